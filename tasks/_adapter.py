"""Parts that share an adapter on the frozen encoder's latents: z' = z + A(z) in place of z (see `joint.py`).

What keeps latents from collapsing, which is the cheapest way to a low flow loss:
    the adapter keeps the length of every token (`umm/heads/adapter.py`);
    with joint.adapter.flow=input the generator's target is z' without its gradient: no latent is moved to be foretold;
    a frozen teacher, the unadapted z, holds z' by joint.adapter.teacher * mean (z' - z)^2.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig
from torch import Tensor, nn

from umm.build import judged_data, open_source, settings_of
from umm.data.base import DataSource, collate
from umm.errors import ConfigError
from umm.heads.adapter import Adapter
from umm.judging import Records, share_of
from umm.latents._adapted import adapted
from umm.latents.base import LatentSpace
from umm.layers import tokens_of
from umm.loader import to_device
from umm.metrics.psnr import psnr
from umm.model import UnifiedModel
from umm.pictures import save_grid
from umm.progress import Progress
from umm.rng import PictureRNG, derive_seed, seeded_init
from umm.settings import JointSettings
from umm.stats import bootstrap
from umm.tasks._answering import Answering
from umm.tasks._parts import PartGen, with_permuted_labels
from umm.tasks._picture_loss import shown_pictures
from umm.tasks.base import Group, Loan, Phase, Task, Turn
from umm.tasks.recon import Recon
from umm.tasks.und import Und
from umm.transforms import to_uint8

BORROWED = "trained on unadapted latents"  # of the decoder that reads adapted ones
OWN = "trained on adapted latents"


class Adapted:
    """What every part adds to its task: the adapter is one more head of the model."""

    def heads(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return super().heads(modules) | {"adapter": modules["adapter"]}


class AdaptedGen(Adapted, PartGen):
    """Generation of adapted latents."""

    moves_target = False

    def goal(self, z: Tensor) -> Tensor:
        return z if self.moves_target else z.detach()

    def facts(self) -> dict:
        return super().facts() | ({} if self.decoder is None else {"adapter": {"decoder": BORROWED}})


class AdaptedUnd(Adapted, Und):
    """Classes read from adapted latents."""

    permuted = False

    def view(self, data):
        data = super().view(data)
        return with_permuted_labels(data, self.seed) if self.permuted else data


class AdaptedAnswering(Adapted, Answering):
    """Questions about adapted latents."""

    def sample(self, modules: dict[str, nn.Module], file: Path) -> None:
        averaged = copy.copy(self)
        averaged.space = adapted(self.space, modules["adapter"])
        super(AdaptedAnswering, averaged).sample(modules, file)


class AdaptedRecon(Adapted, Recon):
    """A decoder of adapted latents."""

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], file: Path) -> None:
        if self.val is None:
            return
        images = shown_pictures(self.val, self.shown, self.space.normalizer.mean.device)
        drawn = UnifiedModel(self.space, self.heads(modules)).reconstruct(images)
        save_grid(file, [images, drawn], rows=["original", "reconstruction"])

    def facts(self) -> dict:
        return super().facts() | {"adapter": {"decoder": OWN}}


class Teacher(Task):
    """Holds adapted latents near the unadapted ones, on the pictures of all parts that move them."""

    name = "teacher"

    def __init__(self, space: LatentSpace):
        self.space, self.seed = space, 0

    def loss(self, phase: str, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        """Mean squared distance; logged are the drift ||z' - z|| / ||z|| and what is left of variance and dimension."""
        z, moved = self.both(batch["latent"])
        logged = {"drift": drift(z, moved.detach()).mean(), **kept(z, moved.detach())}
        return {"loss": (moved - z).square().mean(), **logged}

    def both(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised latents before and behind the adapter, (B, C, h, w) each."""
        z = self.space.normalizer.unadapted(raw.float())
        return z, self.space.normalizer.adapter(z)


def drift(z: Tensor, moved: Tensor) -> Tensor:
    """||z' - z|| / ||z|| of each picture, (B,)."""
    return (moved - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1).clamp_min(1e-12)


def kept(z: Tensor, moved: Tensor) -> dict[str, Tensor]:
    """What z' has over what z has: variance of the channels, mean and least, and participation ratio of the tokens."""
    one, other = (torch.cov(tokens_of(latents).flatten(0, 1).T, correction=0) for latents in (z, moved))  # (C, C)
    share = other.diag() / one.diag().clamp_min(1e-12)
    dimension = participation(other) / participation(one)
    return {"variance": share.mean(), "least_variance": share.min(), "dimension": dimension}


def participation(covariance: Tensor) -> Tensor:
    """`umm.diagnostics.participation_ratio` without eigenvalues: tr(S)^2 / tr(S^2)."""
    return covariance.trace().square() / covariance.square().sum().clamp_min(1e-12)


# ------------------------------------------------------------------------------------------------------------ building


def build_adapted(config: DictConfig, space: LatentSpace, val: DataSource | None) -> tuple[Adapter, dict[str, Task]]:
    """The adapter and the parts behind it; all of them are averaged alike, as each reads what the other makes."""
    settings, config = settings_of(config.joint), copy.deepcopy(config)
    for part in ("gen", "und", "recon"):
        config[part].ema = settings.ema
    with seeded_init(config.seed, "joint", "adapter"):
        adapter = Adapter.from_config(settings.adapter, space.spec).to(space.normalizer.mean.device)
    und = AdaptedUnd if config.und.kind == "classify" else AdaptedAnswering
    kinds = {"gen": AdaptedGen, "und": und, "recon": AdaptedRecon}
    parts = {name: kinds[name](config, adapted(space, adapter), val) for name in settings.parts}
    if "gen" in parts:
        parts["gen"].placebo, parts["gen"].moves_target = settings.placebo, settings.adapter.flow == "both"
    if "und" in parts:
        parts["und"].permuted = settings.placebo == "permuted_labels"
    return adapter, parts


def adapter_groups(adapter: Adapter, parts: dict[str, Task], settings: JointSettings) -> list[Group]:
    """The parts' own optimisers, then the adapter's, which follows the gradients that their passes left it."""
    loan, shared = Loan(adapter.parameters()), list(adapter.parameters())
    groups, turns = [], []
    for name, part in parts.items():
        own = part.groups()
        own[0].turns[0].lends = loan  # a blind twin and a discriminator see no latent with a gradient
        groups += own
        stopped, weight = shared if name in settings.stop else [], getattr(settings.weights, name)
        turns.append(Turn(part, "adapter", settings.optim.clip, weight, stopped, borrows=loan))
    movers = tuple(name for name in parts if name not in settings.stop)
    if movers:
        teacher = Teacher(next(iter(parts.values())).space)
        turns.append(Turn(teacher, "adapter", 0.0, settings.adapter.teacher, guests=movers))
    phase = Phase("adapter", adapter, settings.optim, settings.ema)
    return [*groups, Group("joint.adapter", phase, turns, shared, settings.balance)]


def check_adapted(settings: JointSettings, config: DictConfig) -> None:
    """Refuse what an adapter cannot do, or what would be passed over in silence."""
    parts = settings.parts
    if settings.twice:
        raise ConfigError("joint.twice doubles the parts of a trunk: set joint.share=trunk.")
    if settings.placebo in ("gaussian", "shuffled_tokens") and "gen" not in parts:
        raise ConfigError(f"joint.placebo={settings.placebo} takes the place of gen: name it in joint.parts.")
    if settings.placebo == "permuted_labels" and ("und" not in parts or config.und.kind != "classify"):
        raise ConfigError("joint.placebo=permuted_labels needs und in joint.parts and und.kind=classify.")
    if {"gen", "und"} <= set(parts) and config.und.train == "trunk":
        raise ConfigError("und.train=trunk beside gen makes two trunks: set joint.share=trunk, or und.train=probe.")
    if "recon" in parts and "gen" in parts and config.gen.decoder is not None:
        raise ConfigError("joint.parts has recon, whose decoder would take the place of gen.decoder: leave out one.")
    if "recon" in parts and config.latent.normalizer == "sphere":
        raise ConfigError("latent.normalizer=sphere forgets lengths, which recon draws from: choose another one.")


# ------------------------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def judge_adapter(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> Records:
    """How far the adapter moves latents, and what a decoder that was trained on unadapted ones makes of that."""
    split = config.eval.split
    source = judged_data(config, model.space, open_source(config, split), accelerator)
    borrowed = model.facts.get("adapter", {}).get("decoder") == BORROWED
    total = min(len(source), config.eval.images or len(source))
    teacher, items = Teacher(model.space), []  # (name, picture, value)
    with Progress(total, enabled=accelerator.is_main_process, what="judging the adapter") as progress:
        for indices in share_of(total, accelerator, config.eval.batch_size):
            batch = collate([{k: v for k, v in source[i].items() if k in ("image", "latent", "id")} for i in indices])
            pictures = {key: to_device(value, accelerator.device) for key, value in batch.items()}
            raw = pictures["latent"] if "latent" in batch else model.space.raw(pictures["image"])
            z, moved = teacher.both(raw)
            values = {"latent drift": drift(z, moved)}
            if borrowed and "image" in batch:
                for name, latents in {"unadapted": z, "adapted": moved}.items():
                    drawn = to_uint8(model.decode(latents))
                    values[f"psnr of the borrowed decoder, {name} latents"] = psnr(to_uint8(pictures["image"]), drawn)
            items += [(name, i, v) for name, column in values.items() for i, v in zip(batch["id"], column.tolist())]
            progress.advance(len(indices) * accelerator.num_processes)
    if accelerator.num_processes > 1:
        items = gather_object(items)
    records = Records(notes=notes(model))
    for name, picture, value in sorted(items):
        records.items.setdefault(name, {})[picture] = value
    records.numbers = [row(name, list(found.values()), config) for name, found in records.items.items()]
    return records


def row(name: str, values: list[float], config: DictConfig) -> dict:
    draw = np.random.default_rng(derive_seed(config.seed, "bootstrap", name))
    interval = bootstrap(values, draw, config.eval.bootstrap)
    found = {"metric": name, "value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}
    better = True if name.startswith("psnr") else None
    return found | {"higher_is_better": better, "version": 1, "headline": True, "conflict": None}


def notes(model: UnifiedModel) -> list[str]:
    """What a reader of an adapted model's numbers must know."""
    decoder = model.facts.get("adapter", {}).get("decoder")
    return [f"latents go through an adapter; the decoder was {decoder}"] if decoder else []
