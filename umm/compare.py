"""What a comparison of latent spaces declares before its first run: spaces, one budget for all, columns, seeds.

Every space goes through the same stages with every seed: a decoder (`recon`; of a space that trains networks of its own
this is its training), a generator (`gen`) and a probe (`und`), each an ordinary run of that task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from umm.config import flatten, read_yaml
from umm.declared import Declared, check_free, check_name, configuration, known, listed, typed
from umm.errors import ConfigError, UnknownName
from umm.judging import CHANCE, OF_CLASSES
from umm.registry import find

STAGES = ("recon", "gen", "und")  # tasks, in this order
FIELDS = ("part", "metric", "space")  # of a column
BY_COMPARISON = ("gen.decoder", "latent")  # settings beside those of every experiment that it gives or keeps apart
TAKEN = ("report",)


@dataclass
class Space:
    """One line of the table."""

    latent: dict[str, Any] = field(default_factory=dict)  # settings of the section `latent`
    about: str = ""
    stages: dict[str, Any] = field(default_factory=dict)  # {stage: settings that differ from everybody's}


@dataclass
class Declaration(Declared):
    """The whole comparison."""

    kind, command = "comparison", "umm compare run"
    about: str = ""
    folder: str = ""
    split: Literal["val", "test"] = "test"
    seeds: Any = 3  # a number, or a list
    overrides: dict[str, Any] = field(default_factory=dict)  # of all runs
    stages: dict[str, Any] = field(default_factory=dict)  # {stage: settings of its runs}
    spaces: dict[str, Any] = field(default_factory=dict)  # name -> Space
    columns: dict[str, Any] = field(default_factory=dict)  # name -> {part: gen, metric: fd, space: effnet}: one row

    @classmethod
    def of(cls, stored: dict) -> Declaration:
        return cls(**stored | {"spaces": {name: Space(**values) for name, values in stored["spaces"].items()}})

    def settings(self, name: str, stage: str) -> dict[str, Any]:
        """{dotted setting: value} of a space's runs of a stage, but for what the run itself decides."""
        space = self.spaces[name]
        latent = {f"latent.{key}": value for key, value in flatten(space.latent)}
        return self.common(stage) | latent | self.changed(name).get(stage, {}) | {"eval.split": self.split}

    def common(self, stage: str) -> dict[str, Any]:
        """{dotted setting: value} that all spaces' runs of a stage are given."""
        return dict(flatten(self.overrides)) | dict(flatten(self.stages[stage]))

    def changed(self, name: str) -> dict[str, dict[str, Any]]:
        """{stage: {dotted setting: value}} in which a space differs from the others."""
        return {stage: dict(flatten(given)) for stage, given in self.spaces[name].stages.items()}


def read_declaration(file: str | Path) -> Declaration:
    """A checked declaration.

    Raises:
        ConfigError: one sentence about the first thing that is wrong; every run's settings are tried.
    """
    stored = typed(Declaration, read_yaml(file), str(file))
    stored["spaces"] = {
        name: typed(Space, given, f"{file}, space '{name}'") for name, given in stored["spaces"].items()
    }
    declared = Declaration.of(stored)
    declared.seeds = listed(declared.seeds, 2, file)
    check(declared, file)
    return declared


def check(declared: Declaration, file: str | Path) -> None:
    """Refuse what would be found out only after hours."""
    if not declared.folder:
        raise ConfigError(f"{file}: folder is not given: where are the runs to be?")
    if not declared.spaces or not declared.stages or not declared.columns:
        raise ConfigError(f"{file}: a comparison needs spaces, stages and columns.")
    check_stages(declared.stages, str(file))
    if STAGES[0] not in declared.stages:
        raise ConfigError(f"{file}: stages needs {STAGES[0]}: what becomes of a latent is judged as a picture.")
    refuse_own(declared.overrides, f"{file}: overrides")
    configs: dict[str, list[DictConfig]] = {stage: [] for stage in declared.stages}
    for name in declared.spaces:
        for stage, config in check_space(declared, name, f"{file}: space '{name}'").items():
            configs[stage].append(config)
    for name, row in declared.columns.items():
        check_column(row, configs, f"{file}: column '{name}'")


