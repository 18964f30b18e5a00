"""Patch tokens of any plain timm ViT as a latent space (RAE, arXiv 2510.11690)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from umm import assets
from umm.errors import ConfigError, MissingWeights, UnknownName, nearest
from umm.latents._encoder import FrozenEncoder, ViTFacts, default_encoder_size
from umm.pretrained import families_of, first_line
from umm.rng import seeded_init
from umm.settings import TimmSettings

NEEDED = ("patch_embed", "blocks", "norm", "num_prefix_tokens", "forward_intermediates", "set_input_size")


class TimmViT(FrozenEncoder):
    """A timm VisionTransformer, Eva or Beit: one width, one kind of block, square patches.

    The position table is resized once, to the encoder's picture. The vector for probes is what timm's classifier would
    read: CLS token, mean or attention-pooled token.
    """

    Config, space = TimmSettings, "timm"
    unread = ("norm.", "fc_norm.", "attn_pool.", "head.")

    def __init__(self, encoder: nn.Module, image_size: int = 256, encoder_size: int | None = None, **settings):
        missing = [name for name in NEEDED if not hasattr(encoder, name)]
        if missing:
            raise ConfigError(f"timm's {type(encoder).__name__} is no plain ViT, it has no {missing[0]}: take another.")
        facts = encoder.pretrained_cfg
        size = encoder_size or default_encoder_size(image_size, encoder.patch_embed.patch_size[0])
        encoder.set_input_size(img_size=(size, size))
        own = {"pixel_mean": facts["mean"], "pixel_std": facts["std"]}
        super().__init__(encoder, image_size, encoder_size, **own | settings)
        self.architecture = facts["architecture"]
        self.families = families_of(f"{self.architecture}.{facts.get('tag') or ''}")

    @classmethod
    def from_config(cls, config: TimmSettings) -> TimmViT:
        return cls.from_encoder(load(config.weights, config.revision), config)

    @classmethod
    def tiny(cls, image_size: int = 64, model: str = "vit_tiny_patch16_224", **changes) -> TimmViT:
        """Two blocks, 32 channels, random weights."""
        with seeded_init("tiny timm"):
            encoder = timm.create_model(model, num_classes=0, img_size=32, embed_dim=32, depth=2, num_heads=2)
        return cls(encoder, image_size, **changes)

    def network_facts(self) -> ViTFacts:
        net = self.encoder
        eps = getattr(net.norm, "eps", 1e-6)  # without a final norm on tokens: timm's usual one
        return ViTFacts(net.embed_dim, len(net.blocks), net.patch_embed.patch_size[0], net.num_prefix_tokens, eps)

    def blocks(self, pixels: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        order = sorted(wanted)
        found = self.encoder.forward_intermediates(
            pixels,
            indices=order,
            return_prefix_tokens=self.prefix > 0,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        tokens = [torch.cat([first, patches], dim=1) for patches, first in found] if self.prefix else found
        return [tokens[order.index(block)] for block in wanted]

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.encoder.norm(hidden)

    def pooled(self, normed: Tensor) -> Tensor | None:
        pooled = self.encoder.forward_head(normed, pre_logits=True)
        return pooled if pooled.ndim == 2 else super().pooled(normed)

    def identity(self) -> dict[str, object]:
        return super().identity() | {"architecture": self.architecture}


def load(weights: str, revision: str | None = None) -> nn.Module:
    """A pretrained network: a timm name, a hub id of timm's layout, a folder of it, or asset:<name>.

    Raises:
        UnknownName: timm has no such model.
        MissingWeights: its weights are not to be had, or not those of the model.
    """
    kind, _, name = weights.partition(":")
    folder = assets.path(name) if kind == "asset" and name else Path(weights).expanduser()
    if folder.is_dir():
        source = f"local-dir:{folder}"
    elif "/" in weights:
        source = f"hf-hub:{weights}" + (f"@{revision}" if revision else "")
    elif timm.is_model(weights.partition(".")[0]):
        source = weights
    else:
        close = nearest(weights, timm.list_models("*vit*"))
        raise UnknownName(f"timm has no model '{weights}' and there is no such folder: set latent.weights.{close}")
    try:
        with seeded_init(weights):
            return timm.create_model(source, pretrained=True, num_classes=0)
    except Exception as error:  # the hub, safetensors, torch and timm itself have a dozen kinds
        raise MissingWeights(
            f"the timm model '{weights}' cannot be loaded ({first_line(error)}): give a folder with timm's config.json "
            "and model.safetensors, or a latent that needs no hub, latent.name=dinov2 "
            "latent.weights=asset:dinov2-small-saliency."
        ) from error
