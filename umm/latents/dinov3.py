"""DINOv3 patch tokens as a latent space (RAEv2, arXiv 2605.18324; DINOv3: 2508.10104); positions are rotary."""

from __future__ import annotations

from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from umm.latents._encoder import TransformersEncoder
from umm.rng import seeded_init
from umm.settings import DINOv3Settings

CLASSES = {"dinov3_vit": DINOv3ViTModel}


class DINOv3(TransformersEncoder):
    """A transformers `DINOv3ViTModel`. Its weights come under Meta's DINOv3 licence."""

    Config, space, families = DINOv3Settings, "dinov3", ("dinov3",)
    classes = CLASSES
    unread = ("norm.", "embeddings.mask_token")

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> DINOv3:
        """Two blocks, 32 channels, 4 registers, random weights."""
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        with seeded_init("tiny dinov3"):
            encoder = DINOv3ViTModel(DINOv3ViTConfig(patch_size=16, image_size=32, num_register_tokens=4, **shape))
        return cls(encoder, image_size, **changes)

    def embed(self, pixels: Tensor) -> Tensor:
        return self.encoder.embeddings(pixels)

    def block_arguments(self, pixels: Tensor) -> dict[str, object]:
        return {"position_embeddings": self.encoder.rope_embeddings(pixels)}

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.encoder.norm(hidden)
