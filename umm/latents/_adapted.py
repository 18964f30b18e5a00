"""A latent space whose latents go through an adapter (`umm/heads/adapter.py`) on their way to the heads.

The adapter stands behind the normaliser: raw latents, and every cache of them, stay the encoder's own.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from umm.latents.base import LatentSpace, Normalizer
from umm.pretrained import sha256_of


class AdaptedNormalizer(Normalizer):
    """Standardises, then adapts. `undo` gives adapted latents in the encoder's units and does not undo the adapter."""

    def __init__(self, normalizer: Normalizer, adapter: nn.Module):
        super().__init__(normalizer.shape, normalizer.mode, normalizer.eps)
        self.mean, self.var, self.fitted = normalizer.mean, normalizer.var, normalizer.fitted
        self.adapter = adapter

    def forward(self, z: Tensor) -> Tensor:
        return self.adapter(self.unadapted(z))

    def unadapted(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> standardised ones that no adapter has moved."""
        return super().forward(z)

    def restored(self, z: Tensor) -> Tensor:
        """Written as a difference: an adapter that moves nothing returns raw latents bit for bit."""
        before = self.unadapted(z)
        return z + (self.undo(self.adapter(before)) - self.undo(before)).to(z.dtype)


def adapted(space: LatentSpace, adapter: nn.Module) -> LatentSpace:
    """The same space, its networks shared, that encodes through `adapter` and no other one."""
    twin = copy.copy(space)
    twin.__dict__["_modules"] = dict(space._modules)
    twin.normalizer = AdaptedNormalizer(space.normalizer, adapter)
    return twin


def adapter_digest(space: LatentSpace) -> str | None:
    """The sha256 of the adapter's weights; None for a space without."""
    adapter = getattr(space.normalizer, "adapter", None)
    return None if adapter is None else sha256_of(adapter.state_dict())


def adapted_identity(space: LatentSpace) -> dict[str, object]:
    """What fixes the latents that heads read, but for statistics: `identity`, and the adapter where there is one."""
    digest = adapter_digest(space)
    return space.identity() | ({} if digest is None else {"adapter": digest})
