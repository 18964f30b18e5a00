"""The adversary of stage 1: small heads on a frozen pretrained ViT (StyleGAN-T, arXiv 2301.09515, as used by RAE).

B batch, C channels of the ViT, N its patch tokens, H W image. Images are float (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from umm import assets
from umm.errors import ConfigError, MissingWeights, UnknownName, nearest
from umm.layers import at_least_float32
from umm.pretrained import families_of, load_pretrained
from umm.rng import PictureRNG, seeded_init
from umm.settings import AdversarialSettings


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1], of any size -> logits (B, N * (1 + number of taps)).

    Each tapped block feeds one head, and the network's final block feeds one more, which comes first (so with the
    published taps 2, 5, 8, 11 the first and the last feature map are the same). The ViT is outside `parameters()` and
    `state_dict()`; only `.to()` and its like reach it. Call `eval()` for the generator's turn: spectral norm then
    keeps its singular vectors.

    Args:
        vit: gives the tapped blocks.
        input_size: side to which pictures are resized (bilinear, no antialiasing), a multiple of the ViT's patch.
    """

    def __init__(self, vit: FrozenViT, input_size: int = 224):
        super().__init__()
        if input_size % vit.patch:
            raise ConfigError(
                f"the discriminator's ViT has patches of {vit.patch} px: set adversarial.input_size to a multiple of "
                f"{vit.patch}, not {input_size}."
            )
        self.input_size = input_size
        self._vit = (vit,)  # in a tuple, so that it is not a sub-module
        self.heads = nn.ModuleList(token_head(vit.width) for _ in range(1 + len(vit.taps)))

    @classmethod
    def from_config(cls, config: AdversarialSettings) -> Discriminator:
        return cls(frozen_vit(config.backbone, config.taps, config.input_size), config.input_size)

    @property
    def families(self) -> tuple[str, ...]:
        """The network inside, which then cannot be an independent judge."""
        return self._vit[0].families

    def _apply(self, fn, recurse: bool = True) -> Discriminator:
        self._vit[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def features(self, images: Tensor) -> list[Tensor]:
        """Patch tokens of the final block, then of each tap, (B, N, C) each."""
        size = (self.input_size, self.input_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return self._vit[0](images)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.features(images)
        logits = [head(x.transpose(1, 2)).flatten(1) for head, x in zip(self.heads, maps, strict=True)]  # (B, N) each
        return torch.cat(logits, dim=1)


def token_head(channels: int, kernel: int = 9) -> nn.Sequential:
    """Tokens (B, C, N) -> logits (B, 1, N)."""
    last = spectral_norm(nn.Conv1d(channels, 1, 1))
    return nn.Sequential(convolution(channels, 1), Residual(convolution(channels, kernel)), last)


def convolution(channels: int, kernel: int) -> nn.Sequential:
    """Circular convolution along the tokens with spectral norm (arXiv 1802.05957), norm, LeakyReLU."""
    conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(conv), TokenNorm(channels, eps=1e-6, affine=True), nn.LeakyReLU(0.2))


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2)."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return (self.f(x) + x) / math.sqrt(2)


