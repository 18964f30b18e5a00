"""Structural similarity (Wang, Bovik, Sheikh & Simoncelli 2004)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from umm.errors import UmmError
from umm.metrics.base import PairedMetric

WINDOW, SIGMA = 11, 1.5  # pixels; the Gaussian has unit sum
C1, C2 = 0.01**2, 0.03**2  # for pictures on [0, 1]; the luminance term is not shift-invariant, [-1, 1] differs


def ssim_map(real: Tensor, fake: Tensor) -> Tensor:
    """SSIM at every pixel of uint8 pictures (B, C, H, W), same shape, float64, borders reflected.

    Local moments are the Gaussian-weighted ones (population, not sample), each channel on its own.
    """
    height, width = real.shape[-2:]
    if min(height, width) < WINDOW:
        raise UmmError(f"ssim needs pictures of at least {WINDOW} pixels a side, got {height} x {width}.")
    x, y = (z.permute(2, 0, 1, 3).to(torch.float64).contiguous() / 255 for z in (real, fake))  # (H, B, C, W)
    rows, columns = _smoothing(height, x.device), _smoothing(width, x.device)

    def local_mean(z: Tensor) -> Tensor:
        return (rows @ z.flatten(1)).view_as(z) @ columns.T

    mu_x, mu_y = local_mean(x), local_mean(y)
    product, squares = mu_x * mu_y, mu_x.square() + mu_y.square()
    covariance = local_mean(x * y) - product
    variances = local_mean(x.square() + y.square()) - squares  # of x plus of y
    similarity = (2 * product + C1) * (2 * covariance + C2) / ((squares + C1) * (variances + C2))
    return similarity.permute(1, 2, 0, 3)  # (B, C, H, W)


def _smoothing(size: int, device: torch.device) -> Tensor:
    """The 1-D Gaussian filter with reflected borders as a (size, size) matrix: faster than a float64 convolution."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=device) - WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * SIGMA**2))
    identity = torch.eye(size, dtype=torch.float64, device=device)
    padded = F.pad(identity[:, None], (WINDOW // 2, WINDOW // 2), mode="reflect")[:, 0]  # (size, size + 10)
    return (padded.unfold(-1, WINDOW, 1) @ (kernel / kernel.sum())).T


class SSIM(PairedMetric):
    """Mean SSIM of uint8-rounded RGB on [0, 1], 11 x 11 Gaussian window of sigma 1.5, per channel, then averaged.

    ssim     the original convention: only windows that lie inside the picture (scikit-image with
             `gaussian_weights=True, use_sample_covariance=False`, MATLAB, piq)
    ssim_tm  torchmetrics' convention, which RAE reports: borders reflected, the whole map averaged
    """

    name = "ssim"
    numbers = ("ssim", "ssim_tm")

    def measure(self, real: Tensor, fake: Tensor) -> Tensor:
        pixels = ssim_map(real, fake)
        edge = WINDOW // 2
        inside = pixels[..., edge:-edge, edge:-edge]
        return torch.stack([inside.mean((1, 2, 3)), pixels.mean((1, 2, 3))], dim=1)  # (B, 2)
