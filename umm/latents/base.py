"""The contract of a latent space, its shape, and the statistics that standardise it.

B batch, C channels, h w latent grid, H W image, D feature width, N = h * w tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umm.errors import MissingHead, UmmError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LatentSpec:
    """The shape of a latent; every derived number (time shift, widths, patch size) comes from here."""

    channels: int
    height: int
    width: int
    image_size: int  # side of the square picture the latent stands for, pixels
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # a decoder predicts (pixel - mean) / std
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.channels, self.height, self.width

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def dim(self) -> int:
        """Numbers in one latent."""
        return self.channels * self.tokens

    @property
    def patch(self) -> int:
        """Pixels of a picture's side that one token stands for."""
        return self.image_size // self.height


class RunningStats:
    """Exact streaming mean and population variance over the batch axis, in float64.

    Chunks are combined by the pairwise update of Chan et al. (1979), so chunking, order and merging across processes
    change the result by rounding only.
    """

    def __init__(self, count: int = 0, mean: Tensor | None = None, m2: Tensor | None = None):
        self.count, self.mean, self.m2 = count, mean, m2

    def update(self, batch: Tensor) -> RunningStats:
        """Add rows of `batch`, (B, ...)."""
        if len(batch):
            x = batch.detach().double()
            mean = x.mean(0)
            self.merge(RunningStats(len(x), mean, (x - mean).square().sum(0)))
        return self

    def merge(self, other: RunningStats) -> RunningStats:
        """Add everything `other` has seen."""
        if other.count == 0:
            return self
        if self.count == 0:
            self.count, self.mean, self.m2 = other.count, other.mean.clone(), other.m2.clone()
            return self
        total, delta = self.count + other.count, other.mean - self.mean
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total
        return self

    @property
    def var(self) -> Tensor:
        """Population variance."""
        if self.count == 0:
            raise UmmError("no statistics: not one latent was seen")
        return self.m2 / self.count

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self.count), "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> RunningStats:
        return cls(int(state["count"]), state["mean"].double(), state["m2"].double())


POOLED_AXES = {"position": (), "channel": (1, 2), "scalar": (0, 1, 2)}  # axes of (C, h, w) that share one number


