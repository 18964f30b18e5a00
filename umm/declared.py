"""What experiments have in common that are declared in a file and sealed before their first run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from omegaconf import DictConfig, OmegaConf, SCMode

from umm.config import combine, first_difference, flatten, merge, nest
from umm.errors import ConfigError, nearest
from umm.runs import reading, write_atomic

SET_HERE = ("run", "seed", "eval.split")  # settings of a run that the experiment gives
NAME = re.compile(r"[A-Za-z0-9][\w.+@=-]*")
FILE = "declaration.json"


@dataclass
class Declared:
    """A declaration: a dataclass that `of` makes from plain dictionaries. `sha256` is of all but `about`, `folder`."""

    kind: ClassVar[str]  # what a folder of it is called
    command: ClassVar[str]  # what makes one

    @classmethod
    def of(cls, stored: dict) -> Self:
        """From plain dictionaries, as `asdict` gives them."""
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        text = json.dumps(self.hashed(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def hashed(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key not in ("about", "folder")}

    def seal(self, folder: Path) -> None:
        """Write declaration.json and its hash, or see that the one there is the same.

        Raises:
            ConfigError: another experiment was declared there; names the first difference.
        """
        if (folder / FILE).exists():
            old = self.sealed(folder)
            if old.sha256 != self.sha256:
                difference = first_difference(OmegaConf.create(old.hashed()), OmegaConf.create(self.hashed()), ())
                raise ConfigError(
                    f"{folder} was declared otherwise: {difference} now. Another declaration is another experiment: "
                    "give it a folder of its own."
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = {"sha256": self.sha256, "declaration": asdict(self)}
        write_atomic(folder / FILE, json.dumps(text, indent=1))

    @classmethod
    def sealed(cls, folder: Path) -> Self:
        """The declaration of a folder.

        Raises:
            ConfigError: there is none, or it was changed by hand.
        """
        file = folder / FILE
        if not file.exists():
            raise ConfigError(f"{folder} is no {cls.kind}: it has no {FILE}. {cls.command} makes it.")
        with reading(file, "give back the file"):
            stored = json.loads(file.read_text())
            declared = cls.of(stored["declaration"])
        if declared.sha256 != stored["sha256"]:
            raise ConfigError(f"{file} was changed after it was sealed: its hash is another one. Give back the file.")
        return declared


def typed(cls: type, given: Any, source: str) -> dict:
    """All fields of a dataclass as a dictionary, those that are given checked for name and type."""
    if not isinstance(given, dict | DictConfig):
        raise ConfigError(f"{source} must be a mapping of settings, got {given!r}.")
    names, merged = [field.name for field in fields(cls)], OmegaConf.structured(cls)
    for key, value in given.items():
        if key not in names:
            raise ConfigError(f"unknown setting '{key}' ({source}).{nearest(str(key), names)}")
        merged = merge(merged, OmegaConf.create({key: value}), source)
    return OmegaConf.to_container(merged, resolve=False, structured_config_mode=SCMode.DICT)


def configuration(task: str, settings: dict[str, Any], source: str) -> DictConfig:
    """The complete configuration of one run, of {dotted setting: value}."""
    layers = [OmegaConf.create(nest(key, value)) for key, value in settings.items()]
    return combine(task, [(source, OmegaConf.merge(*layers))])


def listed(seeds: Any, least: int, file: str | Path) -> list[int]:
    """The seeds, given as their number or as a list.

    Raises:
        ConfigError: they are neither, or fewer than `least`.
    """
    found = list(range(seeds)) if type(seeds) is int else seeds
    whole = isinstance(found, list) and all(type(seed) is int for seed in found)
    if not whole or len(set(found)) < max(least, len(found)):
        raise ConfigError(f"{file}: seeds={seeds!r} must be a number from {least} on, or a list of different whole "
                          "numbers.")  # fmt: skip
    return found


def check_name(name: str, where: str, taken: Iterable[str]) -> None:
    """Refuse what cannot be the name of a folder of runs."""
    if not NAME.fullmatch(name) or name in taken:
        raise ConfigError(f"{where} names a folder: letters, digits and . _ + @ = - only, not {' or '.join(taken)}.")


def check_free(settings: dict, where: str) -> None:
    """Refuse settings that the experiment itself gives to every run."""
    for key, _ in flatten(settings):
        if key in SET_HERE:
            raise ConfigError(f"{where} sets '{key}', which the experiment gives to every run.")


def known(name: str, names: Iterable[str], where: str, what: str) -> None:
    """Refuse a name that is none of `names`."""
    if name not in names:
        hint = f"{nearest(name, names)} There are: {', '.join(names)}."
        raise ConfigError(f"{where}: no {what} is called '{name}'.{hint}")
