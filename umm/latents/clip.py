"""CLIP patch tokens as a latent space (arXiv 2103.00020), by RAE's rule."""

from __future__ import annotations

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from umm.latents._encoder import TransformersEncoder
from umm.rng import seeded_init
from umm.settings import CLIPSettings

CLASSES = {"clip": CLIPVisionModel, "clip_vision_model": CLIPVisionModel}


class CLIP(TransformersEncoder):
    """A transformers `CLIPVisionModel`.

    CLIP was trained on its CLS token alone, so no loss has ever seen the last block's patch tokens: the block before it
    is the one to read, as LLaVA does (arXiv 2304.08485). For probes the final norm, which CLIP applies to the CLS
    token, is applied to patches as well.
    """

    Config, space, families = CLIPSettings, "clip", ("clip",)
    classes = CLASSES
    beside = ("text_model.", "logit_scale", "visual_projection.", "text_projection.")
    unread = ("post_layernorm.",)
    pixels = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

    @classmethod
    def tiny(cls, image_size: int = 64, **changes) -> CLIP:
        """Two blocks, 32 channels, random weights."""
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        with seeded_init("tiny clip"):
            encoder = CLIPVisionModel(CLIPVisionConfig(patch_size=16, image_size=32, **shape))
        return cls(encoder, image_size, **{"pixel_mean": cls.pixels[0], "pixel_std": cls.pixels[1]} | changes)

    def embed(self, pixels: Tensor) -> Tensor:
        return self.network.pre_layrnorm(self.network.embeddings(pixels, interpolate_pos_encoding=True))

    def block_arguments(self, pixels: Tensor) -> dict[str, object]:
        return {"attention_mask": None}

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.network.post_layernorm(hidden)