class TokenNorm(nn.InstanceNorm1d):
    """Normalises each channel over one picture's own tokens, (B, C, N), in at least float32: batches cannot leak.

    StyleGAN-T calls it a local batch norm with a virtual batch of 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least_float32(x)).to(x.dtype)


# -------------------------------------------------------------------------------------------------- the frozen ViT


class FrozenViT(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> patch tokens (B, N, C) of the final block, then of each tap.

    Args:
        network: gives its blocks' tokens through `blocks`.
        width, patch, depth: of the network.
        taps: blocks, 0-based.
        mean, std: the network's own, for pictures in [0, 1].
        families: whose features these are.
    """

    def __init__(
        self,
        network: nn.Module,
        width: int,
        patch: int,
        depth: int,
        taps: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        families: Sequence[str],
    ):
        super().__init__()
        if not all(0 <= tap < depth for tap in taps):
            raise ConfigError(
                f"the discriminator's ViT has blocks 0 to {depth - 1}: choose adversarial.taps among them, "
                f"not {list(taps)}."
            )
        self.network, self.width, self.patch, self.final = network.requires_grad_(False).eval(), width, patch, depth - 1
        self.taps, self.families = tuple(taps), tuple(families)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def blocks(self, x: Tensor, wanted: list[int]) -> list[Tensor]:
        """Standardised images -> patch tokens after the wanted blocks, without CLS and without the final norm."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        wanted = sorted({*self.taps, self.final})
        tokens = dict(zip(wanted, self.blocks((0.5 * images + 0.5 - self.mean) / self.std, wanted), strict=True))
        return [tokens[block] for block in (self.final, *self.taps)]


class TimmViT(FrozenViT):
    """A timm VisionTransformer."""

    def __init__(self, network: nn.Module, taps: Sequence[int], families: Sequence[str] = ()):
        patch, facts = network.patch_embed.patch_size[0], network.pretrained_cfg
        super().__init__(
            network, network.embed_dim, patch, len(network.blocks), taps, facts["mean"], facts["std"], families
        )

    def blocks(self, x: Tensor, wanted: list[int]) -> list[Tensor]:
        return self.network.forward_intermediates(x, indices=wanted, output_fmt="NLC", intermediates_only=True)


class Dinov2ViT(FrozenViT):
    """A transformers Dinov2Model; it interpolates its position table to any input size itself."""

    def __init__(self, network: nn.Module, taps: Sequence[int], families: Sequence[str] = ("dinov2",)):
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        c, mean, std = network.config, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        super().__init__(network, c.hidden_size, c.patch_size, c.num_hidden_layers, taps, mean, std, families)

    def blocks(self, x: Tensor, wanted: list[int]) -> list[Tensor]:
        tokens = self.network(x, output_hidden_states=True).hidden_states  # embeddings, then every block
        return [tokens[block + 1][:, 1:] for block in wanted]


def frozen_vit(backbone: str, taps: Sequence[int], input_size: int) -> FrozenViT:
    """`hub:<timm name>`, `asset:<name>`, or a checkpoint file of a timm ViT.

    The published DINO ViT-S/8 runs with the tanh GELU, so timm names tagged `.dino` and files do. (It also zeroes the
    bias of the keys, which no softmax over keys can see; here it stays.)

    Raises:
        UnknownName: timm has no such model.
        MissingWeights: its weights are not to be had.
    """
    kind, _, name = backbone.partition(":")
    if kind == "asset" and name:
        return Dinov2ViT(load_dinov2(assets.path(name)), taps, families_of(name))
    if kind == "hub" and name:
        return TimmViT(load_timm(name, input_size), taps, families_of(name))
    return TimmViT(load_file(Path(backbone).expanduser(), input_size), taps, families_of(Path(backbone).name))


def load_dinov2(folder: Path) -> nn.Module:
    """A transformers folder of a DINOv2 without registers."""
    from transformers import Dinov2Model

    return load_pretrained(folder, {"dinov2": Dinov2Model})


def load_timm(name: str, input_size: int) -> nn.Module:
    """A pretrained timm ViT through the hub, its position table resized to the input size."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        close = nearest(name, timm.list_models("*vit*"))
        raise UnknownName(f"timm has no model '{name}': set adversarial.backbone to another.{close}")
    act = {"act_layer": "gelu_tanh"} if name.endswith(".dino") else {}
    try:
        with seeded_init(name):
            return timm.create_model(name, pretrained=True, num_classes=0, img_size=input_size, **act)
    except (OSError, RuntimeError) as error:
        raise MissingWeights(
            f"the weights of the discriminator's ViT '{name}' cannot be loaded ({str(error).splitlines()[0]}): "
            "set adversarial.backbone to a local checkpoint or asset:dinov2-small-saliency, or adversarial.weight=0."
        ) from error


def load_file(file: Path, input_size: int) -> nn.Module:
    """A ViT checkpoint with timm's names (.safetensors or .pth) and heads of 64 channels; its shapes say the rest."""
    import timm
    from timm.layers import resample_abs_pos_embed

    if not file.is_file():
        raise MissingWeights(f"no file {file} for the discriminator: set adversarial.backbone to a file or hub:<name>.")
    try:
        state = read_tensors(file)
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        shape = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": width // 64}
        with seeded_init(str(file)):
            network = timm.create_model(
                "vit_small_patch8_224.dino", img_size=input_size, num_classes=0, act_layer="gelu_tanh", **shape
            )
        grid = [input_size // patch] * 2
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=1)
        network.load_state_dict(state)
    except (KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise MissingWeights(f"{file} is not the checkpoint of a plain timm ViT ({reason}).") from error
    return network


def read_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file as load_safetensors

        return load_safetensors(file)
    return torch.load(file, map_location="cpu", weights_only=True)


# --------------------------------------------------------------------------------------------------- augmentation


def diff_augment(images: Tensor, rng: PictureRNG, policy: Sequence[str]) -> Tensor:
    """Differentiable augmentation (arXiv 2006.10738) of images in [-1, 1], in the order of `policy`.

    Each name draws from its own fork of `rng`, one draw a picture; fork `rng` for real and fake pictures, which are
    augmented independently. An empty policy returns the images.
    """
    for name in policy:
        if name not in AUGMENTS:
            raise ConfigError(f"no augmentation is called '{name}': adversarial.diffaug takes {', '.join(AUGMENTS)}.")
        images = AUGMENTS[name](images, rng.fork(name))
    return images


def translate(images: Tensor, rng: PictureRNG, share: float = 0.125) -> Tensor:
    """Shift by whole pixels, up to `share` of each side, uniformly; zeros come in."""
    b, _, h, w = images.shape
    reach_y, reach_x = round(h * share), round(w * share)
    top, left = (rng.randint(2 * reach + 1, 1).to(images.device) for reach in (reach_y, reach_x))  # (B, 1) each
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y))
    rows = (top + torch.arange(h, device=images.device))[:, :, None]  # (B, H, 1)
    columns = (left + torch.arange(w, device=images.device))[:, None, :]  # (B, 1, W)
    batch = torch.arange(b, device=images.device)[:, None, None]
    return padded[batch, :, rows, columns].permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)


def jitter_color(images: Tensor, rng: PictureRNG) -> Tensor:
    """Brightness + U(-0.5, 0.5), then saturation x U(0, 2), then contrast x U(0.5, 1.5)."""
    brightness, saturation, contrast = rng.rand(3, 1, 1, 1).to(images).unbind(1)  # (B, 1, 1, 1) each
    x = images + (brightness - 0.5)
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


AUGMENTS = {"translation": translate, "color": jitter_color}


def quantize(images: Tensor) -> Tensor:
    """What an 8-bit file keeps of images in [-1, 1]: fakes are judged as real pictures come. No useful gradient."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
