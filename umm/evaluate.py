"""Judge a run: all its heads, one table; every number with its interval, its count and its fingerprint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from umm.config import load, merge, parse_override
from umm.errors import DataError, UmmError
from umm.judging import Judges, Records
from umm.model import UnifiedModel
from umm.pictures import save_grid
from umm.registry import find
from umm.runs import Run, now, provenance, write_atomic, writing
from umm.settings import EvalSettings
from umm.transforms import center_crop, load_picture, to_tensor


def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator | None = None) -> Records:
    """Everything the run's task can judge of a model; the result is whole on every process."""
    accelerator = accelerator or Accelerator(cpu=config.train.device == "cpu")
    return find("tasks", config.task).evaluate(model, config, accelerator)


def run_config(run: Run, overrides: Sequence[str]) -> DictConfig:
    """A run's configuration with other evaluation settings.

    Raises:
        UmmError: an override touches what the run was trained with.
    """
    config = load(run.config.task, run.config_file)
    for text in overrides:
        override = parse_override(text)
        wrong = [key for key in override if key not in ("eval", "data", "train")]
        if wrong:
            raise UmmError(f"'{text}' would change what {run.folder} was trained with: umm eval takes eval and data.")
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
    return records.table() + "\n" + write(run, records, config)


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
