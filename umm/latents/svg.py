"""SVG: frozen patch tokens and a few channels of detail beside them (arXiv 2510.15301).

Two departures from the published training: no dropout in the residual encoder (random numbers belong to pictures), and
the scalars that match the two distributions can be frozen, so that a picture does not depend on its batch.

B batch, C channels, h w latent grid, N = h * w tokens, H W image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from umm.errors import ConfigError
from umm.latents._conv import ConvDecoder
from umm.latents._trained import Lesson, Stage, TrainedSpace, refuse_layers
from umm.latents.base import LatentSpec, Normalizer, check_images
from umm.latents.dinov2 import DINOv2
from umm.layers import ViTBlock, grid_of, tokens_of
from umm.pretrained import sha256_of
from umm.rng import PictureRNG
from umm.settings import ConvDecoderSettings, SVGSettings

MOMENTUM = 0.01  # of the running scalars, once as many batches have been seen


class SVG(TrainedSpace):
    """[tokens | matched residual], (B, C + residual channels, h, w).

    `scalars="batch"`: the published rule, which takes the scalars from the batch at hand, in use too.
    `scalars="frozen"`: in use their running averages from training.
    """

    Config = SVGSettings

    @classmethod
    def tiny(cls, **changes) -> SVG:
        decoder = ConvDecoderSettings(width=8, multipliers=[1, 1, 1, 1, 1], blocks=0, attention=False)
        small = {"image_size": 64, "channels": 4, "width": 16, "depth": 1, "heads": 2, "mlp": 32, "decoder": decoder}
        settings = SVGSettings(**small | changes)
        return cls(settings, DINOv2.tiny(image_size=settings.image_size, normalizer="none"))

    @classmethod
    def cacheable(cls, config: SVGSettings) -> bool:
        return config.scalars == "frozen"

    def make(self) -> None:
        settings, base = self.settings, self.base.spec
        if settings.tokens == "features":
            refuse_layers(settings, "latent.tokens=features reads the last one, set latent.tokens=raw for others")
        self.spec = replace(base, channels=base.channels + settings.channels)
        self.normalizer = Normalizer(self.spec.shape, settings.normalizer)
        self.per_picture = self.cacheable(settings)
        self.residual = Residual(settings, base)
        self.decoder = ConvDecoder(self.spec, settings.decoder)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"residual": self.residual, "decoder": self.decoder}

    def all_stages(self) -> tuple[Stage, ...]:
        return (Stage("svg", 1, ("residual", "decoder")),)

    def raw(self, images: Tensor) -> Tensor:
        check_images(images, self.spec)
        tokens, residual = self.tokens(images), self.residual(images)
        scalars = self.residual.scalars if self.per_picture else scalars_of(tokens, residual)
        return torch.cat([tokens, match(residual, scalars)], dim=1)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The frozen part, (B, C, h, w)."""
        if self.settings.tokens == "raw":
            return self.base.raw(images)
        return grid_of(self.base.features(images).patches.float(), self.spec.height, self.spec.width)

    def lesson(self, stage: Stage, images: Tensor, rng: PictureRNG, corrupt: Callable[[Tensor], Tensor]) -> Lesson:
        """With the scalars of the batch; now and then a picture goes without detail, so that tokens learn to do."""
        tokens, residual = self.tokens(images), self.residual(images)
        scalars = scalars_of(tokens, residual)
        self.residual.remember(scalars)
        detail = match(residual, scalars)
        absent = rng.fork("mask").rand(1, 1, 1) < self.settings.drop  # (B, 1, 1, 1)
        detail = torch.where(absent, self.residual.absent.view(1, -1, 1, 1), detail)
        return Lesson(self.draw(corrupt(torch.cat([tokens, detail], dim=1))), images)

    def draw(self, raw: Tensor) -> Tensor:
        return self.decoder(raw)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.last_layer

    def facts(self) -> dict[str, object]:
        facts = {"tokens": self.settings.tokens, "scalars": self.settings.scalars}
        if self.settings.tokens == "features":  # these read the final norm, which the base's identity leaves out
            facts["features"] = sha256_of(self.base.state_dict())
        return facts | {"weights": sha256_of(self.residual.state_dict())}


class Residual(nn.Module):
    """A small ViT on pixels: images (B, 3, H, W) in [0, 1] -> (B, c, h, w), with a class token that is not passed on.

    `scalars` are the running (mean, std of the tokens; mean, std of the residual), `absent` what stands for no detail.
    """

    def __init__(self, settings: SVGSettings, grid: LatentSpec):
        super().__init__()
        if settings.width % settings.heads:
            raise ConfigError(f"latent.width={settings.width} cannot be split into {settings.heads} heads.")
        width, self.grid = settings.width, (grid.height, grid.width)
        self.embed = nn.Conv2d(3, width, grid.patch, stride=grid.patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + grid.tokens, width))
        self.blocks = nn.ModuleList(ViTBlock(width, settings.heads, settings.mlp) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, settings.channels))
        self.absent = nn.Parameter(torch.zeros(settings.channels))
        self.register_buffer("scalars", torch.tensor([0.0, 1.0, 0.0, 1.0]))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, images: Tensor) -> Tensor:
        x = tokens_of(self.embed(2 * images - 1))  # (B, N, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return grid_of(self.head(self.norm(x[:, 1:])).float(), *self.grid)

    @torch.no_grad()
    def remember(self, scalars: Tensor) -> None:
        """Running averages: of all batches at first, of the last hundred or so later."""
        self.batches += 1
        self.scalars.lerp_(scalars, (1 / self.batches).clamp_min(MOMENTUM))


@torch.no_grad()
def scalars_of(tokens: Tensor, residual: Tensor) -> Tensor:
    """(mean, std of the tokens, mean, std of the residual): over batch and places, then averaged over channels, (4,).

    The standard deviations are the unbiased ones.
    """
    found = []
    for x in (tokens, residual):
        rows = x.float().transpose(0, 1).flatten(1)  # (C, B * N)
        found += [rows.mean(1).mean(), rows.std(1).mean()]
    return torch.stack(found)


def match(residual: Tensor, scalars: Tensor) -> Tensor:
    """The residual with the tokens' mean and spread: (r - m_r) / (s_r + 1e-6) * s_t + m_t."""
    token_mean, token_std, mean, std = scalars.unbind()
    return (residual - mean) / (std + 1e-6) * token_std + token_mean
