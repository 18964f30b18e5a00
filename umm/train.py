"""One loop for every task and every mixture of tasks.

    for step: for task: for phase: for micro-batch: loss, backward;  then clip, step, average

Schedules count images, so batch size does not change them. Random numbers and data order are functions of the picture
counter (`umm.rng`, `umm.loader`), so micro-batches, processes and interruptions do not change a run, and a checkpoint
holds no generator state.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
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
from umm.loader import Feed, batches, positions
from umm.model import UnifiedModel, contiguous
from umm.progress import Progress
from umm.registry import find
from umm.rng import PictureRNG
from umm.runs import Run, now, reading
from umm.settings import OptimSettings
from umm.tasks.base import Phase, Task


def learning_rate(optim: OptimSettings, images: int, total: int) -> float:
    """The rate after `images` pictures: linear warm-up from zero, a constant part, then the decay to `final_lr`.

    `total` is the length of the run in images, the end of the decay unless `decay_images` says otherwise.
    """
    if images < optim.warmup:
        return optim.lr * images / optim.warmup
    start, end = optim.warmup + optim.constant, optim.decay_images or total
    if optim.decay == "constant" or images <= start:
        return optim.lr
    done = min((images - start) / max(end - start, 1), 1.0)
    rest = 1 - done if optim.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.final_lr + (optim.lr - optim.final_lr) * rest


class EMA:
    """ema <- d * ema + (1 - d) * weights after every step; buffers are copied.

    d = min(decay, (1 + n) / (10 + n)) after n steps, so that a short run is not judged by its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers()):
            mine.copy_(theirs)


class Learner:
    """A phase of a task with its optimiser, its average and its wrapped module."""

    def __init__(self, task: Task, phase: Phase, accelerator: Accelerator, total: int, compiled: bool):
        self.task, self.phase, self.accelerator, self.total = task, phase, accelerator, total
        self.key = f"{task.name}.{phase.name}"
        phase.module.to(accelerator.device)
        self.ema = EMA(phase.module, phase.ema) if phase.ema is not None else None
        if compiled:
            phase.module.compile()
        trainable = [p for p in phase.module.parameters() if p.requires_grad]
        optim = phase.optim
        self.optimizer = torch.optim.AdamW(
            trainable, optim.lr, tuple(optim.betas), optim.eps, optim.weight_decay, fused=True
        )
        phase.forward = self.wrapped = accelerator.prepare_model(phase.module)

    def step(self, micro_batches: list[dict], plan: list[list[int]], images: int) -> dict[str, Tensor | float]:
        """One optimiser step on all micro-batches; returns the mean terms, still on the device."""
        total: dict[str, Tensor] = {}
        self.task.begin(self.phase.name)
        for i, (batch, counters) in enumerate(zip(micro_batches, plan)):
            rng = PictureRNG(counters, self.task.seed, self.key, device=self.accelerator.device)
            last = i == len(plan) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms = self.task.loss(self.phase.name, batch, rng, images)
                (terms["loss"] / len(plan)).backward()
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + value.detach() / len(plan)
        self.task.end(self.phase.name, lambda x: self.accelerator.reduce(x, "mean"))
        done = images + len(plan) * len(plan[0]) * self.accelerator.num_processes
        total["lr"] = learning_rate(self.phase.optim, done - self.phase.start, self.total - self.phase.start)
        total["grad_norm"] = self.update(total["lr"])
        return total

    def update(self, rate: float) -> Tensor:
        """Clip, step, average; returns the gradient norm before clipping."""
        group = self.optimizer.param_groups[0]
        group["lr"] = rate
        limit = self.phase.optim.clip
        norm = torch.nn.utils.clip_grad_norm_(group["params"], limit if limit > 0 else math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.phase.module)
        return norm


class Window:
    """Means of logged terms over some steps; nothing leaves the device before they are asked for.

    A term of two numbers is a sum and a count, whose ratio is logged.
    """

    def __init__(self):
        self.steps, self.sums, self.counts = 0, {}, {}

    def add(self, logs: dict[str, Tensor | float]) -> None:
        self.steps += 1
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, device: torch.device) -> dict[str, Tensor]:
        return {
            name: torch.as_tensor(total / self.counts[name], device=device, dtype=torch.float32)
            for name, total in self.sums.items()
        }


