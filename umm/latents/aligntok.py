"""AlignTok: a pretrained encoder becomes a tokenizer in three stages (arXiv 2509.25162).

    align    adapter and decoder learn, the encoder is frozen
    tune     everything learns; latents are held to what encoder and adapter gave when this stage began
    refine   the decoder learns, latents stay as they are

No code was published: the adapter's inside, the stages' lengths and rates are ours.

B batch, C channels, h w latent grid, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.errors import ConfigError
from umm.latents._conv import ConvDecoder
from umm.latents._trained import Lesson, Stage, TrainedSpace, frozen
from umm.latents.base import Normalizer
from umm.latents.dinov2 import DINOv2
from umm.pretrained import sha256_of
from umm.rng import PictureRNG
from umm.settings import AlignTokSettings, ConvDecoderSettings


class AlignTok(TrainedSpace):
    """Adapter after encoder; with `adapter="identity"` and no training of the encoder it is RAE's latent."""

    Config = AlignTokSettings

    @classmethod
    def tiny(cls, **changes) -> AlignTok:
        decoder = ConvDecoderSettings(width=8, multipliers=[1, 1, 1, 1, 1], blocks=0, attention=False)
        small = {"image_size": 64, "channels": 8, "hidden": 16, "decoder": decoder}
        settings = AlignTokSettings(**small | changes)
        return cls(settings, DINOv2.tiny(image_size=settings.image_size, normalizer="none"))

    def make(self) -> None:
        settings, base = self.settings, self.base.spec
        self.adapter = build_adapter(settings, base.channels)
        self.spec = replace(base, channels=base.channels if settings.adapter == "identity" else settings.channels)
        self.normalizer = Normalizer(self.spec.shape, settings.normalizer)
        self.decoder = ConvDecoder(self.spec, settings.decoder)
        self.anchor: tuple[nn.Module, nn.Module] | None = None  # frozen (base, adapter), no sub-modules of this one

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.base.encoder, "adapter": self.adapter, "decoder": self.decoder}

    def all_stages(self) -> tuple[Stage, ...]:
        lengths = self.settings.lengths
        if len(lengths) != 3 or min(lengths) < 0 or sum(lengths) <= 0:
            raise ConfigError(f"latent.lengths={list(lengths)} must be three lengths, of align, tune and refine.")
        late, held = self.settings.late_lr, {"anchor": self.settings.anchor}
        return (
            Stage("align", lengths[0], ("adapter", "decoder")),
            Stage("tune", lengths[1], ("encoder", "adapter", "decoder"), lr=late, weights=held),
            Stage("refine", lengths[2], ("decoder",), lr=late),
        )

    def raw(self, images: Tensor) -> Tensor:
        return self.adapter(self.base.raw(images))

    def begin_stage(self, stage: Stage) -> None:
        super().begin_stage(stage)
        self.anchor = (frozen(self.base), frozen(self.adapter)) if "anchor" in stage.weights else None

    def lesson(self, stage: Stage, images: Tensor, rng: PictureRNG, corrupt: Callable[[Tensor], Tensor]) -> Lesson:
        """In `tune` with the mean squared distance to the anchor, which is 0 at first, and so is its gradient."""
        z = self.raw(images)
        terms = {}
        if self.anchor is not None:
            base, adapter = self.anchor
            with torch.no_grad():
                held = adapter(base.raw(images))
            terms["anchor"] = (stage.weights["anchor"], F.mse_loss(z.float(), held.float()))
        return Lesson(self.draw(corrupt(z)), images, terms)

    def draw(self, raw: Tensor) -> Tensor:
        return self.decoder(raw)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.last_layer

    def identity(self) -> dict[str, object]:
        """The encoder's own identity but for its weights, which are no longer those of a pretrained file."""
        encoder = {key: value for key, value in self.base.identity().items() if key != "weights"}
        return super().identity() | {"encoder": encoder}

    def facts(self) -> dict[str, object]:
        state = {key: value for key, value in self.own_state().items() if not key.startswith("decoder.")}
        return {"adapter": self.settings.adapter, "weights": sha256_of(state)}

    def memory(self) -> dict[str, Tensor]:
        if self.anchor is None:
            return {}
        base, adapter = self.anchor
        return {f"base.{k}": v for k, v in base.state_dict().items()} | adapter.state_dict(prefix="adapter.")

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        for name, module in zip(("base.", "adapter."), self.anchor or ()):
            module.load_state_dict({k.removeprefix(name): v for k, v in memory.items() if k.startswith(name)})


def build_adapter(settings: AlignTokSettings, channels: int) -> nn.Module:
    """(B, C, h, w) -> (B, settings.channels, h, w), token by token."""
    if settings.adapter == "identity":
        return nn.Identity()
    if settings.adapter == "linear":
        return nn.Conv2d(channels, settings.channels, 1)
    return nn.Sequential(
        nn.Conv2d(channels, settings.hidden, 1), nn.GELU(), nn.Conv2d(settings.hidden, settings.channels, 1)
    )
