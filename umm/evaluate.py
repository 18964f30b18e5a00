"""Judge a run: all its heads, one table; every number with its interval, its count and its fingerprint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from umm.config import chosen, combine, parse_override
from umm.data.folder import SUFFIXES
from umm.errors import DataError, UmmError
from umm.judging import Judges, Records
from umm.model import UnifiedModel
from umm.pictures import save_grid
from umm.registry import find
from umm.runs import Run, now, provenance, write_atomic, writing
from umm.settings import EvalSettings
from umm.transforms import center_crop, load_picture, to_tensor

MAY_DIFFER = ("eval=", "eval.", "data=", "data.", "train.device=", "train.workers=")  # overrides a judged run takes


def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator | None = None) -> Records:
    """Everything the run's task can judge of a model; the result is whole on every process."""
    accelerator = accelerator or Accelerator(cpu=config.train.device == "cpu")
    return find("tasks", config.task).evaluate(model, config, accelerator)


def run_config(run: Run, overrides: Sequence[str]) -> DictConfig:
    """A run's configuration with other evaluation settings, perhaps on other pictures.

    Raises:
        UmmError: an override touches what the run was trained with.
    """
    saved, layers = run.config, [("command line", parse_override(text)) for text in overrides]
    for text in overrides:
        if not text.startswith(MAY_DIFFER):
            raise UmmError(f"'{text}' would change what {run.folder} was trained with: umm eval takes eval and data.")
    name = chosen("data", layers)
    if name not in (None, saved.data.name):  # the settings of one data set mean nothing to another
        saved.data = {"name": name, "image_size": saved.data.image_size}
    return combine(saved.task, [(str(run.config_file), saved), *layers])


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
    originals, notes = read_pictures(images, model.spec.image_size)
    pictures, ids = torch.stack(list(originals.values())).float() / 255, list(originals)
    drawn = torch.cat([model.reconstruct(part) for part in pictures.split(32)])
    judges = Judges(EvalSettings(metrics=["psnr", "ssim", "lpips"], features=[]), pictures.device)
    judges.update(pictures, drawn, ids)
    values = {name: column for metric in judges.paired.values() for name, column in metric.per_item().items()}
    columns = 8
    rows = [row for pair in zip(pictures.split(columns), drawn.split(columns)) for row in pair]
    path = save_grid(Path(out), rows, rows=["original", "reconstruction"] * (len(rows) // 2))
    lines = ["  ".join([f"{name} {values[name][picture]:.4g}" for name in values] + [picture]) for picture in ids]
    return "\n".join([*lines, *(f"note: {note}" for note in [*notes, *judges.notes]), f"wrote {path}"])


def read_pictures(names: Sequence[str], size: int) -> tuple[dict[str, Tensor], list[str]]:
    """{path: centre crop, uint8 (3, size, size)} of files and of all pictures in folders, and what was left out.

    Raises:
        DataError: a file that was named cannot be read, or a folder has no picture that can.
    """
    pictures, bad = {}, []
    for name in names:
        path = Path(name)
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else None
        before = len(bad)
        for file in [path] if inside is None else inside:
            try:
                pictures[str(file)] = to_tensor(center_crop(load_picture(file), size))
            except DataError as error:
                if inside is None:
                    raise
                bad.append(f"left out: {error}")
        if inside is not None and len(bad) - before == len(inside):
            raise DataError(f"the folder {path} holds no readable picture." + "".join(f" {note}" for note in bad[:1]))
    return pictures, bad
