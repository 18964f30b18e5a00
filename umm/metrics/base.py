"""The contract of a metric: streaming, mergeable, and never a number without its fingerprint.

*Paired* metrics (PSNR, LPIPS) compare a picture with its own reconstruction and give a value per picture. *Set*
metrics (Frechet distance, KID) compare collections of features, which a `FeatureStore` extracts once for all of them.
Pictures come with ids, so that one counted twice or dropped by a distributed run is an error and not a wrong number.

B batch, K numbers a metric gives, H W image.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umm.errors import NonFinite, UmmError
from umm.settings import EvalSettings
from umm.transforms import to_uint8

if TYPE_CHECKING:
    from umm.metrics._store import FeatureStore

QUANTISATION = "uint8-round"


class Metric:
    """One file, one metric; everything after the features is float64.

    name              the file's name
    numbers           what it computes, in the order of the table
    higher_is_better  of all its numbers, unless `better` says otherwise
    version           raised when the definition changes, so that old and new numbers are not mixed
    paired            which of the two kinds
    families          networks that judge ("alex", "efficientnet", ...), see `umm.metrics._conflict`
    """

    name: str = ""
    numbers: tuple[str, ...] = ()
    higher_is_better: bool = True
    version: int = 1
    paired: bool = False
    families: tuple[str, ...] = ()

    @classmethod
    def from_settings(cls, settings: EvalSettings, device: torch.device | str = "cpu") -> Metric:
        """The metric as an evaluation's settings want it."""
        return cls()

    def better(self, number: str) -> bool | None:
        """Is a higher value of `number` better? None: neither direction is."""
        return self.higher_is_better

    def protocol(self) -> dict[str, object]:
        """The free choices of this metric: what its fingerprint names beside the pictures and the feature space."""
        return {}

    def notes(self, numbers: Mapping[str, float]) -> list[str]:
        """Sentences a reader of these numbers must see: shuffled pairs, copied training pictures."""
        return []


class PairedMetric(Metric):
    """A value per picture; every number is the mean over pictures, so one bootstrap serves all."""

    paired = True

    def __init__(self) -> None:
        self.ids = PictureIds()
        self._rows: list[Tensor] = []  # each (B, K)

    def measure(self, real: Tensor, fake: Tensor) -> Tensor:
        """uint8 pictures (B, 3, H, W) -> values (B, K), float64; NaN where a picture has no such value."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, ids: Sequence[str]) -> None:
        """Add originals and their reconstructions, (B, 3, H, W), float in [0, 1] or uint8."""
        if real.shape != fake.shape or real.ndim != 4 or real.shape[1] != 3 or len(real) != len(ids):
            raise UmmError(
                f"{self.name} compares pictures of one shape (B, 3, H, W) with an id each, got {tuple(real.shape)}, "
                f"{tuple(fake.shape)} and {len(ids)} ids: resize the reconstructions first."
            )
        if len(ids) == 0:
            return
        self.ids.add(ids)
        self._rows.append(self.measure(quantised(real), quantised(fake)).double().cpu())

    def state(self) -> dict:
        """All that was seen, to be gathered from other processes."""
        return {"ids": list(self.ids), "values": self.values()}

    def absorb(self, state: Mapping) -> None:
        """Add another process' `state`; a picture that both have counted raises."""
        self.ids.add(state["ids"])
        self._rows.append(state["values"])

    def merge(self, other: PairedMetric) -> None:
        self.absorb(other.state())

    def values(self) -> Tensor:
        """(N, K), rows in the order of `ids`."""
        return torch.cat([torch.zeros(0, len(self.numbers), dtype=torch.float64), *self._rows])

    def per_item(self) -> dict[str, dict[str, float]]:
        """{number: {picture id: value}}, ids sorted; pictures without a value are left out."""
        ids = list(self.ids)
        order = sorted(range(len(ids)), key=ids.__getitem__)
        columns = zip(self.numbers, self.values().T.tolist())
        return {number: {ids[i]: column[i] for i in order if column[i] == column[i]} for number, column in columns}

    def compute(self) -> dict[str, float]:
        """{number: mean over pictures}; summed exactly, so that their order does not matter."""
        if not self.ids:
            raise UmmError(f"{self.name} has seen no picture.")
        return {number: mean(items.values()) for number, items in self.per_item().items()}

    def fingerprint(self) -> dict[str, object]:
        """Everything that must be equal for two numbers to be comparable."""
        facts = {"metric": self.name, "version": self.version, "quantisation": QUANTISATION}
        return facts | self.protocol() | {"n": len(self.ids), "pictures": self.ids.digest()}


class SetMetric(Metric):
    """Compares the collections of a `FeatureStore`; holds nothing itself, so many may read one store."""

    needs_rows: bool = True  # False: moments are enough, and the store need not keep the features
    sides: tuple[str, ...] = ("real", "fake")

    def compute(self, store: FeatureStore) -> dict[str, float]:
        """Named numbers, e.g. {"kid": 0.004}."""
        raise NotImplementedError

    def fingerprint(self, store: FeatureStore) -> dict[str, object]:
        """Everything that must be equal for two numbers to be comparable, flat."""
        facts = {"metric": self.name, "version": self.version} | self.protocol() | store.space.fingerprint()
        for side in self.sides:
            facts[f"n_{side}"] = store.count(side)
        return facts | {"reference": store.ids("real").digest()}


class PictureIds:
    """The pictures counted so far; counting one twice is an error."""

    def __init__(self) -> None:
        self._seen: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def __iter__(self):
        return iter(self._seen)

    def add(self, ids: Sequence[str]) -> None:
        for picture in ids:
            if picture in self._seen:
                raise UmmError(
                    f"picture '{picture}' came twice: a distributed sampler that pads, or two pictures with one id? "
                    "Every picture must be counted once."
                )
            self._seen[picture] = None

    def isdisjoint(self, other: Iterable[str]) -> bool:
        return self._seen.keys().isdisjoint(other)

    def check(self, expected: Iterable[str]) -> None:
        """Raise unless exactly the expected pictures were counted."""
        expected = set(expected)
        for what, ids in (("missing", expected - self._seen.keys()), ("unexpected", self._seen.keys() - expected)):
            if ids:
                raise UmmError(
                    f"{len(ids)} of {len(expected)} pictures are {what} in this evaluation, e.g. '{min(ids)}': "
                    "no number over another set of pictures is reported."
                )

    def digest(self) -> str:
        """Sixteen hex digits that fix the set, whatever its order."""
        return hashlib.sha256("\n".join(sorted(self._seen)).encode()).hexdigest()[:16]


def quantised(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W), rounded from float in [0, 1]: what a file would hold.

    Raises:
        NonFinite: a float picture is not finite; as uint8 it would be an innocent black.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.isfinite().all():
        raise NonFinite("a picture to be judged holds infinite values or values that are not numbers.")
    return to_uint8(images)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 means float32 inside, whatever the training around it allows: no autocast, no TF32."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean in float64 by exact summation; NaN of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def require_comparable(first: Mapping[str, object], second: Mapping[str, object], what: str = "these numbers") -> None:
    """Raise UmmError naming the first field in which two fingerprints differ."""
    for field in first | second:
        one, other = first.get(field, "absent"), second.get(field, "absent")
        if one != other:
            raise UmmError(
                f"{what} cannot be compared: '{field}' is {one} in one and {other} in the other. "
                "Evaluate both in the same way."
            )
