"""What a comparison of latent spaces declares before its first run: spaces, one budget for all, columns, seeds.

Every space goes through the same stages with every seed: a decoder (`recon`; of a space that trains networks of its own
this is its training), a generator (`gen`) and a probe (`und`), each an ordinary run of that task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from umm.config import flatten, read_yaml
from umm.declared import Declared, check_free, check_name, configuration, known, listed, typed
from umm.errors import ConfigError

STAGES = ("recon", "gen", "und")  # tasks, in this order
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
        both = dict(flatten(self.overrides)) | dict(flatten(self.stages[stage]))
        return both | latent | self.changed(name).get(stage, {}) | {"eval.split": self.split}

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
    for name, space in declared.spaces.items():
        where = f"{file}: space '{name}'"
        check_name(name, where, TAKEN)
        if "name" not in space.latent:
            raise ConfigError(f"{where}: say which with latent: {{name: dinov2, ...}}.")
        check_stages(space.stages, where)
        for stage in space.stages:
            known(stage, declared.stages, where, "stage")
        for stage in declared.stages:
            configuration(stage, declared.settings(name, stage), f"{where}, {stage}")
    for name, row in declared.columns.items():
        if not isinstance(row, dict) or not {"part", "metric"} <= row.keys():
            raise ConfigError(f"{file}: column '{name}' must name a part and a metric, e.g. {{part: recon, metric: "
                              "psnr}.")  # fmt: skip
        known(row["part"], declared.stages, f"{file}: column '{name}'", "stage")


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
