"""Named feature spaces: where set metrics judge pictures. `open_space("effnet")`, `open_space("dinov2:<weights>")`.

B batch, H W image, d feature width, P packets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.errors import MissingWeights, UmmError, UnknownName, nearest
from umm.losses import efficientnet_lite0
from umm.metrics._inception import IMAGE_SIZE, InceptionFID, tf1_bilinear
from umm.metrics.base import QUANTISATION, full_precision, quantised
from umm.pretrained import load_pretrained, locate, sha256_of
from umm.transforms import resize

DINOV2_MEAN, DINOV2_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of its input channels


class FeatureSpace:
    """A frozen map from pictures to features, and the facts that fix its numbers.

    name      as the user typed it
    dim       feature width d; None where it depends on the picture's size
    packets   groups of features whose Frechet distances are averaged; 1 for networks
    families  networks inside, () for a judge without weights, which never has a conflict of interest
    resizing  the rule that brings pictures to the network's size
    """

    name: str
    dim: int | None = None
    packets: int = 1
    families: tuple[str, ...] = ()
    resizing: str = "none"
    weights: str = "none"  # sha256

    def features(self, pixels: Tensor) -> Tensor:
        """Whole numbers 0 .. 255 as float32 (B, 3, H, W) -> (B, d)."""
        raise NotImplementedError

    @torch.no_grad()
    def extract(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 or float in [0, 1] -> features (B, d), float32."""
        with full_precision(images.device):
            return self.features(quantised(images).float()).float()

    def fingerprint(self) -> dict[str, object]:
        return {
            "space": self.name,
            "weights": self.weights,
            "resizing": self.resizing,
            "quantisation": QUANTISATION,
            "dtype": "float32",
        }


class NetworkSpace(FeatureSpace):
    """A frozen network; the digest of its weights is part of the fingerprint."""

    def __init__(self, network: nn.Module, device: torch.device | str):
        self.network = network.to(device).eval().requires_grad_(False)
        self.weights = sha256_of(network.state_dict())


class Inception(NetworkSpace):
    """The 2015 TensorFlow Inception of FID, pool3, 2048 features, after TensorFlow 1's bilinear resize to 299."""

    dim, families, resizing = 2048, ("inception",), f"tf1-bilinear-{IMAGE_SIZE}"

    def features(self, pixels: Tensor) -> Tensor:
        return self.network((tf1_bilinear(pixels, IMAGE_SIZE) - 128) / 128)


class EffNet(NetworkSpace):
    """EfficientNet-Lite0 (ImageNet-1k), 1280 pooled features at 224 pixels: the judge to be had offline."""

    dim, families, resizing = 1280, ("efficientnet",), "torch-bicubic-aa-224"

    def features(self, pixels: Tensor) -> Tensor:
        x = (resize(pixels, 224) / 127.5 - 1).contiguous(memory_format=torch.channels_last)  # 1.5 x faster on a CPU
        return self.network.forward_head(self.network.forward_features(x), pre_logits=True)


class DINOv2(NetworkSpace):
    """CLS token after the final norm at 224 pixels (FD-DINOv2, arXiv 2306.04675; bicubic resize of EDM2's code)."""

    families, resizing = ("dinov2",), "torch-bicubic-aa-224"

    def __init__(self, network: nn.Module, device: torch.device | str):
        super().__init__(network, device)
        self.dim = network.config.hidden_size

    def features(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(facts).view(1, 3, 1, 1) for facts in (DINOV2_MEAN, DINOV2_STD))
        return self.network((resize(pixels, 224) / 255 - mean) / std).last_hidden_state[:, 0]


class Pixels(FeatureSpace):
    """RGB averaged over an 8 x 8 grid, 192 features in [0, 1]: a judge of layout and colour without weights."""

    dim, resizing = 192, "area-8"

    def features(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels / 255, 8).flatten(1)


