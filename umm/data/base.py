"""The contract of a data set.

An item is a dictionary:

    image     uint8 (3, S, S), RGB, cropped and resized to the source's image size
    id        str, stable: the same picture has the same id in every run
    label     int                     where there are classes
    caption   str                     where there are captions
    mask      int64 (S, S)            where there are masks; 0 is background
    questions list[Question]          where there are questions
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from umm.errors import DataError

T = TypeVar("T")
SPLITS = ("train", "val", "test")
log = logging.getLogger("umm")


@dataclass(frozen=True)
class Question:
    """One question about one picture; `answers` are the raters' answers where there are several."""

    text: str
    answer: str
    kind: str = ""  # existence, count, attribute, relation, comparison, ...
    answers: tuple[str, ...] = ()


class DataSource(Dataset):
    """A map-style set of pictures: `source[i]` is deterministic, `source.load(i, generator)` augments.

    `ids[i]` is the id of `source[i]`. Any first part of a source is a fair sample of it: sources sorted by class on
    disk come in a fixed mixed order. A streaming source has `streaming = True`, no length and no ids, and is read by
    `stream`.
    """

    Config: type
    split: str  # train, val or test
    image_size: int
    ids: Sequence[str]
    classes: list[str] | None = None
    streaming: bool = False

    @classmethod
    def from_config(cls, config, split: str) -> DataSource:
        raise NotImplementedError

    @classmethod
    def tiny(cls, split: str = "train") -> DataSource:
        """A small offline instance, for tests."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int, generator: torch.Generator | None = None) -> dict:
        """Item `index`; with a generator the training augmentation (random crop, flip), without it the centre crop."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        return self.load(index)

    def stream(
        self, start: int = 0, step: int = 1, augment: Callable[[int], torch.Generator] | None = None
    ) -> Iterator[dict]:
        """Items number start, start + step, ...; item n is the same whatever start and step.

        A streaming train split goes on for ever, pass after pass; everything else ends. `augment(n)` is the generator
        of item n's augmentation; without it, centre crops.
        """
        for index in range(start, len(self), step):
            yield self.load(index, augment(index) if augment else None)

    def identity(self) -> dict[str, object]:
        """JSON-able facts that fix the pictures: name, version, split, sizes, a digest of the ids. A cache's key."""
        raise NotImplementedError


@dataclass
class BadPictures:
    """Pictures that turn out unreadable while loading: each is counted and named once, the next readable one stands in.

    The number of pictures and everybody else's index stay as they are in the middle of a run.
    """

    reasons: dict[str, str] = field(default_factory=dict)  # picture -> why

    def first_good(
        self, candidates: Iterable[tuple[str, T]], read: Callable[[T], Image.Image]
    ) -> tuple[T, Image.Image]:
        """The first of the (name, candidate) that `read` can read, and its picture.

        Raises:
            DataError: none can be read.
        """
        reason = "there is none"
        for name, candidate in candidates:
            try:
                return candidate, read(candidate)
            except DataError as error:
                reason = str(error)
                self._note(name, reason)
        raise DataError(f"no readable picture is left: {reason}")

    def _note(self, name: str, reason: str) -> None:
        if name not in self.reasons:
            self.reasons[name] = reason
            log.warning("bad picture %d, replaced by the next: %s", len(self.reasons), reason)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"no split is called '{split}': there are {', '.join(SPLITS)}.")


def digest(parts: Iterable[object]) -> str:
    """16 hexadecimal digits that stand for a sequence, for `identity`."""
    joined = hashlib.sha256()
    for part in parts:
        joined.update(f"{part}\x1f".encode())
    return joined.hexdigest()[:16]


def collate(items: Sequence[dict]) -> dict[str, Tensor | list]:
    """Items -> one batch: tensors and ints are stacked, everything else becomes a list."""
    batch: dict[str, Tensor | list] = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], int):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch
