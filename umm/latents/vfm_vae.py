"""VFM-VAE: several depths of a frozen encoder through a Gaussian bottleneck (arXiv 2510.18457).

    warm     everything learns, the coarser pictures of the decoder too
    align    everything learns, the latents held close to the frozen features
    relax    the same, held less
    refine   the decoder learns, by structure more than by perception

The published fourth stage (a patch discriminator with feature matching in place of reconstruction) is not here, nor is
the rescaling of pictures. The shallowest level is a block's output, where the original reads the patch embedding.
Pictures are enlarged to the encoder's size bicubically, as for every encoder here, and not bilinearly.

B batch, C latent channels, D encoder width, h w latent grid, N = h * w tokens, m merged positions, H W image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm import losses
from umm.errors import ConfigError
from umm.latents._pyramid import AttentionProjection, Pyramid
from umm.latents._trained import Lesson, Stage, TrainedSpace, refuse_layers
from umm.latents.base import Normalizer, check_images
from umm.latents.dinov2 import DINOv2
from umm.layers import grid_of, tokens_of
from umm.metrics.ssim import ssim_map
from umm.pretrained import sha256_of
from umm.rng import PictureRNG
from umm.settings import PyramidSettings, VFMVAESettings

SCALES = (0.25, 0.5, 0.75, 1.0)  # of the latent, in the equivariance loss


class VFMVAE(TrainedSpace):
    """Latents are the means of the posterior; in training they are drawn from it."""

    Config = VFMVAESettings

    @classmethod
    def tiny(cls, **changes) -> VFMVAE:
        decoder = PyramidSettings(budget=512, width=16, style=8, blocks=1, attention=1, injected=2)
        small = {"image_size": 64, "channels": 4, "levels": [0, -1], "level_width": 8, "merge": 1, "decoder": decoder}
        settings = VFMVAESettings(**small | changes)
        return cls(settings, DINOv2.tiny(image_size=settings.image_size, normalizer="none"))

    def make(self) -> None:
        settings, base = self.settings, self.base.spec
        refuse_layers(settings, "latent.levels says which blocks are read")
        if base.height % settings.merge:
            raise ConfigError(f"latent.merge={settings.merge} does not divide the encoder's {base.height} rows.")
        grid = {"height": base.height // settings.merge, "width": base.width // settings.merge}
        self.spec = replace(base, channels=settings.channels, **grid)
        self.normalizer = Normalizer(self.spec.shape, settings.normalizer)
        self.projection = Projection(settings, base.channels)
        self.decoder = Pyramid(self.spec, settings.decoder)
        self.resizes = settings.equivariance > 0

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"projection": self.projection, "decoder": self.decoder}

    def all_stages(self) -> tuple[Stage, ...]:
        settings, both = self.settings, ("projection", "decoder")
        if len(settings.lengths) != 4 or min(settings.lengths) < 0 or sum(settings.lengths) <= 0:
            raise ConfigError(f"latent.lengths={list(settings.lengths)} must be four: warm, align, relax and refine.")
        warm, align, relax, refine = settings.lengths
        tight, loose = ({"kl": settings.kl, "vf": weight} for weight in settings.vf)
        return (
            Stage("warm", warm, both, weights=tight | {"scales": settings.scales}),
            Stage("align", align, both, weights=tight),
            Stage("relax", relax, both, weights=loose),
            Stage("refine", refine, ("decoder",), lr=0.5, perceptual=0.2, weights={"ssim": settings.ssim}),
        )

    # ------------------------------------------------------------------------------------------------------ encoding

    @torch.no_grad()
    def levels(self, images: Tensor) -> list[Tensor]:
        """Patch tokens of the chosen blocks, each (B, N m^2, D)."""
        return [found.patches.float() for found in self.base.features(images, tuple(self.settings.levels))]

    def posterior(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each (B, C, h, w)."""
        moments = grid_of(self.projection(levels), self.spec.height, self.spec.width).float()
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def raw(self, images: Tensor) -> Tensor:
        check_images(images, self.spec)
        return self.posterior(self.levels(images))[0]

    # ------------------------------------------------------------------------------------------------------ training

    def lesson(self, stage: Stage, images: Tensor, rng: PictureRNG, corrupt: Callable[[Tensor], Tensor]) -> Lesson:
        """A draw of the posterior, in half of the micro-batches turned and shrunk together with its pictures."""
        levels, weights = self.levels(images), stage.weights
        mean, logvar = self.posterior(levels)
        z = mean + (0.5 * logvar).exp() * rng.fork("posterior").randn(*self.spec.shape)
        terms: dict[str, tuple[float, Tensor]] = {}
        if "kl" in weights:
            terms["kl"] = (weights["kl"], losses.kl_normal(mean, logvar))
            terms["vf"] = (weights["vf"], self.misalignment(z, levels[-1]))
        shown, target = z, images
        if "projection" in stage.trains:
            shown, target = moved(z, images, rng.fork("equivariance"), self.settings.equivariance)
        pictures = self.decoder.scales(corrupt(shown))
        if "scales" in weights:
            terms["scales"] = (weights["scales"], coarse_l1(pictures[:-1], target))
        if "ssim" in weights:
            terms["ssim"] = (weights["ssim"], 1 - ssim_map(255 * target, 255 * pictures[-1]).mean().float())
        balanced = {"vf": self.projection.last_layer} if "vf" in terms and self.settings.adaptive else {}
        return Lesson(pictures[-1], target, terms, balanced)

    def misalignment(self, z: Tensor, features: Tensor) -> Tensor:
        """To the frozen features (B, N m^2, D) of the deepest level, by direction and by mutual likeness."""
        aligned = self.projection.align(tokens_of(z))  # (B, N, D)
        grid = grid_of(features, *self.base.spec.shape[1:])
        target = tokens_of(F.avg_pool2d(grid, self.settings.merge))
        return losses.misaligned_cosine(aligned, target) + losses.misaligned_distances(aligned, target)

    def draw(self, raw: Tensor) -> Tensor:
        return self.decoder(raw)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.last_layer

    def facts(self) -> dict[str, object]:
        return {
            "levels": list(self.settings.levels),
            "features": sha256_of(self.base.state_dict()),  # the final norm too, which its identity leaves out
            "weights": sha256_of(self.projection.state_dict()),
        }


