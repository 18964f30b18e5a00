"""`umm sample`: many pictures of a run, kept in shards that an interruption does not lose, and sweeps over settings.

Shards lie in <run>/generated/<hash>/, the hash being that of everything the pictures depend on: another checkpoint,
sampler, seed or choice of labels writes elsewhere, so no picture is ever taken for another's. N pictures, S side.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from umm.build import build_space, fit_normalizer, open_source, training_data
from umm.errors import MissingWeights, UmmError
from umm.evaluate import run_config
from umm.metrics._conflict import conflicts
from umm.metrics._features import open_space
from umm.metrics._store import FeatureStore
from umm.metrics.fd import FrechetDistance
from umm.model import UnifiedModel, contiguous
from umm.pictures import save_grid
from umm.pretrained import sha256_of
from umm.progress import Progress
from umm.registry import find
from umm.runs import Run, write_atomic, writing
from umm.sampling import BATCH, Drawer, Labels, choose_labels
from umm.settings import SamplerSettings
from umm.transforms import to_uint8

VERSION = 1  # raised when equal facts give other pictures
SHARD = 128  # pictures
GRID = (10, 8)  # rows and columns of the picture grid, at most


@dataclass
class Request:
    """What to draw; several checkpoints, guidance scales or step counts make a sweep over all combinations."""

    num: int = 64
    labels: Labels = "balanced"
    seed: int = 0
    checkpoints: Sequence[int] = ()
    guidance: Sequence[float] = ()
    steps: Sequence[int] = ()
    method: str | None = None
    npz: str | None = None
    out: str = "samples.png"


@dataclass
class Arm:
    """One combination of a sweep; None is what the run was saved with."""

    checkpoint: int | None
    guidance: float | None
    steps: int | None

    def __str__(self) -> str:
        return "-".join(f"{key}{value:g}" for key, value in asdict(self).items() if value is not None)


class Shards:
    """Pictures uint8 (N, 3, S, S) and their labels in files of `SHARD`, in a folder named by `facts`."""

    def __init__(self, parent: Path, facts: dict):
        text = json.dumps(facts, sort_keys=True)
        self.folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
        with writing(parent, "the samples"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "facts.json", json.dumps(facts, indent=1))

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def has(self, number: int, count: int) -> bool:
        """Whether a shard is there with at least so many pictures; the last one of a shorter run may have fewer."""
        if not self.file(number).exists():
            return False
        with safe_open(self.file(number), "pt") as shard:
            return shard.get_slice("labels").get_shape()[0] >= count

    def write(self, number: int, pictures: Tensor, labels: Tensor) -> None:
        partial = self.file(number).with_suffix(".partial")
        with writing(self.folder, "the samples"):
            save_file({"pictures": pictures, "labels": labels}, partial)
            partial.replace(self.file(number))

    def read(self, num: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(pictures (B, 3, S, S), labels (B,)) of pictures 0 to num - 1, in their order."""
        for number, indices in plan(num):
            found = load_file(self.file(number))
            yield found["pictures"][: len(indices)], found["labels"][: len(indices)]


def plan(num: int) -> Iterator[tuple[int, range]]:
    """(number, pictures) of each shard."""
    for number, start in enumerate(range(0, num, SHARD)):
        yield number, range(start, min(start + SHARD, num))


# ----------------------------------------------------------------------------------------------------------- drawing


def sample_run(folder: str, request: Request) -> str:
    """Draw what is asked for and return what to say about it."""
    run = Run(folder)
    config = run_config(run, [])
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    arms = list(itertools.starmap(Arm, itertools.product(
        request.checkpoints or [None], request.guidance or [None], request.steps or [None]
    )))  # fmt: skip
    judge = Judge(config, request.num, accelerator) if len(arms) > 1 else None
    lines, rows = [], []
    for checkpoint, group in itertools.groupby(arms, lambda arm: arm.checkpoint):
        model = model_of(run, config, checkpoint, accelerator)
        for arm in group:
            shards = draw(model, run, request, arm, accelerator)
            if accelerator.is_main_process:
                lines += write(shards, model, request, str(arm) if len(arms) > 1 else "")
                rows += [] if judge is None else [asdict(arm) | judge.distances(shards, model)]
    if rows:
        lines += report(run, rows, judge.notes, Path(request.out))
    return "\n".join(lines)


