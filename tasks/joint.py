"""Several tasks in one loop on one latent space: do they help each other?

    joint.share=trunk    `und` reads a block of the DiT that `gen` trains; both losses move the blocks up to it
    joint.share=adapter  every part reads latents through one residual adapter, which all losses move (`_adapter.py`)
    joint.share=nothing  every part trains what it would train alone, on the same pictures

Every part keeps its own data order and random stream, named by (seed, part), and its gradient is clipped by itself.
So a part that is alone, or whose partner is stopped, is bit for bit the run of `--task gen` or `--task und`; what
differs otherwise was brought about by the other loss. `umm synergy` builds its arms from these settings.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from itertools import pairwise

from accelerate import Accelerator
from omegaconf import DictConfig

from umm import settings as schemas
from umm.build import settings_of
from umm.data.base import DataSource
from umm.errors import ConfigError
from umm.judging import Records
from umm.latents.base import LatentSpace
from umm.model import UnifiedModel
from umm.registry import find
from umm.settings import JointSettings
from umm.tasks._adapter import adapter_groups, build_adapted, check_adapted, judge_adapter
from umm.tasks._parts import PartGen, PartUnd, SharedTrunk
from umm.tasks.base import Group, Phase, Task, Turn
from umm.tasks.und import read_parts

# what an optimiser shared by both parts leaves no room for -> what to set instead
ELSEWHERE = {
    "gen": {"optim": "joint.optim", "ema": "joint.ema"},
    "und": {"optim": "joint.optim", "ema": "joint.ema", "dit": "gen.dit", "train": "joint.share=nothing"},
}
EMA_ELSEWHERE = {part: {"ema": "joint.ema"} for part in ("gen", "und", "recon")}


class Joint(Task):
    """The parts, and who moves which parameters."""

    name = "joint"

    def __init__(self, config: DictConfig, space: LatentSpace, val: DataSource | None):
        super().__init__(config, space, val)
        self.settings = settings_of(config.joint)
        check(self.settings, config)
        self.shares, self.adapter = self.settings.share == "trunk", None
        if self.settings.share == "adapter":
            self.adapter, self.parts = build_adapted(config, space, val)
        else:
            self.parts = self.build_shared() if self.shares else self.build_apart()
        if self.settings.sequential:
            self.place_one_after_another()

    def build_apart(self) -> dict[str, Task]:
        return {part: find("tasks", part)(self.config, self.space, self.val) for part in self.settings.parts}

    def build_shared(self) -> dict[str, Task]:
        """Both parts stand on one DiT, also where only one of them is trained."""
        settings, config = self.settings, copy.deepcopy(self.config)
        for part in ("gen", "und"):
            config[part].optim, config[part].ema = config.joint.optim, config.joint.ema
        config.und.dit, config.und.train = config.gen.dit, "trunk"
        gen = PartGen(config, self.space, self.val)
        gen.placebo = settings.placebo
        und = PartUnd(config, self.space, self.val, gen.dit, settings.placebo == "permuted_labels")
        self.trunk = SharedTrunk(gen.dit, und.phases[0].module.reader, und.settings.block, und.settings.time)
        self.gen, both = gen, {"gen": gen, "und": und}
        found = {part: both[part] for part in settings.parts if part in both}
        if settings.twice:
            found |= {f"{part}2": again(task) for part, task in found.items()}
        apart = [part for part in settings.parts if part not in both]
        return found | {part: find("tasks", part)(self.config, self.space, self.val) for part in apart}

    def place_one_after_another(self) -> None:
        """Equal windows of the run, in the order of the parts."""
        images, batch, parts = self.config.train.images, self.config.train.batch_size, list(self.parts.values())
        if images % (len(parts) * batch):
            raise ConfigError(
                f"joint.sequential: train.images={images} cannot be shared equally by {len(parts)} parts in whole "
                f"batches: choose a multiple of {len(parts) * batch}."
            )
        edges = [images * i // len(parts) for i in range(len(parts) + 1)]
        for part, window in zip(parts, pairwise(edges)):
            part.window = window

    # ------------------------------------------------------------------------------------------------------ the loop

    def members(self) -> list[Task]:
        return list(self.parts.values())

    def groups(self) -> list[Group]:
        """One optimiser for what is shared, and those of the parts that share nothing."""
        if self.adapter is not None:
            return adapter_groups(self.adapter, self.parts, self.settings)
        apart = [part for name, part in self.parts.items() if not self.shares or name == "recon"]
        found = [group for part in apart for group in part.groups()]
        return found + ([self.shared_group()] if self.shares else [])

    def shared_group(self) -> Group:
        settings, trunk = self.settings, self.trunk
        met = [p for p in read_parts(trunk.dit, trunk.block) if p.requires_grad]
        picks = {"gen": lambda module: module.dit, "und": lambda module: module.read()}
        turns = []
        for name, task in self.parts.items():
            kind = name.removesuffix("2")
            if kind in picks:
                weight, stopped = getattr(settings.weights, kind), met if kind in settings.stop else []
                turns.append(Turn(task, task.phases[0].name, settings.optim.clip, weight, stopped, picks[kind]))
        return Group("joint.trunk", Phase("trunk", trunk, settings.optim, settings.ema), turns, met, settings.balance)

    # ------------------------------------------------------------------------------------------------------- results

    def head_settings(self) -> dict[str, dict]:
        found = {}
        for part in self.parts.values():
            found |= part.head_settings()
        if self.adapter is not None:
            return found | {"adapter": {"settings": asdict(self.settings.adapter), "facts": {}}}
        return found | ({"dit": self.gen.head_settings()["dit"]} if "dit" in found and self.shares else {})

    @staticmethod
    def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> Records:
        """Every part's own evaluation."""
        records = Records()
        for part in config.joint.parts:
            records.add(find("tasks", part).evaluate(model, config, accelerator))
        if "adapter" in model.heads:
            records.add(judge_adapter(model, config, accelerator))
        return records


