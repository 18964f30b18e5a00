"""DINOv2 patch tokens as a latent space (RAE, arXiv 2510.11690; several layers: RAEv2, arXiv 2605.18324)."""

from __future__ import annotations

from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from umm.latents._encoder import TransformersEncoder
from umm.pretrained import UNUSED, sha256_of
from umm.rng import seeded_init
from umm.settings import DINOv2Settings

CLASSES = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
FINAL_NORM = ("layernorm.weight", "layernorm.bias")  # read by `features`, not by the latents


class DINOv2(TransformersEncoder):
    """A transformers `Dinov2Model` or `Dinov2WithRegistersModel`; it interpolates its position table by itself."""

    Config, space, families, classes = DINOv2Settings, "dinov2", ("dinov2",), CLASSES

    @classmethod
    def tiny(cls, registers: int = 4, image_size: int = 64, **changes) -> DINOv2:
        """Two blocks, 32 channels, random weights; `registers=0` is the model type without them."""
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"patch_size": 14, "image_size": 56}
        with seeded_init("tiny dinov2"):
            if registers:
                encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **shape))
            else:
                encoder = Dinov2Model(Dinov2Config(**shape))
        return cls(encoder, image_size, **changes)

    def embed(self, pixels: Tensor) -> Tensor:
        return self.encoder.embeddings(pixels)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.encoder.layernorm(hidden)

    def digest(self) -> str:
        """By names: the digest that caches and models have always been keyed with."""
        return sha256_of(self.encoder.state_dict(), skip=(*UNUSED, *FINAL_NORM))
