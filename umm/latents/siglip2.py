"""SigLIP 2 patch tokens as a latent space (RAE, arXiv 2510.11690; SigLIP 2: 2502.14786), fixed resolutions."""

from __future__ import annotations

from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from umm.latents._encoder import TransformersEncoder
from umm.rng import seeded_init
from umm.settings import SigLIP2Settings

CLASSES = {"siglip": SiglipVisionModel, "siglip_vision_model": SiglipVisionModel}


class SigLIP2(TransformersEncoder):
    """A transformers `SiglipVisionModel`, which SigLIP 2 of a fixed resolution is. NaFlex models are refused.

    It has no CLS token: the vector for probes is its attention-pooled one.
    """

    Config, space, families = SigLIP2Settings, "siglip2", ("siglip2",)
    classes = CLASSES
    beside = ("text_model.", "logit_scale", "logit_bias")
    unread = ("post_layernorm.", "head.")
    pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    has_cls = False

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> SigLIP2:
        """Two blocks, 32 channels, random weights."""
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        with seeded_init("tiny siglip2"):
            encoder = SiglipVisionModel(SiglipVisionConfig(patch_size=16, image_size=32, **shape))
        return cls(encoder, image_size, **{"pixel_mean": cls.pixels[0], "pixel_std": cls.pixels[1]} | changes)

    def embed(self, pixels: Tensor) -> Tensor:
        return self.network.embeddings(pixels, interpolate_pos_encoding=True)

    def block_arguments(self, pixels: Tensor) -> dict[str, object]:
        return {"attention_mask": None}

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.network.post_layernorm(hidden)

    def pooled(self, normed: Tensor) -> Tensor | None:
        head = getattr(self.network, "head", None)
        return None if head is None else head(normed)
