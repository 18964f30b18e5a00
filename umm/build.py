"""From settings to objects: the latent space, the pictures, their cache, the statistics."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from umm import assets, cache
from umm.data.base import DataSource, collate
from umm.errors import ConfigError
from umm.latents.base import LatentSpace, RunningStats
from umm.loader import permutation, to_device
from umm.progress import Progress
from umm.registry import find
from umm.runs import Run


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
    if config.cache.dir is None:
        return source
    if config.data.crop != "center":
        raise ConfigError("a latent cache holds centre crops: set data.crop=center, or cache.dir=null.")
    if config.data.flip and not config.cache.flip:
        raise ConfigError("data.flip=true on cached latents needs the mirrored ones too: set cache.flip=true.")
    return open_cache(config, space, source, accelerator)


def cache_folder(config: DictConfig, space: LatentSpace, source: DataSource) -> Path:
    """`<cache.dir>/<split>`; `auto` is a folder of UMM_CACHE named by everything that fixes the latents."""
    if config.cache.dir != "auto":
        return Path(config.cache.dir) / source.split
    key = cache.cache_key(cache.key_facts(source, space, settings_of(config.cache)))
    return assets.cache_root() / "latents" / f"{source.split}-{key[:16]}"


def open_cache(config: DictConfig, space: LatentSpace, source: DataSource, accelerator: Accelerator):
    """The latent cache of a source; its missing part is encoded first, shared by all processes."""
    settings, folder = settings_of(config.cache), cache_folder(config, space, source)
    total = None if source.streaming else len(source)
    with Progress(total, enabled=accelerator.is_main_process, what=f"encoding {source.split}") as progress:
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
    """Give the space its statistics: imported ones, the cache's, or measured on `latent.stats_images` pictures."""
    if space.normalizer.fitted:
        return
    if isinstance(data, cache.LatentCache):
        space.normalizer.fit(data.stats)
        return
    file = run.folder / "stats.safetensors"
    with accelerator.main_process_first():
        if not file.exists():
            save_file(measure(space, config, data).state_dict(), file)
    space.normalizer.fit(RunningStats.from_state(load_file(file)))


@torch.no_grad()
def measure(space: LatentSpace, config: DictConfig, data: DataSource) -> RunningStats:
    """Statistics of the latents of `latent.stats_images` training pictures, in an order that is part of the run."""
    stats, device, batch = RunningStats(), space.normalizer.mean.device, config.latent.encode_batch
    count = config.latent.stats_images
    if data.streaming:
        items = itertools.islice(data.stream(), count)
    else:
        count = min(len(data), count)
        items = (data[i] for i in permutation(len(data), config.seed, "statistics", 0)[:count].tolist())
    with Progress(count, what="statistics") as progress:
        while chunk := [{"image": item["image"]} for item in itertools.islice(items, batch)]:
            stats.update(space.raw(to_device(collate(chunk)["image"], device)))
            progress.advance(len(chunk))
    return stats
