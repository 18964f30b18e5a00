"""The contract of a head: it sees a `LatentSpec` and tensors, never a latent space."""

from __future__ import annotations

from torch import nn

from umm.latents.base import LatentSpec


class Head(nn.Module):
    """A trainable network on latents.

    `Config` is its settings dataclass; `from_config(config, spec, **facts)` builds it; `tiny(spec)` builds a
    small one with random weights for tests.
    """

    spec: LatentSpec
    Config: type

    @classmethod
    def from_config(cls, config, spec: LatentSpec, **facts) -> Head:
        raise NotImplementedError

    @classmethod
    def tiny(cls, spec: LatentSpec) -> Head:
        raise NotImplementedError

    def parameter_count(self) -> int:
        """Parameters, frozen tables included."""
        return sum(p.numel() for p in self.parameters())