def check_space(declared: Declaration, name: str, where: str) -> dict[str, DictConfig]:
    """{stage: configuration} of a space's runs, once there is nothing to refuse."""
    space = declared.spaces[name]
    check_name(name, where, TAKEN)
    if "name" not in space.latent:
        raise ConfigError(f"{where}: say which with latent: {{name: dinov2, ...}}.")
    check_stages(space.stages, where)
    for stage in space.stages:
        known(stage, declared.stages, where, "stage")
    configs = {}
    for stage in declared.stages:
        try:
            configs[stage] = configuration(stage, declared.settings(name, stage), f"{where}, {stage}")
        except UnknownName as error:
            raise UnknownName(f"{where}, {stage}: {error}") from error
        check_cache(configs[stage], f"{where}, {stage}")
    return configs


def check_cache(config: DictConfig, where: str) -> None:
    """Refuse a generator or a probe whose latents cannot be kept as it wants them kept."""
    name, place = config.latent.name, config.cache.dir
    if config.task == STAGES[0]:  # where a space is trained, it reads pictures
        return
    if place is not None and not find("latents", name).cacheable(config.latent):
        raise ConfigError(f"{where}: latents of {name} as it is set depend on their batch, give cache: {{dir: null}}.")
    if place is None and config.eval.cached:
        raise ConfigError(f"{where}: eval.cached=true needs a place for latents: set cache.dir, or eval.cached=false.")


def check_column(row: Any, configs: dict[str, list[DictConfig]], where: str) -> None:
    """Refuse a column that no row of some space's run will answer to, or several."""
    named = isinstance(row, dict) and {"part", "metric"} <= row.keys()
    if not named or not all(isinstance(value, str) for value in row.values()):
        raise ConfigError(f"{where} must name a part and a metric, e.g. {{part: recon, metric: psnr}}.")
    for key in row:
        known(key, FIELDS, where, "field")
    known(row["part"], configs, where, "stage")
    metric, space = row["metric"], row.get("space")
    for numbers in map(judged, configs[row["part"]]):
        if numbers is None or metric.startswith("recall of ") or " at latent noise " in metric:
            continue  # which there are is seen later
        known(metric, numbers, where, "metric of these runs")
        spaces = numbers[metric]
        if space is None and len(spaces) > 1:
            raise ConfigError(f"{where}: {metric} is measured in {', '.join(spaces)}: say which with space.")
        if space is not None and not spaces:
            raise ConfigError(f"{where}: {metric} is measured in no feature space: leave out space.")
        if space is not None:
            known(space, spaces, where, "feature space of these runs")


def judged(config: DictConfig) -> dict[str, Sequence[str]] | None:
    """{number: feature spaces it is measured in} of a run's evaluation; None: not known before it."""
    if config.task == "und":
        return dict.fromkeys(("accuracy", CHANCE), ()) if config.und.kind == "classify" else None
    spaces, found = [*config.eval.features, *(["latents"] if config.task == "gen" else [])], {}
    for name in config.eval.metrics:
        metric = find("metrics", name)
        numbers = metric.numbers or (f"lpips_{config.eval.lpips}",)  # the one that is named after its network
        found |= dict.fromkeys(numbers, () if metric.paired else spaces)
    if config.task == "gen" and config.gen.conditional:
        found |= dict.fromkeys(OF_CLASSES, spaces)
    if config.task == "recon" and config.eval.baselines:
        found |= dict.fromkeys(("psnr of the mean picture", "psnr of an untrained decoder"), ())
    return found


def check_stages(stages: dict[str, Any], where: str) -> None:
    for stage, settings in stages.items():
        known(stage, STAGES, f"{where}: stages", "stage")
        if not isinstance(settings, dict):
            raise ConfigError(f"{where}: stage {stage} must be a mapping of settings, got {settings!r}.")
        refuse_own(settings, f"{where}: stage {stage}")


def refuse_own(settings: dict[str, Any], where: str) -> None:
    check_free(settings, where)
    for key, _ in flatten(settings):
        if key.startswith(BY_COMPARISON):
            raise ConfigError(f"{where} sets '{key}', which belongs to a space's own 'latent' or is given by its runs.")
