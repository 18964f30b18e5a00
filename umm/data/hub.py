"""Any data set that the `datasets` library reads: hub ids, parquet, arrow, webdataset, json; map-style or streaming."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image

from umm import rng
from umm.data._hub_rows import class_names, digest_of, find_columns, label_of, open_rows, picture_of, questions_of
from umm.data._scenes import Dice
from umm.data.base import BadPictures, DataSource, check_split
from umm.errors import DataError
from umm.settings import HubSettings
from umm.transforms import prepare

PATIENCE = 100  # unreadable pictures in a row after which a stream gives up
PROBES = 16  # pictures whose bytes enter the identity


class HubSource(DataSource):
    """Map-style in a fixed mixed order; as a stream in stored order, the train split endless and mixed in a buffer.

    A picture that cannot be read is named once, and the next readable row stands in under its id.
    """

    Config = HubSettings

    def __init__(self, config: HubSettings, split: str, rows=None):
        check_split(split)
        self.config, self.split, self.image_size, self.streaming = config, split, config.image_size, config.streaming
        rows = open_rows(config, split) if rows is None else rows
        self.columns, self.bad = find_columns(rows, config), BadPictures()
        self.rows = rows.select_columns(sorted(set(self.columns.values())))
        if "label" in self.columns:
            self.classes = class_names(rows, self.columns["label"], config)
        if not self.streaming:
            self.order = torch.randperm(len(rows), generator=rng.generator("order", len(rows)))[: config.limit].tolist()
            self.ids = [f"{split}/{row}" for row in self.order]
            if not self.ids:
                raise DataError(f"{config.path} has no rows for {split}.")

    @classmethod
    def from_config(cls, config: HubSettings, split: str) -> HubSource:
        return cls(config, split)

    @classmethod
    def tiny(cls, split: str = "train") -> HubSource:
        import datasets

        check_split(split)
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["dark", "light"]))
        table: dict[str, list] = {"image": [], "label": []}
        for number in range({"train": 16, "val": 6, "test": 8}[split]):
            stream = io.BytesIO()
            Image.new("RGB", (40, 36 + number), (100 + 10 * number, 60, 90)).save(stream, "PNG")
            table["image"].append({"bytes": stream.getvalue(), "path": None})
            table["label"].append(number % 2)
        rows = datasets.Dataset.from_dict(table, features).cast_column("image", datasets.Image(decode=False))
        return cls(HubSettings(path="tiny", image_size=32), split, rows)

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError("a streaming data set has no length")
        return len(self.ids)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict:
        turned = ((index + step) % len(self) for step in range(len(self)))
        rows = ((self.order[i], self.rows[self.order[i]]) for i in turned)
        return self._item(self.ids[index], rows, generator)

    def stream(
        self, start: int = 0, step: int = 1, augment: Callable[[int], torch.Generator] | None = None
    ) -> Iterator[dict]:
        """See `DataSource.stream`. What lies before `start` is read but not decoded."""
        if not self.streaming:
            yield from super().stream(start, step, augment)
            return
        rows = itertools.islice(self._stored(), start, None)
        ahead: deque[tuple[int, dict]] = deque(itertools.islice(rows, 1))
        number = start
        while ahead:
            name = f"{self.split}/{ahead[0][0]}"
            yield self._item(name, _peek(ahead, rows), augment(number) if augment else None)
            number += step
            for _ in range(step):
                if ahead:
                    ahead.popleft()
                if not ahead:
                    ahead.extend(itertools.islice(rows, 1))

    def _stored(self) -> Iterator[tuple[int, dict]]:
        """(Row number, row), undecoded; the train split pass after pass, each mixed anew."""
        for turn in itertools.count():
            rows = itertools.islice(enumerate(self.rows), self.config.limit)
            if self.split != "train":
                yield from rows
                return
            dice = Dice(rng.derive_seed("hub", self.config.seed, turn))
            empty = True
            for row in mixed(rows, self.config.shuffle_buffer, dice):
                empty = False
                yield row
            if empty:
                raise DataError(f"{self.config.path} has no rows for {self.split}.")

    def _item(self, name: str, rows: Iterable[tuple[int, dict]], generator: torch.Generator | None) -> dict:
        """The first of `rows` whose picture can be read, under the id `name`."""
        config = self.config
        (number, row), picture = self.bad.first_good(((self._name(row[0]), row) for row in rows), self._picture)
        item: dict = {"image": prepare(picture, self.image_size, config.crop, config.flip, generator), "id": name}
        if "label" in self.columns:
            item["label"] = label_of(row[self.columns["label"]], self.classes, self._name(number))
        if "caption" in self.columns:
            caption = row[self.columns["caption"]]
            item["caption"] = str(caption[0] if isinstance(caption, list) else caption)
        if "question" in self.columns:
            item["questions"] = questions_of(row, self.columns)
        return item

    def _picture(self, row: tuple[int, dict]) -> Image.Image:
        return picture_of(row[1][self.columns["image"]], self._name(row[0]))

    def _name(self, number: int) -> str:
        return f"row {number} of {self.config.path} ({self.split})"

    def identity(self) -> dict[str, object]:
        config = self.config
        local = Path(config.path).expanduser().exists()
        facts: dict[str, object] = {
            "name": config.name,
            "data": Path(config.path).name if local else config.path,
            "config": config.config,
            "revision": config.revision,
            "split": getattr(config, f"split_{self.split}"),
            "image_size": self.image_size,
            "crop": "adm",
            "columns": dict(self.columns),
        }
        if self.streaming:
            return facts | {"streaming": True, "limit": config.limit}
        probes = self.order[:: max(1, len(self) // PROBES)]
        pictures = (self.rows[row][self.columns["image"]] for row in probes)
        return facts | {"items": len(self), "pictures": digest_of(pictures)}


def mixed(rows: Iterable, size: int, dice: Dice) -> Iterator:
    """Rows in random order as far as a buffer of `size` of them allows."""
    held = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        place = int(dice.random() * size)
        held[place], row = row, held[place]
        yield row
    yield from dice.mixed(held)


def _peek(ahead: deque, rows: Iterator) -> Iterator:
    """The waiting rows and then further ones, which stay waiting."""
    for position in range(PATIENCE):
        if position == len(ahead):
            ahead.extend(itertools.islice(rows, 1))
        if position == len(ahead):
            return
        yield ahead[position]
