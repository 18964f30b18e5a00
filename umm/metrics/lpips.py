"""Learned perceptual image patch similarity (Zhang et al. 2018, arXiv 1801.03924), version 0.1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from umm.losses import lpips_network
from umm.metrics.base import PairedMetric, full_precision
from umm.pretrained import sha256_of
from umm.settings import EvalSettings


class LPIPS(PairedMetric):
    """LPIPS at the pictures' own size, float32 network, inputs scaled to [-1, 1].

    AlexNet judges best, VGG is what decoders are trained on: report which. Lower is better.

    Raises:
        MissingWeights: torchvision's trunk is not on this disk; nothing is downloaded.
    """

    name = "lpips"
    higher_is_better = False

    def __init__(self, net: Literal["alex", "vgg"] = "alex", device: torch.device | str = "cpu"):
        super().__init__()
        self.net, self.families, self.numbers = net, (net,), (f"lpips_{net}",)
        self.network = lpips_network(net).to(device)
        self.weights = sha256_of(self.network.state_dict())

    @classmethod
    def from_settings(cls, settings: EvalSettings, device: torch.device | str = "cpu") -> LPIPS:
        return cls(settings.lpips, device)

    def measure(self, real: Tensor, fake: Tensor) -> Tensor:
        with full_precision(real.device):
            return self.network(real.float() / 127.5 - 1, fake.float() / 127.5 - 1).reshape(len(real), 1)

    def protocol(self) -> dict[str, object]:
        return {"network": f"lpips-0.1-{self.net}", "weights": self.weights, "input": "native size, [-1, 1], float32"}
