"""The RAE decoder: a MAE-style ViT from latent tokens to pixels (arXiv 2510.11690, section 3).

B batch, C latent channels, h w latent grid, N = h * w tokens, D width, p patch side, H W image.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from umm.errors import ConfigError, UmmError
from umm.heads.base import Head
from umm.latents.base import LatentSpec
from umm.layers import ViTBlock, grid_of, sincos_2d, tokens_of, unpatchify
from umm.settings import DecoderSettings

# size -> width, depth, heads, mlp. B, L and XL as published; Ti and S are the usual small ViTs
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "XL": (1152, 28, 16, 4096),
}


class Decoder(Head):
    """Raw latents (B, C, h, w), in the encoder's own units -> images (B, 3, H, W) around [0, 1], not clamped.

    The network predicts (pixel - mean) / std with the mean and std of `spec`. Linear layers keep PyTorch's default
    initialisation, as published.

    Args:
        spec: shape of the latent; its grid is the one the decoder is trained on.
        width, depth, heads, mlp: of the transformer.
        output_size: H in pixels, a multiple of the grid's height; None: the picture size the latent stands for.
        eps: of every LayerNorm.
        checkpoint_gradients: recompute the blocks in the backward pass instead of keeping their activations.
    """

    Config = DecoderSettings

    def __init__(
        self,
        spec: LatentSpec,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        output_size: int | None = None,
        eps: float = 1e-12,
        checkpoint_gradients: bool = False,
    ):
        super().__init__()
        output_size = output_size or spec.image_size
        if output_size % spec.height:
            raise ConfigError(
                f"a decoder cannot draw {output_size} px from {spec.height} rows of tokens: "
                f"set decoder.output_size to a multiple of {spec.height}."
            )
        self.spec, self.grid = spec, (spec.height, spec.width)
        self.patch = output_size // spec.height  # output pixels a token side
        self.checkpoint_gradients = checkpoint_gradients
        self.embed = nn.Linear(spec.channels, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        # A buffer and not a frozen parameter: nothing that says requires_grad_(True) can thaw it.
        self.register_buffer("positions", position_table(width, *self.grid))
        self.blocks = nn.ModuleList(ViTBlock(width, heads, mlp, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.pred = nn.Linear(width, 3 * self.patch**2)
        for name, value in (("pixel_mean", spec.pixel_mean), ("pixel_std", spec.pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: DecoderSettings, spec: LatentSpec, **facts) -> Decoder:
        """A named size, or `custom` with all four numbers; anything in between is a contradiction."""
        numbers = (config.width, config.depth, config.heads, config.mlp)
        if config.size == "custom":
            if None in numbers:
                raise ConfigError("decoder.size=custom needs decoder.width, depth, heads and mlp: set all four.")
        elif any(number is not None for number in numbers):
            raise ConfigError(
                f"decoder.size={config.size} has fixed numbers: set decoder.size=custom to choose width, depth, heads "
                "and mlp yourself."
            )
        else:
            numbers = SIZES[config.size]
        return cls(spec, *numbers, output_size=config.output_size, checkpoint_gradients=config.checkpoint_gradients)

    @classmethod
    def tiny(cls, spec: LatentSpec) -> Decoder:
        return cls(spec, width=32, depth=2, heads=2, mlp=64)

    @property
    def output_size(self) -> tuple[int, int]:
        """(H, W) of the images it draws."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def last_layer(self) -> nn.Parameter:
        """Where the gradients of reconstruction and adversarial loss are weighed against each other."""
        return self.pred.weight

    def parameter_count(self) -> int:
        """Parameters and the position table, as published counts have it."""
        return super().parameter_count() + self.positions.numel()

    def set_grid(self, height: int, width: int) -> Decoder:
        """Draw height * p by width * p pixels from now on: the 2-D table is rebuilt for the new grid, in place."""
        table = position_table(self.positions.shape[-1], height, width)
        self.positions = table.to(self.positions)
        scale = self.spec.patch
        self.spec = replace(self.spec, height=height, width=width, image_size=height * scale)
        self.grid = (height, width)
        return self

    def forward(self, latents: Tensor) -> Tensor:
        """Latents of another grid than the trained one are resized to it, so the image size stays (as published)."""
        if latents.ndim != 4 or latents.shape[1] != self.spec.channels:
            raise UmmError(
                f"this decoder reads raw latents (B, {self.spec.channels}, h, w), got {tuple(latents.shape)}."
            )
        x = self.embed(tokens_of(latents))  # (B, N, D)
        if latents.shape[2:] != self.grid:
            x = grid_of(x, *latents.shape[2:])
            x = tokens_of(F.interpolate(x, self.grid, mode="bilinear", align_corners=False))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions  # (B, 1 + N, D)
        for block in self.blocks:
            if self.checkpoint_gradients and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        patches = self.pred(self.norm(x[:, 1:]))  # (B, N, p * p * 3)
        return unpatchify(patches, *self.grid, self.patch) * self.pixel_std + self.pixel_mean


def position_table(dim: int, height: int, width: int) -> Tensor:
    """Zeros for the CLS token, then the grid's sine-cosine positions, (1, 1 + N, dim)."""
    return F.pad(sincos_2d(dim, height, width), (0, 0, 1, 0))[None]
