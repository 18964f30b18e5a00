"""Frozen ViTs as latent spaces: what every encoder shares (RAE, arXiv 2510.11690; several layers: RAEv2, 2605.18324).

B batch, C channels (the encoder's width), h w token grid, N = h * w, P tokens in front of the patches (CLS, registers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from umm.pretrained import load_pretrained, locate, sha256_of_values
from umm.settings import EncoderSettings


@dataclass(frozen=True)
class ViTFacts:
    """What a space must know of its network."""

    width: int
    depth: int
    patch: int  # pixels
    prefix: int  # tokens in front of the patches
    eps: float  # of the final norm


class FrozenEncoder(LatentSpace):
    """Patch tokens, each chosen block's output layer-normed without affine, averaged over the blocks.

    Always in eval mode and without parameter gradients; gradients still flow to the images, for perceptual losses.
    A subclass says `space`, `unread`, `network_facts`, `blocks` and `final_norm`.

    Args:
        encoder: the network.
        image_size: side of the pictures, pixels.
        encoder_size: side the encoder sees, a multiple of its patch; None: see `default_encoder_size`.
        layers: blocks, 0-based or negative from the end; a single one is RAE.
        mean_token: add the last of the chosen layers' mean token to every token, as RAEv2's code does on DINOv3 and
            SigLIP 2.
        pixel_mean, pixel_std: the encoder's own, for pictures in [0, 1].
    """

    space: str  # its name in `identity`
    unread: tuple[str, ...] = ()  # beginnings of the names of tensors that raw latents do not depend on

    def __init__(
        self,
        encoder: nn.Module,
        image_size: int = 256,
        encoder_size: int | None = None,
        layers: Sequence[int] = (-1,),
        normalizer: str = "position",
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        mean_token: bool = False,
    ):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        facts = self.network_facts()
        self.depth, self.prefix, self.eps, self.mean_token = facts.depth, facts.prefix, facts.eps, mean_token
        self.layers = resolve_layers(layers, facts.depth)
        self.encoder_size = encoder_size or default_encoder_size(image_size, facts.patch)
        grid = grid_side(image_size, self.encoder_size, facts.patch)
        self.spec = LatentSpec(facts.width, grid, grid, image_size, tuple(pixel_mean), tuple(pixel_std))
        self.normalizer = Normalizer(self.spec.shape, normalizer)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def from_encoder(cls, encoder: nn.Module, config: EncoderSettings, **pixels: Sequence[float]) -> FrozenEncoder:
        """The space of a loaded network; `pixels` are pixel_mean and pixel_std."""
        names = ("image_size", "encoder_size", "layers", "normalizer", "mean_token")
        space = cls(encoder, **{name: getattr(config, name) for name in names}, **pixels)
        if config.stats is not None:
            space.normalizer.set(*load_stats(config.stats))
        return space

    # ------------------------------------------------------------------------------------------ what a subclass says

    def network_facts(self) -> ViTFacts:
        raise NotImplementedError

    def blocks(self, pixels: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Standardised pixels -> outputs of the wanted blocks in the order given, each (B, P + N, C)."""
        raise NotImplementedError

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The encoder's own norm after the last block, affine included."""
        raise NotImplementedError

    def pooled(self, normed: Tensor) -> Tensor | None:
        """One vector a picture from normed tokens (B, P + N, C): the CLS token, or what the encoder has instead."""
        return normed[:, 0] if self.prefix else None

    # --------------------------------------------------------------------------------------------------- as a space

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in eval mode whatever is asked: the space is frozen."""
        return super().train(False)

    def raw(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> float32 (B, C, h, w); each token of one layer has mean 0 and variance 1."""
        normed = [self._norm(hidden[:, self.prefix :]) for hidden in self._blocks(images, self.layers)]
        tokens = sum(normed) / len(normed)  # (B, N, C)
        if self.mean_token:
            tokens = tokens + normed[-1].mean(1, keepdim=True)
        return grid_of(tokens, self.spec.height, self.spec.width)

    def features(self, images: Tensor, layers: Sequence[int] | None = None) -> Features | list[Features]:
        """What probes read: one vector (B, C) or None and patches (B, N, C), after the encoder's own final norm.

        That is how DINOv2 is probed (arXiv 2304.07193, appendix B.3), for the last block as for the ones in `layers`.
        """
        wanted = resolve_layers((-1,) if layers is None else layers, self.depth)
        normed = [self.final_norm(hidden) for hidden in self._blocks(images, wanted)]
        found = [Features(cls=self.pooled(h), patches=h[:, self.prefix :]) for h in normed]
        return found[0] if layers is None else found

    def identity(self) -> dict[str, object]:
        """What fixes the raw latents; tensors that do not take part (final norm, mask token) do not count."""
        facts = {
            "space": self.space,
            "weights": self._sha256,
            "layers": list(self.layers),
            "norm": f"LayerNorm without affine, eps {self.eps}",
            "image_size": self.spec.image_size,
            "encoder_size": self.encoder_size,
            "resize": "bicubic, no antialias",
            "pixel_mean": list(self.spec.pixel_mean),
            "pixel_std": list(self.spec.pixel_std),
        }
        return facts | ({"mean_token": True} if self.mean_token else {})

    @cached_property
    def _sha256(self) -> str:
        return self.digest()

    def digest(self) -> str:
        """sha256 of the tensors that raw latents depend on."""
        state = self.network.state_dict()
        return sha256_of_values(value for key, value in state.items() if not key.startswith(self.unread))

    @property
    def network(self) -> nn.Module:
        """The encoder without a wrapper."""
        return self.encoder

    def _blocks(self, images: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        return self.blocks(self._pixels(images), wanted)

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
        return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=self.eps)