def finished(means: dict[str, Tensor]) -> dict[str, float]:
    """Means as numbers; a (sum, count) as its ratio, and left out where the count is 0."""
    values = {name: mean.tolist() for name, mean in means.items()}
    pairs = {name: pair for name, pair in values.items() if isinstance(pair, list)}
    ratios = {name: total / count for name, (total, count) in pairs.items() if count}
    return {name: ratios.get(name, value) for name, value in values.items() if name in ratios or name not in pairs}


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
        self.tasks = [find("tasks", config.task)(config, self.space, open_source(config, "val"))]
        self.learners = {
            task.name: [Learner(task, phase, self.accelerator, self.images_at(self.steps), self.settings.compile)
                        for phase in task.phases]
            for task in self.tasks
        }  # fmt: skip
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
                logs: dict[str, Tensor] = {}
                for task in self.tasks:
                    before = time.perf_counter()
                    micro_batches = [next(feeds[task.name]) for _ in range(self.settings.accumulate)]
                    waited += time.perf_counter() - before
                    logs |= self.train_task(task, micro_batches)
                self.step += 1
                self.guard(logs)
                window.add(logs)
                if self.every(self.settings.log_every, steps=True):
                    self.log(window, time.perf_counter() - started, waited, progress)
                    waited, started, window = 0.0, time.perf_counter(), Window()
                self.due()
                progress.advance(self.settings.batch_size)
        return self.finish() if self.step == self.steps else self.stop()

    def told_to_stop(self) -> bool:
        """Has a signal come? Several processes agree on it, now and then, so that all leave at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        if self.every(self.settings.log_every, steps=True):
            told = torch.tensor(self.stop_signal or 0, device=self.device)
            self.stop_signal = int(self.accelerator.gather(told[None]).max()) or None
            return self.stop_signal is not None
        return False

    def train_task(self, task: Task, micro_batches: list[dict]) -> dict[str, Tensor]:
        """All phases of one task on the same pictures."""
        images, plan = self.images_at(self.step), self.plan(self.step)
        for batch in micro_batches:
            self.add_latents(batch)
        logs = {}
        for learner in self.learners[task.name]:
            if images >= learner.phase.start:
                terms = learner.step(micro_batches, plan, images)
                logs |= {f"{learner.key}.{name}": value for name, value in terms.items()}
        return logs

    @torch.no_grad()
    def add_latents(self, batch: dict) -> None:
        """Encode on the fly what no cache has encoded."""
        if "latent" not in batch:
            with self.accelerator.autocast():
                batch["latent"] = self.space.raw(batch["image"]).float()

    def plan(self, step: int) -> list[list[int]]:
        settings, accelerator = self.settings, self.accelerator
        return positions(
            step, settings.batch_size, settings.accumulate, accelerator.process_index, accelerator.num_processes
        )

    def feed(self, task: Task) -> Iterator[dict]:
        """Batches from the present step on, loaded ahead."""
        feed = Feed(self.data, self.config.seed, task.name, self.config.data.flip, task.keys)
        plan = [part for step in range(self.step, self.steps) for part in self.plan(step)]
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
                task.sample(self.averaged(task), self.run.folder / "samples" / f"{self.images_at(self.step):09d}.png")
        if self.every(settings.evaluate_every) and not last:
            self.evaluate()

    def averaged(self, task: Task) -> dict[str, nn.Module]:
        """The weights a task is judged by: the average of each phase that keeps one, else the weights themselves."""
        return {
            learner.phase.name: learner.ema.module if learner.ema else learner.phase.module
            for learner in self.learners[task.name]
        }

    def model(self) -> UnifiedModel:
        heads, facts = {}, {}
        for task in self.tasks:
            heads |= task.heads(self.averaged(task))
            facts |= task.facts()
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
        feed = Feed(self.data, self.config.seed, self.tasks[0].name)
        numbers = [position for part in self.plan(step) for position in part]
        ids = [self.data[feed.index(position)]["id"] for position in numbers[:shown]]
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
        for learner in self.all_learners():
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
        for learner in self.all_learners():
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

    def all_learners(self) -> list[Learner]:
        return [learner for learners in self.learners.values() for learner in learners]

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
            heads = {}
            for task in self.tasks:
                heads |= task.head_settings()
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


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{key}": value for key, value in state.items()}


def unprefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(f"{prefix}/")}


def train(config: DictConfig, argv: list[str] | None = None) -> Path:
    """Train the run that `config` describes, from its last checkpoint if there is one; returns its model folder."""
    return Trainer(config, argv).train()
