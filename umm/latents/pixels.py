"""Pixels as they are, one token a square patch: the space that every representation is compared with.

B batch, p side of a patch, C = 3 p p channels, h w token grid.
"""

from __future__ import annotations

from torch import Tensor

from umm.errors import ConfigError
from umm.latents._stats import load_stats
from umm.latents.base import Features, LatentSpace, LatentSpec, Normalizer, check_images
from umm.layers import grid_of, patchify, tokens_of, unpatchify
from umm.settings import PixelsSettings


class Pixels(LatentSpace):
    """Pictures cut into patches, [-1, 1]; it has no weights, and its decoder is exact."""

    Config = PixelsSettings

    def __init__(self, image_size: int = 256, patch: int = 16, normalizer: str = "position"):
        super().__init__()
        if image_size % patch:
            raise ConfigError(f"{image_size} pixels are no multiple of latent.patch={patch}: choose another patch.")
        self.spec = LatentSpec(3 * patch**2, image_size // patch, image_size // patch, image_size)
        self.normalizer = Normalizer(self.spec.shape, normalizer)

    @classmethod
    def from_config(cls, config: PixelsSettings) -> Pixels:
        space = cls(config.image_size, config.patch, config.normalizer)
        if config.stats is not None:
            space.normalizer.set(*load_stats(config.stats))
        return space

    @classmethod
    def tiny(cls, **changes) -> Pixels:
        return cls(**{"image_size": 32, "patch": 8} | changes)

    def raw(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, C, h, w) in [-1, 1]."""
        check_images(images, self.spec)
        return grid_of(patchify(2 * images.float() - 1, self.spec.patch), self.spec.height, self.spec.width)

    def decode(self, latents: Tensor) -> Tensor:
        """Undo `encode`."""
        tokens = tokens_of(self.normalizer.undo(latents))  # (B, N, C)
        return (unpatchify(tokens, self.spec.height, self.spec.width, self.spec.patch) + 1) / 2

    def features(self, images: Tensor, layers: tuple[int, ...] | None = None) -> Features | list[Features]:
        """The tokens themselves; there are no blocks to choose from."""
        found = Features(None, tokens_of(self.raw(images)))
        return found if layers is None else [found] * len(layers)

    def identity(self) -> dict[str, object]:
        return {"space": "pixels", "image_size": self.spec.image_size, "patch": self.spec.patch}