def draw(model: UnifiedModel, run: Run, request: Request, arm: Arm, accelerator: Accelerator) -> Shards:
    """The shards of one arm; what is there already stays. Shard k belongs to process k mod their number."""
    sampler = sampler_for(Drawer.of(model).sampler, model, arm, request.method)
    drawer = Drawer.of(model, sampler)
    model.require_pictures()
    shards = Shards(run.folder / "generated", facts_of(model, drawer, request))
    missing = [(k, part) for k, part in plan(request.num) if not shards.has(k, len(part))]
    mine = [(k, part) for k, part in missing if k % accelerator.num_processes == accelerator.process_index]
    total, here = request.num, accelerator.is_main_process
    with Progress(total, total - sum(len(part) for _, part in missing), here, what=f"sampling {arm}".strip()) as bar:
        for number, indices in mine:
            labels = choose_labels(drawer.dit, request.labels, indices, request.seed)
            parts = [slice(i, i + BATCH) for i in range(0, len(indices), BATCH)]
            pictures = []
            for part in parts:
                chosen = None if labels is None else labels[part]
                pictures.append(to_uint8(drawer.pictures(model, indices[part], chosen, request.seed)).cpu())
                bar.advance(len(pictures[-1]) * min(accelerator.num_processes, len(missing)))
            shards.write(number, torch.cat(pictures), torch.tensor(labels or [-1] * len(indices)))
    accelerator.wait_for_everyone()
    return shards


def sampler_for(own: SamplerSettings, model: UnifiedModel, arm: Arm, method: str | None) -> SamplerSettings:
    """The run's sampler with what the command line says; a guidance scale without a kind means the kind at hand."""
    guidance = own.guidance
    if arm.guidance is not None:
        internal = model.head("dit").base_final is not None
        kind = guidance.kind if guidance.kind != "none" else "internal" if internal else "classifier_free"
        guidance = replace(guidance, kind="none" if arm.guidance == 1 else kind, scale=arm.guidance)
    return replace(own, guidance=guidance, steps=arm.steps or own.steps, method=method or own.method)


def facts_of(model: UnifiedModel, drawer: Drawer, request: Request) -> dict:
    """Everything that pictures depend on, JSON-able; their number is not part of it."""
    parts = {**dict(model.heads.items()), "normalizer": model.space.normalizer}
    if drawer.weak is not None:
        parts["weak"] = drawer.weak.dit
    sampler = asdict(drawer.sampler)
    sampler["guidance"].pop("weak")  # its weights count, not its folder
    labels = request.labels if isinstance(request.labels, str) else list(map(str, request.labels))
    facts = {"version": VERSION, "weights": {name: sha256_of(contiguous(p.state_dict())) for name, p in parts.items()}}
    facts |= {"latent": model.space.identity(), "flow": asdict(drawer.settings), "sampler": sampler}
    return json.loads(json.dumps(facts | {"seed": request.seed, "labels": labels}))


def model_of(run: Run, config: DictConfig, checkpoint: int | None, accelerator: Accelerator) -> UnifiedModel:
    """The finished model of a run, or the averaged weights of one of its checkpoints.

    Raises:
        UmmError: the run is of another task, has no such checkpoint, or has not ended.
    """
    if config.task not in ("gen", "joint"):
        raise UmmError(
            f"{run.folder} is a {config.task} run: umm sample draws from runs of umm train --task gen|joint."
        )
    if checkpoint is None:
        return UnifiedModel.load(run.folder, accelerator.device)
    if config.task == "joint":
        raise UmmError(f"{run.folder} is a joint run, of which only the finished model is drawn from: no --checkpoint.")
    folder = run.folder / "checkpoints" / f"{checkpoint:08d}"
    if not folder.is_dir():
        known = ", ".join(str(int(path.name)) for path in sorted(folder.parent.glob("[0-9]*"))) or "none"
        raise UmmError(f"{run.folder} has no checkpoint {checkpoint}. There are: {known}.")
    space = build_space(config.latent).to(accelerator.device)
    fit_normalizer(space, config, training_data(config, space, accelerator), run, accelerator)
    task = find("tasks", "gen")(config, space, open_source(config, "val"))
    weights = load_file(folder / "ema.safetensors")
    task.dit.load_state_dict({key.removeprefix("gen.dit/"): value for key, value in weights.items()})
    return UnifiedModel(space, task.heads({"dit": task.dit.requires_grad_(False)}), task.facts()).to(accelerator.device)


# ----------------------------------------------------------------------------------------------------------- writing


def write(shards: Shards, model: UnifiedModel, request: Request, suffix: str) -> list[str]:
    """The grid, and the npz where one is asked for; files of a sweep carry their arm's name."""
    lines = [f"drew {request.num} pictures into {shards.folder}"]
    grid = named(Path(request.out), suffix)
    shown, labels = next(shards.read(min(request.num, SHARD)))
    rows, names = grid_rows(shown / 255, labels, model.head("dit").classes)
    lines.append(f"wrote {save_grid(grid, rows, rows=names)}")
    if request.npz is not None:
        lines.append(f"wrote {write_npz(named(Path(request.npz), suffix), shards, request.num)}")
    return lines


