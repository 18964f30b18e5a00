"""Stage 1: a decoder that draws pictures from a frozen latent space (RAE, arXiv 2510.11690, section 3).

Decoder phase:        L1 + perceptual + weight * lambda * GAN, on latents with noise added
Discriminator phase:  hinge loss on pictures against reconstructions of noise-free latents
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from umm import losses
from umm.build import open_source, settings_of
from umm.data.base import DataSource, collate
from umm.discriminator import Discriminator, diff_augment, quantize
from umm.errors import ConfigError, DataError
from umm.heads.decoder import Decoder
from umm.judging import Judges, Records, share_of
from umm.latents.base import LatentSpace
from umm.loader import to_device
from umm.model import UnifiedModel
from umm.pictures import save_grid
from umm.progress import Progress
from umm.rng import PictureRNG, seeded_init
from umm.settings import EvalSettings
from umm.tasks.base import Phase, Task


class Recon(Task):
    """Trains a `Decoder`, and a `Discriminator` where `recon.adversarial.weight` is above 0."""

    name = "recon"
    shown = 8  # pictures in a sample grid

    def __init__(self, config: DictConfig, space: LatentSpace, val: DataSource | None):
        super().__init__(config, space, val)
        self.settings = settings_of(config.recon)
        device = space.normalizer.mean.device
        with seeded_init(self.seed, self.name, "decoder"):
            self.decoder = Decoder.from_config(self.settings.decoder, space.spec)
        if self.decoder.output_size != (config.data.image_size, config.data.image_size):
            raise ConfigError(
                f"recon.decoder.output_size={self.settings.decoder.output_size} is not the size of the pictures it "
                f"learns from, data.image_size={config.data.image_size}: leave it out."
            )
        self.perceptual = losses.build_perceptual(self.settings.perceptual, space.features, space.families)
        if self.perceptual is not None:
            self.perceptual.to(device)
        self.phases = [Phase("decoder", self.decoder, self.settings.optim, self.settings.ema)]
        self.discriminator = None
        if self.settings.adversarial.weight > 0:
            self.add_discriminator()
        # |d rec / d W| / |d gan / d W| of the last step: see `decoder_loss`
        self.adaptive = torch.zeros((), device=device)
        self.gradients: dict[str, Tensor] = {}

    def add_discriminator(self) -> None:
        settings = self.settings.adversarial
        with seeded_init(self.seed, self.name, "discriminator"):
            self.discriminator = Discriminator.from_config(settings)
        self.phases.append(
            Phase("discriminator", self.discriminator, settings.optim, start=settings.start_discriminator)
        )

    # ------------------------------------------------------------------------------------------------------ training

    def begin(self, phase: str) -> None:
        self.gradients = {}
        if self.discriminator is not None:  # only its own phase trains it, spectral norm's power iteration included
            training = phase == "discriminator"
            self.discriminator.train(training).requires_grad_(training)

    def loss(self, phase: str, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        if phase == "discriminator":
            return self.discriminator_loss(batch, rng)
        return self.decoder_loss(batch, rng, images)

    def decoder_loss(self, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        """The pictures' gradients are taken first and sent through the decoder once.

        lambda balances two gradients at the last layer. It is measured on the whole previous step, all micro-batches
        and processes, so that neither changes what is trained; the first adversarial step only measures.
        """
        settings = self.settings
        raw = losses.augment_noise(batch["latent"], settings.noise, rng.fork("noise"), settings.noise_law)
        drawn = self.phases[0].forward(raw)  # (B, 3, H, W)
        pictures = drawn.detach().requires_grad_()
        terms = self.reconstruction_terms(pictures, batch["image"])
        gradient = torch.autograd.grad(terms["rec"], pictures)[0]
        value = terms["rec"]
        if self.discriminator is not None and images >= settings.adversarial.start_generator:
            augmented = diff_augment(2 * pictures - 1, rng.fork("diffaug"), settings.adversarial.diffaug)
            gan = losses.hinge_generator(self.discriminator(augmented))
            gan_gradient = torch.autograd.grad(gan, pictures)[0]
            if settings.adversarial.adaptive:
                self.collect("rec", drawn, gradient)
                self.collect("gan", drawn, gan_gradient)
            weight = settings.adversarial.weight * (self.adaptive if settings.adversarial.adaptive else 1.0)
            gradient = gradient + weight * gan_gradient
            terms |= {"gan": gan, "adaptive": self.adaptive}
            value = value + weight * gan
        through = (drawn * gradient).sum()  # its gradient with respect to the decoder is the loss's
        return terms | {"loss": through - through.detach() + value.detach()}

    def reconstruction_terms(self, pictures: Tensor, target: Tensor) -> dict[str, Tensor]:
        settings = self.settings
        terms = {"l1": losses.l1(pictures, target)}
        rec = settings.l1 * terms["l1"]
        if settings.l2:
            terms["l2"] = losses.l2(pictures, target)
            rec = rec + settings.l2 * terms["l2"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(pictures, target)
            rec = rec + settings.perceptual.weight * terms["perceptual"]
        return terms | {"rec": rec}

    def collect(self, name: str, drawn: Tensor, gradient: Tensor) -> None:
        """Add this micro-batch's gradient at the decoder's last layer."""
        at_last = torch.autograd.grad(drawn, self.decoder.last_layer, gradient, retain_graph=True)[0]
        self.gradients[name] = self.gradients.get(name, 0) + at_last

    def end(self, phase: str, mean: Callable[[Tensor], Tensor]) -> None:
        if self.gradients:
            sums = {name: mean(gradient) for name, gradient in self.gradients.items()}
            limit = self.settings.adversarial.max_adaptive
            self.adaptive = losses.adaptive_weight(sums["rec"], sums["gan"], limit)

    def discriminator_loss(self, batch: dict[str, Tensor], rng: PictureRNG) -> dict[str, Tensor]:
        policy = self.settings.adversarial.diffaug
        with torch.no_grad():
            fake = quantize(2 * self.decoder(batch["latent"]) - 1)
        real = diff_augment(2 * batch["image"] - 1, rng.fork("real"), policy)
        fake = diff_augment(fake, rng.fork("fake"), policy)
        # one forward for both: DDP and spectral norm want one forward for each backward
        real_logits, fake_logits = self.phases[1].forward(torch.cat([real, fake])).chunk(2)
        self.discriminator.eval()  # one power iteration a step, however many micro-batches it has
        loss = losses.hinge_discriminator(real_logits, fake_logits)
        return {"loss": loss, "real": real_logits.mean(), "fake": fake_logits.mean()}

    def state_dict(self) -> dict:
        return {"adaptive": self.adaptive}

    def load_state_dict(self, state: dict) -> None:
        self.adaptive = state["adaptive"].to(self.adaptive.device)

    # ------------------------------------------------------------------------------------------------------- results

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], file: Path) -> None:
        """Originals above their reconstructions, always the same validation pictures."""
        if self.val is None:
            return
        items = itertools.islice(self.val.stream(), self.shown)
        images = to_device(collate([pick(item, "image") for item in items])["image"], self.adaptive.device)
        drawn = modules["decoder"].eval()(self.space.raw(images)).clamp(0, 1)
        save_grid(file, [images, drawn], rows=["original", "reconstruction"])

    def heads(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return {"decoder": modules["decoder"]}

    def head_settings(self) -> dict[str, dict]:
        return {"decoder": {"settings": OmegaConf.to_container(self.config.recon.decoder), "facts": {}}}

    def facts(self) -> dict:
        """{family: role} of the networks that took part: judges of those families have a conflict of interest."""
        roles = {"discriminator": self.discriminator, "perceptual loss": self.perceptual, "encoder": self.space}
        trained_with = {}
        for role, part in roles.items():  # a family with several roles keeps the last
            if part is not None:
                trained_with |= dict.fromkeys(part.families, role)
        return {"trained_with": trained_with}

    @staticmethod
    @torch.no_grad()
    def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> Records:
        """Judge the reconstructions of `eval.split`.

        Raises:
            MissingHead: the model cannot decode.
        """
        settings = settings_of(config.eval)
        source = open_source(config, settings.split)
        if source.streaming:
            raise DataError("an evaluation needs to count its pictures: set data.streaming=false, or use a local copy.")
        total = min(len(source), settings.images or len(source))
        if total == 0:
            raise DataError(f"the {settings.split} split has no pictures: choose another with eval.split.")
        judges = Judges(settings, accelerator.device)
        if judges.sets and not settings.features:
            raise ConfigError(f"{', '.join(judges.sets)} compare features: name a space, e.g. eval.features=[effnet].")
        drawers = {"reconstruction": (model.reconstruct, judges)}
        if settings.baselines:
            drawers |= baselines(model, config, accelerator.device)
        with Progress(total, enabled=accelerator.is_main_process, what="judging") as progress:
            for indices in share_of(total, accelerator, settings.batch_size):
                batch = collate([pick(source[i], "image", "id") for i in indices])
                images = to_device(batch["image"], accelerator.device)
                for draw, judge in drawers.values():
                    judge.update(images, draw(images), batch["id"])
                progress.advance(len(indices) * accelerator.num_processes)
        records = Records()
        for name, (_, judge) in drawers.items():
            if accelerator.num_processes > 1:
                judge.gather(accelerator)
            found = judge.records(model.facts.get("trained_with", {}), config.seed)
            if judge is not judges:
                found.notes = []  # they speak of pairs, and a baseline has none
                found.numbers = [row | {"metric": f"{row['metric']} of {name}"} for row in found.numbers]
                found.items = {f"{metric} of {name}": values for metric, values in found.items.items()}
            records.add(found)
        return records


def baselines(model: UnifiedModel, config: DictConfig, device: torch.device) -> dict[str, tuple]:
    """What a decoder must beat: the mean picture of the training data, and itself before training."""
    psnr = EvalSettings(metrics=["psnr"], features=[], bootstrap=config.eval.bootstrap)
    mean = mean_picture(open_source(config, "train")).to(device)
    found = {"the mean picture": (lambda images: mean.expand_as(images), Judges(psnr, device))}
    if "decoder" in model.heads and "recon" in config:
        with seeded_init(config.seed, "recon", "decoder"):  # as training began
            untrained = type(model.heads["decoder"]).from_config(settings_of(config.recon).decoder, model.spec)
        other = UnifiedModel(model.space, {"decoder": untrained.to(device)})
        found["an untrained decoder"] = (other.reconstruct, Judges(psnr, device))
    return found


def mean_picture(source: DataSource, count: int = 512) -> Tensor:
    """Mean of the first pictures of a source, (3, H, W) in [0, 1]."""
    items = itertools.islice(source.stream(), count)
    total = [item["image"].double() / 255 for item in items]
    return torch.stack(total).mean(0).float()


def pick(item: dict, *keys: str) -> dict:
    return {key: item[key] for key in keys}
