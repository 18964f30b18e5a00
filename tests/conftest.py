"""What several test files need: the fakes importable by their dotted names, quiet and offline libraries."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))


@pytest.fixture
def fake_overrides(tmp_path):
    """Settings of a reconstruction run that trains in a second."""
    return [
        f"run={tmp_path / 'run'}",
        "data.name=fakes.pictures",
        "latent.name=fakes.space",
        "recon.decoder.size=custom",
        "recon.decoder.width=16",
        "recon.decoder.depth=1",
        "recon.decoder.heads=2",
        "recon.decoder.mlp=32",
        "recon.perceptual.name=none",
        "recon.adversarial.weight=0",
        "recon.optim.warmup=0",
        "recon.optim.lr=1e-3",
        "train.images=96",
        "train.batch_size=8",
        "train.workers=0",
        "train.log_every=2",
        "train.save_every=32",
        "train.sample_every=96",
        "train.device=cpu",
    ]


@pytest.fixture
def fake_discriminator(monkeypatch):
    """A discriminator small enough for a test, with the spectral norms of the real one."""
    import torch

    from umm.tasks import _picture_loss

    class Small(torch.nn.Module):
        families = ("fake",)

        def __init__(self):
            super().__init__()
            self.net = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 4, 3, stride=2))

        @classmethod
        def from_config(cls, config):
            return cls()

        def forward(self, images):
            return self.net(images).flatten(1)

    monkeypatch.setattr(_picture_loss, "Discriminator", Small)
