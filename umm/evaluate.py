"""One model, all its heads, one table; every number with its interval, its count and its fingerprint."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from umm.build import open_source, settings_of
from umm.config import merge, parse_override
from umm.data.base import DataSource, collate
from umm.errors import DataError, MissingWeights, UmmError
from umm.loader import to_device
from umm.metrics._conflict import MARK, conflicts
from umm.metrics._features import open_space
from umm.metrics._store import FeatureStore
from umm.metrics.base import Metric, PairedMetric, SetMetric
from umm.model import UnifiedModel
from umm.pictures import save_grid
from umm.progress import Progress
from umm.registry import find
from umm.rng import derive_seed, seeded_init
from umm.runs import Run, now, provenance, write_atomic, writing
from umm.settings import EvalSettings
from umm.stats import bootstrap
from umm.tasks.base import Records
from umm.transforms import center_crop, load_picture, to_tensor


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


# --------------------------------------------------------------------------------------------------- reconstruction


def share_of(total: int, accelerator: Accelerator, batch_size: int) -> Iterator[list[int]]:
    """This process's picture numbers in batches; together the processes have each picture once."""
    mine = list(range(accelerator.process_index, total, accelerator.num_processes))
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]


@torch.no_grad()
def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator | None = None) -> Records:
    """Judge the reconstructions of `eval.split`; the result is whole on every process.

    Raises:
        MissingHead: the model cannot decode.
    """
    accelerator = accelerator or Accelerator(cpu=config.train.device == "cpu")
    settings = settings_of(config.eval)
    source = open_source(config, settings.split)
    if source.streaming:
        raise DataError("an evaluation needs to count its pictures: set data.streaming=false, or use a local copy.")
    total = min(len(source), settings.images or len(source))
    if total == 0:
        raise DataError(f"the {settings.split} split has no pictures: choose another with eval.split.")
    judges = Judges(settings, accelerator.device)
    drawers = {"reconstruction": (model.reconstruct, judges)}
    if settings.baselines:
        drawers |= baselines(model, config, accelerator.device)
    with Progress(total, enabled=accelerator.is_main_process, what="judging") as progress:
        for indices in share_of(total, accelerator, settings.batch_size):
            batch = collate([pick(source[i], "image", "id") for i in indices])
            images = to_device(batch["image"], accelerator.device)
            for draw, judge in drawers.values():
                judge.update(images, draw(images), batch["id"])
            progress.advance(len(indices) * accelerator.num_processes)
    records = Records()
    for name, (_, judge) in drawers.items():
        if accelerator.num_processes > 1:
            judge.gather(accelerator)
        found = judge.records(model.facts.get("trained_with", {}), config.seed)
        if judge is not judges:
            found.numbers = [row | {"metric": f"{row['metric']} of {name}"} for row in found.numbers]
            found.items = {f"{metric} of {name}": values for metric, values in found.items.items()}
        records.add(found)
    return records


def baselines(model: UnifiedModel, config: DictConfig, device: torch.device) -> dict[str, tuple]:
    """What a decoder must beat: the mean picture of the training data, and itself before training."""
    psnr = EvalSettings(metrics=["psnr"], features=[], bootstrap=config.eval.bootstrap)
    mean = mean_picture(open_source(config, "train")).to(device)
    found = {"the mean picture": (lambda images: mean.expand_as(images), Judges(psnr, device))}
    if "decoder" in model.heads and "recon" in config:
        with seeded_init(config.seed, "recon", "decoder"):  # as training began
            untrained = type(model.heads["decoder"]).from_config(settings_of(config.recon).decoder, model.spec)
        other = UnifiedModel(model.space, {"decoder": untrained.to(device)})
        found["an untrained decoder"] = (other.reconstruct, Judges(psnr, device))
    return found


def mean_picture(source: DataSource, count: int = 512) -> Tensor:
    """Mean of the first pictures of a source, (3, H, W) in [0, 1]."""
    items = itertools.islice(source.stream(), count)
    total = [item["image"].double() / 255 for item in items]
    return torch.stack(total).mean(0).float()


def pick(item: dict, *keys: str) -> dict:
    return {key: item[key] for key in keys}


# ---------------------------------------------------------------------------------------------------- the commands