def named(file: Path, suffix: str) -> Path:
    return file.with_name(f"{file.stem}-{suffix}{file.suffix}") if suffix else file


def grid_rows(pictures: Tensor, labels: Tensor, classes: Sequence[str]) -> tuple[list[Tensor], list[str]]:
    """Rows of pictures with their class names; without classes just rows."""
    rows, columns = GRID
    present = sorted(set(labels.tolist()) - {-1})[:rows]
    if not present:
        return list(pictures[: rows * columns].split(columns)), []
    names = [classes[label] if label < len(classes) else str(label) for label in present]
    return [pictures[labels == label][:columns] for label in present], names


def write_npz(file: Path, shards: Shards, num: int) -> Path:
    """arr_0 uint8 (N, S, S, 3) and arr_1 int64 (N,), as the ADM evaluator reads them; never all in memory."""
    side = next(shards.read(1))[0].shape[-1]
    arrays = {
        "arr_0": ((num, side, side, 3), np.uint8, lambda pictures, labels: pictures.permute(0, 2, 3, 1).contiguous()),
        "arr_1": ((num,), np.int64, lambda pictures, labels: labels),
    }
    partial = file.with_name(f".{file.name}.partial")
    with writing(file.parent, file.name):
        file.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w") as archive:
            for name, (shape, dtype, pick) in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
                    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(out, header)
                    for pair in shards.read(num):
                        out.write(pick(*pair).numpy().tobytes())
        partial.replace(file)
    return file


# ------------------------------------------------------------------------------------------------------------- sweeps


class Judge:
    """Frechet distances of each arm of a sweep to the first pictures of `eval.split`, equally many on both sides."""

    def __init__(self, config: DictConfig, num: int, accelerator: Accelerator):
        source = open_source(config, config.eval.split)
        self.num, self.notes, self.real = min(num, len(source)), [], {}
        if not accelerator.is_main_process:
            return
        for name in config.eval.features:
            try:
                store = FeatureStore(open_space(name, accelerator.device), keep_rows=False)
            except MissingWeights as error:
                self.notes.append(f"note: not measured: {error}")
                continue
            for start in range(0, self.num, BATCH):
                items = [source[i] for i in range(start, min(start + BATCH, self.num))]
                images = torch.stack([item["image"] for item in items]).to(accelerator.device)
                store.update("real", images, [item["id"] for item in items])
            self.real[name] = store

    def distances(self, shards: Shards, model: UnifiedModel) -> dict:
        """{"n", "fd@space", "fd_excess@space", ...}; spaces unrelated to the encoder first."""
        excluded = conflicts(
            {name: store.space.families for name, store in self.real.items()}, model.facts.get("trained_with", {})
        )
        found: dict[str, float] = {"n": self.num}
        for name, real in sorted(self.real.items(), key=lambda pair: pair[0] in excluded):
            store, first = FeatureStore(real.space, keep_rows=False), 0
            store.merge(real)
            for pictures, _ in shards.read(self.num):
                ids = [f"sample-{first + i:06d}" for i in range(len(pictures))]
                store.update("fake", pictures.to(model.device), ids)
                first += len(pictures)
            values = FrechetDistance().compute(store)
            found |= {f"{key}@{name}": values[key] for key in ("fd", "fd_excess") if key in values}
        return found


def report(run: Run, rows: list[dict], notes: list[str], out: Path) -> list[str]:
    """The sweep as a table, a plot, and lines of metrics.jsonl."""
    for row in rows:
        run.log({"sweep": True, **row}, "metrics.jsonl")
    columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    cells = [columns] + [[f"{row[key]:.5g}" for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
    distances = [key for key in columns if key.startswith("fd@")]
    drawn = [f"wrote {plot(rows, distances[0], named(out, 'sweep'))}"] if distances else []
    return [*table, *notes, *drawn]


def plot(rows: list[dict], distance: str, file: Path) -> Path:
    """A distance against the setting with most values, a line for each combination of the others."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UmmError("the plot of a sweep needs matplotlib: pip install matplotlib, or umm[demo].") from error
    settings = ("checkpoint", "guidance", "steps")
    x = max(settings, key=lambda name: len({row[name] for row in rows}))
    others = [name for name in settings if name != x and len({row[name] for row in rows}) > 1]
    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=x, ylabel=f"{distance}, {rows[0]['n']} pictures")
    for key in dict.fromkeys(tuple(row[name] for name in others) for row in rows):
        line = [row for row in rows if tuple(row[name] for name in others) == key]
        label = ", ".join(f"{name} {value:g}" for name, value in zip(others, key))
        axes.plot([row[x] for row in line], [row[distance] for row in line], "o-", label=label or None)
    if others:
        axes.legend()
    with writing(file.parent, file.name):
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    return file
