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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Question:
    """One question about one picture; `answers` are the raters' answers where there are several."""

    text: str
    answer: str
    kind: str = ""  # existence, count, attribute, relation, comparison, ...
    answers: tuple[str, ...] = ()


class DataSource(Dataset):
    """A map-style set of pictures: `source[i]` is deterministic, `source.load(i, generator)` augments.

    A streaming source has `streaming = True`, no length, and is read by `stream(start)`.
    """

    Config: type
    split: str  # train, val or test
    image_size: int
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

    def stream(self, start: int = 0) -> Iterator[dict]:
        """Items from number `start` on, in order. Map-style sources stream themselves."""
        for index in range(start, len(self)):
            yield self[index]

    def identity(self) -> dict[str, object]:
        """JSON-able facts that fix the pictures: name, version, split, sizes, a digest of the ids. A cache's key."""
        raise NotImplementedError


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
