"""What a synergy experiment declares before its first run: arms, endpoints, margins, seeds, and the hash of it all.

Every arm is one ordinary run of a task, described by settings. The protocol and its names are those of the report:
s = log(error alone / error together) per seed, Sigma = the specialists' compute a joint model is worth over its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from umm.config import flatten, read_yaml
from umm.declared import SET_HERE, Declared, check_free, check_name, configuration, known, listed, typed
from umm.errors import ConfigError
from umm.seed_stats import MOST_SEEDS

ROLES = ("single", "joint", "stop", "placebo", "distill", "more", "sequential", "floor", "front")
CONTROLS = ("placebo", "distill", "more")  # arms whose gain is taken off the joint arm's
TAKEN = ("tuning", "report")


@dataclass
class Endpoint:
    """One direction of the question: a number of the evaluation and how it becomes an error."""

    row: dict[str, Any] = field(default_factory=dict)  # fields that single out one row, {metric: kid, space: effnet}
    single: str = ""  # the specialist's arm
    error: Literal["value", "1 - value", "100 - value"] = "value"
    floor: float | None = None  # smaller errors count as this one: half an item of the test set, say
    margin: float = 0.0  # changes smaller than that are as good as none
    margin_in: Literal["percent", "value"] = "percent"  # of the error, or in units of the number itself
    primary: bool = True  # False: exploratory


@dataclass
class Arm:
    """One kind of run.

    single: one loss; several of them at different `compute` make the learning curve of the endpoint they measure.
    joint: both losses. stop: both, but the measured task's partner does not move what is shared: must equal `single`.
    placebo, distill, more: what a joint arm's gain may be due to instead. sequential: one loss after the other.
    floor: no training of what is shared. front: the headline arm with other loss weights, made from `front`.
    """

    role: str = ""
    measures: list[str] = field(default_factory=list)  # endpoints; none: all
    compute: float = 1.0  # of what is shared, all losses together, in units of the specialist's
    overrides: dict[str, Any] = field(default_factory=dict)  # {joint.parts: [und]}
    base: str | None = None  # a configuration file in place of the experiment's
    seeds: int | None = None  # only the first so many
    tuned_as: str | None = None  # takes the settings that tuning chose for that arm
    about: str = ""


@dataclass
class Front:
    """The headline arm at other values of one setting, in general the weight of a loss."""

    key: str = ""
    values: list[float] = field(default_factory=list)
    seeds: int | None = None


@dataclass
class Tuning:
    """Every listed arm is tried with every combination of the grid, on seeds of its own and the validation split."""

    seeds: list[int] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    arms: list[str] = field(default_factory=list)

    def trials(self) -> list[dict[str, Any]]:
        """[{dotted setting: value}] of the grid."""
        return [dict(flatten(dict(zip(self.grid, values)))) for values in itertools.product(*self.grid.values())]


@dataclass
class Comparison:
    """An exploratory question: is `arm` better than `reference` on `endpoint`?"""

    arm: str = ""
    reference: str = ""
    endpoint: str = ""


@dataclass
class Declaration(Declared):
    """The whole experiment."""

    kind, command = "synergy experiment", "umm synergy run"
    task: str = "joint"
    about: str = ""
    folder: str = ""
    config: str | None = None  # configuration file of all arms, relative to this one
    overrides: dict[str, Any] = field(default_factory=dict)  # of all arms
    split: Literal["val", "test"] = "test"
    seeds: Any = 8  # a number, or a list
    headline: str = ""  # the joint arm the verdict is about
    endpoints: dict[str, Any] = field(default_factory=dict)  # name -> Endpoint
    arms: dict[str, Any] = field(default_factory=dict)  # name -> Arm
    front: Any = None  # Front
    tuning: Any = None  # Tuning
    comparisons: list[Any] = field(default_factory=list)  # Comparisons
    alpha: float = 0.05  # two-sided
    test: Literal["sign-flip", "t"] = "sign-flip"  # decides; at 0.05 the exact one needs 6 seeds for both, 7 for one
    tolerance: float = 1e-6  # relative difference of errors by which a stop arm may miss its specialist

    @classmethod
    def of(cls, stored: dict) -> Declaration:
        front, tuning = stored["front"], stored["tuning"]
        parts = {
            "endpoints": {name: Endpoint(**values) for name, values in stored["endpoints"].items()},
            "arms": {name: Arm(**values) for name, values in stored["arms"].items()},
            "front": front and Front(**front),
            "tuning": tuning and Tuning(**tuning),
            "comparisons": [Comparison(**values) for values in stored["comparisons"]],
        }
        return cls(**stored | parts)

    @property
    def primary(self) -> list[str]:
        return [name for name, endpoint in self.endpoints.items() if endpoint.primary]

    def seeds_of(self, arm: str) -> list[int]:
        return self.seeds[: self.arms[arm].seeds]

    def with_role(self, *roles: str) -> list[str]:
        return [name for name, arm in self.arms.items() if arm.role in roles]

    def curve(self, endpoint: str) -> list[str]:
        """The single arms that measure an endpoint, cheapest first."""
        names = [name for name in self.with_role("single") if endpoint in self.arms[name].measures]
        return sorted(names, key=lambda name: self.arms[name].compute)

    def settings(self, arm: str, folder: Path, seed: int, split: str, chosen: dict[str, Any] | None = None) -> dict:
        """{dotted setting: value} of one run; a point of the front keeps its own place on it, whatever was chosen."""
        mine = {"run": str(folder), "seed": seed, "eval.split": split}
        kept = {self.front.key} if self.arms[arm].role == "front" else set()
        tuned = {key: value for key, value in (chosen or {}).items() if key not in kept}
        return self.arms[arm].overrides | tuned | mine


# ----------------------------------------------------------------------------------------------------------- reading


def read_declaration(file: str | Path) -> Declaration:
    """A checked declaration, all of it: base files, common settings and the front are folded into the arms.

    Raises:
        ConfigError: one sentence about the first thing that is wrong; every arm's settings are tried.
    """
    stored = typed(Declaration, read_yaml(file), str(file))
    for kind, cls, name in (("endpoints", Endpoint, "endpoint"), ("arms", Arm, "arm")):
        stored[kind] = {key: typed(cls, given, f"{file}, {name} '{key}'") for key, given in stored[kind].items()}
    stored["comparisons"] = [typed(Comparison, given, f"{file}, comparisons") for given in stored["comparisons"]]
    for kind, cls in (("front", Front), ("tuning", Tuning)):
        stored[kind] = stored[kind] and typed(cls, stored[kind], f"{file}, {kind}")
    declared = Declaration.of(stored)
    declared.seeds = listed(declared.seeds, 2, file)
    check(declared, file)
    declared = folded(declared, Path(file))
    for name in declared.arms:
        settings = declared.settings(name, Path("x"), 0, declared.split)
        config = configuration(declared.task, settings, f"arm '{name}' of {file}")
        if declared.front and name == declared.headline:  # its own place on the front, said or by default
            declared.arms[name].overrides.setdefault(declared.front.key, OmegaConf.select(config, declared.front.key))
    if declared.tuning:
        try_trials(declared, declared.tuning, file)
    return declared


def folded(declared: Declaration, file: Path) -> Declaration:
    """Arms that hold all their settings, those of the front among them."""
    common, arms = dict(flatten(declared.overrides)), {}
    for name, arm in declared.arms.items():
        base = arm.base or declared.config
        given = dict(flatten(read_yaml(file.parent / base))) if base else {}
        settings = {key: value for key, value in given.items() if key not in SET_HERE}
        settings |= common | dict(flatten(arm.overrides))
        arms[name] = replace(arm, overrides=settings, base=None, measures=arm.measures or list(declared.endpoints))
    if declared.front:
        headline = arms[declared.headline]
        tuned = headline.tuned_as or declared.headline if declared.tuning else None
        for value in declared.front.values:
            weight = {declared.front.key: value}
            point = replace(headline, role="front", overrides=headline.overrides | weight, tuned_as=tuned)
            arms[f"{declared.headline}@{value:g}"] = replace(point, seeds=declared.front.seeds)
    return replace(declared, arms=arms, config=None, overrides={})


def check(declared: Declaration, file: str | Path) -> None:
    """Refuse what would be found out only after hours."""
    if len(declared.primary) != 2:
        raise ConfigError(f"{file}: two endpoints are primary, one a direction, not {len(declared.primary)}.")
    if not 0 < declared.alpha < 1:
        raise ConfigError(f"{file}: alpha={declared.alpha} must lie between 0 and 1.")
    if not declared.folder:
        raise ConfigError(f"{file}: folder is not given: where are the runs to be?")
    if declared.test == "sign-flip" and len(declared.seeds) > MOST_SEEDS:
        raise ConfigError(
            f"{file}: the exact sign-flip test takes up to {MOST_SEEDS} seeds, not {len(declared.seeds)}: set test: t."
        )
    if declared.front and not (declared.front.key and declared.front.values):
        raise ConfigError(f"{file}: front needs a key, e.g. joint.weights.und, and values.")
    for name, arm in declared.arms.items():
        check_arm(declared, name, arm, file)
    known(declared.headline, declared.with_role("joint"), f"{file}: headline", "arm of role joint")
    for name, endpoint in declared.endpoints.items():
        check_endpoint(declared, name, endpoint, file)
    for row in declared.comparisons:
        for name in (row.arm, row.reference):
            known(name, declared.arms, f"{file}: comparisons", "arm")
            known(row.endpoint, measured(declared, name), f"{file}: comparisons", f"endpoint of arm {name}")
    if declared.tuning:
        check_tuning(declared, declared.tuning, file)


def check_arm(declared: Declaration, name: str, arm: Arm, file: str | Path) -> None:
    where = f"{file}: arm '{name}'"
    check_name(name, where, TAKEN)
    known(arm.role, ROLES, where, "role")
    if arm.role == "front":
        raise ConfigError(f"{where}: arms of role front are made from the section 'front'.")
    for endpoint in arm.measures:
        known(endpoint, declared.endpoints, f"{where} measures", "endpoint")
    if arm.role in ("single", "stop", *CONTROLS) and not arm.measures:
        raise ConfigError(f"{where}: say what it measures, e.g. measures: [{declared.primary[0]}].")
    if arm.seeds is not None and not 2 <= arm.seeds <= len(declared.seeds):
        raise ConfigError(f"{where}: seeds={arm.seeds} is not from 2 to the {len(declared.seeds)} of the experiment.")
    if arm.compute < 0 or (arm.role in ("single", "joint") and not arm.compute):
        raise ConfigError(f"{where}: compute={arm.compute} must be positive.")
    for settings in (declared.overrides, arm.overrides):
        check_free(settings, where)
    if arm.tuned_as:
        known(arm.tuned_as, declared.tuning.arms if declared.tuning else [], f"{where}: tuned_as", "tuned arm")


def check_endpoint(declared: Declaration, name: str, endpoint: Endpoint, file: str | Path) -> None:
    where = f"{file}: endpoint '{name}'"
    known(endpoint.single, declared.with_role("single"), f"{where}: single", "arm of role single")
    known(name, measured(declared, endpoint.single), where, f"endpoint that arm {endpoint.single} measures")
    known(name, measured(declared, declared.headline), where, f"endpoint that arm {declared.headline} measures")
    if "metric" not in endpoint.row:
        raise ConfigError(f"{where}: row={endpoint.row} must name a metric, e.g. {{metric: accuracy}}.")
    if endpoint.margin <= 0 or (endpoint.floor is not None and endpoint.floor <= 0):
        raise ConfigError(f"{where}: margin and floor must be positive.")
    arms = declared.curve(name)
    if len({declared.arms[arm].compute for arm in arms}) < len(arms):
        raise ConfigError(f"{where}: its single arms {', '.join(arms)} must differ in compute: a learning curve.")


def check_tuning(declared: Declaration, tuning: Tuning, file: str | Path) -> None:
    for name in tuning.arms:
        known(name, declared.arms, f"{file}: tuning.arms", "arm")
        if not set(measured(declared, name)) & set(declared.primary):
            raise ConfigError(f"{file}: tuning.arms: '{name}' measures no primary endpoint that it could be tuned by.")
    given = tuning.arms and tuning.grid and tuning.trials() and tuning.seeds
    if not given or set(tuning.seeds) & set(declared.seeds):
        raise ConfigError(f"{file}: tuning needs arms, a grid, and seeds that are none of the experiment's.")


def try_trials(declared: Declaration, tuning: Tuning, file: str | Path) -> None:
    """Refuse settings of the grid that no run takes, or that would undo what sets the arms apart.

    Raises:
        ConfigError: one sentence; `declared` is folded.
    """
    where = f"{file}: tuning.grid"
    for trial in tuning.trials():
        check_free(trial, where)
        if "train.images" in trial:
            raise ConfigError(f"{where}: train.images is the compute that arms declare, and cannot be tuned.")
        first = tuning.arms[0]
        configuration(declared.task, declared.settings(first, Path("x"), 0, declared.split, trial), where)
        for name, arm in declared.arms.items():
            if arm.tuned_as and arm.role != "front":
                check_same(declared, name, arm.tuned_as, trial, where)


def check_same(declared: Declaration, name: str, tuned_as: str, trial: dict[str, Any], where: str) -> None:
    """Refuse a tuned setting in which an arm is meant to differ from the one it takes its settings from."""
    mine, theirs = declared.arms[name].overrides, declared.arms[tuned_as].overrides
    for key in trial:
        if key in mine and mine[key] != theirs.get(key):
            raise ConfigError(
                f"{where}: arm '{name}' sets '{key}' to {mine[key]!r}, which what is chosen for {tuned_as} would "
                "replace: leave it out of the grid, or tune the arm by itself."
            )


def measured(declared: Declaration, arm: str) -> list[str]:
    return declared.arms[arm].measures or list(declared.endpoints)