class TransformersEncoder(FrozenEncoder):
    """A ViT of transformers. A subclass adds `classes`, `embed`, and what else its loading and its blocks need."""

    classes: Mapping[str, type[nn.Module]]  # model_type of config.json -> class
    beside: tuple[str, ...] = ()  # beginnings of the names of tensors in the file that belong to other networks
    pixels: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD)  # without preprocessor_config.json
    has_cls = True

    @classmethod
    def from_config(cls, config: EncoderSettings) -> TransformersEncoder:
        folder = locate(config.weights, config.revision)
        encoder = load_pretrained(folder, cls.classes, cls.beside)
        mean, std = pixel_stats(folder, cls.pixels)
        return cls.from_encoder(encoder, config, pixel_mean=mean, pixel_std=std)

    def network_facts(self) -> ViTFacts:
        config = self.network.config
        prefix = int(self.has_cls) + getattr(config, "num_register_tokens", 0)
        return ViTFacts(
            config.hidden_size, config.num_hidden_layers, config.patch_size, prefix, config.layer_norm_eps
        )

    @property
    def network(self) -> nn.Module:
        """Without the wrapper that CLIP and SigLIP have in early versions of transformers 5."""
        return getattr(self.encoder, "vision_model", self.encoder)

    def embed(self, pixels: Tensor) -> Tensor:
        """Standardised pixels -> what the first block reads, (B, P + N, C)."""
        raise NotImplementedError

    def block_arguments(self, pixels: Tensor) -> dict[str, object]:
        """What a block reads beside the tokens."""
        return {}

    def blocks(self, pixels: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Blocks above the highest do not run."""
        hidden, arguments, outputs = self.embed(pixels), self.block_arguments(pixels), {}
        for index, block in enumerate(self._stack[: max(wanted) + 1]):
            hidden = block(hidden, **arguments)
            if index in wanted:
                outputs[index] = hidden
        return [outputs[index] for index in wanted]

    @property
    def _stack(self) -> nn.ModuleList:
        """The list of all blocks; versions of transformers disagree about where it hangs."""
        return next(m for m in self.network.modules() if isinstance(m, nn.ModuleList) and len(m) == self.depth)


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


def pixel_stats(
    folder: Path, otherwise: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD)
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Image mean and standard deviation of preprocessor_config.json, or `otherwise` where there is no such file."""
    file = folder / "preprocessor_config.json"
    facts = json.loads(file.read_text()) if file.exists() else {}
    return tuple(facts.get("image_mean", otherwise[0])), tuple(facts.get("image_std", otherwise[1]))


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
