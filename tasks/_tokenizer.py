"""Stage 1 of a space that trains networks of its own (SVG, VFM-VAE, AlignTok): `--task recon` on such a space.

The space says in which stages (`TrainedSpace.stages`). Each stage is a stretch of the run with an optimiser, a schedule
and an average of its own, over the parts it trains; the other parts are in no optimiser and do not move. A student is
trained. The space itself takes its weights when somebody looks: averaged those of the present stage, as they are those
that are frozen in it, because the decoder learns on them. In the end the space gets its statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from umm import losses
from umm.build import measure, open_source, settings_of
from umm.data.base import DataSource
from umm.errors import ConfigError
from umm.latents._trained import Stage, TrainedSpace
from umm.pictures import save_grid
from umm.rng import PictureRNG
from umm.settings import DecoderSettings, OptimSettings
from umm.tasks._picture_loss import PictureLoss, shown_pictures
from umm.tasks.base import Group, Phase, Task, Turn


class Tokenizer(Task):
    """The stages as members of one loop, and what they share: the student and the losses on pictures."""

    name = "recon"

    def __init__(self, config: DictConfig, space: TrainedSpace, val: DataSource | None):
        super().__init__(config, space, val)
        self.settings = settings_of(config.recon)
        self.check()
        device = space.normalizer.mean.device
        self.student = space.student(self.seed)
        self.pictures = PictureLoss(self.settings, self.seed, device, space.features, space.families)
        self.present: StageTask | None = None
        self.stages = [
            StageTask(self, stage, window)
            for stage, window in windows(space.stages, config.train.images, config.train.batch_size)
        ]

    def check(self) -> None:
        if self.settings.decoder != DecoderSettings():
            raise ConfigError(
                f"recon.decoder is for spaces without a decoder, and {self.config.latent.name} has its own: set "
                "latent.decoder instead."
            )
        if self.settings.perceptual.name == "encoder":
            self.check_encoder()

    def check_encoder(self) -> None:
        """Refuse to compare pictures by an encoder that is trained, is not there, or sees pictures of one size only."""
        if self.space.base is None or any("encoder" in stage.trains for stage in self.space.stages):
            why = "an encoder that stays as it is, and this space has none: choose"
        elif self.space.resizes:
            why = "pictures of one size, and this space draws smaller ones too: set latent.equivariance=0, or choose"
        else:
            return
        raise ConfigError(f"recon.perceptual.name=encoder needs {why} judge or lpips-vgg.")

    def members(self) -> list[Task]:
        return self.stages

    def groups(self) -> list[Group]:
        """A stage's optimiser each, and the discriminator's, which goes on through all stages."""
        groups = [
            # `shared`: the loop averages gradients over processes itself, whatever a stage's loss calls of the student
            Group(f"{stage.name}.parts", stage.phases[0], [stage.turn("parts")], shared=[])
            for stage in self.stages
        ]
        if self.pictures.discriminator is not None:
            turns = [stage.turn("discriminator") for stage in self.stages]
            groups.append(Group("recon.discriminator", self.pictures.phase, turns))
        return groups

    def enter(self, stage: StageTask) -> None:
        """Begin a stage, if it is not the present one."""
        if stage is not self.present:
            self.present = stage
            self.student.begin_stage(stage.stage)

    def head_settings(self) -> dict[str, dict]:
        return {}


class StageTask(Task):
    """One stage. Its pictures come in an order of its own."""

    keys = ("image",)
    encodes = False  # the loop need not encode: that is what is trained
    shown = 8  # pictures in a sample grid

    def __init__(self, whole: Tokenizer, stage: Stage, window: tuple[int, int | None]):
        super().__init__(whole.config, whole.space, whole.val)
        self.whole, self.stage, self.window = whole, stage, window
        self.name, self.settings = stage.name, whole.settings
        trained = nn.ModuleDict({name: whole.student.parts[name] for name in stage.trains})
        self.phases = [Phase("parts", trained, slowed(self.settings.optim, stage.lr), self.settings.ema)]

    def turn(self, phase: str) -> Turn:
        optim = self.settings.optim if phase == "parts" else self.settings.adversarial.optim
        return Turn(self, phase, optim.clip)

    # ------------------------------------------------------------------------------------------------------ training

    def begin(self, phase: str) -> None:
        self.whole.enter(self)
        self.whole.pictures.begin(phase)

    def loss(self, phase: str, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        student, pictures, target = self.whole.student, self.whole.pictures, batch["image"]
        if phase == "discriminator":
            with torch.no_grad(), self.precision(target):
                drawn = student.draw(student.normalizer.restored(student.raw(target)))
            return pictures.discrimination(drawn.float(), target, rng)
        with self.precision(target):
            lesson = student.lesson(self.stage, target, rng, lambda raw: self.corrupted(raw, rng))
        drawn = lesson.pictures.float()
        terms = pictures.drawing(drawn, lesson.target, rng, images, student.last_layer, self.stage.perceptual)
        for name, (weight, value) in lesson.terms.items():
            if name in lesson.balanced:
                weight = weight * pictures.balance(name, value, drawn, lesson.balanced[name])
            terms |= {name: value, "loss": terms["loss"] + weight * value}
        return terms

    def precision(self, like: Tensor) -> torch.autocast:
        """What `train.precision` says; no wrapper of the loop is around the student."""
        enabled = self.config.train.precision == "bf16"
        return torch.autocast(like.device.type, torch.bfloat16, enabled=enabled)

    def corrupted(self, raw: Tensor, rng: PictureRNG) -> Tensor:
        raw = self.whole.student.normalizer.restored(raw)
        return losses.augment_noise(raw, self.settings.noise, rng.fork("noise"), self.settings.noise_law)

    def end(self, phase: str, mean: Callable[[Tensor], Tensor]) -> None:
        self.whole.pictures.end(mean)

    def state_dict(self) -> dict:
        """Only the present stage has one: what the next step needs."""
        if self.whole.present is not self:
            return {}
        return {"adaptive": self.whole.pictures.state_dict(), "memory": self.whole.student.memory()}

    def load_state_dict(self, state: dict) -> None:
        if state:
            self.whole.enter(self)
            self.whole.student.recall(state["memory"])
            self.whole.pictures.load_state_dict(state["adaptive"])

    # ------------------------------------------------------------------------------------------------------- results

    def show(self, modules: dict[str, nn.Module]) -> None:
        """Put what has been learned into the space."""
        averaged = modules["parts"]
        for name, part in self.space.parts.items():
            source = averaged[name] if name in averaged else self.whole.student.parts[name]
            part.load_state_dict(source.state_dict())

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], file: Path) -> None:
        """Originals above their reconstructions, always the same validation pictures."""
        if self.val is None or self.whole.present is not self:
            return
        self.show(modules)
        images = shown_pictures(self.val, self.shown, self.space.normalizer.mean.device)
        drawn = self.space.draw(self.space.normalizer.restored(self.space.raw(images))).clamp(0, 1)
        save_grid(file, [images, drawn], rows=["original", "reconstruction"])

    def heads(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """None: the space, which now takes its weights and measures its statistics, has a decoder of its own."""
        if self.whole.present is self:
            self.show(modules)
            self.space.normalizer.fit(measure(self.space, self.config, open_source(self.config, "train")))
        return {}

    def facts(self) -> dict:
        return {"trained_with": self.whole.pictures.trained_with(self.space)}


def slowed(optim: OptimSettings, factor: float) -> OptimSettings:
    """The same optimiser at `factor` times its learning rates."""
    return replace(optim, lr=factor * optim.lr, final_lr=factor * optim.final_lr)


def windows(stages: tuple[Stage, ...], images: int, batch_size: int) -> list[tuple[Stage, tuple[int, int | None]]]:
    """Stages that have at least a step, each with the pictures of the run it lasts, in whole steps; the last is open.

    Raises:
        ConfigError: a stage with a length gets no step.
    """
    steps, total = math.ceil(images / batch_size), sum(stage.length for stage in stages)
    found, done, start = [], 0.0, 0
    for stage in stages:
        done += stage.length
        end = round(steps * done / total)
        if stage.length and end == start:
            raise ConfigError(
                f"train.images={images} is too short a run: stage '{stage.name}' would have no step of "
                f"{batch_size} pictures."
            )
        if end > start:
            found.append((stage, (start * batch_size, end * batch_size)))
        start = end
    last, (start, _) = found[-1]
    return [*found[:-1], (last, (start, None))]
