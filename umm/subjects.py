"""What is probed: a run, or a latent space by name; its encoder, its trunk, its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import nn

from umm.build import build_space, fit_normalizer, open_cache, open_source
from umm.config import combine, parse_override, read_yaml
from umm.data.base import DataSource
from umm.errors import ConfigError, UmmError
from umm.latents.base import LatentSpace
from umm.model import UnifiedModel
from umm.runs import Run


@dataclass
class Subject:
    """One target: its name, configuration, latent space and trunk; its pictures are opened when they are needed.

    `folder` takes the statistics of the latents where they must be measured.
    """

    name: str
    config: DictConfig
    space: LatentSpace
    dit: nn.Module | None
    accelerator: Accelerator
    folder: Path
    sources: dict[str, DataSource] = field(default_factory=dict)
    caches: dict[str, DataSource] = field(default_factory=dict)

    def source(self, split: str) -> DataSource:
        """The pictures of a split."""
        if split not in self.sources:
            self.sources[split] = open_source(self.config, split)
        return self.sources[split]

    def data(self, split: str, latents: bool) -> DataSource:
        """The pictures of a split; with `latents` their latent cache where the configuration has one."""
        source = self.source(split)
        if latents and self.config.cache.dir is not None:
            if split not in self.caches:
                self.caches[split] = open_cache(self.config, self.space, source, self.accelerator)
            return self.caches[split]
        if source.streaming:
            raise ConfigError("probes need to count their pictures: set data.streaming=false, or use a local copy.")
        return source

    def fit(self) -> None:
        """Statistics of the latents, for those addresses that read latents."""
        if not self.space.normalizer.fitted:
            data = self.data("train", latents=True)
            fit_normalizer(self.space, self.config, data, Run(self.folder), self.accelerator)


def open_subject(
    target: str | None, file: str | None, overrides: Sequence[str], folder: Path, limit: int | None = None
) -> Subject:
    """A run folder, NAME or NAME:WEIGHTS of a latent space, or None for the latent space of the configuration.

    Args:
        folder: where statistics of the latents go, if they must be measured.
        limit: pictures of each split, at most.
    """
    run = Run(target) if target is not None and Path(target).is_dir() else None
    config = subject_config(target, run, file, [*overrides, *([f"data.limit={limit}"] if limit else [])])
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    if run is None:
        space = build_space(config.latent).to(accelerator.device)
        return Subject(target or config.latent.name, config, space, None, accelerator, folder)
    model = UnifiedModel.load(target, accelerator.device)
    trunk = dict(model.heads.items()).get("dit")
    return Subject(target, config, model.space, trunk, accelerator, folder)


def subject_config(target: str | None, run: Run | None, file: str | None, overrides: Sequence[str]) -> DictConfig:
    """Defaults < --config < the target < key=value.

    Raises:
        UmmError: a folder that does not exist; an override of the latent space that a run was trained on.
    """
    if run is None and target is not None and "/" in target.partition(":")[0]:
        raise UmmError(f"{target} does not exist: give a run folder, or a latent space as NAME or NAME:WEIGHTS.")
    layers = [(file, read_yaml(file))] if file else []
    if run is not None:
        given = OmegaConf.create({key: run.config[key] for key in ("data", "latent", "cache")})
        layers = [(file, without(layer, "data", "latent", "cache")) for file, layer in layers]
        layers.append((str(run.config_file), given))
        if wrong := [text for text in overrides if text.startswith("latent.")]:
            raise UmmError(f"'{wrong[0]}' would change what {run.folder} was trained on: probe that space by its name.")
    elif target is not None:
        name, _, weights = target.partition(":")
        layers = [(file, of_latent(layer, name)) for file, layer in layers]
        given = {"name": name} | ({"weights": weights} if weights else {})
        layers.append((f"target {target}", OmegaConf.create({"latent": given})))
    layers += [("command line", parse_override(text)) for text in overrides]
    return combine("und", layers)


def without(layer: DictConfig, *keys: str) -> DictConfig:
    return OmegaConf.masked_copy(layer, [key for key in layer if key not in keys])


def of_latent(layer: DictConfig, name: str) -> DictConfig:
    """The layer, but of another latent space's settings only the picture size: one file serves several targets."""
    given = layer.get("latent")
    if given is None or given.get("name", name) == name:
        return layer
    size = {"image_size": given.image_size} if "image_size" in given else {}
    return OmegaConf.merge(without(layer, "latent"), {"latent": size})