class Wavelet(FeatureSpace):
    """Haar wavelet packets of level 4: in this space `fd` is the Frechet Wavelet Distance (arXiv 2312.15289).

    256 packets of 3 H W / 256 coefficients, orthonormal, on pictures in [0, 1]; the moments of one side take
    16 (3 H W)^2 / 256 bytes, 2.4 GB at 256 pixels.
    """

    LEVEL = 4
    packets = 4**LEVEL

    def features(self, pixels: Tensor) -> Tensor:
        return haar_packets(pixels / 255, self.LEVEL).flatten(1)


def haar_packets(x: Tensor, level: int) -> Tensor:
    """Orthonormal Haar wavelet-packet transform, (B, C, H, W) -> (B, 4^level, C * H * W / 4^level)."""
    side = 2**level
    if x.shape[-2] % side or x.shape[-1] % side:
        raise UmmError(f"{level} wavelet levels need sides that are multiples of {side}, got {tuple(x.shape[-2:])}.")
    packets = x[:, None]  # (B, 1, C, H, W)
    for _ in range(level):
        top, bottom = packets[..., ::2, :], packets[..., 1::2, :]
        rows = torch.stack([top + bottom, top - bottom], 2)  # (B, P, 2, C, H / 2, W)
        left, right = rows[..., ::2], rows[..., 1::2]
        packets = torch.stack([left + right, left - right], 3).flatten(1, 3) / 2  # (B, 4 P, C, H / 2, W / 2)
    return packets.flatten(2)


# ---------------------------------------------------------------------------------------------------- opening one


def open_space(spec: str, device: torch.device | str = "cpu") -> FeatureSpace:
    """The space called `<name>` or `<name>:<weights>`; for `dinov2` weights are a hub id, a folder or asset:<name>.

    Raises:
        UnknownName: no space has that name.
        MissingWeights: its weights cannot be had; the message says how to get them.
    """
    name, _, weights = spec.partition(":")
    if name not in SPACES:
        raise UnknownName(f"no feature space is called '{name}'.{nearest(name, SPACES)} Known: {', '.join(SPACES)}.")
    if weights and name not in ("inception", "dinov2"):
        raise UmmError(f"the feature space '{name}' takes no weights: write {name} instead of {spec}.")
    space = SPACES[name](weights, device)
    space.name = spec
    return space


SPACES: dict[str, Callable[[str, torch.device | str], FeatureSpace]] = {
    "inception": lambda weights, device: Inception(load_inception(weights), device),
    "effnet": lambda weights, device: EffNet(efficientnet_lite0().to(memory_format=torch.channels_last), device),
    "dinov2": lambda weights, device: DINOv2(load_dinov2(weights or "facebook/dinov2-large"), device),
    "pixels": lambda weights, device: Pixels(),
    "wavelet": lambda weights, device: Wavelet(),
}

# The same tensors under the names their two publishers give them.
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")


def load_inception(weights: str = "") -> nn.Module:
    """FID's Inception from a file, or from the torch hub folder; nothing is downloaded."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [Path(weights).expanduser()] if weights else [folder / name for name in INCEPTION_FILES]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise MissingWeights(
            f"the feature space 'inception' needs {candidates[0]}, which does not exist: put torch-fidelity's release "
            f"file {INCEPTION_FILES[0]} there, or write features=[inception:<file>], or use features=[effnet], which "
            "needs no download."
        )
    network = InceptionFID()
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # truncated, not a checkpoint, other names: torch has many kinds
        reason = str(error).splitlines()[0]
        raise MissingWeights(f"{file} does not hold the weights of FID's Inception ({reason}).") from error
    return network


def load_dinov2(weights: str) -> nn.Module:
    """A transformers DINOv2, with or without registers, from asset:<name>, a folder or a hub id."""
    from transformers import Dinov2Model, Dinov2WithRegistersModel

    classes = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
    try:
        return load_pretrained(locate(weights), classes)
    except MissingWeights as error:
        raise MissingWeights(
            f"the feature space 'dinov2' needs '{weights}': name others by features=['dinov2:<folder or hub id>'], "
            f"or use features=[effnet], which needs no hub. ({error})"
        ) from error