class Normalizer(nn.Module):
    """z -> (z - mean) / sqrt(var + eps) and back; mean and var are buffers that broadcast over (C, h, w).

    Modes: `none`, `scalar`, `channel` (C, 1, 1), `position` (C, h, w: RAE's), `sphere` (each token scaled to norm
    sqrt(C); its length is forgotten, so `undo` is the identity).
    """

    MODES = ("none", "scalar", "channel", "position", "sphere")

    def __init__(self, shape: tuple[int, int, int], mode: str = "position", eps: float = 1e-5):
        super().__init__()
        if mode not in self.MODES:
            raise UmmError(f"no normaliser is called '{mode}': choose one of {', '.join(self.MODES)}")
        channels, height, width = shape
        size = {"position": (channels, height, width), "channel": (channels, 1, 1)}.get(mode, (1, 1, 1))
        self.mode, self.eps, self.shape = mode, eps, (channels, height, width)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("fitted", torch.tensor(mode in ("none", "sphere")))

    def fit(self, stats: RunningStats) -> Normalizer:
        """Take the statistics of (C, h, w) latents."""
        return self.set(stats.mean, stats.var)

    def set(self, mean: Tensor | None, var: Tensor | None) -> Normalizer:
        """Take statistics that broadcast to (C, h, w), pooled over the axes this mode shares.

        None stands for mean 0, variance 1; `none` and `sphere` have no statistics and stay as they are.
        """
        if self.mode not in POOLED_AXES:
            return self
        mean, var = self._broadcast(mean, 0.0), self._broadcast(var, 1.0)
        if axes := POOLED_AXES[self.mode]:  # law of total variance: mean of variances + variance of means
            var = var.mean(axes, keepdim=True) + mean.var(axes, correction=0, keepdim=True)
            mean = mean.mean(axes, keepdim=True)
        self.mean.copy_(mean)
        self.var.copy_(var)
        self.fitted.fill_(True)
        return self

    def _broadcast(self, value: Tensor | None, neutral: float) -> Tensor:
        """float64 (C, h, w)."""
        value = torch.tensor(neutral) if value is None else value
        try:
            return value.double().expand(self.shape)
        except RuntimeError as error:
            raise UmmError(
                f"the statistics have shape {tuple(value.shape)} and the latents {self.shape}: they were measured on "
                "another encoder or picture size."
            ) from error

    def forward(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> standardised."""
        if self.mode == "none":
            return z
        if self.mode == "sphere":
            return z * (z.shape[1] ** 0.5 / z.norm(dim=1, keepdim=True).clamp_min(self.eps))
        return (z - self.mean) / (self.var + self.eps).sqrt()

    def undo(self, z: Tensor) -> Tensor:
        """Standardised latents (B, C, h, w) -> raw."""
        if self.mode in ("none", "sphere"):
            return z
        return z * (self.var + self.eps).sqrt() + self.mean

    def restored(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) as a decoder reads them: themselves, but where an adapter moves them, and on the
        sphere, where lengths are lost: a decoder that learned other lengths than it is given later would draw worse.
        """
        return self.undo(self(z)) if self.mode == "sphere" else z


@dataclass
class Features:
    """What a probe reads: cls (B, D) or None, patches (B, N, D)."""

    cls: Tensor | None
    patches: Tensor


class LatentSpace(nn.Module):
    """A map between images and latents, frozen unless its own stage 1 is being trained.

    images (B, 3, H, W) float in [0, 1]; latents (B, C, h, w) float. `encode` gives standardised latents, `raw` the
    encoder's own units; `normalizer` maps between them. A subclass sets `spec` and `normalizer`, implements `raw` and
    `features`, and says in `identity` which weights, layers and transform its numbers come from.
    """

    spec: LatentSpec
    normalizer: Normalizer
    Config: type  # its settings, a dataclass
    families: tuple[str, ...] = ()  # networks inside; a judge of the same family has a conflict of interest
    per_picture: bool = True  # False: a latent depends on the other pictures of its batch too
    # of spaces that train networks of their own, see umm/latents/_trained.py:
    stages: tuple = ()  # what --task recon does with them; empty: there is nothing to train (any more)
    settings: object | None = None  # build the networks that `own_state` fills

    @classmethod
    def from_config(cls, config) -> LatentSpace:
        """Build from settings, weights included."""
        raise NotImplementedError

    @classmethod
    def tiny(cls, **changes) -> LatentSpace:
        """A space with random weights that builds in milliseconds, for tests."""
        raise NotImplementedError

    @classmethod
    def cacheable(cls, config) -> bool:
        """Whether latents of such settings can be kept: `per_picture`, known before anything is built."""
        return cls.per_picture

    def raw(self, images: Tensor) -> Tensor:
        """images -> latents in the encoder's own units."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """images -> standardised latents."""
        return self.normalizer(self.raw(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents -> images, for spaces that come with a decoder."""
        raise MissingHead(
            f"{type(self).__name__} has no decoder of its own: train one with umm train --task recon, "
            "then decode with umm.load(run).decode(latents)."
        )

    def features(self, images: Tensor, layers: tuple[int, ...] | None = None) -> Features | list[Features]:
        """What probes read: the final features, or one `Features` per named block (0-based, negative from the end)."""
        raise NotImplementedError

    def identity(self) -> dict[str, object]:
        """JSON-able facts that fix the raw latents: weights' sha256, layers, input size, resize. A cache's key."""
        raise NotImplementedError

    def own_state(self) -> dict[str, Tensor]:
        """Weights that no pretrained file has; a saved model holds them."""
        return {}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `own_state`."""


def check_images(images: Tensor, spec: LatentSpec) -> None:
    """One sentence instead of a shape error deep inside a network."""
    want = (3, spec.image_size, spec.image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != want or not images.is_floating_point():
        raise UmmError(
            f"images must be float (B, {', '.join(map(str, want))}) in [0, 1], got {images.dtype} "
            f"{tuple(images.shape)}: see umm.transforms for crops."
        )
