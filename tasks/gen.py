"""Stage 2: a diffusion transformer that draws latents of a frozen space (RAE, arXiv 2510.11690; RAEv2, 2605.18324).

Latents are standardised, carried towards noise to a random time, and the network learns to say where they came from
(`umm.flow`). B batch, C channels, h w latent grid, K classes.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn

from umm import flow
from umm.build import settings_of
from umm.data.base import DataSource
from umm.errors import ConfigError, DataError
from umm.heads.dit import DiT
from umm.judging import Records
from umm.latents._trained import build_base
from umm.latents.base import LatentSpace
from umm.layers import patchify, tokens_of
from umm.model import UnifiedModel, load_head
from umm.pictures import save_grid
from umm.rng import PictureRNG, seeded_init
from umm.sampling import check_guidance
from umm.settings import GenSettings
from umm.tasks.base import Phase, Task

log = logging.getLogger("umm")

TIME_BINS = 5  # of equal width on [0, 1]: where along the path the loss is


class Gen(Task):
    """Trains a `DiT`; its samples are drawn by a decoder where `gen.decoder` or the space itself has one."""

    name = "gen"
    shown = (6, 4)  # classes and pictures of each in a sample grid

    def __init__(self, config: DictConfig, space: LatentSpace, val: DataSource | None):
        super().__init__(config, space, val)
        self.settings = settings_of(config.gen)
        self.sampler = settings_of(config.eval).sampler
        check_repa(self.settings)
        self.teacher = self.build_teacher()
        self.classes = self.find_classes()
        self.keys = self.find_keys()
        self.dit = self.build_dit()
        check_guidance(self.sampler.guidance, self.dit)
        self.shift = flow.shift_for(space.spec.dim, self.settings.flow)
        self.decoder, self.decoder_described, self.decoder_facts = None, {}, {}
        if self.settings.decoder is not None:
            self.decoder, self.decoder_described, self.decoder_facts = load_head(
                self.settings.decoder, "decoder", space
            )
        self.phases = [Phase("dit", self.dit, self.settings.optim, self.settings.ema)]
        self.said = False  # that there is no decoder

    def find_classes(self) -> list[str]:
        """Names of the classes to learn; none for unconditional generation."""
        if not self.settings.conditional:
            return []
        classes = self.val.classes if self.val is not None else None
        if not classes:
            raise DataError(
                f"the data set '{self.config.data.name}' has no classes: set gen.conditional=false to learn it without."
            )
        return list(classes)

    def find_keys(self) -> tuple[str, ...]:
        """What a batch must hold; cached latents need no pictures unless features of them are aligned with."""
        pictures = self.config.cache.dir is None or self.needs_features
        keys = ["image"] * pictures + ["latent"] * (self.config.cache.dir is not None)
        return (*keys, "label") if self.classes else tuple(keys)

    @property
    def needs_features(self) -> bool:
        return self.settings.dit.repa_depth > 0 and self.settings.repa.target == "features"

    def build_teacher(self) -> LatentSpace:
        """The space whose features are aligned with."""
        if not self.needs_features or self.settings.repa.encoder is None:
            return self.space
        teacher = build_base(self.settings.repa.encoder, self.space.spec.image_size)
        return teacher.to(self.space.normalizer.mean.device)

    def build_dit(self) -> DiT:
        settings = self.settings.dit
        if settings.repa_depth and settings.repa_dim is None:
            own = self.space.spec.channels * settings.patch**2
            settings.repa_dim = feature_width(self.teacher) if self.needs_features else own
        with seeded_init(self.seed, self.name, "dit"):
            dit = DiT.from_config(settings, self.space.spec, len(self.classes), self.classes)
        if dit.repa is not None and self.settings.repa.weight == 0:
            dit.repa.requires_grad_(False)  # not even its zeros take part in the gradient's norm
        return dit

    # ------------------------------------------------------------------------------------------------------ training

    def loss(self, phase: str, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        """Flow matching, plus the auxiliary output's and the alignment's losses where the network has them."""
        settings = self.settings
        z = self.clean(batch, rng)  # (B, C, h, w)
        goal = self.goal(z)
        t = flow.training_time(rng.fork("time").rand(), self.shift, settings.flow)  # (B,)
        eps = rng.fork("noise").randn(*z.shape[1:])
        out = self.phases[0].forward(flow.interpolate(z, eps, t), t, self.labels(batch, rng), auxiliary=True)
        error = flow.loss(out.prediction.float(), goal, eps, t, settings.flow)  # (B,)
        terms = {"flow": error.mean()}
        total = terms["flow"]
        if out.base is not None:
            terms["base"] = flow.loss(out.base.float(), goal, eps, t, settings.flow).mean()
            total = total + settings.base_weight * terms["base"]
        if out.aligned is not None:
            terms["repa"] = misalignment(out.aligned, self.alignment_target(batch))
            if settings.repa.weight > 0:
                total = total + settings.repa.weight * terms["repa"]
        return {"loss": total, **terms, **by_time(error.detach(), t)}

    def clean(self, batch: dict[str, Tensor], rng: PictureRNG) -> Tensor:
        """What is to be generated: standardised latents."""
        return self.space.normalizer(batch["latent"].float())

    def goal(self, z: Tensor) -> Tensor:
        """What predictions are compared with."""
        return z

    def labels(self, batch: dict[str, Tensor], rng: PictureRNG) -> Tensor | None:
        """Class numbers (B,), some of them dropped for the label that means no class."""
        if not self.classes:
            return None
        dropped = rng.fork("label").rand() < self.settings.label_dropout
        return batch["label"].masked_fill(dropped, self.dit.null_label)

    @torch.no_grad()
    def alignment_target(self, batch: dict[str, Tensor]) -> Tensor:
        """Clean tokens to align with, (B, N, D), N those of the network."""
        if self.settings.repa.target == "latent":
            return patchify(batch["latent"], self.settings.dit.patch)
        features = self.teacher.features(batch["image"]).patches  # (B, N', D)
        side = round(features.shape[1] ** 0.5)
        grid = features.transpose(1, 2).unflatten(2, (side, -1))
        return tokens_of(F.adaptive_avg_pool2d(grid, self.dit.grid))

    # ------------------------------------------------------------------------------------------------------- results

    def sample(self, modules: dict[str, nn.Module], file: Path) -> None:
        """A row a class, always from the same noise; nothing but a sentence where no decoder is at hand."""
        model = UnifiedModel(self.space, self.heads(modules), self.facts())
        if not model.can_decode:
            if not self.said:
                log.warning("no sample grids: set gen.decoder to a recon run on this latent space to see pictures.")
            self.said = True
            return
        rows, columns = self.shown
        classes = self.classes[:rows]
        labels = [name for name in classes for _ in range(columns)] or "balanced"
        pictures = model.sample(labels, num=max(len(classes), 1) * columns, seed=self.seed)
        save_grid(file, list(pictures.split(columns)), rows=classes)

    def heads(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return {"dit": modules["dit"]} | ({} if self.decoder is None else {"decoder": self.decoder})

    def head_settings(self) -> dict[str, dict]:
        facts = {"num_classes": len(self.classes), "classes": self.classes}
        described = {"dit": {"settings": asdict(self.dit.config), "facts": facts}}
        return described | ({} if self.decoder is None else {"decoder": self.decoder_described})

    def facts(self) -> dict:
        """How to draw from the network, and the families that took part in training."""
        trained_with = self.decoder_facts.get("trained_with", {}) | dict.fromkeys(self.teacher.families, "alignment")
        trained_with |= dict.fromkeys(self.space.families, "encoder")
        drawing = {"flow": asdict(self.settings.flow), "sampler": asdict(self.sampler)}
        return {"trained_with": trained_with, "generation": drawing}

    @staticmethod
    def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> Records:
        """Judge as many samples as `eval.split` has pictures."""
        from umm.tasks._gen_judging import judge

        return judge(model, config, accelerator)


def by_time(error: Tensor, t: Tensor) -> dict[str, Tensor]:
    """{time interval: (sum of the loss, pictures), over B}; nothing is looked at on the host."""
    number = (t * TIME_BINS).long().clamp_max(TIME_BINS - 1)
    inside = F.one_hot(number, TIME_BINS).to(error.dtype)  # (B, bins)
    pairs = torch.stack([error @ inside, inside.sum(0)], 1) / len(t)  # (bins, 2)
    return {f"t{k / TIME_BINS:.1f}-{(k + 1) / TIME_BINS:.1f}": pair for k, pair in enumerate(pairs)}


def misalignment(tokens: Tensor, target: Tensor) -> Tensor:
    """1 - mean cosine over tokens of (B, N, D) and (B, N, D), float32."""
    return 1 - F.cosine_similarity(tokens.float(), target.float(), dim=-1).mean()


def check_repa(settings: GenSettings) -> None:
    depth, repa = settings.dit.repa_depth, settings.repa
    if repa.weight > 0 and depth == 0:
        raise ConfigError(
            f"gen.repa.weight={repa.weight} and gen.dit.repa_depth=0: alignment needs a depth, REPA's is 8."
        )
    if repa.encoder is not None and (depth == 0 or repa.target == "latent"):
        raise ConfigError("gen.repa.encoder is for gen.dit.repa_depth above 0 and gen.repa.target=features.")


@torch.no_grad()
def feature_width(space: LatentSpace) -> int:
    """Width of the space's patch features."""
    size = space.spec.image_size
    blank = torch.full((1, 3, size, size), 0.5, device=space.normalizer.mean.device)
    return space.features(blank).patches.shape[-1]
