"""Defaults < YAML file < `key.sub=value`: one complete, typed configuration, and errors that say where and what.

The schema of a run is put together from `umm.settings`: a section that names a choice (`data`, `latent`) takes the
dataclass of the choice. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from umm import settings as schemas
from umm.errors import ConfigError, UnknownName, nearest
from umm.registry import find, names

# section -> (folder of its choices, base dataclass, default choice)
CHOICES = {
    "data": ("data", schemas.DataSettings, "shapes"),
    "latent": ("latents", schemas.LatentSettings, "dinov2"),
}
# task -> the sections only it has
TASKS = {
    "recon": {"recon": schemas.ReconSettings},
    "gen": {"gen": schemas.GenSettings, "eval": schemas.GenEvalSettings},
    "und": {"und": schemas.UndSettings, "probe": schemas.ProbeSettings},
}
TASKS["joint"] = {"joint": schemas.JointSettings} | TASKS["recon"] | TASKS["und"] | TASKS["gen"]
COMMON = {"cache": schemas.CacheSettings, "train": schemas.TrainSettings, "eval": schemas.EvalSettings}
# settings by pattern -> least and greatest value, None: no limit
BOUNDS = {
    "data.image_size": (1, None),
    "data.limit": (1, None),
    "latent.image_size": (1, None),
    "latent.stats_images": (1, None),
    "latent.encode_batch": (1, None),
    "cache.shard_size": (1, None),
    "train.images": (1, None),
    "train.batch_size": (1, None),
    "train.accumulate": (1, None),
    "train.workers": (0, None),
    "train.keep": (1, None),
    "eval.images": (1, None),
    "eval.batch_size": (1, None),
    "eval.bootstrap": (1, None),
    "eval.neighbors": (1, None),
    "recon.noise": (0, None),
    "joint.weights.*": (0, None),
    "joint.adapter.hidden": (1, None),
    "joint.adapter.depth": (1, None),
    "joint.adapter.teacher": (0, None),
    "und.limit": (1, None),
    "und.time": (0, 1),
    "und.attentive.*": (1, None),
    "und.vqa.width": (1, None),
    "und.vqa.heads": (1, None),
    "und.vqa.answers": (2, None),
    "und.vqa.text_depth": (0, None),
    "und.llm.merge": (1, None),
    "und.llm.max_answer": (2, None),
    "und.llm.lora.rank": (0, None),
    "und.llm.lora.start": (0, None),
    "und.llm.tiny.steps": (0, None),
    "und.llm.tiny.lr": (0, None),
    "und.llm.tiny.*": (1, None),
    "probe.holdout": (0, 1),
    "probe.rates": (0, None),
    "probe.token_rates": (0, None),
    "probe.token_decay": (0, None),
    "probe.temperature": (1e-6, None),
    "probe.batch_size": (1, None),
    "probe.steps": (1, None),
    "probe.token_steps": (1, None),
    "probe.neighbors": (1, None),
    "*.ema": (0, 1),
    "*.optim.lr": (0, None),
    "*.optim.final_lr": (0, None),
    "*.optim.betas": (0, 0.999999),
    "*.optim.warmup": (0, None),
    "*.optim.constant": (0, None),
}


def choice_settings(section: str, name: str) -> type:
    """The settings dataclass of `name` in a section: from `umm.settings`, else the `Config` beside the class."""
    folder, base, _ = CHOICES[section]
    stack = list(base.__subclasses__())
    while stack:
        candidate = stack.pop()
        stack += candidate.__subclasses__()
        if candidate.name == name and candidate.__module__ == schemas.__name__:
            return candidate
    if "." not in name and name not in names(folder):
        raise UnknownName(
            f"{section}.name: nothing in umm/{folder} is called '{name}'.{nearest(name, names(folder))} "
            f"There are: {', '.join(names(folder))}. Your own goes by its import path, e.g. my_package.my_module."
        )
    return find(folder, name).Config


def load(task: str, file: str | Path | None = None, overrides: Sequence[str] = ()) -> DictConfig:
    """The resolved configuration of a run.

    Args:
        task: recon, gen, und, joint, or the import path of your own.
        file: YAML that differs from the defaults.
        overrides: `key.sub=value`, the last word.

    Raises:
        ConfigError: unknown or ill-typed setting, with its source and the nearest valid name.
    """
    layers = [(str(file), read_yaml(file))] if file else []
    return combine(task, [*layers, *(("command line", parse_override(text)) for text in overrides)])


def combine(task: str, layers: Sequence[tuple[str, DictConfig]]) -> DictConfig:
    """The defaults of a task under (source, settings) layers, the last one on top; interpolations are resolved.

    Raises:
        ConfigError: as `load`.
    """
    sections_of(task)
    for source, layer in layers:
        if layer.get("task", task) != task:
            raise ConfigError(f"{source} is for task '{layer['task']}', not '{task}': use --task {layer['task']}.")
    config = schema(task, layers)
    for source, layer in layers:
        config = merge(config, layer, source)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"'{error.full_key}' cannot be resolved: {str(error).splitlines()[0]}.") from error
    for source, layer in layers:
        check_values(config, layer, source)
    return config


def sections_of(task: str) -> dict[str, type]:
    """{section: dataclass} that only this task has; a task from outside has one, `Config`, under its file's name.

    Raises:
        ConfigError: there is no such task.
    """
    if "." in task:
        return {task.rpartition(".")[2]: find("tasks", task).Config}
    if task not in TASKS:
        raise ConfigError(f"no task is called '{task}'.{nearest(task, TASKS)} There are: {', '.join(TASKS)}.")
    return TASKS[task]


def check_values(config: DictConfig, layer: DictConfig, source: str) -> None:
    """Refuse numbers out of `BOUNDS` and unknown metrics before a run takes hours to come upon them."""
    for key, _ in flatten(layer):
        value = OmegaConf.select(config, key)
        low, high = next((BOUNDS[p] for p in BOUNDS if fnmatch.fnmatch(key, p)), (None, None))
        for number in value if OmegaConf.is_config(value) else [value]:
            if isinstance(number, int | float) and low is not None and not low <= number <= (high or math.inf):
                limits = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ConfigError(f"'{key}' ({source}) must be {limits}, got {number}.")
        if key == "eval.metrics":
            known = names("metrics")
            for name in value:
                if "." not in name and name not in known:
                    hint = f"{nearest(name, known)} There are: {', '.join(known)}."
                    raise UnknownName(f"eval.metrics ({source}): no metric is called '{name}'.{hint}")


def schema(task: str, layers: Sequence[tuple[str, DictConfig]] = ()) -> DictConfig:
    """All sections of a task with their defaults; choices are those the layers name."""
    sections: dict[str, Any] = {}
    for section, (_, _, default) in CHOICES.items():
        name = chosen(section, layers) or default
        sections[section] = choice_settings(section, name)(name=name)
    sections |= {name: cls() for name, cls in {**COMMON, **sections_of(task)}.items()}
    values = {"task": task, "seed": 0, "run": f"runs/{task.rpartition('.')[2]}", **sections}
    # the top level is a dataclass too, so that unknown sections are errors
    fields = [(key, type(value), dataclasses.field(default_factory=lambda v=value: v)) for key, value in values.items()]
    return OmegaConf.structured(dataclasses.make_dataclass("Run", fields))


def chosen(section: str, layers: Sequence[tuple[str, DictConfig]]) -> str | None:
    """The last `<section>.name` of the layers."""
    name = None
    for source, layer in layers:
        given = layer.get(section)
        if isinstance(given, str):
            raise ConfigError(f"'{section}' ({source}) is a section, not a value: write {section}.name={given}.")
        if isinstance(given, DictConfig) and "name" in given:
            name = str(given["name"])
    return name


def merge(config: DictConfig, layer: DictConfig, source: str) -> DictConfig:
    """`layer` on top of `config`; what does not fit is an error that names `source`."""
    try:
        return OmegaConf.merge(config, layer)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list where a map belongs
        raise ConfigError(explain(config, layer, source, error)) from error


def explain(config: DictConfig, layer: DictConfig, source: str, error: Exception) -> str:
    """One sentence for the first setting of `layer` that `config` does not take."""
    for key, value in flatten(layer):
        parent, _, leaf = key.rpartition(".")
        known = OmegaConf.select(config, parent) if parent else config
        if known is not None and not isinstance(known, DictConfig):
            return f"'{parent}' ({source}) is a value, not a section: it has no '{leaf}'."
        if known is None or (leaf not in known and not is_free(known)):
            return f"unknown setting '{key}' ({source}).{nearest_setting(config, key)}"
        if isinstance(known.get(leaf), DictConfig) and not isinstance(value, Mapping | None):
            inside = ", ".join(f"{key}.{name}" for name in list(known[leaf])[:4]) or f"{key}: {{name: ...}}"
            return f"'{key}' ({source}) is a section, not a value: set e.g. {inside}."
        try:
            OmegaConf.merge(config, OmegaConf.create(nest(key, value)))
        except (OmegaConfBaseException, TypeError) as wrong:
            expected = type_of(known, leaf)
            return f"'{key}' ({source}) must be {expected}, got {value!r}: {str(wrong).splitlines()[0]}."
    return f"{source}: {str(error).splitlines()[0]}"


def is_free(section: DictConfig) -> bool:
    """True for a map with keys of the user's own, such as data.columns."""
    return not dataclasses.is_dataclass(section._metadata.object_type)


