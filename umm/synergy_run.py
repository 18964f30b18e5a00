"""`umm synergy run`: every arm with every seed, in parallel, resumable; what it finds lies in files.

    <folder>/declaration.json                          sealed before the first run
    <folder>/<arm>/seed<i>/                            an ordinary run folder, and result.json once it is judged
    <folder>/tuning/<arm>/trial<k>/seed<i>/, tuning.json   where settings are tuned, and what was chosen
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from umm.board import Board
from umm.config import config_hash
from umm.errors import UmmError
from umm.runs import commit, lock, now, reading, write_atomic
from umm.synergy import Declaration, Endpoint, configuration, read_declaration, seal
from umm.workers import cores, in_workers

Judge = Callable[[DictConfig], tuple[list[dict], dict[str, float]]]  # rows of an evaluation, and what the run cost
RESULT = "result.json"


@dataclass(frozen=True)
class Job:
    """One run; `group` and `seed` say where it stands in the table."""

    group: str
    seed: int
    folder: Path
    task: str
    settings: dict[str, Any]
    sha256: str  # of the declaration

    @property
    def done(self) -> bool:
        return (self.folder / RESULT).exists()


def run_synergy(
    file: str | Path,
    jobs: int | None = None,
    limit_seeds: int | None = None,
    out: str | None = None,
    judge: Judge | None = None,
) -> str:
    """Run what is not finished of an experiment; returns what came of it, in a sentence.

    Args:
        file: the declaration, YAML.
        jobs: runs at a time; None: one a core.
        limit_seeds: only the first so many seeds, for a first look; the rest can follow.
        out: folder; None: the declaration's.
        judge: what makes rows of a configuration; None: train the run and evaluate it.

    Raises:
        UmmError: some runs failed; all others were done before.
    """
    declared = read_declaration(file)
    folder = Path(out or declared.folder)
    seal(declared, folder)
    lock(folder)
    todo = partial(work, jobs=jobs or cores(), judge=judge or train_and_judge)
    with sigterm_raises():
        chosen: dict[str, dict[str, Any]] = {}
        if declared.tuning:
            todo(tuning_jobs(declared, folder), "tuning")
            chosen = choose(declared, folder)
        jobs_to_do = final_jobs(declared, folder, chosen, limit_seeds)
        todo(jobs_to_do, declared.about or folder.name)
    return f"all {len(jobs_to_do)} runs are in: umm synergy report {folder}"


def final_jobs(declared: Declaration, folder: Path, chosen: dict[str, dict], limit_seeds: int | None) -> list[Job]:
    """Seed by seed, so that an experiment cut short has whole pairs."""
    jobs = []
    for number, seed in enumerate(declared.seeds[:limit_seeds]):
        for name, arm in declared.arms.items():
            if number < len(declared.seeds_of(name)):
                place = folder / name / f"seed{seed}"
                tuned = chosen.get(arm.tuned_as or name)
                settings = declared.settings(name, place, seed, declared.split, tuned)
                jobs.append(Job(name, seed, place, declared.task, settings, declared.sha256))
    return jobs


def work(jobs_to_do: list[Job], title: str, jobs: int, judge: Judge) -> None:
    """Do the jobs that are not done.

    Raises:
        UmmError: some failed, and why.
    """
    lost, missing = [], [(job, job.folder / "output.log") for job in jobs_to_do if not job.done]
    with Board(jobs_to_do, title, jobs) as board:
        for kind, job, result in in_workers(partial(perform, judge), missing, jobs):
            board.note(kind, job, result)
            if kind == "failed":
                lost.append(f"  {job.group} seed {job.seed}: {result} ({job.folder / 'output.log'})")
    if lost:
        raise UmmError("\n".join([f"{len(lost)} runs failed; the same command tries them again:", *lost]))


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: workers save, and the same command goes on."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stood.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, old)


# --------------------------------------------------------------------------------------------------- one run (worker)


def perform(judge: Judge, job: Job) -> None:
    """Do a job in this process and write its result, the last of its files."""
    again, started = (job.folder / "config.yaml").exists(), time.perf_counter()
    config = configuration(job.task, job.settings, f"arm '{job.group}'")
    rows, costs = judge(config)
    costs = {"seconds": round(time.perf_counter() - started, 2), **costs}
    facts = {"config_hash": config_hash(config), "commit": commit(), "finished": now()}
    keep(job, rows, {} if again else costs, facts)  # costs of a whole run only
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # model/ stays


def keep(job: Job, rows: list[dict], costs: dict[str, float], facts: dict) -> None:
    """Write the result of a job."""
    result = {"arm": job.group, "seed": job.seed, "rows": rows, "costs": costs, "declaration": job.sha256, **facts}
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(job.folder / RESULT, json.dumps(result, indent=1))


def train_and_judge(config: DictConfig) -> tuple[list[dict], dict[str, float]]:
    """Train the run, evaluate it, and count its work."""
    from umm.evaluate import evaluate_run
    from umm.train import Trainer

    trainer = Trainer(config)
    meter = Meter(trainer)
    trainer.train()
    evaluate_run(str(config.run))
    found = json.loads((Path(config.run) / "eval" / f"{config.eval.split}.json").read_text())
    return found["numbers"], {"images": trainer.images_at(trainer.steps), "flops": meter.total}


class Meter:
    """Counts the floating-point operations of a training run: of one step of each mixture of tasks, times its steps.

    Matrix products and convolutions, forward and backward, the encoder's too where no cache holds its latents.
    """

    def __init__(self, trainer):
        self.train_step, self.flops, self.steps = trainer.train_step, {}, {}
        trainer.train_step = self.counted

    def counted(self, micro_batches: dict[str, list[dict]]):
        from torch.utils.flop_counter import FlopCounterMode

        mixture = tuple(micro_batches)
        self.steps[mixture] = self.steps.get(mixture, 0) + 1
        if mixture in self.flops:
            return self.train_step(micro_batches)
        with FlopCounterMode(display=False) as counter:
            logs = self.train_step(micro_batches)
        self.flops[mixture] = counter.get_total_flops()
        return logs

    @property
    def total(self) -> int:
        return sum(self.flops[mixture] * steps for mixture, steps in self.steps.items())


# ------------------------------------------------------------------------------------------------------------ numbers


def results(folder: Path, sha256: str | None = None) -> dict[int, dict]:
    """{seed: result} of an arm's folder, seeds sorted.

    Raises:
        UmmError: a result belongs to another declaration.
    """
    found = {}
    for file in folder.glob(f"seed*/{RESULT}"):
        with reading(file, "delete it, and its run is done again"):
            result = json.loads(file.read_text())
            found[result["seed"]] = result
        if sha256 and result["declaration"] != sha256:
            raise UmmError(f"{file} belongs to another declaration: delete its folder, and its run is done again.")
    return dict(sorted(found.items()))


def number(rows: list[dict], endpoint: Endpoint, name: str) -> dict:
    """The one row an endpoint speaks of.

    Raises:
        UmmError: no row or several have those fields, or the row's direction is not the endpoint's.
    """
    fitting = [row for row in rows if all(row.get(key) == value for key, value in endpoint.row.items())]
    if len(fitting) != 1:
        names = {row["metric"] + (f" ({row['space']})" if row.get("space") else "") for row in rows}
        there = ", ".join(sorted(names))
        raise UmmError(f"endpoint '{name}': {len(fitting)} rows have {endpoint.row}, not one. There are: {there}.")
    higher = endpoint.error != "value"
    if fitting[0].get("higher_is_better", higher) not in (higher, None):
        better = "lower" if higher else "higher"
        raise UmmError(f"endpoint '{name}': its metric is better {better}, which contradicts error={endpoint.error}.")
    return fitting[0]


def error_of(value: float, endpoint: Endpoint) -> float:
    """The error that a number means."""
    error = {"value": value, "1 - value": 1 - value, "100 - value": 100 - value}[endpoint.error]
    return error if endpoint.floor is None else max(error, endpoint.floor)


# ------------------------------------------------------------------------------------------------------------- tuning


def tuning_jobs(declared: Declaration, folder: Path) -> list[Job]:
    jobs = []
    for name in declared.tuning.arms:
        for k, trial in enumerate(declared.tuning.trials()):
            for seed in declared.tuning.seeds:
                place = folder / "tuning" / name / f"trial{k}" / f"seed{seed}"
                settings = declared.settings(name, place, seed, "val", trial)
                jobs.append(Job(f"{name} trial {k}", seed, place, declared.task, settings, declared.sha256))
    return jobs


def choose(declared: Declaration, folder: Path) -> dict[str, dict[str, Any]]:
    """{arm: the trial with the least mean log error over its primary endpoints and the tuning seeds}, also a file."""
    chosen, scores = {}, {}
    for name in declared.tuning.arms:
        places = [folder / "tuning" / name / f"trial{k}" for k in range(len(declared.tuning.trials()))]
        scores[name] = [score(declared, name, results(place, declared.sha256)) for place in places]
        best = min(range(len(places)), key=scores[name].__getitem__)
        chosen[name] = declared.tuning.trials()[best]
    text = {"trials": declared.tuning.trials(), "mean_log_error": scores, "chosen": chosen}
    write_atomic(folder / "tuning.json", json.dumps(text, indent=1))
    return chosen


def score(declared: Declaration, arm: str, found: dict[int, dict]) -> float:
    """Mean log error of one trial; an error that is not positive is as good as it gets."""
    endpoints = {name: declared.endpoints[name] for name in declared.arms[arm].measures if name in declared.primary}
    errors = [
        error_of(number(result["rows"], endpoint, name)["value"], endpoint)
        for result in found.values()
        for name, endpoint in endpoints.items()
    ]
    return sum(math.log(max(error, 1e-12)) for error in errors) / len(errors)
