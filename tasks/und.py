"""Understanding: classes read from a frozen latent space, or from a trunk that this loss alone trains.

    und.kind=vqa, llm question answering instead, see `umm/tasks/_answering.py`
    und.train=probe   a linear or attentive reader on standardised latents
    und.train=trunk   a DiT from scratch and a reader of one of its blocks: the specialist that joint training must beat

B batch, C channels, h w latent grid, D trunk width, K classes.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig
from torch import Tensor, nn

from umm import flow
from umm.build import judged_data, open_source, settings_of
from umm.data.base import DataSource, collate
from umm.errors import DataError
from umm.heads.attentive import AttentiveReader
from umm.heads.dit import DiT
from umm.heads.linear import LinearReader
from umm.judging import CHANCE, Records, share_of
from umm.latents.base import LatentSpace
from umm.loader import first, to_device
from umm.metrics.base import PictureIds
from umm.model import UnifiedModel, trunk_grid
from umm.paired import wilson
from umm.progress import Progress
from umm.rng import PictureRNG, seeded_init
from umm.settings import LinearSettings
from umm.tasks._answering import Answering
from umm.tasks.base import Phase, Task

SHOWN = 20  # classes whose recall is a line of the table; of more, the worst


class TrunkReader(nn.Module):
    """A DiT and a reader of its block: latents (B, C, h, w) at `time` -> logits (B, K)."""

    def __init__(self, dit: DiT, reader: nn.Module, block: int, time: float):
        super().__init__()
        self.dit, self.reader, self.block, self.time = dit, reader, block, time

    def forward(self, z: Tensor) -> Tensor:
        return self.reader(trunk_grid(self.dit, z, self.time, self.block))


def read_parts(dit: DiT, block: int) -> list[nn.Parameter]:
    """What a reader after `block` sees of a trunk."""
    seen = [dit.embed, dit.time, dit.label, *dit.blocks[: range(1, dit.config.depth + 1)[block]]]
    tokens = [tokens for tokens in (dit.time_tokens, dit.class_tokens) if tokens is not None]
    return [parameter for part in seen for parameter in part.parameters()] + tokens


class Und(Task):
    """Trains a reader, and with `und.train=trunk` the trunk below it."""

    name = "und"

    def __new__(cls, config: DictConfig, space: LatentSpace, val: DataSource | None) -> Task:
        """Questions have a task of their own."""
        return super().__new__(cls) if config.und.kind == "classify" else Answering(config, space, val)

    def __init__(self, config: DictConfig, space: LatentSpace, val: DataSource | None):
        super().__init__(config, space, val)
        self.settings = settings = settings_of(config.und)
        self.classes = self.find_classes()
        self.keys = ("image" if config.cache.dir is None else "latent", "label")
        self.trunk = settings.train == "trunk"
        module = self.build_trunk() if self.trunk else self.build_reader(space.spec.channels)
        self.phases = [Phase(settings.train, module, settings.optim, settings.ema)]

    def find_classes(self) -> list[str]:
        classes = self.val.classes if self.val is not None else None
        if not classes:
            raise DataError(
                f"the data set '{self.config.data.name}' has no classes to learn: choose one with labels, or name the "
                "column with data.columns={label: ...}."
            )
        return list(classes)

    def build_reader(self, width: int) -> nn.Module:
        with seeded_init(self.seed, self.name, "reader"):
            if self.settings.reader == "linear":
                return LinearReader(self.space.spec, self.classes, width)
            attentive = self.settings.attentive
            return AttentiveReader(self.space.spec, self.classes, width, attentive.heads, attentive.width)

    def build_trunk(self) -> TrunkReader:
        dit, block = self.build_dit(), self.settings.block
        if not -dit.config.depth <= block < dit.config.depth:
            raise DataError(f"und.block={block}: this trunk has blocks 0 to {dit.config.depth - 1}.")
        self.thaw(dit)
        return TrunkReader(dit, self.build_reader(dit.config.width), block, self.settings.time)

    def build_dit(self) -> DiT:
        """The first weights are those of an unconditional `gen` run with the same seed: arms are paired by it."""
        with seeded_init(self.seed, "gen", "dit"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "this DiT is .* wide")  # width limits generation, not reading
            return DiT.from_config(self.settings.dit, self.space.spec)

    def thaw(self, dit: DiT) -> None:
        """Train what the reader sees and nothing else: other parameters would get no gradient."""
        dit.requires_grad_(False)
        for parameter in read_parts(dit, self.settings.block):
            parameter.requires_grad_(True)

    def view(self, data):
        """The pictures learnt from.

        Raises:
            DataError: a class has none, as far as a cache tells (to read all labels of a folder is to read it).
        """
        few = self.settings.limit is not None or self.config.data.limit is not None
        if self.config.cache.dir is not None and not few:
            labels = data.select("label").batch(range(len(data)))["label"]
            require_known(labels, self.classes, self.config.data.name)
            empty = [name for name, n in zip(self.classes, labels.bincount(minlength=len(self.classes))) if not n]
            if empty:
                raise DataError(
                    f"the class '{empty[0]}' has no training picture ({len(empty)} of {len(self.classes)} classes): "
                    "remove it from the data set, or add pictures of it."
                )
        return first(data, self.settings.limit, "und.limit")

    # ------------------------------------------------------------------------------------------------------ training

    def loss(self, phase: str, batch: dict[str, Tensor], rng: PictureRNG, images: int) -> dict[str, Tensor]:
        """Cross-entropy of the classes."""
        labels = self.labels(batch)
        z = self.space.normalizer(batch["latent"].float())  # (B, C, h, w)
        if self.trunk and self.settings.time > 0:
            t = torch.full((len(z),), self.settings.time, device=z.device)
            z = flow.interpolate(z, rng.fork("noise").randn(*z.shape[1:]), t)
        logits = self.phases[0].forward(z).float()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        if "label" not in batch:
            raise DataError(
                f"the pictures of '{self.config.data.name}' have no labels: name the column with "
                "data.columns={label: ...}."
            )
        if batch["label"].device.type == "cpu":  # elsewhere to look at them is to wait for them
            require_known(batch["label"], self.classes, self.config.data.name)
        return batch["label"]

    # ------------------------------------------------------------------------------------------------------- results

    def heads(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        module = modules[self.settings.train]
        return {"dit": module.dit, "und": module.reader} if self.trunk else {"und": module}

    def head_settings(self) -> dict[str, dict]:
        reader = self.settings.attentive if self.settings.reader == "attentive" else LinearSettings()
        module = self.phases[0].module
        width = module.dit.config.width if self.trunk else self.space.spec.channels
        described = {"und": {"settings": asdict(reader), "facts": {"classes": self.classes, "width": width}}}
        if self.trunk:
            described["dit"] = {"settings": asdict(self.settings.dit), "facts": {"num_classes": 0}}
        return described

    def facts(self) -> dict:
        """Where the reader reads: see `UnifiedModel.class_logits`."""
        trunk = {"block": self.settings.block, "time": self.settings.time} if self.trunk else None
        return {"und": {"trunk": trunk}}

    @staticmethod
    @torch.no_grad()
    def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> Records:
        """Accuracy on `eval.split` with its interval, the recall of every class, and what classes are mistaken for.

        Raises:
            MissingHead: the model cannot classify.
            DataError: the pictures have no labels, or others than the model knows.
        """
        if config.und.kind != "classify":
            return Answering.evaluate(model, config, accelerator)
        classes = model.head("und").classes
        source = judged_data(config, model.space, open_source(config, config.eval.split), accelerator)
        check_classes(source, classes)
        total = min(len(source), config.eval.images or len(source))
        answers: list[tuple[str, int, int]] = []  # id, class, answer
        with Progress(total, enabled=accelerator.is_main_process, what="judging") as progress:
            for indices in share_of(total, accelerator, config.eval.batch_size):
                batch = collate([labelled(source[i]) for i in indices])
                require_known(batch["label"], classes, config.data.name)
                pictures = {key: to_device(value, accelerator.device) for key, value in batch.items()}
                guess = model.class_logits(model.latents_of(pictures)).argmax(1)
                answers += zip(batch["id"], batch["label"].tolist(), guess.tolist())
                progress.advance(len(indices) * accelerator.num_processes)
        if accelerator.num_processes > 1:
            answers = gather_object(answers)
        return class_records(answers, classes)


def require_known(labels: Tensor, classes: list[str], data: str) -> None:
    """Raise for a label (B,) that is none of the classes."""
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise DataError(
            f"the label {int(wrong[0])} is outside the {len(classes)} classes of '{data}': its labels must count from "
            "0, in the order of its classes."
        )


def check_classes(source: DataSource, classes: list[str]) -> None:
    if len(source) == 0:
        raise DataError(f"the {source.split} split has no pictures: choose another with eval.split.")
    if source.classes is not None and list(source.classes) != list(classes):
        raise DataError(
            f"the model knows the classes {', '.join(classes[:4])}, ... ({len(classes)}), the pictures have "
            f"{', '.join(source.classes[:4])}, ... ({len(source.classes)}): evaluate on the data it was trained on."
        )


def labelled(item: dict) -> dict:
    if "label" not in item:
        raise DataError(f"picture '{item['id']}' has no label: classes cannot be judged without.")
    return {key: item[key] for key in ("image", "latent", "label", "id") if key in item}


def class_records(answers: list[tuple[str, int, int]], classes: list[str]) -> Records:
    """Numbers, per-picture values and remarks from (id, class, answer)."""
    ids = PictureIds()
    ids.add([picture for picture, _, _ in answers])
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)  # [class, answer]
    for _, label, answer in answers:
        confusion[label, answer] += 1
    counts, right = confusion.sum(1), confusion.diag()
    rows = [row("accuracy", int(right.sum()), int(counts.sum()))]
    rows.append(row(CHANCE, int(counts.max()), int(counts.sum())))
    there = [k for k in range(len(classes)) if counts[k]]
    worst_first = sorted(there, key=lambda k: float(right[k] / counts[k]))
    shown = there if len(there) <= SHOWN else worst_first[:SHOWN]
    rows += [row(f"recall of {classes[k]}", int(right[k]), int(counts[k])) for k in shown]
    items = {"accuracy": {picture: float(label == answer) for picture, label, answer in sorted(answers)}}
    facts = {"metric": "accuracy", "version": 1, "n": len(ids), "pictures": ids.digest()}
    return Records(rows, items, {"accuracy": facts}, confusions(confusion, classes, worst_first[:5]))


def row(metric: str, correct: int, n: int) -> dict:
    found = wilson(correct, n)
    numbers = {"metric": metric, "value": found.value, "low": found.low, "high": found.high, "n": n}
    return numbers | {"higher_is_better": True, "version": 1, "headline": True, "conflict": None}


def confusions(confusion: Tensor, classes: list[str], which: list[int]) -> list[str]:
    """What the weakest classes are taken for."""
    wrong = confusion.clone().fill_diagonal_(0)
    return [
        f"{classes[k]} is most often mistaken for {classes[int(wrong[k].argmax())]} ({int(wrong[k].max())} of "
        f"{int(confusion[k].sum())})"
        for k in which
        if wrong[k].any()
    ]
