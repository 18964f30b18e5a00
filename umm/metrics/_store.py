"""Features of pictures, extracted once and read by every set metric of the space; their moments, exactly.

B batch, N pictures, d feature width, P packets the features are split into (1 for a network), D = d / P.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from umm.errors import NonFinite, UmmError
from umm.metrics._features import FeatureSpace
from umm.metrics.base import PictureIds


class Moments:
    """Streaming count, mean (P, D) and sum of outer products of deviations (P, D, D), float64.

    Chunks combine by the pairwise update of Chan et al. (1979): chunking and order change rounding only, also where
    the mean is a thousand standard deviations from zero.
    """

    def __init__(self, packets: int, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(packets, width, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(packets, width, width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Add features (B, P * D)."""
        if len(rows):
            x = rows.double().unflatten(1, self.mean.shape).transpose(0, 1)  # (P, B, D)
            mean = x.mean(1)
            centred = x - mean[:, None]
            self._shift(len(rows), mean)
            self.m2.baddbmm_(centred.mT, centred)

    def merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        """Add the moments of other rows."""
        if count:
            self._shift(count, mean.to(self.mean))
            self.m2 += m2.to(self.m2)

    def _shift(self, count: int, mean: Tensor) -> None:
        """Move to the common mean; what that adds to m2 is of rank one."""
        total, delta = self.count + count, mean - self.mean
        self.m2.baddbmm_(delta[:, :, None], delta[:, None, :], alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased (ddof = 1), (P, D, D)."""
        if self.count < 2:
            raise UmmError(f"a covariance needs at least 2 pictures, got {self.count}: evaluate more.")
        return self.m2 / (self.count - 1)


class Side:
    """One collection of a store: ids, moments of two random halves, and the rows where they are kept."""

    def __init__(self, space: FeatureSpace, width: int, device: torch.device, keep_rows: bool):
        self.ids = PictureIds()
        self.halves = [Moments(space.packets, width // space.packets, device) for _ in range(2)]
        self.rows: list[Tensor] | None = [] if keep_rows else None

    def add(self, features: Tensor, ids: Sequence[str]) -> None:
        self.ids.add(ids)
        half = torch.tensor([half_of(i) for i in ids], device=features.device)
        for number, moments in enumerate(self.halves):
            moments.update(features[half == number])
        if self.rows is not None:
            self.rows.append(features)

    def state(self) -> dict:
        moments = [(m.count, m.mean.cpu(), m.m2.cpu()) for m in self.halves]
        rows = None if self.rows is None else torch.cat(self.rows).cpu()
        return {"ids": list(self.ids), "moments": moments, "rows": rows}

    def absorb(self, state: Mapping) -> None:
        self.ids.add(state["ids"])
        for moments, other in zip(self.halves, state["moments"]):
            moments.merge(*other)
        if self.rows is not None:
            self.rows.append(state["rows"].to(self.halves[0].mean.device))


def half_of(picture: str) -> int:
    """0 or 1, a fair coin that depends on the id alone: the same half on every machine and in every order."""
    return hashlib.blake2b(picture.encode(), digest_size=1).digest()[0] & 1


class FeatureStore:
    """Collections of features in one space, by name: "real", "fake" and, for `nearest`, "train".

    Args:
        space: where the pictures are judged.
        keep_rows: keep the features themselves, float32, which KID, PRDC, MIND and nearest need; the Frechet distance
            needs the moments alone.
    """

    def __init__(self, space: FeatureSpace, keep_rows: bool = True):
        self.space, self.keep_rows = space, keep_rows
        self._sides: dict[str, Side] = {}

    def update(self, side: str, images: Tensor, ids: Sequence[str]) -> None:
        """Extract and add pictures (B, 3, H, W), float in [0, 1] or uint8."""
        if len(images):
            self.add(side, self.space.extract(images), ids)

    def add(self, side: str, features: Tensor, ids: Sequence[str]) -> None:
        """Add features (B, d) that `space.extract` gave."""
        if features.ndim != 2 or len(features) != len(ids):
            raise UmmError(f"features must be (B, d) with an id each, got {tuple(features.shape)} and {len(ids)} ids.")
        if len(features) == 0:
            return
        if features.device.type == "mps":  # has no float64
            features = features.cpu()
        self._side(side, features.shape[1], features.device).add(features.detach(), ids)

    def state(self) -> dict:
        """All that was added, on the CPU, to be gathered from other processes."""
        return {name: side.state() for name, side in self._sides.items()}

    def absorb(self, state: Mapping) -> None:
        """Add another process' `state`; a picture that both have counted raises."""
        for name, other in state.items():
            mean = other["moments"][0][1]
            self._side(name, mean.numel(), mean.device).absorb(other)

    def merge(self, other: FeatureStore) -> None:
        self.absorb(other.state())

    def ids(self, side: str) -> PictureIds:
        return self._sides[side].ids if side in self._sides else PictureIds()

    def count(self, side: str) -> int:
        return len(self.ids(side))

    def independent(self, side: str, other: str) -> bool:
        """No picture of one has its id in the other: samples, not reconstructions."""
        return self.ids(side).isdisjoint(self.ids(other))

    def moments(self, side: str, half: int | None = None) -> Moments:
        """Of a whole side, or of one of its two random halves.

        Raises:
            NonFinite: a feature is infinite or not a number.
        """
        halves = self._known(side).halves
        total = Moments(*halves[0].mean.shape, device=halves[0].mean.device)
        for number, part in enumerate(halves):
            if half in (None, number):
                total.merge(part.count, part.mean, part.m2)
        if not total.m2.isfinite().all():
            raise NonFinite(f"a feature of the {side} pictures in '{self.space.name}' is infinite or not a number.")
        return total

    def rows(self, side: str) -> Tensor:
        """Features (N, d), float64, sorted by picture id: independent of chunks, order and processes."""
        kept = self._known(side)
        if kept.rows is None:
            raise UmmError(f"this store of '{self.space.name}' keeps moments only: make it with keep_rows=True.")
        ids, rows = list(kept.ids), torch.cat(kept.rows).double()
        if not rows.isfinite().all():
            bad = ids[int((~rows.isfinite().all(1)).nonzero()[0])]
            raise NonFinite(f"the features of picture '{bad}' ({side}) in '{self.space.name}' are not finite.")
        return rows[sorted(range(len(ids)), key=ids.__getitem__)]

    def _side(self, name: str, width: int, device: torch.device) -> Side:
        if name not in self._sides:
            self._sides[name] = Side(self.space, width, device, self.keep_rows)
        return self._sides[name]

    def _known(self, name: str) -> Side:
        if name not in self._sides:
            raise UmmError(f"no '{name}' pictures were added to the feature store of '{self.space.name}'.")
        return self._sides[name]
