"""Convolutional VAEs of diffusers' AutoencoderKL family: SD, SDXL, SD3, FLUX, or a small one trained here.

Pictures go in and come out in [-1, 1]; a latent is the posterior's mean (LDM, arXiv 2112.10752, section 3.1).

B batch, C channels, h w latent grid, N = h * w, H W image.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from umm import losses
from umm.errors import ConfigError, MissingWeights, UmmError
from umm.latents._conv import groups_of
from umm.latents._encoder import resolve_layers
from umm.latents._stats import load_stats
from umm.latents._trained import Lesson, Stage, TrainedSpace
from umm.latents.base import Features, LatentSpace, LatentSpec, Normalizer, check_images
from umm.layers import tokens_of
from umm.pretrained import first_line, locate, sha256_of_values
from umm.rng import PictureRNG, generator, seeded_init
from umm.settings import VAESettings

WEIGHTS = "diffusion_pytorch_model.safetensors"


class VAE(TrainedSpace):
    """A diffusers `AutoencoderKL`, pretrained and frozen, or untrained with one stage of training.

    Args:
        settings: of a pretrained one only image_size, normalizer and posterior count.
        pretrained: the network; None: one of `settings.widths`, to be trained.
    """

    Config = VAESettings

    def __init__(self, settings: VAESettings, pretrained: nn.Module | None = None):
        LatentSpace.__init__(self)  # its parent's wants an encoder inside
        self.base, self.config = None, settings
        if pretrained is None:
            self.settings, self.stages = replace(settings, weights=None, stats=None), self.all_stages()
            with seeded_init(settings.name):
                self.make()
        else:
            self.families = ("vae", "vgg")  # LDM's and those after it were trained with LPIPS on VGG
            self.put(pretrained)
        self.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, config: VAESettings) -> VAE:
        if config.weights is None or is_run(config.weights):
            return super().from_config(config)
        check_unused(config)
        space = cls(config, load(config.weights, config.subfolder, config.revision))
        if config.stats is not None:
            space.normalizer.set(*load_stats(config.stats))
        return space

    @classmethod
    def fresh(cls, settings: VAESettings) -> VAE:
        return cls(settings)

    @classmethod
    def tiny(cls, **changes) -> VAE:
        """8 pixels a token, 4 channels, random weights."""
        return cls(VAESettings(**{"image_size": 64, "widths": [8, 8, 8, 8], "blocks": 1} | changes))

    def make(self) -> None:
        self.put(build(self.settings.channels, self.settings.widths, self.settings.blocks))

    def put(self, network: nn.Module) -> None:
        """Take a network, its grid and what it publishes about its latents' scale."""
        facts, size = network.config, self.config.image_size
        patch = 2 ** (len(facts.block_out_channels) - 1)
        if size % patch:
            raise ConfigError(f"latent.image_size={size} is no multiple of the {patch} pixels a token of this VAE has.")
        self.network = network
        self.spec = LatentSpec(facts.latent_channels, size // patch, size // patch, size)
        self.normalizer = Normalizer(self.spec.shape, self.config.normalizer, eps=0.0)  # as published, without eps
        if self.settings is None and (statistics := published(facts, self.config.normalizer)):
            self.normalizer.set(*statistics)

    # ------------------------------------------------------------------------------------------------------ encoding

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | image), each float32 (B, C, h, w)."""
        check_images(images, self.spec)
        found = self.network.encode(2 * images.float() - 1).latent_dist
        return found.mean.float(), found.logvar.float()

    def raw(self, images: Tensor) -> Tensor:
        mean, logvar = self.posterior(images)
        if self.config.posterior == "mean":
            return mean
        return mean + (0.5 * logvar).exp() * picture_noise(images, self.spec.shape)

    def features(self, images: Tensor, layers: Sequence[int] | None = None) -> Features | list[Features]:
        """Block 0 is the encoder's last hidden grid (512 channels in published ones), block 1 the posterior's mean."""
        wanted = resolve_layers((-1,) if layers is None else layers, depth=2)
        hidden: list[Tensor] = []
        handle = self.network.encoder.mid_block.register_forward_hook(lambda m, i, output: hidden.append(output))
        try:
            mean, _ = self.posterior(images)
        finally:
            handle.remove()
        blocks = (hidden[0], mean)
        found = [Features(cls=None, patches=tokens_of(blocks[layer])) for layer in wanted]
        return found[0] if layers is None else found

    def identity(self) -> dict[str, object]:
        """Of the encoder: the decoder does not change raw latents."""
        return {"space": "vae", "image_size": self.spec.image_size} | self.facts()

    def facts(self) -> dict[str, object]:
        state = self.network.state_dict()
        weights = sha256_of_values(v for key, v in state.items() if key.startswith(("encoder.", "quant_conv.")))
        return {"weights": weights, "posterior": self.config.posterior}

    def draw(self, raw: Tensor) -> Tensor:
        return self.network.decode(raw).sample / 2 + 0.5

    # ------------------------------------------------------------------------------------------------------ training

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    @property
    def last_layer(self) -> nn.Parameter:
        return self.network.decoder.conv_out.weight

    def all_stages(self) -> tuple[Stage, ...]:
        return (Stage("vae", 1.0, ("network",), weights={"kl": self.config.kl}),)

    def lesson(self, stage: Stage, images: Tensor, rng: PictureRNG, corrupt: Callable[[Tensor], Tensor]) -> Lesson:
        """A draw of the posterior (arXiv 1312.6114, section 2.4)."""
        mean, logvar = self.posterior(images)
        z = mean + (0.5 * logvar).exp() * rng.fork("posterior").randn(*self.spec.shape)
        terms = {"kl": (stage.weights["kl"], losses.kl_normal(mean, logvar))}
        return Lesson(self.draw(corrupt(z)), images, terms)


def picture_noise(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape), seeded by the 8-bit pixels: equal pictures have equal noise in every batch and run.

    So latents can be cached and a picture does not depend on its batch; LDM and SiT draw anew in every epoch.
    """
    pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu()
    seeds = (hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in pixels)
    return torch.stack([torch.randn(tuple(shape), generator=generator("posterior", seed)) for seed in seeds]).to(images)


