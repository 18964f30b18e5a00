"""MAE patch tokens as a latent space (RAE, arXiv 2510.11690; MAE: 2111.06377), nothing masked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEModel

from umm.latents._encoder import TransformersEncoder
from umm.rng import seeded_init
from umm.settings import MAESettings

CLASSES = {"vit_mae": ViTMAEModel}


class MAE(TransformersEncoder):
    """A transformers `ViTMAEModel` that sees all patches, in their order."""

    Config, space, families = MAESettings, "mae", ("mae",)
    classes = CLASSES
    beside = ("decoder.",)
    unread = ("layernorm.",)

    def __init__(self, encoder: nn.Module, *arguments, **settings):
        encoder.config.mask_ratio = 0.0
        super().__init__(encoder, *arguments, **settings)

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> MAE:
        """Two blocks, 32 channels, random weights."""
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        with seeded_init("tiny mae"):
            encoder = ViTMAEModel(ViTMAEConfig(patch_size=16, image_size=32, **shape))
        return cls(encoder, image_size, **changes)

    def embed(self, pixels: Tensor) -> Tensor:
        order = torch.arange(self.spec.tokens, device=pixels.device).float()  # MAE keeps patches sorted by "noise"
        noise = order.expand(len(pixels), -1)
        return self.encoder.embeddings(pixels, noise=noise, interpolate_pos_encoding=True)[0]

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.encoder.layernorm(hidden)
