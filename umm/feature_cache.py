"""Features extracted once and kept: a folder of UMM_CACHE named by everything that fixes their numbers.

    features/<split>-<key>/meta.json           facts, class names, FLOPs and seconds; `complete: true` is written last
        shards/00000/vectors.npy               (n, D) one vector a picture
        shards/00000/tokens.npy                (n, N, D), where a probe of tokens asked for them
        shards/00000/labels.npy  masks.npy     int64 (n,), uint8 (n, S, S) where there are masks
        shards/00000/items.jsonl               ids

Shards are those of the latent cache (`umm/shards.py`): whole or absent, so that an interrupted extraction goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from umm import assets
from umm.cache import LatentCache
from umm.data.base import DataSource, collate
from umm.errors import DataError, NonFinite, StaleCache
from umm.features import Reader
from umm.latents.base import LatentSpace
from umm.layers import tokens_of
from umm.loader import to_device
from umm.progress import Progress
from umm.shards import (
    ShardWriter,
    atomic_folder,
    full_disk_explained,
    map_file,
    only_writer,
    read_meta,
    read_shard,
    shard_folder,
    write_json,
)

FORMAT = 1
SHARD = 4096  # pictures
Rows = Callable[[Tensor], Tensor]


class FeatureSet:
    """The features of a split, read without its pictures.

    Args:
        tokens, masks: functions of row numbers, where the latent cache has what need not be stored here again.
    """

    def __init__(self, folder: Path, tokens: Rows | None = None, masks: Rows | None = None):
        self.folder, self.meta = folder, read_meta(folder)
        self.classes: list[str] | None = self.meta["classes"]
        self.elsewhere = {"tokens": tokens, "masks": masks}
        self.maps: dict[str, list[Tensor]] = {}
        self.labels = torch.cat(self.files("labels.npy"))
        self.ids = [json.loads(line)["id"] for part in self.files("items.jsonl") for line in _lines(part)]

    def __len__(self) -> int:
        return len(self.labels)

    def files(self, name: str) -> list[Tensor]:
        """That file of every shard, mapped; none where shards lack it."""
        if name not in self.maps:
            folders = [shard_folder(self.folder, k) for k in range(self.meta["shards"])]
            self.maps[name] = [map_file(folder / name) for folder in folders if (folder / name).exists()]
        return self.maps[name]

    def vectors(self) -> Tensor:
        """(n, D) as stored."""
        return torch.cat(self.files("vectors.npy"))

    @property
    def has_masks(self) -> bool:
        return self.elsewhere["masks"] is not None or bool(self.files("masks.npy"))

    def tokens(self, rows: Tensor) -> Tensor:
        """(B, N, D) float32 of the named rows."""
        return self.read("tokens", rows).float()

    def masks(self, rows: Tensor) -> Tensor:
        """(B, S, S) int64; 0 is background."""
        return self.read("masks", rows).long()

    def read(self, what: str, rows: Tensor) -> Tensor:
        """Tokens or masks of the named rows, in the order asked for."""
        if self.elsewhere[what] is not None:
            return self.elsewhere[what](rows)
        parts = self.files(f"{what}.npy")
        return torch.stack([parts[row // SHARD][row % SHARD] for row in rows.tolist()])


def _lines(part: Tensor) -> list[str]:
    return part.numpy().tobytes().decode().split("\n")[:-1]


# ------------------------------------------------------------------------------------------------------ extracting


class Extraction:
    """One address of one split: where its features are kept, and how they are made.

    Args:
        data: the pictures, or their latent cache.
        identity: of the pictures (`DataSource.identity`).
        tokens: also keep the tokens.
        dtype: float16 or float32.
    """

    def __init__(self, reader: Reader, space: LatentSpace, data: DataSource, identity: dict, tokens: bool, dtype: str):
        self.reader, self.space, self.data, self.dtype = reader, space, data, getattr(torch, dtype)
        self.cached = isinstance(data, LatentCache)
        self.from_cache = tokens and self.cached and reader.address.kind == "latent" and not reader.address.random
        self.tokens = tokens and not self.from_cache
        facts = {"format": FORMAT, "data": identity, "address": reader.address.text, "reader": reader.facts}
        facts |= {"dtype": dtype, "tokens": self.tokens}
        if reader.needs == "latent":
            facts["latents"] = data.facts["cache.dtype"] if self.cached else "as encoded"
        self.facts = json.loads(json.dumps(facts))
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self.folder = assets.cache_root() / "features" / f"{data.split}-{key[:16]}"

    def done(self) -> bool:
        """Whether the features are there.

        Raises:
            StaleCache: what is there was made otherwise.
        """
        if not (self.folder / "meta.json").exists():
            return False
        meta = read_meta(self.folder)
        if meta["facts"] != self.facts:
            raise StaleCache(f"{self.folder} holds other features than its name says: delete it.")
        return meta["complete"] and all(read_shard(self.folder, k) for k in range(meta["shards"]))

    def open(self, device: torch.device, batch_size: int, workers: int) -> FeatureSet:
        """The features, extracted first where they are missing."""
        if len(self.data) == 0:
            raise DataError(f"the {self.data.split} split has no pictures: choose another with probe.split.")
        with only_writer(self.folder, 0), full_disk_explained(self.folder):
            if not self.done():
                self.run(device, batch_size, workers)
        if not self.from_cache:
            return FeatureSet(self.folder)
        return FeatureSet(self.folder, self._cached_tokens, self._cached_masks if "mask" in self.data.fields else None)

    def _cached_tokens(self, rows: Tensor) -> Tensor:
        latents = self.data.select("latent").batch(rows.tolist())["latent"]
        return tokens_of(self.space.normalizer(latents.to(self.space.normalizer.mean.device)))

    def _cached_masks(self, rows: Tensor) -> Tensor:
        return self.data.select("mask").batch(rows.tolist())["mask"]

    def run(self, device: torch.device, batch_size: int, workers: int) -> None:
        """Extract what is missing, shard by shard."""
        starts = range(0, len(self.data), SHARD)
        whole = [read_shard(self.folder, k) for k in range(len(starts))]
        meta = {"complete": False, "facts": self.facts, "classes": self.data.classes, "shards": len(starts)}
        write_json(self.folder / "meta.json", meta)
        started, flops = time.perf_counter(), 0.0
        done = sum(shard["count"] for shard in whole if shard)
        with Progress(len(self.data), done, what=f"features {self.reader.address.text}") as progress:
            for k in (k for k, shard in enumerate(whole) if not shard):
                rows = range(starts[k], min(starts[k] + SHARD, len(self.data)))
                plan = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
                with atomic_folder(shard_folder(self.folder, k)) as temporary, ShardWriter(temporary) as writer:
                    for batch in self.batches(plan, workers, device):
                        flops = flops or self.cost(batch)
                        arrays = self.arrays(batch)
                        writer.add(arrays, [{"id": name} for name in batch["id"]])
                        writer.stats.update(arrays["vectors.npy"].float())
                        progress.advance(len(batch["id"]))
                    writer.close()
        seconds = round(time.perf_counter() - started, 2)
        write_json(
            self.folder / "meta.json", meta | {"complete": True, "seconds": seconds, "flops": flops * len(self.data)}
        )

    def batches(self, plan: list[list[int]], workers: int, device: torch.device) -> Iterator[dict]:
        context = "forkserver" if workers else None
        rows = Pictures(self.data, self.fields())
        loader = DataLoader(
            rows, batch_sampler=plan, collate_fn=_as_is, num_workers=workers, multiprocessing_context=context
        )
        for batch in loader:
            if "label" not in batch:
                raise no_labels(self.data)
            yield {key: to_device(value, device) for key, value in batch.items()}

    def fields(self) -> tuple[str, ...]:
        wanted = ("latent" if self.cached and self.reader.needs == "latent" else "image", "label", "id")
        return wanted + ("mask",) * self.tokens

    @torch.no_grad()
    def cost(self, batch: dict) -> float:
        """FLOPs of one picture's matrix products."""
        with FlopCounterMode(display=False) as counter:
            self.reader.read({key: value[:1] for key, value in batch.items()})
        return counter.get_total_flops()

    @torch.no_grad()
    def arrays(self, batch: dict) -> dict[str, Tensor]:
        """What is stored of a batch."""
        features = self.reader.read(batch).float()
        arrays = {"vectors.npy": self.stored(self.reader.vector(features), batch), "labels.npy": batch["label"].cpu()}
        if self.tokens:
            if features.ndim != 3:
                raise DataError(f"{self.reader.address.text} is one vector a picture: it has no tokens.")
            arrays["tokens.npy"] = self.stored(features, batch)
            if "mask" in batch:
                arrays["masks.npy"] = batch["mask"].to(torch.uint8).cpu()
        return arrays

    def stored(self, features: Tensor, batch: dict) -> Tensor:
        out = features.to(self.dtype).cpu()
        finite = out.flatten(1).isfinite().all(1)
        if not finite.all():
            bad = batch["id"][int((~finite).nonzero()[0])]
            raise NonFinite(f"the features of picture '{bad}' are not finite in {self.dtype}: set probe.dtype=float32.")
        return out


class Pictures(Dataset):
    """Batches of some fields of a source or a latent cache; a field that is not there is left out."""

    def __init__(self, data: DataSource, fields: Sequence[str]):
        self.cached, self.fields = isinstance(data, LatentCache), tuple(fields)
        self.data = data.select(*(name for name in fields if name in data.fields)) if self.cached else data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[int]) -> dict:
        if self.cached:
            return self.data.batch(rows)
        items = [self.data[row] for row in rows]
        return collate([{key: item[key] for key in self.fields if key in item} for item in items])


def no_labels(data: DataSource) -> DataError:
    return DataError(
        f"the pictures of the {data.split} split have no labels: choose a data set with classes, or name the column "
        "with data.columns={label: ...}."
    )


def _as_is(batch: dict) -> dict:
    return batch
