"""Judges of an evaluation: metrics and feature spaces fed together, their numbers as one set of records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from umm.errors import MissingWeights
from umm.metrics._conflict import MARK, conflicts
from umm.metrics._features import open_space
from umm.metrics._store import FeatureStore
from umm.metrics.base import Metric, PairedMetric, SetMetric
from umm.registry import find
from umm.rng import derive_seed
from umm.settings import EvalSettings
from umm.stats import bootstrap

OF_CLASSES = ("class_agreement", "probe_accuracy")  # of samples and of real pictures: what a class is matters
CHANCE = "accuracy of the most frequent class alone"


@dataclass
class Records:
    """What an evaluation found: numbers, and the values per picture they are means of."""

    numbers: list[dict] = field(default_factory=list)  # {"metric", "value", "low", "high", "n", ...}
    items: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> {picture id: value}
    fingerprints: dict[str, dict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # sentences a reader of the numbers must see

    def add(self, other: Records) -> None:
        self.numbers += other.numbers
        self.items |= other.items
        self.fingerprints = other.fingerprints | self.fingerprints
        self.notes += [note for note in other.notes if note not in self.notes]

    def table(self) -> str:
        """The numbers as text: headline first, judges with a conflict of interest marked and below."""
        rows = [("metric", "judge", "value", "95 % interval", "n", "better")]
        for row in sorted(self.numbers, key=lambda row: not row["headline"]):
            interval = f"{row['low']:.4g} .. {row['high']:.4g}" if "low" in row else ""
            direction = {True: "higher", False: "lower", None: ""}[row["higher_is_better"]]
            name = row["metric"] + ("" if row["headline"] else f" {MARK}")
            rows.append((name, row.get("space") or "", f"{row['value']:.5g}", interval, str(row["n"]), direction))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "-" * len(max(lines, key=len)))
        reasons = {row["conflict"] for row in self.numbers if row["conflict"]}
        lines += [f"{MARK} conflict of interest, not in the headline: {reason}" for reason in sorted(reasons)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class Judges:
    """The metrics of an evaluation and the feature spaces they read; what cannot be had is said in `notes`."""

    def __init__(self, settings: EvalSettings, device: torch.device):
        self.settings, self.notes = settings, []
        self.paired: dict[str, PairedMetric] = {}
        self.sets: dict[str, SetMetric] = {}
        for name in settings.metrics:
            metric = self.try_to(find("metrics", name).from_settings, settings, device)
            if metric is not None:
                (self.paired if metric.paired else self.sets)[name] = metric
        keep_rows = any(metric.needs_rows for metric in self.sets.values())
        spaces = {name: self.try_to(open_space, name, device) for name in (settings.features if self.sets else [])}
        self.stores = {name: FeatureStore(space, keep_rows) for name, space in spaces.items() if space is not None}

    def try_to(self, make, *arguments):
        """What `make` makes, or None and a note where weights are missing."""
        try:
            return make(*arguments)
        except MissingWeights as error:
            self.notes.append(f"not measured: {error}")
            return None

    def update(self, real: Tensor, fake: Tensor, ids: Sequence[str]) -> None:
        for metric in self.paired.values():
            metric.update(real, fake, ids)
        for store in self.stores.values():
            store.update("real", real, ids)
            store.update("fake", fake, ids)

    def gather(self, accelerator: Accelerator) -> None:
        """Add what the other processes saw; a picture that two of them counted raises."""
        mine = {"paired": {name: metric.state() for name, metric in self.paired.items()}}
        mine["stores"] = {name: store.state() for name, store in self.stores.items()}
        for process, state in enumerate(gather_object([mine])):
            if process != accelerator.process_index:
                for name, metric in self.paired.items():
                    metric.absorb(state["paired"][name])
                for name, store in self.stores.items():
                    store.absorb(state["stores"][name])

    def families(self) -> dict[str, tuple[str, ...]]:
        """{judge: families of its networks}."""
        judges = {name: metric.families for name, metric in self.paired.items()}
        return judges | {name: store.space.families for name, store in self.stores.items()}

    def records(self, trained_with: dict[str, str], seed: int) -> Records:
        """All numbers, each with its interval where pictures have values of their own."""
        records = Records(notes=list(self.notes))
        excluded = conflicts(self.families(), trained_with)
        for metric in self.paired.values():
            numbers, items = metric.compute(), metric.per_item()
            for number, value in numbers.items():
                row = self.row(metric, number, value, metric.name, excluded) | {"n": len(items[number])}
                if len(items[number]) > 1:
                    draw = np.random.default_rng(derive_seed(seed, "bootstrap", number))
                    interval = bootstrap(list(items[number].values()), draw, self.settings.bootstrap)
                    row |= {"low": interval.low, "high": interval.high}
                records.numbers.append(row)
            records.items |= items
            records.fingerprints[metric.name] = metric.fingerprint()
            records.notes += metric.notes(numbers)
        for space, store in self.stores.items():
            for metric in self.sets.values():
                numbers = metric.compute(store)
                for number, value in numbers.items():
                    row = self.row(metric, number, value, space, excluded)
                    records.numbers.append(row | {"space": space, "n": store.count("fake")})
                records.fingerprints[f"{metric.name}@{space}"] = metric.fingerprint(store)
                records.notes += [f"{space}: {note}" for note in metric.notes(numbers)]
        return records

    def row(self, metric: Metric, number: str, value: float, judge: str, excluded: dict[str, str]) -> dict:
        row = {"metric": number, "value": value, "higher_is_better": metric.better(number), "version": metric.version}
        return row | {"headline": judge not in excluded, "conflict": excluded.get(judge)}


def share_of(total: int, accelerator: Accelerator, batch_size: int) -> Iterator[list[int]]:
    """This process's picture numbers in batches; together the processes have each picture once."""
    mine = list(range(accelerator.process_index, total, accelerator.num_processes))
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]
