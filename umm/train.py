"""One loop for every task and every mixture of tasks.

    for step: for learner: for task: for micro-batch: loss, backward;  then clip, step, average

Schedules count images, so batch size does not change them. Random numbers and data order are functions of the picture
counter (`umm.rng`, `umm.loader`), so micro-batches, processes and interruptions do not change a run, and a checkpoint
holds no generator state.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umm.build import build_space, check_data, fit_normalizer, open_source, training_data
from umm.config import flatten
from umm.errors import ConfigError, NonFinite
from umm.learner import Learner, Plan, Window, finished
from umm.loader import Feed, batches, positions
from umm.model import UnifiedModel, contiguous
from umm.progress import Progress
from umm.registry import find
from umm.runs import Run, now, reading
from umm.tasks.base import Task


class Trainer:
    """A run in progress: its tasks, where it stands, and how it is written down."""

    def __init__(self, config: DictConfig, argv: list[str] | None = None):
        self.config, self.settings = config, config.train
        self.accelerator = start_accelerator(config)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.check_batch()
        self.steps = math.ceil(self.settings.images / self.settings.batch_size)
        with self.accelerator.main_process_first():
            self.run = Run.create(config, argv) if self.main else Run(config.run)
        self.space = build_space(config.latent).to(self.device)
        self.data = training_data(config, self.space, self.accelerator)
        if self.main:
            check_data(self.run, self.data)
        fit_normalizer(self.space, config, self.data, self.run, self.accelerator)
        self.task = find("tasks", config.task)(config, self.space, open_source(config, "val"))
        self.tasks = self.task.members()
        self.views = {task.name: task.view(self.data) for task in self.tasks}
        total, compiled = self.images_at(self.steps), self.settings.compile
        self.learners = [Learner(group, self.accelerator, total, compiled) for group in self.task.groups()]
        self.step = self.resume()
        self.first_bad = torch.tensor(self.steps, device=self.device)  # first step with a non-finite term
        self.stop_signal: int | None = None

    def check_batch(self) -> None:
        parts = self.accelerator.num_processes * self.settings.accumulate
        if self.settings.batch_size % parts:
            raise ConfigError(
                f"train.batch_size={self.settings.batch_size} cannot be shared equally by "
                f"{self.accelerator.num_processes} processes x {self.settings.accumulate} micro-batches: "
                f"choose a multiple of {parts}."
            )

    def images_at(self, step: int) -> int:
        return step * self.settings.batch_size

    # --------------------------------------------------------------------------------------------------- the loop

    def train(self) -> Path:
        """Run to the end, or to a signal; returns the model folder."""
        feeds = {task.name: self.feed(task) for task in self.tasks}
        with self.signals(), Progress(self.images_at(self.steps), self.images_at(self.step), self.main) as progress:
            waited, started, window = 0.0, time.perf_counter(), Window()
            while self.step < self.steps and not self.told_to_stop():
                before = time.perf_counter()
                micro_batches = {
                    task.name: [next(feeds[task.name]) for _ in range(self.settings.accumulate)]
                    for task in self.at_work()
                }
                waited += time.perf_counter() - before
                logs = self.train_step(micro_batches)
                self.step += 1
                self.guard(logs)
                window.add(logs)
                if self.every(self.settings.log_every, steps=True):
                    self.log(window, time.perf_counter() - started, waited, progress)
                    waited, started, window = 0.0, time.perf_counter(), Window()
                self.due()
                progress.advance(self.settings.batch_size)
        folder = self.finish() if self.step == self.steps else self.stop()
        if self.stop_signal is not None:  # it came in the last step, and whoever goes on from here is to stop too
            raise SystemExit(128 + self.stop_signal)
        return folder

    def at_work(self) -> list[Task]:
        """The tasks that take part in the present step."""
        images = self.images_at(self.step)
        return [t for t in self.tasks if t.window[0] <= images and (t.window[1] is None or images < t.window[1])]

    def told_to_stop(self) -> bool:
        """Has a signal come? Several processes agree on it, now and then, so that all leave at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        if self.every(self.settings.log_every, steps=True):
            told = torch.tensor(self.stop_signal or 0, device=self.device)
            self.stop_signal = int(self.accelerator.gather(told[None]).max()) or None
            return self.stop_signal is not None
        return False

    def train_step(self, micro_batches: dict[str, list[dict]]) -> dict[str, Tensor]:
        """A step of every learner whose time has come, on the same micro-batches of each task."""
        images, plans = self.images_at(self.step), {task.name: self.plan(self.step, task) for task in self.at_work()}
        for batch in itertools.chain(*micro_batches.values()):
            self.add_latents(batch)
        logs = {}
        for learner in self.learners:
            here = any(turn.task.name in micro_batches for turn in learner.group.turns)
            if here and images >= learner.phase.start:
                logs |= learner.step(micro_batches, plans, images)
        return logs

    @torch.no_grad()
    def add_latents(self, batch: dict) -> None:
        """Encode on the fly what no cache has encoded."""
        if "latent" not in batch:
            with self.accelerator.autocast():
                batch["latent"] = self.space.raw(batch["image"]).float()

    def plan(self, step: int, task: Task) -> Plan:
        """Positions in a task's own order, which begins where its window does."""
        settings, accelerator = self.settings, self.accelerator
        step -= task.window[0] // settings.batch_size
        return positions(
            step, settings.batch_size, settings.accumulate, accelerator.process_index, accelerator.num_processes
        )

    def feed(self, task: Task) -> Iterator[dict]:
        """Batches from the present step on, loaded ahead."""
        feed = Feed(self.views[task.name], self.config.seed, task.name, self.config.data.flip, task.keys)
        first, last = (edge // self.settings.batch_size if edge else edge for edge in task.window)
        steps = range(max(self.step, first), self.steps if last is None else last)
        plan = [part for step in steps for part in self.plan(step, task)]
        return batches(feed, plan, self.accelerator.num_processes, self.settings.workers, self.device)

    def every(self, interval: int, steps: bool = False) -> bool:
        """True at the step in which the count of steps or images reaches a multiple of `interval`."""
        if interval <= 0:
            return False
        unit = 1 if steps else self.settings.batch_size
        return self.step * unit // interval > (self.step - 1) * unit // interval

    def due(self) -> None:
        """Checkpoints, picture grids and evaluations that fall on this step."""
        settings, last = self.settings, self.step == self.steps
        if self.every(settings.save_every) or last:
            self.save()
        if self.main and (self.every(settings.sample_every) or last):
            for task in self.tasks:
                name = f"{self.images_at(self.step):09d}" + (f"-{task.name}" if len(self.tasks) > 1 else "")
                task.sample(self.averaged(task), self.run.folder / "samples" / f"{name}.png")
        if self.every(settings.evaluate_every) and not last:
            self.evaluate()

    def averaged(self, task: Task) -> dict[str, nn.Module]:
        """The weights a task is judged by, {phase: module}."""
        return {
            turn.phase: turn.pick(learner.averaged)
            for learner in self.learners
            for turn in learner.group.turns
            if turn.task is task
        }

    def model(self) -> UnifiedModel:
        heads, facts = {}, {}
        for task in self.tasks:
            heads |= task.heads(self.averaged(task))
            facts = merged(facts, task.facts())
        return UnifiedModel(self.space, heads, facts)

    def evaluate(self) -> None:
        """Numbers on the validation split, into metrics.jsonl; every process judges its share."""
        from umm.evaluate import evaluate  # evaluation builds on everything here

        records = evaluate(self.model(), self.config, self.accelerator)
        for row in records.numbers if self.main else []:
            self.run.log({"step": self.step, **row}, "metrics.jsonl")

    # ----------------------------------------------------------------------------------------------------- writing

    def guard(self, logs: dict[str, Tensor]) -> None:
        """Remember on the device the first step with a non-finite term; look at it where that costs nothing."""
        values = [torch.as_tensor(value, device=self.device, dtype=torch.float32).flatten() for value in logs.values()]
        bad = ~torch.isfinite(torch.cat(values)).all()
        self.first_bad = torch.minimum(self.first_bad, torch.where(bad, self.step - 1, self.steps))
        if self.device.type == "cpu":
            self.check_finite()

    def check_finite(self) -> None:
        """Stop before a damaged model is written or logged.

        Raises:
            NonFinite: names the step, its pictures and the last good checkpoint.
        """
        step = int(self.first_bad)
        if step >= self.steps:
            return
        good = self.run.latest()
        raise NonFinite(
            f"the loss or a gradient is not finite at step {step} (images {self.images_at(step)}), "
            f"{self.pictures_of(step)}. Last good checkpoint: {good or 'none'}. "
            "Lower the learning rate, set a gradient clip, or look at those pictures."
        )

    def pictures_of(self, step: int, shown: int = 8) -> str:
        """The first pictures of a step on this process, by id."""
        if getattr(self.data, "streaming", False):
            return "in a stream"
        images = self.images_at(step)
        task = next(t for t in self.tasks if t.window[1] is None or images < t.window[1])
        data = self.views[task.name]
        feed = Feed(data, self.config.seed, task.name)
        numbers = [position for part in self.plan(step, task) for position in part]
        ids = [data[feed.index(position)]["id"] for position in numbers[:shown]]
        return f"pictures {', '.join(ids)}{' ...' if len(numbers) > shown else ''}"

    def log(self, window: Window, seconds: float, waited: float, progress: Progress) -> None:
        """Means since the last record, and how long the loop waited for its data."""
        self.check_finite()
        means = self.accelerator.reduce(window.means(self.device), "mean")
        terms = finished(means)
        record = {"step": self.step, "images": self.images_at(self.step), **terms}
        speed = window.steps * self.settings.batch_size / seconds
        record |= {"images_per_second": round(speed, 2), "data_wait": round(waited / seconds, 4)}
        if self.main:
            self.run.log(record)
            progress.show(record)
        self.accelerator.log(terms, step=self.step)

    def save(self) -> None:
        """A checkpoint of the present step."""
        self.check_finite()
        if self.main and (self.run.latest() is None or self.run.latest().name != f"{self.step:08d}"):
            self.run.save(self.step, self.write_checkpoint, self.settings.keep)
        self.accelerator.wait_for_everyone()

    def write_checkpoint(self, folder: Path) -> None:
        weights, averages = {}, {}
        tasks = {task.name: task.state_dict() for task in self.tasks}
        state = {"step": self.step, "optimizers": {}, "averaged": {}, "tasks": tasks}
        for learner in self.learners:
            weights |= prefixed(learner.key, learner.phase.module.state_dict())
            averages |= prefixed(learner.key, learner.ema.module.state_dict()) if learner.ema else {}
            state["optimizers"][learner.key] = learner.optimizer.state_dict()
            state["averaged"][learner.key] = learner.ema.steps if learner.ema else 0
        save_file(contiguous(weights), folder / "model.safetensors")
        save_file(contiguous(averages), folder / "ema.safetensors")
        torch.save(state, folder / "state.pt")

    def resume(self) -> int:
        """Load the newest checkpoint; returns the number of steps taken."""
        folder = self.run.latest()
        if folder is None:
            return 0
        with reading(folder, "write the name of an earlier checkpoint into checkpoints/latest"):
            weights = load_file(folder / "model.safetensors")
            averages = load_file(folder / "ema.safetensors")
            state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        for learner in self.learners:
            learner.phase.module.load_state_dict(unprefixed(learner.key, weights))
            if learner.ema:
                learner.ema.module.load_state_dict(unprefixed(learner.key, averages))
                learner.ema.steps = state["averaged"][learner.key]
            learner.optimizer.load_state_dict(state["optimizers"][learner.key])
        for task in self.tasks:
            task.load_state_dict(state["tasks"][task.name])
        if self.main:
            self.run.rewind(state["step"])
        return state["step"]

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the loop after the present step, with a checkpoint."""

        def remember(number, frame):
            self.stop_signal = number

        old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def stop(self) -> Path:
        """After a signal: a checkpoint, a sentence, and the exit status shells expect."""
        self.save()
        if self.main:
            print(f"stopped at step {self.step} of {self.steps}; the same command goes on from {self.run.latest()}.")
        raise SystemExit(128 + self.stop_signal)

    def finish(self) -> Path:
        """Write model/ with the averaged weights."""
        folder = self.run.folder / "model"
        if self.main:
            heads = self.task.head_settings()
            described = {"latent": OmegaConf.to_container(self.config.latent), "heads": heads}
            self.model().save(folder, OmegaConf.create(described))
            self.run.note(finished=now(), images=self.images_at(self.steps))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return folder


def start_accelerator(config: DictConfig) -> Accelerator:
    """Devices, processes and precision, by accelerate's own rules; trackers write into the run folder."""
    for tracker in config.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(f"train.trackers={tracker} needs a package: pip install {tracker}.")
    precision = {"fp32": "no"}.get(config.train.precision, config.train.precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=config.train.device == "cpu",
        log_with=list(config.train.trackers) or None,
        project_dir=config.run,
    )
    if config.train.trackers:
        flat = {key: str(value) for key, value in flatten(config)}
        accelerator.init_trackers(Path(config.run).name, config=flat)
    return accelerator


def merged(facts: dict, more: dict) -> dict:
    """Facts of two tasks; what is a dictionary in both is merged."""
    both = {key: facts[key] | more[key] for key in facts.keys() & more.keys() if isinstance(more[key], dict)}
    return facts | more | both


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{key}": value for key, value in state.items()}


def unprefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(f"{prefix}/")}


def train(config: DictConfig, argv: list[str] | None = None) -> Path:
    """Train the run that `config` describes, from its last checkpoint if there is one; returns its model folder."""
    return Trainer(config, argv).train()