def nearest_setting(config: DictConfig, key: str) -> str:
    """The closest full name of a setting, by the whole path first and by the last part next."""
    everything = [name for name, _ in flatten(config, sections=True)]
    hint = nearest(key, everything)
    if not hint:
        leaf = key.rpartition(".")[2]
        same_leaf = [name for name in everything if name.rpartition(".")[2] == leaf]
        hint = f" Did you mean '{same_leaf[0]}'?" if same_leaf else " umm config --task TASK prints all settings."
    return hint


def type_of(section: DictConfig, leaf: str) -> str:
    """A setting's type in words."""
    node = section._get_node(leaf)
    kind = getattr(getattr(node, "_metadata", None), "ref_type", None)
    text = str(kind).replace("typing.", "").replace("<class '", "").replace("'>", "")
    if text.startswith("Literal["):
        return "one of " + text[len("Literal[") : -1]
    return text


def flatten(config: Mapping, prefix: str = "", sections: bool = False) -> list[tuple[str, Any]]:
    """[(dotted name, value)] of every leaf, and of sections too when asked."""
    rows: list[tuple[str, Any]] = []
    items = config.items_ex(resolve=False) if isinstance(config, DictConfig) else config.items()
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, Mapping | DictConfig) and len(value):
            rows += [(name, None)] * sections + flatten(value, f"{name}.", sections)
        else:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            rows.append((name, list(plain) if isinstance(plain, tuple) else plain))  # YAML knows lists only
    return rows


