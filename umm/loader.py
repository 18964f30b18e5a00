"""Endless, resumable data order: picture number n of a task is a function of (seed, task, n) alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from umm.data.base import collate
from umm.errors import UmmError
from umm.rng import generator


class Feed(Dataset):
    """Position n of a task's data order -> its picture: a fresh permutation of the data every epoch.

    Args:
        data: a map-style `DataSource`, or a `LatentCache` (anything with `batch(indices, flips)`).
        seed, name: the order and the augmentation belong to them.
        flip: mirror half of the cached pictures (sources flip themselves, by their own setting).
        keys: what to pass on; a scene's captions and masks need not travel to a task that ignores them.
    """

    def __init__(self, data, seed: int, name: str, flip: bool = False, keys: tuple[str, ...] = ("image", "latent")):
        self.cached = hasattr(data, "batch")
        self.data = data.select(*keys) if self.cached else data
        self.seed, self.name, self.flip, self.keys = seed, name, flip, keys

    def __len__(self) -> int:
        return len(self.data)

    def index(self, position: int) -> int:
        """Which picture of the data set stands at this position."""
        epoch, offset = divmod(position, len(self.data))
        return int(permutation(len(self.data), self.seed, self.name, epoch)[offset])

    def __getitem__(self, position: int) -> dict:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> dict:
        """One batch."""
        indices = [self.index(position) for position in positions]
        if self.cached:
            return self.data.batch(indices, flips=self.flips(positions) if self.flip else None)
        return self.pack([self.data.load(index, self.draw(n)) for index, n in zip(indices, positions)])

    def draw(self, position: int) -> torch.Generator:
        """What the augmentation of a position is drawn from."""
        return generator(self.seed, self.name, "augment", position)

    def pack(self, items: list[dict]) -> dict:
        return {key: value for key, value in collate(items).items() if key in self.keys}

    def flips(self, positions: list[int]) -> list[bool]:
        return [bool(torch.rand((), generator=generator(self.seed, self.name, "flip", n)) < 0.5) for n in positions]


class View:
    """The first pictures of a source or a cache, perhaps with each other's labels.

    Args:
        count: how many of the first; None: all. Any first part of a source is a fair sample of it.
        order: picture i goes by the label of picture order[i], (n,); None: by its own.
    """

    def __init__(self, data, count: int | None = None, order: torch.Tensor | None = None):
        self.data, self.order = data, order
        self.count = len(data) if count is None else min(count, len(data))
        if hasattr(data, "batch"):
            self.batch = self._batch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return self.load(index)

    def select(self, *keys: str) -> View:
        return View(self.data.select(*keys), self.count, self.order)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict:
        item = self.data.load(index, generator)
        return item if self.order is None else item | {"label": self.data[int(self.order[index])]["label"]}

    def _batch(self, indices: list[int], flips: list[bool] | None = None) -> dict:
        batch = self.data.batch(indices, flips=flips)
        if self.order is not None:
            batch["label"] = self.data.select("label").batch(self.order[indices].tolist())["label"]
        return batch


def first(data, count: int | None, setting: str):
    """The first `count` pictures, or all; `setting` is named where they cannot be counted."""
    if count is not None and getattr(data, "streaming", False):
        raise UmmError(f"{setting} needs pictures it can count: set data.streaming=false, or use a local copy.")
    return data if count is None else View(data, count)


class Stream(IterableDataset):
    """The batches of `plan` from a streaming source: its own order, picture n at position n."""

    def __init__(self, feed: Feed, plan: list[list[int]], step: int):
        self.feed, self.plan, self.step = feed, plan, step

    def __iter__(self) -> Iterator[dict]:
        items = self.feed.data.stream(self.plan[0][0], self.step, self.feed.draw) if self.plan else iter(())
        for positions in self.plan:
            yield self.feed.pack(list(itertools.islice(items, len(positions))))


@functools.lru_cache(maxsize=4)
def permutation(length: int, seed: int, name: str, epoch: int) -> torch.Tensor:
    """The order of one epoch."""
    return torch.randperm(length, generator=generator(seed, name, "order", epoch))


def positions(step: int, batch_size: int, accumulate: int, process: int, processes: int) -> list[list[int]]:
    """The positions of each micro-batch of a step on one process: every `processes`-th.

    A step takes positions [step * batch_size, (step + 1) * batch_size) whatever the split.
    """
    each = batch_size // accumulate
    starts = range(step * batch_size, (step + 1) * batch_size, each)
    return [list(range(start + process, start + each, processes)) for start in starts]


def batches(feed: Feed, plan: list[list[int]], step: int, workers: int, device: torch.device) -> Iterator[dict]:
    """The batches of `plan`, loaded ahead by `workers` processes (0: in this one) and moved to `device`.

    Args:
        step: from one position of this process to its next: the number of processes.
    """
    if getattr(feed.data, "streaming", False):
        data, workers, how = Stream(feed, plan, step), min(workers, 1), {"batch_size": None}
    else:
        data, how = feed, {"batch_sampler": plan}
    loader = DataLoader(
        data,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
        # fork would copy the threads' locks of a process that has run torch
        multiprocessing_context="forkserver" if workers else None,
        **how,
    )
    with from_workers():
        for batch in loader:
            yield {key: to_device(value, device) for key, value in batch.items()}


@contextlib.contextmanager
def from_workers() -> Iterator[None]:
    """A loader process's user error as the sentence it was: torch puts the trace of the process in front of it."""
    try:
        yield
    except UmmError as error:
        sentence = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
        raise type(error)(sentence) from error


def to_device(value, device: torch.device):
    """Tensors go to the device, uint8 pictures become float in [0, 1] there."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(device, non_blocking=True)
    return value.float().div_(255) if value.dtype == torch.uint8 and value.ndim == 4 else value


def _as_is(batch: dict) -> dict:
    return batch
