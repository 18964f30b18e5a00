"""A DINOv2 whose weights are drawn at random: what does the architecture give by itself?

A latent space by its import path: PYTHONPATH=. umm diagnose latent.name=experiments.untrained latent.weights=...
"""

from __future__ import annotations

from dataclasses import dataclass

from umm.features import randomised
from umm.latents.dinov2 import DINOv2
from umm.settings import EncoderSettings


@dataclass
class Config(EncoderSettings):
    """Those of DINOv2; of the weights only each tensor's shape, mean and spread are used."""

    name: str = "experiments.untrained"
    draw: int = 0  # which random weights


class Untrained(DINOv2):
    """Drawn as the probes' random baseline is, see `umm.features.randomised`."""

    Config, families = Config, ()

    @classmethod
    def from_config(cls, config: Config) -> Untrained:
        return randomised(super().from_config(config), config.draw)
