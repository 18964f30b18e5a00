"""From settings to objects: the latent space, the pictures, their cache, the statistics."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from umm import assets, cache
from umm.config import first_difference
from umm.data.base import DataSource, collate
from umm.errors import ConfigError, DataError
from umm.latents.base import LatentSpace, RunningStats
from umm.loader import from_workers, permutation, to_device
from umm.progress import Progress
from umm.registry import find
from umm.runs import Run, reading, writing


def settings_of(section: DictConfig):
    """A section as the dataclass it was made from."""
    return OmegaConf.to_object(section)


def build_space(section: DictConfig) -> LatentSpace:
    return find("latents", section.name).from_config(settings_of(section))


def open_source(config: DictConfig, split: str) -> DataSource:
    """The pictures of a split.

    Raises:
        ConfigError: the pictures and the latent space disagree about the picture size.
    """
    if config.data.image_size != config.latent.image_size:
        raise ConfigError(
            f"data.image_size={config.data.image_size} but latent.image_size={config.latent.image_size}: "
            "make them equal."
        )
    return find("data", config.data.name).from_config(settings_of(config.data), split)


def training_data(config: DictConfig, space: LatentSpace, accelerator: Accelerator):
    """The training pictures, or their latent cache where the run has one (made here if need be)."""
    source = open_source(config, "train")
    check_trained(config, space)
    if config.cache.dir is None:
        return source
    if config.data.crop != "center":
        raise ConfigError("a latent cache holds centre crops: set data.crop=center, or cache.dir=null.")
    if config.data.flip and not config.cache.flip:
        raise ConfigError("data.flip=true on cached latents needs the mirrored ones too: set cache.flip=true.")
    return open_cache(config, space, source, accelerator)


def check_trained(config: DictConfig, space: LatentSpace) -> None:
    """Refuse to read latents off networks that nobody has trained."""
    if space.stages and config.task != "recon":
        name = config.latent.name
        raise ConfigError(
            f"{name} has networks to train: umm train --task recon latent.name={name} run=<folder>, then "
            "latent.weights=<folder>."
        )


def judged_data(config: DictConfig, space: LatentSpace, source: DataSource, accelerator: Accelerator):
    """The pictures of a split to judge, or with `eval.cached` their latent cache.

    Raises:
        DataError: they cannot be counted.
        ConfigError: there is no place for a cache.
    """
    if source.streaming:
        raise DataError("an evaluation needs to count its pictures: set data.streaming=false, or use a local copy.")
    if not config.eval.cached:
        return source
    if config.cache.dir is None:
        raise ConfigError("eval.cached=true needs a place for the latents: set cache.dir=<folder>, or cache.dir=auto.")
    return open_cache(config, space, source, accelerator)


def check_data(run: Run, data: DataSource | cache.LatentCache) -> None:
    """Note the pictures a run begins with; going on with others would be neither this run nor another.

    Raises:
        DataError: the pictures are not those the run began with; names the first difference.
    """
    found = json.loads(json.dumps(data.identity()))
    before = run.facts.get("data")
    if before is None:
        run.note(data=found)
    elif difference := first_difference(OmegaConf.create(before), OmegaConf.create(found), ignore=()):
        raise DataError(
            f"the training pictures are not those {run.folder} began with ({difference}): give them back, or start "
            "again with run=<another folder>."
        )


def cache_folder(config: DictConfig, space: LatentSpace, source: DataSource) -> Path:
    """`<cache.dir>/<split>`; `auto` is a folder of UMM_CACHE named by everything that fixes the latents."""
    if config.cache.dir != "auto":
        return Path(config.cache.dir) / source.split
    key = cache.cache_key(cache.key_facts(source, space, settings_of(config.cache)))
    return assets.cache_root() / "latents" / f"{source.split}-{key[:16]}"


def open_cache(config: DictConfig, space: LatentSpace, source: DataSource, accelerator: Accelerator):
    """The latent cache of a source; its missing part is encoded first, shared by all processes.

    Raises:
        ConfigError: the latents are of networks that nobody has trained, or depend on their batch.
    """
    if space.stages or not space.per_picture:
        why = "are trained now" if space.stages else "depend on their batch"
        instead = ", or latent.weights=<its finished run>" if space.stages else ""
        raise ConfigError(f"latents of {config.latent.name} cannot be cached, they {why}: set cache.dir=null{instead}.")
    settings, folder = settings_of(config.cache), cache_folder(config, space, source)
    total = None if source.streaming else len(source)
    enabled, what = accelerator.is_main_process, f"encoding {source.split}"
    with Progress(total, enabled=enabled, what=what) as progress, from_workers():
        cache.build(
            source,
            space,
            settings,
            folder,
            batch_size=config.latent.encode_batch,
            workers=config.train.workers,
            progress=progress.update,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
    accelerator.wait_for_everyone()
    # in the last of several processes to finish, `build` may have been the one that completed it
    return cache.build(source, space, settings, folder)


def cache_command(config: DictConfig, split: str, verify: bool) -> str:
    """What `umm cache` does; returns what it has to say."""
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    if config.cache.dir is None:
        raise ConfigError("umm cache needs a place: set cache.dir=<folder>, or cache.dir=auto for one in UMM_CACHE.")
    space = build_space(config.latent).to(accelerator.device)
    made = open_cache(config, space, open_source(config, split), accelerator)
    if verify:
        made.verify()
    size = sum(file.stat().st_size for file in made.folder.rglob("*") if file.is_file())
    return f"{made.folder}: {len(made)} pictures, {size / 1e6:.1f} MB, {', '.join(made.fields)}" + (
        ", every byte verified" if verify else ""
    )


def fit_normalizer(space: LatentSpace, config: DictConfig, data, run: Run, accelerator: Accelerator) -> None:
    """Give the space its statistics: imported ones, the cache's, or measured on `latent.stats_images` pictures.

    A space in training gets them from its task, in the end.
    """
    check_trained(config, space)
    if space.normalizer.fitted or space.stages:
        return
    if isinstance(data, cache.LatentCache):
        space.normalizer.fit(data.stats)
        return
    file = run.folder / "stats.safetensors"
    with accelerator.main_process_first():
        if not file.exists():
            partial = file.with_name(f".{file.name}.partial")  # a kill leaves no half a file under the name
            with writing(run.folder, file.name, cleanup=partial):
                save_file(measure(space, config, data).state_dict(), partial)
                partial.replace(file)
    with reading(file, "delete it and give the same command again"):
        stats = RunningStats.from_state(load_file(file))
    space.normalizer.fit(stats)


@torch.no_grad()
def measure(space: LatentSpace, config: DictConfig, data: DataSource) -> RunningStats:
    """Statistics of the latents of `latent.stats_images` training pictures, in an order that is part of the run."""
    stats, device, batch = RunningStats(), space.normalizer.mean.device, config.latent.encode_batch
    count = config.latent.stats_images
    if data.streaming:
        items = itertools.islice(data.stream(), count)
    else:
        count = min(len(data), count)
        if count == 0:
            raise DataError("the train split has no pictures to measure latent statistics on.")
        items = (data[i] for i in permutation(len(data), config.seed, "statistics", 0)[:count].tolist())
    with Progress(count, what="statistics") as progress:
        while chunk := [{"image": item["image"]} for item in itertools.islice(items, batch)]:
            stats.update(space.raw(to_device(collate(chunk)["image"], device)))
            progress.advance(len(chunk))
    return stats