def nest(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def parse_override(text: str) -> DictConfig:
    """`train.lr=1e-4` -> {"train": {"lr": 1e-4}}; lists and maps in YAML's flow style."""
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"'{text}' is not an override: write key=value, e.g. train.images=1000.")
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:  # PyYAML's own exceptions vary
        raise ConfigError(f"'{text}' (command line) cannot be read: {str(error).splitlines()[0]}.") from error


def read_yaml(file: str | Path) -> DictConfig:
    path = Path(file)
    if not path.is_file():
        close = nearest(str(path), [str(p) for p in Path("configs").glob("*/*.yaml")])
        raise ConfigError(f"no configuration file '{path}'.{close}")
    try:
        content = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} must be a mapping of settings, e.g. 'train: {{images: 1000}}'.")
    return content


def to_yaml(config: DictConfig) -> str:
    return OmegaConf.to_yaml(config, resolve=True)


def config_hash(config: DictConfig, without: Sequence[str] = ("run",)) -> str:
    """12 hex digits that name a configuration; where it writes does not count."""
    container = OmegaConf.to_container(config, resolve=True)
    for key in without:
        container.pop(key, None)
    text = json.dumps(container, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def first_difference(old: DictConfig, new: DictConfig, ignore: Sequence[str] = ("run",)) -> str | None:
    """The first setting in which two configurations differ, in words, or None."""
    a, b = dict(flatten(old)), dict(flatten(new))
    for key in [*a, *(k for k in b if k not in a)]:
        if not any(fnmatch.fnmatch(key, pattern) for pattern in ignore) and a.get(key) != b.get(key):
            return f"'{key}' was {a.get(key)!r} and is {b.get(key)!r}"
    return None
