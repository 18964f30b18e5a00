"""What stage 1 minimises: pixel, perceptual and adversarial losses, and the noise its decoder must bear.

B batch, C channels, h w latent grid, N tokens, H W image. Images are float (B, 3, H, W) in [0, 1] unless said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm import assets
from umm.errors import ConfigError, MissingWeights, UmmError
from umm.layers import at_least_float32
from umm.rng import PictureRNG, seeded_init
from umm.settings import PerceptualSettings


def augment_noise(
    raw: Tensor, tau: float, rng: PictureRNG, law: Literal["uniform", "half_normal"] = "uniform"
) -> Tensor:
    """raw + sigma * eps with one sigma a picture, so that the decoder forgives a generator's small errors.

    sigma ~ U(0, tau) as in RAE's code, or |N(0, tau^2)| as in its paper (arXiv 2510.11690, section 3.3): the means
    differ, 0.5 tau against 0.8 tau. `raw` (B, C, h, w) and tau are in the encoder's own units.
    """
    if tau == 0:
        return raw
    ones = (1,) * (raw.ndim - 1)
    sigma = tau * (rng.rand(*ones) if law == "uniform" else rng.randn(*ones).abs())
    noise = sigma * rng.randn(*raw.shape[1:])
    return raw + noise.to(raw)


def l1(fake: Tensor, real: Tensor) -> Tensor:
    """Mean absolute difference."""
    return F.l1_loss(at_least_float32(fake), at_least_float32(real))


def l2(fake: Tensor, real: Tensor) -> Tensor:
    """Mean squared difference."""
    return F.mse_loss(at_least_float32(fake), at_least_float32(real))


# --------------------------------------------------------------------------------------------------------- latents


def kl_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) | N(0, 1)), summed over a picture's numbers, mean over pictures (VAE, 1312.6114, app. B).

    Both (B, ...).
    """
    mean, logvar = at_least_float32(mean), at_least_float32(logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def misaligned_cosine(z: Tensor, features: Tensor, margin: float = 0.0) -> Tensor:
    """Mean over tokens of relu(1 - margin - cos), both (B, N, D) (VA-VAE, arXiv 2501.01423, eq. 3)."""
    cosine = (unit(z, -1) * unit(features, -1)).sum(-1)
    return F.relu(1 - margin - cosine).mean()


def misaligned_distances(z: Tensor, features: Tensor, margin: float = 0.0) -> Tensor:
    """Mean over pairs of tokens of a picture of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin) (VA-VAE, eq. 4).

    Both (B, N, D); the widths may differ.
    """
    a, b = unit(z, -1), unit(features, -1)
    return F.relu((a @ a.mT - b @ b.mT).abs() - margin).mean()


# ----------------------------------------------------------------------------------------------------- perceptual


class Perceptual(nn.Module):
    """A frozen judge of likeness: (fake, real) in [0, 1] -> scalar, 0 for equal pictures, gradients to `fake` only.

    `families` names the networks inside: a metric built on one of them has a conflict of interest.
    """

    families: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> Perceptual:
        """Frozen: batch statistics and dropout stay off whatever the module around it does."""
        return super().train(False)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        raise NotImplementedError


class LPIPSLoss(Perceptual):
    """LPIPS 0.1 (Zhang et al. 2018), mean over pictures; `net` is "vgg" or "alex"."""

    def __init__(self, net: Literal["vgg", "alex"]):
        super().__init__()
        self.families = (net,)
        self.network = lpips_network(net)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        return self.network(2 * fake.float() - 1, 2 * real.float() - 1).mean()


class EncoderLoss(Perceptual):
    """`feature_distance` of the patch tokens of chosen blocks of a frozen encoder.

    Args:
        features: `LatentSpace.features`, or any `(images, layers) -> [object with .patches (B, N, D)]` that lets
            gradients through to the images.
        layers: blocks, 0-based.
        families: of that encoder.
    """

    def __init__(self, features: Callable, layers: Sequence[int], families: Sequence[str]):
        super().__init__()
        self.features, self.layers, self.families = features, tuple(layers), tuple(families)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            real_tokens = [f.patches for f in self.features(real, self.layers)]
        fake_tokens = [f.patches for f in self.features(fake, self.layers)]
        if fake.requires_grad and not fake_tokens[0].requires_grad:
            raise UmmError("this latent space's features() stops gradients, so perceptual.name=encoder cannot train.")
        return feature_distance(fake_tokens, real_tokens, dim=-1)


class JudgeLoss(Perceptual):
    """`feature_distance` over the five resolutions of EfficientNet-Lite0 (ImageNet-1k), at the pictures' own size."""

    families = ("efficientnet",)

    def __init__(self, network: nn.Module | None = None):
        super().__init__()
        self.network = network or efficientnet_lite0()
        self.network.requires_grad_(False)
        self.train(False)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps at strides 2, 4, 8, 16, 32."""
        return self.network.forward_intermediates(2 * images - 1, intermediates_only=True)

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            real_stages = self.stages(real)
        return feature_distance(self.stages(fake), real_stages, dim=1)


def feature_distance(fake: Sequence[Tensor], real: Sequence[Tensor], dim: int) -> Tensor:
    """Mean over layers of the mean over pictures and places of |f / |f| - g / |g||^2, norms along the channels `dim`.

    It is LPIPS (Zhang et al. 2018, eq. 1) with every channel weight 1, and twice (1 - cosine).
    """
    layers = [(unit(f, dim) - unit(g, dim)).square().sum(dim).mean() for f, g in zip(fake, real, strict=True)]
    return torch.stack(layers).mean()


def unit(x: Tensor, dim: int) -> Tensor:
    """x / sqrt(|x|^2 + 1e-10) along `dim`; smooth where x is 0."""
    x = at_least_float32(x)
    return x * (x.square().sum(dim, keepdim=True) + 1e-10).rsqrt()


def efficientnet_lite0() -> nn.Module:
    """timm's tf_efficientnet_lite0 with the weights of the offline asset, frozen; reads (2 x - 1) for x in [0, 1]."""
    import timm

    with seeded_init("efficientnet-lite0"):
        network = timm.create_model("tf_efficientnet_lite0")
    given = torch.load(assets.path("efficientnet-lite0"), map_location="cpu", weights_only=True)
    # Same tensors in the same order under another framework's names; batch counters are in neither file nor forward.
    values = [value for name, value in given.items() if not name.endswith("num_batches_tracked")]
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    network.load_state_dict({**network.state_dict(), **dict(zip(names, values, strict=True))})
    return network.requires_grad_(False).eval()


def lpips_network(net: Literal["vgg", "alex"]) -> nn.Module:
    """The lpips package's network on torchvision's weights, which must lie in the torch hub folder.

    Raises:
        MissingWeights: they do not; nothing is downloaded here.
    """
    from torchvision import models

    name, enum = {"vgg": ("vgg16", models.VGG16_Weights), "alex": ("alexnet", models.AlexNet_Weights)}[net]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(enum.IMAGENET1K_V1.url).name
    if not file.is_file():
        raise MissingWeights(
            f"lpips-{net} needs torchvision's {name} weights, and {file} does not exist: put the file there "
            f"(python -c \"import torchvision; torchvision.models.{name}(weights='IMAGENET1K_V1')\" downloads it, "
            "TORCH_HOME moves the folder)."
        )
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise MissingWeights(f"lpips-{net} needs the package lpips: pip install lpips.") from error
    with warnings.catch_warnings(), seeded_init("lpips", net):
        warnings.simplefilter("ignore")  # lpips calls torchvision by its old `pretrained` argument
        return lpips.LPIPS(net=net, verbose=False).requires_grad_(False)


def build_perceptual(
    config: PerceptualSettings, features: Callable | None = None, families: Sequence[str] = ()
) -> Perceptual | None:
    """The perceptual loss that the settings name; `features` and `families` are the encoder's, for `encoder`."""
    if config.name == "none" or config.weight == 0:
        return None
    if config.name == "judge":
        return JudgeLoss()
    if config.name == "encoder":
        if features is None:
            raise ConfigError("perceptual.name=encoder needs a latent space with features: choose judge instead.")
        return EncoderLoss(features, config.layers, families)
    return LPIPSLoss(config.name.removeprefix("lpips-"))


# ---------------------------------------------------------------------------------------------------- adversarial


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """0.5 (mean relu(1 - D(real)) + mean relu(1 + D(fake))) of logits (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - at_least_float32(real)).mean() + F.relu(1 + at_least_float32(fake)).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean D(fake)."""
    return -at_least_float32(fake).mean()


def adaptive_weight(grad_rec: Tensor, grad_gan: Tensor, maximum: float = 1e4) -> Tensor:
    """|grad_rec| / (|grad_gan| + 1e-6), at most `maximum` (VQGAN, arXiv 2012.09841, eq. 7).

    Both are gradients at the decoder's last layer. In distributed training average them over the processes first: a
    weight per process would weigh each process's pictures differently.
    """
    return (at_least_float32(grad_rec).norm() / (at_least_float32(grad_gan).norm() + 1e-6)).clamp(max=maximum).detach()
