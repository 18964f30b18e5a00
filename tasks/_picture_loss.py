"""How drawn pictures are compared with their originals: L1, L2, perceptual, and an adversary (RAE, arXiv 2510.11690).

Whoever draws has one home for these terms: a decoder on a frozen space (`recon.py`), or a whole space that is trained
(`_tokenizer.py`). W is the decoder's last layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from umm import losses
from umm.data.base import DataSource, collate
from umm.discriminator import Discriminator, diff_augment, quantize
from umm.loader import to_device
from umm.rng import PictureRNG, seeded_init
from umm.settings import ReconSettings
from umm.tasks.base import Phase


class PictureLoss:
    """The terms of `recon.*`, the discriminator if there is one, and the weights that balance gradients.

    Args:
        seed: of the run; the discriminator's first weights are drawn from it.
        features, families: of the encoder, for `perceptual.name=encoder`.
    """

    def __init__(
        self, settings: ReconSettings, seed: int, device: torch.device, features: Callable, families: Sequence[str]
    ):
        self.settings = settings
        self.perceptual = losses.build_perceptual(settings.perceptual, features, families)
        if self.perceptual is not None:
            self.perceptual.to(device)
        self.discriminator = None
        if settings.adversarial.weight > 0:
            with seeded_init(seed, "recon", "discriminator"):
                self.discriminator = Discriminator.from_config(settings.adversarial)
            optim, start = settings.adversarial.optim, settings.adversarial.start_discriminator
            self.phase = Phase("discriminator", self.discriminator, optim, start=start)
        # |d rec / d W| / |d term / d W| of the last step, by term: see `drawing`
        self.adaptive = {"gan": torch.zeros((), device=device)}
        self.gradients: dict[str, Tensor] = {}

    def begin(self, phase: str) -> None:
        """Before the micro-batches of a step."""
        self.gradients = {}
        if self.discriminator is not None:  # only its own phase trains it, spectral norm's power iteration included
            training = phase == "discriminator"
            self.discriminator.train(training).requires_grad_(training)

    def drawing(
        self,
        drawn: Tensor,
        target: Tensor,
        rng: PictureRNG,
        images: int,
        last_layer: nn.Parameter,
        perceptual: float = 1.0,
    ) -> dict[str, Tensor]:
        """Terms of pictures (B, 3, H, W); "loss" has the gradients. `perceptual` multiplies that term's weight.

        The pictures' gradients are taken first and sent through the decoder once.

        lambda balances two gradients at the last layer. It is measured on the whole previous step, all micro-batches
        and processes, so that neither changes what is trained; the first adversarial step only measures.
        """
        settings = self.settings
        pictures = drawn.detach().requires_grad_()
        terms = self.reconstruction(pictures, target, perceptual)
        gradient = self.rec_gradient = torch.autograd.grad(terms["rec"], pictures)[0]
        value = terms["rec"]
        if self.discriminator is not None and images >= settings.adversarial.start_generator:
            augmented = diff_augment(2 * pictures - 1, rng.fork("diffaug"), settings.adversarial.diffaug)
            gan = losses.hinge_generator(self.discriminator(augmented))
            gan_gradient = torch.autograd.grad(gan, pictures)[0]
            if settings.adversarial.adaptive:
                self.collect("gan.rec", drawn, last_layer, gradient)
                self.collect("gan", drawn, last_layer, gan_gradient)
            weight = settings.adversarial.weight * (self.adaptive["gan"] if settings.adversarial.adaptive else 1.0)
            gradient = gradient + weight * gan_gradient
            terms |= {"gan": gan, "adaptive": self.adaptive["gan"]}
            value = value + weight * gan
        through = (drawn * gradient).sum()  # its gradient with respect to the decoder is the loss's
        return terms | {"loss": through - through.detach() + value.detach()}

    def reconstruction(self, pictures: Tensor, target: Tensor, perceptual: float = 1.0) -> dict[str, Tensor]:
        settings = self.settings
        terms = {"l1": losses.l1(pictures, target)}
        rec = settings.l1 * terms["l1"]
        if settings.l2:
            terms["l2"] = losses.l2(pictures, target)
            rec = rec + settings.l2 * terms["l2"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(pictures, target)
            rec = rec + perceptual * settings.perceptual.weight * terms["perceptual"]
        return terms | {"rec": rec}

    def balance(self, name: str, term: Tensor, drawn: Tensor, layer: nn.Parameter) -> Tensor:
        """|d rec / d layer| / |d term / d layer| of the previous step, for the pictures last given to `drawing`."""
        self.collect(f"{name}.rec", drawn, layer, self.rec_gradient)
        self.collect(name, term, layer)
        return self.adaptive.setdefault(name, torch.zeros_like(self.adaptive["gan"]))

    def collect(self, name: str, output: Tensor, layer: nn.Parameter, gradient: Tensor | None = None) -> None:
        """Add this micro-batch's gradient of `output` at a layer."""
        at_layer = torch.autograd.grad(output, layer, gradient, retain_graph=True)[0]
        self.gradients[name] = self.gradients.get(name, 0) + at_layer

    def end(self, mean: Callable[[Tensor], Tensor]) -> None:
        """After the micro-batches; `mean` averages over the processes."""
        sums = {name: mean(gradient) for name, gradient in self.gradients.items()}
        for name in self.adaptive:
            if name in sums:
                limit = self.settings.adversarial.max_adaptive
                self.adaptive[name] = losses.adaptive_weight(sums[f"{name}.rec"], sums[name], limit)

    def discrimination(self, fake: Tensor, real: Tensor, rng: PictureRNG) -> dict[str, Tensor]:
        """Hinge loss of the discriminator on pictures in [0, 1], both (B, 3, H, W)."""
        policy = self.settings.adversarial.diffaug
        fake = quantize(2 * fake - 1)
        real = diff_augment(2 * real - 1, rng.fork("real"), policy)
        fake = diff_augment(fake, rng.fork("fake"), policy)
        # one forward for both: DDP and spectral norm want one forward for each backward
        real_logits, fake_logits = self.phase.forward(torch.cat([real, fake])).chunk(2)
        self.discriminator.eval()  # one power iteration a step, however many micro-batches it has
        loss = losses.hinge_discriminator(real_logits, fake_logits)
        return {"loss": loss, "real": real_logits.mean(), "fake": fake_logits.mean()}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.adaptive)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.adaptive = {name: value.to(self.adaptive["gan"].device) for name, value in state.items()}

    def trained_with(self, space: nn.Module) -> dict[str, str]:
        """{family: role} of the networks that took part: judges of those families have a conflict of interest."""
        roles = {"discriminator": self.discriminator, "perceptual loss": self.perceptual, "encoder": space}
        found = {}
        for role, part in roles.items():  # a family with several roles keeps the last
            if part is not None:
                found |= dict.fromkeys(part.families, role)
        return found


def shown_pictures(val: DataSource, count: int, device: torch.device) -> Tensor:
    """The first pictures of the validation split, (count, 3, H, W) in [0, 1]: those that sample grids show."""
    items = [{"image": item["image"]} for item in itertools.islice(val.stream(), count)]
    return to_device(collate(items)["image"], device)
