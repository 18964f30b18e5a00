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
from umm.tasks._picture_loss import PictureLoss, shown_pictures
from umm.tasks._tokenizer import Tokenizer
from umm.tasks.base import Phase, Task


class Recon(Task):
    """Trains a `Decoder`, and a `Discriminator` where `recon.adversarial.weight` is above 0."""

    name = "recon"
    shown = 8  # pictures in a sample grid

    def __new__(cls, config: DictConfig, space: LatentSpace, val: DataSource | None) -> Task:
        """A space that has networks of its own to train has a task of its own."""
        return Tokenizer(config, space, val) if space.stages else super().__new__(cls)

    def __init__(self, config: DictConfig, space: LatentSpace, val: DataSource | None):
        super().__init__(config, space, val)
        self.settings = settings_of(config.recon)
        with seeded_init(self.seed, self.name, "decoder"):
            self.decoder = Decoder.from_config(self.settings.decoder, space.spec)
        if self.decoder.output_size != (config.data.image_size, config.data.image_size):
            raise ConfigError(
                f"recon.decoder.output_size={self.settings.decoder.output_size} is not the size of the pictures it "
                f"learns from, data.image_size={config.data.image_size}: leave it out."
            )
        device = space.normalizer.mean.device
        self.pictures = PictureLoss(self.settings, self.seed, device, space.features, space.families)
        self.phases = [Phase("decoder", self.decoder, self.settings.optim, self.settings.ema)]
        if self.pictures.discriminator is not None:
            self.phases.append(self.pictures.phase)

    # ------------------------------------------------------------------------------------------------------ training

    def begin(self, phase: str) -> None:
        self.pictures.begin(phase)

    def loss(self, phase: str, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        latents, target = self.space.normalizer.restored(batch["latent"]), batch["image"]
        if phase == "discriminator":
            with torch.no_grad():
                drawn = self.decoder(latents)
            return self.pictures.discrimination(drawn, target, rng)
        raw = losses.augment_noise(latents, self.settings.noise, rng.fork("noise"), self.settings.noise_law)
        drawn = self.phases[0].forward(raw)  # (B, 3, H, W)
        return self.pictures.drawing(drawn, target, rng, images, self.decoder.last_layer)

    def end(self, phase: str, mean: Callable[[Tensor], Tensor]) -> None:
        self.pictures.end(mean)

    def state_dict(self) -> dict:
        return self.pictures.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.pictures.load_state_dict(state)

    # ------------------------------------------------------------------------------------------------------- results

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], file: Path) -> None:
        """Originals above their reconstructions, always the same validation pictures."""
        if self.val is None:
            return
        images = shown_pictures(self.val, self.shown, self.space.normalizer.mean.device)
        drawn = modules["decoder"].eval()(self.space.normalizer.restored(self.space.raw(images))).clamp(0, 1)
        save_grid(file, [images, drawn], rows=["original", "reconstruction"])

    def heads(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return {"decoder": modules["decoder"]}

    def head_settings(self) -> dict[str, dict]:
        return {"decoder": {"settings": OmegaConf.to_container(self.config.recon.decoder), "facts": {}}}

    def facts(self) -> dict:
        return {"trained_with": self.pictures.trained_with(self.space)}

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