def run_config(run: Run, overrides: Sequence[str]) -> DictConfig:
    """A run's configuration with other evaluation settings.

    Raises:
        UmmError: an override touches what the run was trained with.
    """
    from umm.config import load

    config = load(run.config.task, run.config_file)
    for text in overrides:
        override = parse_override(text)
        wrong = [key for key in override if key not in ("eval", "data", "train")]
        if wrong:
            raise UmmError(f"'{text}' would change what {run.folder} was trained with: umm eval takes eval.* and data.*.")
        config = merge(config, override, "command line")
    return config


def evaluate_run(folder: str, overrides: Sequence[str] = ()) -> str:
    """Judge a run, write what was found beside it, and return the table."""
    run = Run(folder)
    config = run_config(run, overrides)
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    model = UnifiedModel.load(folder, accelerator.device)
    records = evaluate(model, config, accelerator)
    if not accelerator.is_main_process:
        return ""
    return table(records) + "\n" + write(run, records, config)


def write(run: Run, records: Records, config: DictConfig) -> str:
    """eval/<split>.json, items/<split>.parquet and lines of metrics.jsonl; returns a sentence that names them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    split = config.eval.split
    settings = OmegaConf.to_container(config.eval)
    result = {"split": split, "evaluated": now(), "settings": settings, "numbers": records.numbers}
    result |= {"notes": records.notes, "fingerprints": records.fingerprints, "provenance": provenance(config)}
    file, items = run.folder / "eval" / f"{split}.json", run.folder / "items" / f"{split}.parquet"
    with writing(run.folder, "the evaluation"):
        for path in (file, items):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(result, indent=1))
        ids = sorted({picture for values in records.items.values() for picture in values})
        columns = {name: [values.get(picture) for picture in ids] for name, values in records.items.items()}
        pq.write_table(pa.table({"id": ids, **columns}), items)
    for row in records.numbers:
        run.log({"split": split, "evaluated": result["evaluated"], **row}, "metrics.jsonl")
    return f"wrote {file} and {items}"


def table(records: Records) -> str:
    """The numbers as text: headline first, judges with a conflict of interest marked and below."""
    rows = [("metric", "judge", "value", "95 % interval", "n", "better")]
    for row in sorted(records.numbers, key=lambda row: not row["headline"]):
        interval = f"{row['low']:.4g} .. {row['high']:.4g}" if "low" in row else ""
        direction = {True: "higher", False: "lower", None: ""}[row["higher_is_better"]]
        name = row["metric"] + ("" if row["headline"] else f" {MARK}")
        rows.append((name, row.get("space") or "", f"{row['value']:.5g}", interval, str(row["n"]), direction))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * len(max(lines, key=len)))
    reasons = {row["conflict"] for row in records.numbers if row["conflict"]}
    lines += [f"{MARK} conflict of interest, not in the headline: {reason}" for reason in sorted(reasons)]
    return "\n".join([*lines, *(f"note: {note}" for note in records.notes)])


def reconstruct_files(folder: str, images: Sequence[str], out: str) -> str:
    """Reconstruct any picture files: a grid, and each picture's numbers."""
    model = UnifiedModel.load(folder)
    files = list(picture_files(images))
    originals = []
    for file in files:
        originals.append(to_tensor(center_crop(load_picture(file), model.spec.image_size)))
    pictures = torch.stack(originals).float() / 255
    drawn = torch.cat([model.reconstruct(part) for part in pictures.split(32)])
    judges = Judges(EvalSettings(metrics=["psnr", "ssim", "lpips"], features=[]), pictures.device)
    ids = [str(file) for file in files]
    judges.update(pictures, drawn, ids)
    values = {name: column for metric in judges.paired.values() for name, column in metric.per_item().items()}
    columns = 8
    rows = [row for pair in zip(pictures.split(columns), drawn.split(columns)) for row in pair]
    path = save_grid(Path(out), rows, rows=["original", "reconstruction"] * (len(rows) // 2))
    lines = ["  ".join([f"{name} {values[name][picture]:.4g}" for name in values] + [picture]) for picture in ids]
    return "\n".join([*lines, *(f"note: {note}" for note in judges.notes), f"wrote {path}"])


def picture_files(names: Sequence[str]) -> Iterator[Path]:
    """Files as given; of folders everything that looks like a picture."""
    from umm.data.folder import SUFFIXES

    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"the folder {path} holds no pictures.")
            yield from found
        else:
            yield path
