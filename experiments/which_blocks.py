"""How much of a picture a linear map recovers from the tokens of chosen encoder blocks.

    python experiments/which_blocks.py      a minute on two CPU cores, offline

Ridge regression from a token (mean of the blocks' normed outputs) to its 8 x 8 pixels, 1,000 scenes to fit and 200 to
judge. A decoder sees neighbouring tokens too and is not linear, so these are lower bounds; their order is the point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import umm
from umm.layers import tokens_of

SIZE, ENCODER_SIZE, PATCH, FIT, JUDGE = 48, 84, 8, 1000, 200
CHOICES = [[11], [6, 7, 8, 9, 10, 11], [1, 3, 5, 7, 9, 11], list(range(12)), [0, 1, 2, 3, 4, 5]]


def ridge_psnr(z: Tensor, pixels: Tensor, strength: float = 10.0) -> float:
    """Mean PSNR (dB) on the last JUDGE pictures; z (B, N, C), pixels (B, N, 3 * PATCH^2) in [0, 1]."""
    x, y = z[:FIT].flatten(0, 1).double(), pixels[:FIT].flatten(0, 1).double()
    mean, std, offset = x.mean(0), x.std(0), y.mean(0)
    x = (x - mean) / std
    weight = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]).double(), x.T @ (y - offset))
    drawn = (((z[FIT:] - mean) / std) @ weight + offset).clamp(0, 1)
    return float(-10 * (drawn - pixels[FIT:]).square().mean((1, 2)).log10().mean())


@torch.inference_mode()
def main() -> None:
    source = umm.find("data", "shapes")
    source = source.from_config(source.Config(image_size=SIZE, train=FIT + JUDGE), "train")
    space = umm.find("latents", "dinov2")
    settings = space.Config(weights="asset:dinov2-small-saliency", image_size=SIZE, encoder_size=ENCODER_SIZE)
    images = torch.stack([source[i]["image"] for i in range(len(source))]).float() / 255
    pixels = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).double()  # (B, N, 3 * PATCH^2)
    for blocks in CHOICES:
        settings.layers = blocks
        encoder = space.from_config(settings)
        z = torch.cat([tokens_of(encoder.raw(part)) for part in images.split(100)]).double()  # (B, N, C)
        print(f"blocks {blocks}: {ridge_psnr(z, pixels):.2f} dB", flush=True)


if __name__ == "__main__":
    main()