class Projection(nn.Module):
    """Levels, each (B, N m^2, D) -> mean and log variance, (B, N, 2 C)."""

    def __init__(self, settings: VFMVAESettings, width: int):
        super().__init__()
        self.merge = settings.merge
        self.levels = nn.ModuleList(AttentionProjection(width, settings.level_width) for _ in settings.levels)
        merged = len(settings.levels) * settings.level_width * settings.merge**2
        self.fuse = AttentionProjection(merged, 2 * settings.channels)
        self.align = nn.Linear(settings.channels, width)  # to the features; in training only

    @property
    def last_layer(self) -> nn.Parameter:
        return self.fuse.last_layer

    def forward(self, levels: list[Tensor]) -> Tensor:
        side = round(levels[0].shape[1] ** 0.5)
        parts = [
            tokens_of(F.pixel_unshuffle(grid_of(project(level), side, side), self.merge))
            for project, level in zip(self.levels, levels, strict=True)
        ]
        return self.fuse(torch.cat(parts, dim=-1))


def moved(z: Tensor, images: Tensor, rng: PictureRNG, share: float) -> tuple[Tensor, Tensor]:
    """With probability `share`, latents and pictures shrunk and turned alike (EQ-VAE, arXiv 2502.09509).

    One draw for all pictures, which must stay of one size: the first picture's.
    """
    apply, size, turns = rng.rand(3)[0].tolist()
    if apply >= share:
        return z, images
    scale, patch = SCALES[int(size * len(SCALES))], images.shape[-1] // z.shape[-1]
    height, width = (max(1, round(scale * side)) for side in z.shape[2:])
    if scale < 1:
        z = F.interpolate(z, (height, width), mode="bilinear", align_corners=False, antialias=True)
        images = F.interpolate(images, (height * patch, width * patch), mode="bilinear", antialias=True)
    quarter = int(4 * turns)
    return torch.rot90(z, quarter, (2, 3)), torch.rot90(images, quarter, (2, 3))


def coarse_l1(pictures: list[Tensor], target: Tensor) -> Tensor:
    """Sum over scales of the mean absolute difference to the target, averaged down to their size."""
    return sum(losses.l1(picture, F.adaptive_avg_pool2d(target, picture.shape[2:])) for picture in pictures)
