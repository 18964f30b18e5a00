"""The latent cache: a data set encoded once, then read back at the speed of memory. `umm/shards.py` has the files.

What is stored does not depend on when, how often interrupted or by how many processes it was made.
B batch, C channels, h w latent grid, S side of the picture.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from umm.data.base import DataSource, Question
from umm.errors import ConfigError, DataError, NonFinite, StaleCache, UmmError, nearest
from umm.latents.base import LatentSpace, LatentSpec, RunningStats
from umm.settings import CacheSettings
from umm.shards import (
    FILES,
    MIRRORED,
    ShardWriter,
    atomic_folder,
    damaged_file,
    full_disk_explained,
    map_file,
    only_writer,
    read_meta,
    read_shard,
    sha256,
    shard_folder,
    write_json,
    write_stats,
)

FORMAT = 1  # raised when old files no longer mean the same
Progress = Callable[[int, int | None], None]  # (pictures done, pictures in all or None)


# ------------------------------------------------------------------------------------------------------- identity


def key_facts(source: DataSource, space: LatentSpace, settings: CacheSettings) -> dict[str, object]:
    """Everything the stored numbers depend on, JSON-able; two caches with equal facts hold the same numbers."""
    facts = {
        "format": FORMAT,
        "data": source.identity(),
        "latent": space.identity(),
        "shape": space.spec.shape,
        "image_size": space.spec.image_size,
        "crop": "center",
        "cache.dtype": settings.dtype,
        "cache.flip": settings.flip,
    }
    return json.loads(json.dumps(facts))  # as they come back from disk: tuples are lists


def cache_key(facts: dict[str, object]) -> str:
    """sha256 of the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_facts(folder: Path, made: dict, asked: dict) -> None:
    """Raise `StaleCache` naming the first fact in which a cache differs from what is asked for."""
    old, new = _flatten(made), _flatten(asked)
    for name in dict.fromkeys([*new, *old]):
        said = [json.dumps(facts[name]) if name in facts else "nothing" for facts in (old, new)]
        if said[0] != said[1]:
            raise StaleCache(
                f"the latent cache in {folder} was made with {name} = {said[0]}, this run asks for {said[1]}: "
                "set cache.dir to another folder, or delete this one to have it made again."
            )


