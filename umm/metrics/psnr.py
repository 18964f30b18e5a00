"""Peak signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from umm.metrics.base import PairedMetric, mean


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    """-10 log10(MSE) in dB for uint8 pictures (B, C, H, W) on the unit range -> (B,), float64.

    MSE is over all channels and pixels of one picture, RGB, and at least 1e-10: identical pictures score 100 dB.
    """
    error = (real.to(torch.float64) - fake.to(torch.float64)).square().mean((1, 2, 3)) / 255**2
    return -10 * error.clamp_min(1e-10).log10()


class PSNR(PairedMetric):
    """PSNR per picture, then the mean over pictures (pooling the MSE first gives less: 24.9 dB where this gives 28.1).

    `notes` guards the pairing: a reconstruction must be nearer to its own original than to its neighbour's.
    """

    name = "psnr"
    numbers = ("psnr",)

    def __init__(self) -> None:
        super().__init__()
        self._gains: list[Tensor] = []  # PSNR to the own original minus PSNR to the next one of the batch

    def measure(self, real: Tensor, fake: Tensor) -> Tensor:
        values = psnr(real, fake)
        if len(real) > 1:
            self._gains.append((values - psnr(real.roll(1, 0), fake)).cpu())
        return values[:, None]

    def state(self) -> dict:
        return super().state() | {"gains": torch.cat([torch.zeros(0), *self._gains])}

    def absorb(self, state: Mapping) -> None:
        super().absorb(state)
        self._gains.append(state["gains"])

    def notes(self, numbers: Mapping[str, float]) -> list[str]:
        gains = [gain for batch in self._gains for gain in batch.tolist()]
        if not gains or mean(gains) > 1:
            return []
        return [
            f"reconstructions are only {mean(gains):.2f} dB nearer to their own originals than to other pictures: "
            "are the pairs shuffled, or is the decoder untrained?"
        ]
