"""Energy and coherence of a reconstruction in octave bands of spatial frequency: what an encoder lost, and where.

Energy alone can be gamed: hallucinated texture has the right energy and no coherence, blur has neither energy nor,
in the end, coherence. Both near one is preservation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from umm.metrics.base import PairedMetric

EDGES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # cycles per pixel; the last band is the corner beyond 1/2
LUMA = (0.299, 0.587, 0.114)  # BT.601
FLAT = 1e-12  # energy per pixel below which a band holds rounding noise only


def band_statistics(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of uint8 pictures (B, 3, H, W), three times (B, bands), float64.

    With X, Y the 2-D Fourier transforms of luma on [0, 1], mean removed, under a Hann window, and sums over a band:
    retention = E_y / E_x with E = sum |.|^2; coherence = Re sum X Y* / sqrt(E_x E_y); ratio = E_x / sum |X - Y|^2.
    NaN where the original has no energy in the band; coherence with nothing is 0.
    """
    x, y = _spectrum(real), _spectrum(fake)
    bands = _bands(*real.shape[-2:], real.device)
    energy_x, energy_y = x.abs().square() @ bands, y.abs().square() @ bands  # (B, bands)
    noise, cross = (x - y).abs().square() @ bands, (x * y.conj()).real @ bands
    floor = FLAT * x.shape[1]
    energy_x = torch.where(energy_x > floor, energy_x, torch.nan)
    coherence = torch.where(energy_y > floor, cross / (energy_x * energy_y).sqrt(), cross / energy_x * 0)
    return energy_y / energy_x, coherence, energy_x / noise


def _spectrum(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, H * W) complex."""
    luma = torch.einsum("bchw,c->bhw", images.to(torch.float64) / 255, images.new_tensor(LUMA, dtype=torch.float64))
    luma = luma - luma.mean((1, 2), keepdim=True)
    rows, columns = (
        torch.hann_window(size, periodic=False, dtype=torch.float64, device=images.device) for size in luma.shape[1:]
    )
    return torch.fft.fft2(luma * rows[:, None] * columns).flatten(1)


def _bands(height: int, width: int, device: torch.device) -> Tensor:
    """Which band each frequency lies in, (H * W, bands) of zeros and ones."""
    rows, columns = (torch.fft.fftfreq(size, dtype=torch.float64, device=device) for size in (height, width))
    radius = torch.hypot(rows[:, None], columns[None, :]).flatten()
    edges = torch.tensor(EDGES, dtype=torch.float64, device=device)
    return ((radius[:, None] >= edges[:-1]) & (radius[:, None] < edges[1:])).double()


class Bands(PairedMetric):
    """Per band, low to high: retention and signal-to-noise ratio in dB, and coherence.

    Means over pictures; in dB that is the geometric mean of the ratios. Ratios are kept within +-100 dB.
    """

    name = "bands"
    numbers = tuple(f"{what}_{band}" for what in ("retention_db", "coherence", "snr_db") for band in (1, 2, 3, 4, 5))

    def measure(self, real: Tensor, fake: Tensor) -> Tensor:
        retention, coherence, ratio = band_statistics(real, fake)
        return torch.cat([_decibels(retention), coherence, _decibels(ratio)], dim=1)  # (B, 3 * bands)

    def better(self, number: str) -> bool | None:
        return None if number.startswith("retention") else True  # 0 dB is best

    def protocol(self) -> dict[str, object]:
        return {"luma": "BT.601", "window": "hann", "edges": list(EDGES)}


def _decibels(ratio: Tensor) -> Tensor:
    return 10 * ratio.clamp(1e-10, 1e10).log10()