def _flatten(facts: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in facts.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# ------------------------------------------------------------------------------------------------------- building


def build(
    source: DataSource,
    space: LatentSpace,
    settings: CacheSettings,
    folder: Path,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> LatentCache | None:
    """Encode every picture of `source` once, with the centre crop, and open the result.

    Shards that are there already are kept: the same call resumes an interrupted build, rewrites a damaged shard, and
    merely opens a complete cache. Shard k belongs to process k mod num_processes.

    Args:
        space: encodes on the device it is on.
        folder: one a split. The shard size it was begun with stands.
        batch_size: pictures per encoder call.
        workers: loader processes; a streaming source uses at most one.

    Returns:
        The cache, or None while shards of other processes are missing: wait for them, then `LatentCache.open`.

    Raises:
        StaleCache: the folder holds a cache made with something else.
        UmmError: the disk is full, or a picture cannot be encoded. Finished shards stay.
    """
    if settings.shard_size < 1 or batch_size < 1:
        raise ConfigError("cache.shard_size and the batch size must be at least 1.")
    if source.image_size != space.spec.image_size:
        raise ConfigError(
            f"the data gives pictures of {source.image_size} px, the latent space stands for {space.spec.image_size} "
            f"px: set data.image_size={space.spec.image_size}."
        )
    builder = _Builder(source, space, settings, Path(folder), batch_size, workers, progress)
    if (cache := builder.complete()) is not None:
        return cache
    with only_writer(builder.folder, process_index), full_disk_explained(builder.folder):
        cache = builder.complete()  # made while this process waited
        return builder.run(process_index, num_processes) if cache is None else cache


class _Builder:
    """One process's part of a build. `total`: pictures of the source; `done` of `share`: this process's."""

    def __init__(self, source, space, settings, folder, batch_size, workers, progress):
        self.source, self.space, self.settings, self.folder = source, space, settings, folder
        self.batch_size, self.workers, self.progress = batch_size, workers, progress
        self.facts = key_facts(source, space, settings)
        self.total: int | None = None
        self.done, self.share = 0, None

    def existing(self) -> dict | None:
        """The meta data in the folder, None if there is none; refuses those of another cache."""
        if not (self.folder / "meta.json").exists():
            return None
        meta = read_meta(self.folder)
        check_facts(self.folder, meta["facts"], self.facts)
        if self.settings.pictures and not meta["pictures"]:
            check_facts(self.folder, {"cache.pictures": False}, {"cache.pictures": True})
        return meta

    def begin(self) -> dict:
        meta = {
            "complete": False,
            "key": cache_key(self.facts),
            "facts": self.facts,
            "spec": asdict(self.space.spec),
            "split": self.source.split,
            "classes": self.source.classes,
            "pictures": self.settings.pictures,
            "shard_size": self.settings.shard_size,
        }
        write_json(self.folder / "meta.json", meta)
        return meta

    def complete(self) -> LatentCache | None:
        """The cache, if nothing is left to be done. Writes nothing, so that a folder of somebody else's will do."""
        meta = self.existing()
        if meta and meta["complete"] and all(self.present(k) for k in range(len(meta["shards"]))):
            return LatentCache.open(self.folder, self.facts)
        return None

    def run(self, process_index: int, num_processes: int) -> LatentCache | None:
        meta = self.existing() or self.begin()
        self.size, self.pictures = meta["shard_size"], meta["pictures"]
        mine = itertools.count(process_index, num_processes)
        for number, batches in self.from_stream(mine) if self.source.streaming else self.from_map(mine):
            self.write_shard(number, batches)
        return self.finish(meta)

    def present(self, number: int) -> int:
        """Pictures in a shard that is whole on disk, else 0."""
        shard = read_shard(self.folder, number)
        return shard["count"] if shard else 0

    def from_map(self, mine: Iterator[int]) -> Iterator[tuple[int, Iterator[list[dict]]]]:
        """(number, batches of items) of every missing shard of `mine`, for sources with a length."""
        self.total = len(self.source)
        ranges = {k: range(k * self.size, min((k + 1) * self.size, self.total)) for k in self.numbers(mine)}
        missing = [k for k in ranges if not self.present(k)]
        self.share = sum(map(len, ranges.values()))
        self.done = self.share - sum(len(ranges[k]) for k in missing)
        self.check_space(self.share - self.done)
        plan = [ranges[k][i : i + self.batch_size] for k in missing for i in range(0, len(ranges[k]), self.batch_size)]
        loader = iter(_loader(self.source, self.workers, batch_sampler=plan))
        for k in missing:
            yield k, itertools.islice(loader, math.ceil(len(ranges[k]) / self.batch_size))

    def from_stream(self, mine: Iterator[int]) -> Iterator[tuple[int, Iterator[list[dict]]]]:
        """The same for a stream: read on from the first shard that nobody has written, past the shards of others."""
        first = next(k for k in itertools.count() if self.present(k) < self.size)
        position = first * self.size
        self.check_space(self.size)
        items = iter(_loader(_Stream(self.source, position), min(self.workers, 1), batch_size=None))
        for k in mine:
            start = k * self.size
            if self.present(k) == self.size:
                self.done += self.size
                continue
            position += sum(1 for _ in itertools.islice(items, start - position))
            if position == start:
                yield k, _chunks(itertools.islice(items, self.size), self.batch_size)
                position += self.present(k)
            if position < start + self.size:
                self.total = position
                return

    def numbers(self, mine: Iterable[int]) -> Iterator[int]:
        """Those of `mine` that a source of known length fills."""
        return itertools.takewhile(lambda k: k * self.size < self.total, mine)

    def check_space(self, pictures: int) -> None:
        """Refuse to start what cannot fit. Masks and texts come on top of this."""
        spec = self.space.spec
        latent = spec.dim * getattr(torch, self.settings.dtype).itemsize * (1 + self.settings.flip)
        need = pictures * (latent + 3 * spec.image_size**2 * self.pictures)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UmmError(
                f"the latent cache in {self.folder} needs {need / 1e6:,.0f} MB more and {free / 1e6:,.0f} MB are free: "
                "free some space, choose another cache.dir, or set cache.dtype=bfloat16 or cache.pictures=false."
            )

    def write_shard(self, number: int, batches: Iterator[list[dict]]) -> None:
        first = next(batches, None)
        if first is None:  # a stream that ended where this shard would begin
            return
        with atomic_folder(shard_folder(self.folder, number)) as temporary, ShardWriter(temporary) as writer:
            for items in itertools.chain([first], batches):
                writer.add(self.arrays(items, writer.stats), [_text(item) for item in items])
                self.done += len(items)
                if self.progress:
                    self.progress(self.done, self.share)
            writer.close()

    def arrays(self, items: list[dict], stats: RunningStats) -> dict[str, Tensor]:
        """What is stored of a batch, by file name; the latents are added to `stats` as they are before rounding."""
        images = torch.stack([item["image"] for item in items])  # (B, 3, S, S) uint8
        arrays = {}
        for name, pictures in {"latents.npy": images, MIRRORED: images.flip(-1)}.items():
            if name != MIRRORED or self.settings.flip:
                latents = self.encode(pictures)
                arrays[name] = _rounded(latents, getattr(torch, self.settings.dtype), items)
                stats.update(latents)
        if self.pictures:
            arrays["images.npy"] = images
        if _all_have("label", items):
            arrays["labels.npy"] = torch.tensor([item["label"] for item in items])
        if _all_have("mask", items):
            arrays["masks.npy"] = _byte_masks(torch.stack([item["mask"] for item in items]), items)
        return arrays

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> raw latents (B, C, h, w), float32 on the CPU."""
        weights = next(itertools.chain(self.space.parameters(), self.space.buffers()), images)
        return self.space.raw(images.to(weights.device).float() / 255).float().cpu()

    def finish(self, meta: dict) -> LatentCache | None:
        """Merge the shards' statistics in their order and mark the cache complete, if no shard is missing."""
        numbers = list(self.numbers(itertools.count()))
        shards = [read_shard(self.folder, k) for k in numbers]
        if not all(shards):
            return None
        for k, shard in enumerate(shards):
            odd = set(shard["files"]) ^ set(shards[0]["files"])
            if odd:
                raise DataError(
                    f"shard {k} of the latent cache in {self.folder} differs from shard 0 in {', '.join(sorted(odd))}: "
                    "every picture needs a label, or none; masks likewise."
                )
        stats = RunningStats(0, *torch.zeros(2, *self.space.spec.shape, dtype=torch.float64))
        for k in numbers:
            stats.merge(_load_stats(shard_folder(self.folder, k)))
        write_stats(self.folder / "stats.safetensors", stats)
        texts = sorted({key for shard in shards for key in shard["texts"]})
        done = {"complete": True, "count": self.total, "texts": texts, "shards": shards}
        write_json(self.folder / "meta.json", meta | done)
        return LatentCache.open(self.folder, self.facts)


class _Stream(IterableDataset):
    """A streaming source from item `start` on, for a loader with at most one worker."""

    def __init__(self, source: DataSource, start: int):
        self.source, self.start = source, start

    def __iter__(self) -> Iterator[dict]:
        return self.source.stream(self.start)


def _loader(data, workers: int, **how) -> DataLoader:
    context = "forkserver" if workers else None  # fork would copy the threads' locks of a process that has run torch
    return DataLoader(data, num_workers=workers, multiprocessing_context=context, collate_fn=_as_is, **how)


def _as_is(items):
    return items


def _chunks(items: Iterator[dict], size: int) -> Iterator[list[dict]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _rounded(latents: Tensor, dtype: torch.dtype, items: list[dict]) -> Tensor:
    stored = latents.to(dtype)
    finite = stored.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = items[int((~finite).nonzero()[0])]["id"]
        raise NonFinite(f"the latent of picture '{bad}' is not finite in {dtype}: try cache.dtype=bfloat16 or float32.")
    return stored


def _all_have(key: str, items: list[dict]) -> bool:
    having = [key in item for item in items]
    if any(having) and not all(having):
        bad = items[having.index(False)]["id"]
        raise DataError(f"picture '{bad}' has no {key}, others have: every picture has one, or none.")
    return all(having)


def _byte_masks(masks: Tensor, items: list[dict]) -> Tensor:
    """int64 (B, S, S) -> uint8."""
    wrong = ((masks < 0) | (masks > 255)).flatten(1).any(1)
    if wrong.any():
        bad = items[int(wrong.nonzero()[0])]["id"]
        raise DataError(f"the mask of picture '{bad}' has values outside 0..255, which the latent cache cannot hold.")
    return masks.to(torch.uint8)


def _text(item: dict) -> dict:
    """What is not an array: id, caption, questions."""
    text = {"id": item["id"]} | {key: item[key] for key in sorted(set(item) - set(FILES) - {"id"})}
    if "questions" in text:
        text["questions"] = [asdict(question) for question in text["questions"]]
    return text


def _load_stats(folder: Path) -> RunningStats:
    return RunningStats.from_state(load_file(folder / "stats.safetensors"))


# -------------------------------------------------------------------------------------------------------- reading


class LatentCache(DataSource):
    """A complete cache, read like any map-style source; safe in loader workers, maps a file when it is first read.

    An item has `latent` (C, h, w) float32 in the encoder's own units, `id`, and what the source had of `image` uint8,
    `label`, `mask` int64, `caption`, `questions`. Mirroring turns latent, image and mask; words stay as they are.
    """

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.facts, self.key = folder, meta["facts"], meta["key"]
        self.spec = LatentSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["spec"].items()})
        self.image_size, self.mirrored = self.spec.image_size, self.facts["cache.flip"]
        self.split, self.classes = meta["split"], meta["classes"]
        self._count, self._size, self._shards = meta["count"], meta["shard_size"], meta["shards"]
        stored = self._shards[0]["files"] if self._shards else FILES.values()  # an empty cache lacks nothing
        self.fields = [name for name, file in FILES.items() if file in stored] + ["id", *meta["texts"]]
        self._maps: dict[tuple[int, str], Tensor] = {}

    @classmethod
    def open(cls, folder: Path, expect: dict | None = None) -> LatentCache:
        """Open a complete cache.

        Args:
            expect: `key_facts` of what the caller would have encoded; None opens whatever is there.

        Raises:
            StaleCache: made with something else than `expect`.
            DataError: incomplete, or a file is missing or has the wrong size.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        check_facts(folder, meta["facts"], expect or meta["facts"] | {"format": FORMAT})
        if not meta["complete"]:
            whole = sum(shard.suffix == "" for shard in folder.glob("shards/*"))
            raise DataError(
                f"the latent cache in {folder} is incomplete ({whole} shards so far): run the umm cache command that "
                "began it again, and it goes on from there."
            )
        for number, shard in enumerate(meta["shards"]):
            if damaged := damaged_file(shard_folder(folder, number), shard):
                raise DataError(
                    f"{damaged} is missing or cut short: run the umm cache command that made it again; it rewrites "
                    "this shard only."
                )
        return cls(folder, meta)

    def verify(self) -> None:
        """Read every byte and compare the sha256 of every file; raises `DataError` naming the first bad one."""
        for number, shard in enumerate(self._shards):
            folder = shard_folder(self.folder, number)
            for name, fact in shard["files"].items():
                if not (folder / name).is_file() or sha256(folder / name) != fact["sha256"]:
                    raise DataError(
                        f"{folder / name} is not what was written: delete {folder} and run the umm cache command that "
                        "made it again; it rewrites this shard only."
                    )

    def select(self, *fields: str) -> LatentCache:
        """The same cache giving these fields only: what is not asked for is not read."""
        for name in fields:
            if name not in self.fields:
                raise DataError(
                    f"the latent cache in {self.folder} has no '{name}'.{nearest(name, self.fields)} "
                    f"It has: {', '.join(self.fields)}."
                )
        view = copy.copy(self)
        view.fields = list(fields)
        return view

    @property
    def stats(self) -> RunningStats:
        """Exact statistics of the raw latents before rounding to the stored dtype, mirrored ones included."""
        return _load_stats(self.folder)

    def identity(self) -> dict[str, object]:
        """The facts that fix the stored numbers."""
        return self.facts

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> dict[str, Tensor | list]:
        """Pictures `indices`, in that order, as one batch: stacked tensors, lists of texts.

        Args:
            flips: which of them to mirror; needs a cache made with cache.flip=true.
        """
        where = self._locate(indices)
        flips = [False] * len(where) if flips is None else [bool(flip) for flip in flips]
        if any(flips) and not self.mirrored:
            raise StaleCache(f"the latent cache in {self.folder} has no mirrored latents: cache.flip=true makes them.")
        batch = {name: self._gather(name, where, flips) for name in self.fields if name in FILES}
        texts = [name for name in self.fields if name not in FILES]
        if texts:
            lines = [self._line(shard, row) for shard, row in where]
            batch |= {name: [line.get(name) for line in lines] for name in texts}
        return batch

    def _locate(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(shard, row) of each picture; negative indices count from the end."""
        indices = [int(i) for i in indices]
        for i in indices:
            if not -self._count <= i < self._count:
                raise IndexError(f"picture {i} of a cache of {self._count}")
        return [divmod(i % self._count, self._size) for i in indices]

    def _gather(self, name: str, where: list[tuple[int, int]], flips: list[bool]) -> Tensor:
        """Rows of one array, (B, ...), read in the order of the disk; latents as float32, masks as int64."""
        spec, side = self.spec, self.spec.image_size
        shape, dtype = {
            "latent": (spec.shape, torch.float32),
            "image": ((3, side, side), torch.uint8),
            "mask": ((side, side), torch.int64),
            "label": ((), torch.int64),
        }[name]
        out = torch.empty(len(where), *shape, dtype=dtype)
        for i in sorted(range(len(where)), key=where.__getitem__):
            shard, k = where[i]
            flip = flips[i] and name != "label"
            row = self._map(shard, MIRRORED if flip and name == "latent" else FILES[name])[k]
            out[i] = row.flip(-1) if flip and name != "latent" else row  # converts while it copies
        return out

    def _line(self, shard: int, row: int) -> dict:
        """The texts of one picture."""
        start, stop = self._map(shard, "lines.npy")[row : row + 2].tolist()
        line = json.loads(self._map(shard, "items.jsonl")[start:stop].numpy().tobytes())
        if "questions" in line:
            line["questions"] = [Question(**q | {"answers": tuple(q["answers"])}) for q in line["questions"]]
        return line

    def _map(self, shard: int, file: str) -> Tensor:
        if (shard, file) not in self._maps:
            self._maps[shard, file] = map_file(shard_folder(self.folder, shard) / file)
        return self._maps[shard, file]

    def load(self, index: int, generator: torch.Generator | None = None) -> dict:
        """Item `index`; with a generator and mirrored latents, mirrored half of the time."""
        flip = generator is not None and self.mirrored and bool(torch.rand((), generator=generator) < 0.5)
        return _items(self.batch([index], [flip]))[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The items of a loader's batch, views of one gather."""
        return _items(self.batch(indices))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}  # a worker maps the files itself


def _items(batch: dict) -> list[dict]:
    columns = batch | ({"label": batch["label"].tolist()} if "label" in batch else {})
    return [dict(zip(columns, values)) for values in zip(*columns.values())]