# ------------------------------------------------------------------------------------------------------- the network


def autoencoder() -> type[nn.Module]:
    """diffusers' AutoencoderKL.

    Raises:
        UmmError: diffusers is not installed.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UmmError(f"latent.name=vae needs diffusers ({first_line(error)}): pip install diffusers.") from error
    return AutoencoderKL


def build(channels: int, widths: Sequence[int], blocks: int) -> nn.Module:
    """An untrained network, widths from the finest level to the latent's."""
    return autoencoder()(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=list(widths),
        layers_per_block=blocks,
        latent_channels=channels,
        norm_num_groups=math.gcd(*map(groups_of, widths)),
    )


def load(weights: str, subfolder: str | None = None, revision: str | None = None) -> nn.Module:
    """The pretrained network in a hub repository or folder, float32.

    Raises:
        MissingWeights: it is not to be had, of another class, or its tensors do not fit.
    """
    inside = subfolder or "."
    folder = locate(weights, revision, [str(Path(inside) / name) for name in ("config.json", WEIGHTS)]) / inside
    kind = autoencoder()
    try:
        named = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise MissingWeights(
            f"{folder} has no config.json in diffusers' layout: give the VAE's own folder, or latent.subfolder=vae."
        ) from error
    if named != kind.__name__:
        raise MissingWeights(f"{folder} holds a {named}, not an {kind.__name__}.")
    try:
        network, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # no file, truncated file, wrong shapes: diffusers and safetensors have many kinds
        raise MissingWeights(f"the weights in {folder} cannot be read ({first_line(error)}).") from error
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise MissingWeights(f"the weights in {folder} do not fit its config.json: {len(wrong)} tensors {wrong[:3]}.")
    return network


def published(facts, normalizer: str) -> tuple[Tensor, Tensor] | None:
    """Mean and variance with which (z - mean) / std is what diffusers' pipelines give a generator; None: not published.

    scalar: (z - shift) * scale (LDM, FLUX, SD3); channel, where a network has them: (z - mean) / std * scale.
    """
    if normalizer == "scalar":
        mean, std = [facts.shift_factor or 0.0], [1.0]
    elif normalizer == "channel" and facts.latents_mean is not None:
        mean, std = facts.latents_mean, facts.latents_std
    else:
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64).flatten()[:, None, None] for values in (mean, std))
    return mean, (std / facts.scaling_factor).square()


def is_run(weights: str) -> bool:
    """Whether it is a finished run of a space that was trained here."""
    return any((Path(weights) / name).exists() for name in ("model/space.safetensors", "space.safetensors"))


def check_unused(config: VAESettings) -> None:
    """Refuse what a pretrained network would not listen to."""
    for name in ("channels", "widths", "blocks", "kl"):
        if getattr(config, name) != getattr(VAESettings(), name):
            raise ConfigError(f"latent.{name} is for a VAE trained here, and latent.weights names one: leave one out.")