def again(task: Task) -> Task:
    """The same networks, under a name that gives another order of the same pictures, and other noise."""
    twin = copy.copy(task)
    twin.name = f"{task.name}2"
    return twin


def check(settings: JointSettings, config: DictConfig) -> None:
    """Refuse settings that contradict each other, or that would be passed over in silence."""
    parts = settings.parts
    if not parts or len(set(parts)) < len(parts):
        raise ConfigError(f"joint.parts={list(parts)}: name one part or more, each once.")
    if settings.share == "adapter":
        check_adapted(settings, config)
        refuse_absent(settings)
        refuse_elsewhere(config, EMA_ELSEWHERE, settings.share)
        return
    if settings.adapter != schemas.AdapterSettings():
        raise ConfigError(f"joint.adapter has no effect with joint.share={settings.share}: set joint.share=adapter.")
    if settings.weights.recon != 1 or "recon" in settings.stop:
        raise ConfigError(f"recon shares nothing with joint.share={settings.share}: it has neither weight nor stop.")
    refuse_absent(settings)
    if settings.share == "nothing":
        for key in ("balance", "stop", "twice", "weights"):
            if getattr(settings, key) != getattr(JointSettings(), key):
                raise ConfigError(f"joint.{key} speaks of what the parts share: set joint.share=trunk.")
        if settings.placebo != "none":
            raise ConfigError("joint.placebo takes the place of a partner: set joint.share=trunk.")
        if {"gen", "und"} <= set(parts) and config.und.train == "trunk":
            raise ConfigError("und.train=trunk beside gen makes two trunks: set joint.share=trunk, or und.train=probe.")
        return
    if not {"gen", "und"} & set(parts):
        raise ConfigError(f"joint.share=trunk needs gen or und among joint.parts, not only {', '.join(parts)}.")
    of = "und" if settings.placebo == "permuted_labels" else "gen"
    if settings.placebo != "none" and of not in parts:
        raise ConfigError(f"joint.placebo={settings.placebo} changes {of}, which is not among joint.parts: add it.")
    if config.und.kind != "classify":
        raise ConfigError(f"und.kind={config.und.kind} reads latents, not a trunk: set joint.share=nothing.")
    refuse_elsewhere(config, ELSEWHERE, settings.share)


def refuse_absent(settings: JointSettings) -> None:
    """Refuse what speaks of a part that is not there, or of several where there is one."""
    parts, weighed = settings.parts, [part for part, weight in asdict(settings.weights).items() if weight != 1]
    shared = [part for part in parts if part != "recon" or settings.share == "adapter"]
    for key, named in (("stop", settings.stop), ("weights", weighed)):
        for part in named:
            if part not in parts:
                raise ConfigError(f"joint.{key} names {part}, which is not among joint.parts: add it, or leave it out.")
    for key, there in (("balance", shared), ("sequential", parts)):
        if getattr(settings, key) and len(there) * (1 + settings.twice) < 2:
            raise ConfigError(f"joint.{key} has no effect on {', '.join(there)} alone: it needs two of joint.parts.")


def refuse_elsewhere(config: DictConfig, elsewhere: dict[str, dict[str, str]], share: str) -> None:
    """Refuse what has no effect because another setting takes its place."""
    for part, names in elsewhere.items():
        given = settings_of(config[part])
        default = type(given)()
        for name, other in names.items():
            if getattr(given, name) != getattr(default, name):
                raise ConfigError(f"{part}.{name} has no effect with joint.share={share}: set {other}.")
