"""DINOv2 patch tokens as a latent space (RAE, arXiv 2510.11690; several layers: RAEv2, arXiv 2605.18324).

B batch, C channels (the encoder's width), h w token grid, N = h * w, P tokens in front of the patches (CLS, registers).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from umm.errors import ConfigError
from umm.latents._stats import load_stats
from umm.latents.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Features,
    LatentSpace,
    LatentSpec,
    Normalizer,
    check_images,
)
from umm.layers import grid_of
from umm.pretrained import UNUSED, load_pretrained, locate, sha256_of
from umm.rng import seeded_init
from umm.settings import DINOv2Settings

CLASSES = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
FINAL_NORM = ("layernorm.weight", "layernorm.bias")  # read by `features`, not by the latents


class DINOv2(LatentSpace):
    """Frozen patch tokens, each chosen block's output layer-normed without affine, averaged over the blocks.

    Always in eval mode and without parameter gradients; gradients still flow to the images, for perceptual losses.

    Args:
        encoder: a transformers `Dinov2Model` or `Dinov2WithRegistersModel`.
        image_size: side of the pictures, pixels.
        encoder_size: side the encoder sees, a multiple of its patch; None: see `default_encoder_size`.
        layers: blocks, 0-based or negative from the end; [-1] is RAE.
    """

    Config = DINOv2Settings
    families = ("dinov2",)

    def __init__(
        self,
        encoder: nn.Module,
        image_size: int = 256,
        encoder_size: int | None = None,
        layers: Sequence[int] = (-1,),
        normalizer: str = "position",
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        config = encoder.config
        self.encoder = encoder.requires_grad_(False)
        self.layers = resolve_layers(layers, config.num_hidden_layers)
        self.encoder_size = encoder_size or default_encoder_size(image_size, config.patch_size)
        grid = grid_side(image_size, self.encoder_size, config.patch_size)
        self.prefix = 1 + getattr(config, "num_register_tokens", 0)
        self.spec = LatentSpec(config.hidden_size, grid, grid, image_size, tuple(pixel_mean), tuple(pixel_std))
        self.normalizer = Normalizer(self.spec.shape, normalizer)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def from_config(cls, config: DINOv2Settings) -> DINOv2:
        folder = locate(config.weights, config.revision)
        mean, std = pixel_stats(folder)
        encoder = load_pretrained(folder, CLASSES)
        space = cls(encoder, config.image_size, config.encoder_size, config.layers, config.normalizer, mean, std)
        if config.stats is not None:
            space.normalizer.set(*load_stats(config.stats))
        return space

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

    def train(self, mode: bool = True) -> DINOv2:
        """Stays in eval mode whatever is asked: the space is frozen."""
        return super().train(False)

    def raw(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> float32 (B, C, h, w); each token of one layer has mean 0 and variance 1."""
        blocks = self._blocks(images, self.layers)
        tokens = sum(self._norm(hidden[:, self.prefix :]) for hidden in blocks) / len(blocks)  # (B, N, C)
        return grid_of(tokens, self.spec.height, self.spec.width)

    def features(self, images: Tensor, layers: Sequence[int] | None = None) -> Features | list[Features]:
        """What probes read: CLS (B, C) and patches (B, N, C) after the encoder's own final norm, affine included.

        That is how DINOv2 is probed (arXiv 2304.07193, appendix B.3), for the last block as for the ones in `layers`.
        """
        depth = self.encoder.config.num_hidden_layers
        hidden = self._blocks(images, resolve_layers((-1,) if layers is None else layers, depth))
        normed = [self.encoder.layernorm(h) for h in hidden]
        found = [Features(cls=h[:, 0], patches=h[:, self.prefix :]) for h in normed]
        return found[0] if layers is None else found

    def identity(self) -> dict[str, object]:
        """What fixes the raw latents. The final norm's affine part and the mask token do not take part."""
        return {
            "space": "dinov2",
            "weights": self._sha256,
            "layers": list(self.layers),
            "norm": f"LayerNorm without affine, eps {self.encoder.config.layer_norm_eps}",
            "image_size": self.spec.image_size,
            "encoder_size": self.encoder_size,
            "resize": "bicubic, no antialias",
            "pixel_mean": list(self.spec.pixel_mean),
            "pixel_std": list(self.spec.pixel_std),
        }

    @cached_property
    def _sha256(self) -> str:
        return sha256_of(self.encoder.state_dict(), skip=(*UNUSED, *FINAL_NORM))

    def _blocks(self, images: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Outputs of the wanted blocks in the order given, each (B, P + N, C); blocks above the highest do not run."""
        hidden = self.encoder.embeddings(self._pixels(images))
        outputs = {}
        for index, block in enumerate(self.encoder.encoder.layer[: max(wanted) + 1]):
            hidden = block(hidden)
            if index in wanted:
                outputs[index] = hidden
        return [outputs[index] for index in wanted]

    def _pixels(self, images: Tensor) -> Tensor:
        """Resized and standardised as the encoder expects, (B, 3, S, S).

        Plain bicubic, without the antialiasing filter: published decoders and statistics were made with it, and the
        two sizes are close (256 -> 224), so the filter would change latents without removing visible aliasing.
        """
        check_images(images, self.spec)
        images = images.float()
        if images.shape[-1] != self.encoder_size:
            size = (self.encoder_size, self.encoder_size)
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        return (images - self.pixel_mean) / self.pixel_std

    def _norm(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=self.encoder.config.layer_norm_eps)


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """0-based block numbers of a list that may count from the end.

    Raises:
        ConfigError: the list is empty, names a block twice or one that does not exist.
    """
    found = tuple(layer + depth if layer < 0 else layer for layer in layers)
    if not found or len(set(found)) != len(found) or not all(0 <= layer < depth for layer in found):
        raise ConfigError(
            f"layers {list(layers)} do not name different blocks of an encoder that has {depth}: use 0 to {depth - 1}, "
            f"or -{depth} to -1."
        )
    return found


def pixel_stats(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Image mean and standard deviation of preprocessor_config.json, or ImageNet's where there is no such file."""
    file = folder / "preprocessor_config.json"
    facts = json.loads(file.read_text()) if file.exists() else {}
    return tuple(facts.get("image_mean", IMAGENET_MEAN)), tuple(facts.get("image_std", IMAGENET_STD))


def default_encoder_size(image_size: int, patch: int) -> int:
    """One token for each 16 pixels of the picture (256 -> 224 at patch 14), as RAE has it.

    A picture that is no multiple of 16 but one of the patch is seen as it is.
    """
    return image_size // 16 * patch if image_size % 16 == 0 else image_size


def grid_side(image_size: int, encoder_size: int, patch: int) -> int:
    """Tokens on a side, checked against patch and picture.

    Raises:
        ConfigError: the encoder's picture is no multiple of the patch, or a token would be a fraction of a pixel.
    """
    if encoder_size < patch or encoder_size % patch:
        raise ConfigError(
            f"the encoder has patches of {patch} pixels and cannot see {encoder_size}: set encoder_size to a multiple "
            f"of {patch}, or image_size to a multiple of 16 or {patch}."
        )
    grid = encoder_size // patch
    if image_size % grid:
        raise ConfigError(
            f"a picture of {image_size} pixels cannot be shared out among {grid} x {grid} tokens: set encoder_size so "
            f"that encoder_size / {patch} divides {image_size}."
        )
    return grid
