"""Latents out of noise: a trained DiT, its flow, its guidance and a sampler.

Picture i of a sampling run is a function of (seed, i, its label): numbers come from its own stream, and networks run on
whole groups of pictures, because matrix products over other numbers of rows round otherwise. On CPUs that makes it
bit-identical over batch sizes and processes; GPU kernels change with the batch, so keep `BATCH` there.

B batch, C channels, h w latent grid, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from umm import flow
from umm.errors import ConfigError, UmmError, nearest
from umm.heads.dit import DiT
from umm.rng import PictureRNG
from umm.settings import FlowSettings, GuidanceSettings, SamplerSettings

if TYPE_CHECKING:
    from umm.model import UnifiedModel

BATCH = 64  # pictures a network call
GROUP = 8  # every call's number of pictures is a multiple of it
Labels = str | Sequence[int | str]  # "balanced", "random", or class numbers and names, repeated in turn


@dataclass
class Drawer:
    """A generator ready to draw: `latents(indices, labels, seed)`."""

    dit: DiT
    settings: FlowSettings
    sampler: SamplerSettings
    weak: Drawer | None = None  # what autoguidance guides away from

    @classmethod
    def of(cls, model: UnifiedModel, sampler: SamplerSettings | None = None) -> Drawer:
        """The drawer of a saved model, with its own sampler or another; loads the weak model of autoguidance.

        Raises:
            MissingHead: the model has no `dit`.
            UmmError: the weak model lives on another latent space.
        """
        dit, facts = model.head("dit"), model.facts["generation"]
        sampler = sampler or sampler_of(facts["sampler"])
        guidance, weak = sampler.guidance, None
        if guidance.kind == "auto" and guidance.scale != 1 and guidance.weak is not None:
            from umm.model import load_head  # models are built on samplers

            head, _, its_facts = load_head(guidance.weak, "dit", model.space)
            weak = cls(head, FlowSettings(**its_facts["generation"]["flow"]), sampler)
        return cls(dit, FlowSettings(**facts["flow"]), sampler, weak)

    def __post_init__(self):
        check_guidance(self.sampler.guidance, self.dit)

    def pictures(self, model: UnifiedModel, indices: Sequence[int], labels: Sequence[int] | None, seed: int) -> Tensor:
        """The same pictures decoded, (B, 3, H, W) in [0, 1]."""
        return decode(model, self.latents(indices, labels, seed))

    @torch.no_grad()
    def latents(self, indices: Sequence[int], labels: Sequence[int] | None, seed: int) -> Tensor:
        """Standardised latents (B, C, h, w), float32, of pictures `indices` with class `labels` (None: no class)."""
        count, device = len(indices), self.dit.embed.weight.device
        indices = [*indices, *[indices[-1]] * (-count % GROUP)]
        y = torch.full((len(indices),), self.dit.null_label)
        y[:count] = self.dit.null_label if labels is None else torch.tensor(labels)
        y = y.to(device)
        rng = PictureRNG(indices, seed, "sample")  # on the CPU: the same pictures on every machine
        start = rng.fork("start").randn(*self.dit.spec.shape).to(device)
        field, shift = self.field(), flow.shift_for(self.dit.spec.dim, self.settings)
        return flow.sample(lambda x, t: field(x, t, y), start, shift, self.sampler, rng.fork("noise"))[:count]

    def field(self) -> flow.Field:
        """The guided velocity (x, t, y) -> (B, C, h, w)."""
        guidance = self.sampler.guidance
        scale, interval = guidance.scale, tuple(guidance.interval)
        if guidance.kind == "none" or scale == 1:
            return self.velocity
        if guidance.kind == "classifier_free":
            return flow.classifier_free(self.velocity, self.dit.null_label, scale, interval)
        if guidance.kind == "auto":
            return flow.autoguidance(self.velocity, self.weak.velocity, scale, interval)
        return flow.internal_guidance(self.velocities, scale, interval)

    def velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return flow.velocity_field(self.dit, self.settings.prediction, self.settings.t_eps)(x, t, y)

    def velocities(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of the whole network and of its auxiliary output."""
        full, base, _ = self.dit(x, t, y, auxiliary=True)
        kind, least = self.settings.prediction, self.settings.t_eps
        return flow.to_velocity(full, x, t, kind, least), flow.to_velocity(base, x, t, kind, least)


def decode(model: UnifiedModel, latents: Tensor) -> Tensor:
    """Standardised latents (B, C, h, w) -> pictures (B, 3, H, W) in [0, 1], in whole groups."""
    padding = latents[-1:].expand(-len(latents) % GROUP, -1, -1, -1)
    return model.decode(torch.cat([latents, padding]))[: len(latents)]


def sampler_of(settings: dict) -> SamplerSettings:
    """From the dictionary that a saved model holds."""
    return SamplerSettings(**settings | {"guidance": GuidanceSettings(**settings["guidance"])})


def check_guidance(guidance: GuidanceSettings, dit: DiT) -> None:
    """Refuse guidance that this network cannot give, or that would be ignored."""
    where = "the sampler's guidance"
    if not math.isfinite(guidance.scale):
        raise ConfigError(f"{where}.scale={guidance.scale} is not a number to scale by: 1 is no guidance.")
    if guidance.kind == "none" and guidance.scale != 1:
        raise ConfigError(f"{where}.scale={guidance.scale} without a kind does nothing: set {where}.kind too.")
    if guidance.kind == "classifier_free" and not dit.num_classes:
        raise ConfigError(f"{where}.kind=classifier_free needs a model that was trained on classes, this one was not.")
    if guidance.kind == "internal" and dit.base_final is None:
        raise ConfigError(f"{where}.kind=internal needs an auxiliary output: train with dit.base_depth above 0.")
    if guidance.kind == "auto" and guidance.scale != 1 and guidance.weak is None:
        raise ConfigError(f"{where}.kind=auto needs {where}.weak=<run of a smaller or less trained generator>.")


# -------------------------------------------------------------------------------------------------------------- labels


def choose_labels(dit: DiT, labels: Labels, indices: Sequence[int], seed: int) -> list[int] | None:
    """The class of each picture, a function of its index; None for a model without classes.

    Raises:
        UmmError: no class has that name or number.
    """
    if not dit.num_classes:
        if labels not in ("balanced", "random"):
            raise UmmError("this generator was trained without classes: it draws what it likes, give no labels.")
        return None
    if labels == "balanced":
        return [i % dit.num_classes for i in indices]
    if labels == "random":
        return PictureRNG(indices, seed, "label").randint(dit.num_classes).tolist()
    if isinstance(labels, str) or not len(labels):
        raise UmmError(f"labels are balanced, random or a list of classes, got {labels!r}.")
    chosen = [class_number(dit, label) for label in labels]
    return [chosen[i % len(chosen)] for i in indices]


def class_number(dit: DiT, label: int | str) -> int:
    """A class by name or by number."""
    if str(label) in dit.classes:
        return dit.classes.index(str(label))
    if str(label).isdecimal() and int(label) < dit.num_classes:
        return int(label)
    names = ", ".join(dit.classes[:20]) + (", ..." if len(dit.classes) > 20 else "")
    raise UmmError(
        f"no class is called '{label}'.{nearest(str(label), dit.classes)} There are numbers 0 to "
        f"{dit.num_classes - 1}" + (f" and the names {names}." if names else ".")
    )
