"""`umm best-of`: does the understanding head pick good samples without seeing them decoded?

For every request (a class) a pool of candidates is drawn, and each judge takes its favourite of the first 1, 2, 4, ...

    random      any of them
    latent      the run's own reader of latents: the class's logit; nothing is decoded
    re-encoded  the same reader after decoding to whole pixel values and encoding again
    external    a ridge probe of real pictures in a feature space unrelated to the encoder
    oracle      what scores the choices: another such probe, in a space that neither encoder nor external judge uses,
                by default that of a small network learned here (`umm/convnet.py`)

B candidates of a batch, R requests, P candidates of each, K classes, C channels, h w latent grid, d feature width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from umm import flow
from umm.build import judged_data, open_source, settings_of
from umm.data.base import DataSource
from umm.errors import UmmError
from umm.evaluate import run_config
from umm.latents._adapted import adapter_digest
from umm.loader import to_device
from umm.model import UnifiedModel, check_identity
from umm.picture_judges import PictureJudge, batches, in_groups, learn_judges, share
from umm.progress import Progress
from umm.rng import PictureRNG
from umm.runs import Run
from umm.sampling import BATCH, GROUP, Drawer
from umm.tasks.und import check_classes
from umm.transforms import to_uint8

Made = TypeVar("Made")
MOST = 1 << 16  # candidates of a request: candidate i of request q is picture q * MOST + i of the seed, in any pool
# what each judge needs of a candidate once it is drawn
NEEDS = {
    "random": (),
    "latent": ("read",),
    "re-encoded": ("decode", "encode", "read"),
    "external": ("decode", "external"),
    "oracle": ("decode", "metric"),
}


@dataclass
class Request:
    """What to compare; `overrides` are those of `umm eval`."""

    judge: str | None = None  # a run with an und head on the same latent space; None: the run's own
    pool: int = 32
    per_class: int = 16
    external: str = "effnet"  # a feature space of eval.features, or convnet, which is learned here
    metric: str = "convnet"
    margin: float = 0.05  # of class agreement
    seed: int = 0
    out: str | None = None
    overrides: Sequence[str] = ()


@dataclass
class Pool:
    """What is known of all candidates; row q asked for class `labels[q]`."""

    labels: np.ndarray  # (R,)
    scores: dict[str, np.ndarray]  # judge -> (R, P)
    right: np.ndarray  # (R, P) whether the metric's probe sees the class asked for
    ties: np.ndarray  # (R, P) who is taken among equals
    features: Tensor  # (R, P, d) in the metric's space, float32 on the CPU


class Stages:
    """Seconds and FLOPs that named steps cost a picture.

    FLOPs are those of matrix products and convolutions, counted on the first batch, which is then timed anew.
    """

    def __init__(self, device: torch.device):
        self.device, self.flops = device, {}
        self._seconds: dict[str, float] = {}
        self._pictures: dict[str, int] = {}

    def run(self, name: str, count: int, make: Callable[[], Made]) -> Made:
        """What `make` makes of `count` pictures."""
        if name not in self.flops:
            with FlopCounterMode(display=False) as counter:
                make()
            self.flops[name] = counter.get_total_flops() / (count + -count % GROUP)
        self.wait()
        start = time.perf_counter()
        made = make()
        self.wait()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
        self._pictures[name] = self._pictures.get(name, 0) + count
        return made

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def cost(self, names: Sequence[str]) -> dict[str, float]:
        """{"flops", "seconds"} of these steps, a picture."""
        seconds = sum(self._seconds[name] / self._pictures[name] for name in names)
        return {"flops": float(sum(self.flops[name] for name in names)), "seconds": seconds}


@dataclass
class Contest:
    """A generator, the judges, and the real pictures they learned from."""

    model: UnifiedModel
    reader: UnifiedModel  # whose und head judges
    drawer: Drawer
    external: PictureJudge
    metric: PictureJudge
    accuracy: dict[str, float]  # of the judges where the latents are those of real pictures
    real_labels: Tensor
    seed: int
    stages: Stages = field(init=False)

    def __post_init__(self):
        self.stages = Stages(self.model.device)

    @torch.no_grad()
    def draw(self, pool: int, requests: int, batch: int = BATCH) -> Pool:
        """All candidates of all requests, judged by everyone; request q asks for class q mod K."""
        total, found = requests * pool, []
        with Progress(total, what="candidates") as progress:
            for start in range(0, total, batch):
                numbers = range(start, min(start + batch, total))
                asked = [n // pool % self.drawer.dit.num_classes for n in numbers]
                found.append(self.judge([n // pool * MOST + n % pool for n in numbers], asked))
                progress.advance(len(numbers))
        columns = {key: torch.cat([part[key] for part in found]).unflatten(0, (requests, pool)) for key in found[0]}
        features = columns.pop("features")
        known = {key: column.double().numpy() for key, column in columns.items()}
        right, ties = known.pop("right"), known.pop("ties")
        labels = np.arange(requests) % self.drawer.dit.num_classes
        return Pool(labels, known | {"random": np.zeros_like(right), "oracle": right}, right, ties, features)

    def judge(self, indices: list[int], classes: list[int]) -> dict[str, Tensor]:
        """Scores (B,) of each judge, features (B, d), and who is right, of a batch; on the CPU."""
        run, count = self.stages.run, len(indices)
        asked = torch.tensor(classes)
        z = run("draw", count, lambda: self.drawer.latents(indices, classes, self.seed))
        pictures = run("decode", count, lambda: to_uint8(in_groups(self.model.decode, z)))
        again = run("encode", count, lambda: in_groups(self.reader.encode, pictures.float() / 255))
        own = run("read", count, lambda: in_groups(self.reader.class_logits, as_read(self.reader, self.model, z)))
        seen = in_groups(self.reader.class_logits, again)
        _, external = run("external", count, lambda: self.external.look(pictures))
        features, answers = run("metric", count, lambda: self.metric.look(pictures))
        found = {"latent": own, "re-encoded": seen, "external": external}
        found = {name: scores.cpu().gather(1, asked[:, None])[:, 0] for name, scores in found.items()}
        if bad := [name for name, scores in found.items() if not scores.isfinite().all()]:
            raise UmmError(f"the {bad[0]} judge gives scores that are not finite: its run or the generator is broken.")
        found["right"] = answers.argmax(1).cpu() == asked
        found["ties"] = PictureRNG(indices, self.seed, "ties").rand()
        return found | {"features": features.float().cpu()}

    def pictures(self, indices: list[int], classes: list[int]) -> Tensor:
        """Candidates decoded once more, (B, 3, H, W) in [0, 1]."""
        parts = [slice(start, start + BATCH) for start in range(0, len(indices), BATCH)]
        return torch.cat([self.drawer.pictures(self.model, indices[p], classes[p], self.seed) for p in parts])

    def costs(self) -> dict[str, dict[str, float]]:
        """{judge or "draw": {"flops", "seconds"}} a candidate; `draw` also has its velocity evaluations."""
        costs = {judge: self.stages.cost(names) for judge, names in NEEDS.items()}
        draw = self.stages.cost(("draw",)) | {"evaluations": flow.evaluations(self.drawer.sampler)}
        return costs | {"draw": draw, "decode": self.stages.cost(("decode",))}


# ------------------------------------------------------------------------------------------------------- opening


def open_contest(folder: str, request: Request) -> tuple[Contest, DictConfig]:
    """Load the generator and the reader, and train the judges of pictures.

    Raises:
        UmmError: no classes, no decoder, no reader, another latent space, or judges that are related.
    """
    config = run_config(Run(folder), request.overrides)
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    model = UnifiedModel.load(folder, accelerator.device)
    drawer = open_drawer(model, config)
    if not model.can_decode:
        model.head("decoder")
    reader = open_reader(model, request.judge)
    train, val = (
        judged_data(config, model.space, open_source(config, split), accelerator)
        for split in ("train", config.eval.split)
    )
    for classes in (drawer.dit.classes, reader.head("und").classes):
        check_classes(val, classes)
    names = {"--external": request.external, "--metric": request.metric}
    external, metric, labels = learn_judges(names, model, train, val, config, request.seed)
    accuracy = real_accuracy(reader, model, val, config)
    accuracy |= {"external": external.accuracy, "oracle": metric.accuracy}
    return Contest(model, reader, drawer, external, metric, accuracy, labels, request.seed), config


def open_drawer(model: UnifiedModel, config: DictConfig) -> Drawer:
    """The generator of samples with labels.

    Raises:
        UmmError: it knows no classes.
    """
    if not model.head("dit").num_classes:
        raise UmmError("this run draws without classes, so its samples have no labels: set gen.conditional=true.")
    return Drawer.of(model, settings_of(config.eval.sampler))


def open_reader(model: UnifiedModel, judge: str | None) -> UnifiedModel:
    """The model whose und head judges: of another run on the same latent space, or the model's own."""
    if judge is None:
        if "und" not in model.heads:
            raise UmmError("this run has no understanding head to judge with: give --judge RUN of an und run.")
        return model
    reader = UnifiedModel.load(judge, model.device)
    check_identity(model.space, reader.space.identity(), Path(judge))
    if adapter_digest(model.space) not in (None, adapter_digest(reader.space)):
        raise UmmError(f"{judge} does not read latents through the adapter of this run's: give a reader trained in it.")
    reader.head("und")
    return reader


def real_accuracy(reader: UnifiedModel, model: UnifiedModel, val: DataSource, config: DictConfig) -> dict[str, float]:
    """How often the reader names real pictures right, from their latents and from pictures decoded of these."""
    answers, labels = {"latent": [], "re-encoded": []}, []
    with torch.no_grad():
        for batch in batches(val, config.eval.images, config.eval.batch_size):
            z = model.encode(to_device(batch["image"], model.device))
            again = reader.encode(to_uint8(model.decode(z)).float() / 255)
            labels.append(batch["label"])
            for name, latents in {"latent": as_read(reader, model, z), "re-encoded": again}.items():
                answers[name].append(reader.class_logits(latents).argmax(1).cpu())
    return {name: share(torch.cat(found), torch.cat(labels)) for name, found in answers.items()}


def as_read(reader: UnifiedModel, model: UnifiedModel, z: Tensor) -> Tensor:
    """The generator's latents standardised as the reader's are: another run measured its own statistics."""
    if reader is model:
        return z
    raw, normalizer = model.space.normalizer.undo(z), reader.space.normalizer
    # a generator behind an adapter makes latents that the reader's, the same one, has moved already
    return normalizer(raw) if adapter_digest(model.space) is None else normalizer.unadapted(raw)
