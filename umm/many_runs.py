"""Runs that belong to one experiment: done in parallel, judged, counted, gone on with where they were interrupted.

<folder>/<group>/seed<i>/              an ordinary run folder
<folder>/<group>/seed<i>/result.json   what was found, once it is judged
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig

from umm.board import Board
from umm.config import config_hash
from umm.declared import configuration
from umm.errors import UmmError
from umm.runs import Run, commit, now, reading, write_atomic
from umm.workers import in_workers

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


def work(jobs_to_do: list[Job], title: str, jobs: int, do: Callable[[Job], None]) -> None:
    """Do the jobs that are not done, `jobs` at a time, each in a process that calls `do`.

    Raises:
        UmmError: some failed, and why.
    """
    lost, missing = [], [(job, job.folder / "output.log") for job in jobs_to_do if not job.done]
    with Board(jobs_to_do, title, jobs) as board:
        for kind, job, result in in_workers(do, missing, jobs):
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


def perform(judge: Judge, job: Job, check: Callable[[list[dict]], object] | None = None) -> None:
    """Do a job in this process and write its result, the last of its files.

    Args:
        check: sees the rows before they are kept, and raises where they will not do.
    """
    again, timer = Run(job.folder).begun, Timer()
    config = configuration(job.task, job.settings, f"'{job.group}'")
    rows, costs = judge(config)
    if check is not None:
        check(rows)
    costs = timer.costs() | costs
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
    return found["numbers"], {
        "images": pictures(trainer),
        "flops": meter.total,
        "parameters": meter.parameters,
    }


def pictures(trainer) -> int:
    """Pictures that a training reads, those of all its parts together."""
    end = trainer.images_at(trainer.steps)
    return sum((task.window[1] or end) - task.window[0] for task in trainer.tasks)


class Timer:
    """Seconds on the clock and of this process on its processors; on a machine that others use too, these differ."""

    def __init__(self):
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def costs(self) -> dict[str, float]:
        wall, processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        return {"seconds": round(wall, 2), "cpu_seconds": round(processor, 2)}


class Meter:
    """Counts the floating-point operations of a training run: a step now and then stands for those until the next.

    Matrix products and convolutions, forward and backward, the encoder's too where no cache holds its latents. A kind
    of step is the tasks and the optimisers that take part. While its counts agree, every `SELDOM`-th step of a kind is
    counted, else (pictures shrunk at random) every `OFTEN`-th.
    """

    OFTEN, SELDOM = 4, 32
    SURE = 8  # counts in a row that agree

    def __init__(self, trainer):
        self.trainer, self.train_step, self.kinds, self.total = trainer, trainer.train_step, {}, 0
        trained = {id(p): p for one in trainer.learners for p in one.phase.module.parameters() if p.requires_grad}
        self.parameters = sum(p.numel() for p in trained.values())  # in any optimiser
        trainer.train_step = self.counted

    def counted(self, micro_batches: dict[str, list[dict]]):
        from umm.operations import Operations

        images = self.trainer.images_at(self.trainer.step)
        at_work = tuple(one.key for one in self.trainer.learners if images >= one.phase.start)
        kind = self.kinds.setdefault((tuple(micro_batches), at_work), Counted())
        if kind.steps % (self.SELDOM if kind.agreeing >= self.SURE else self.OFTEN):
            logs = self.train_step(micro_batches)
        else:
            with Operations() as counter:
                logs = self.train_step(micro_batches)
            kind.count(counter.total)
        kind.steps += 1
        self.total += kind.last
        return logs


@dataclass
class Counted:
    """Steps of one kind, the operations of the one last counted, and how many counts in a row agreed with it."""

    steps: int = 0
    last: int = 0
    agreeing: int = 0

    def count(self, flops: int) -> None:
        self.agreeing = self.agreeing + 1 if flops == self.last else 1
        self.last = flops


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


def row_of(rows: list[dict], fields: dict[str, Any], what: str) -> dict:
    """The one row that has those fields.

    Raises:
        UmmError: no row or several have them.
    """
    fitting = [row for row in rows if all(row.get(key) == value for key, value in fields.items())]
    if len(fitting) != 1:
        names = {row["metric"] + (f" ({row['space']})" if row.get("space") else "") for row in rows}
        there = ", ".join(sorted(names))
        raise UmmError(f"{what}: {len(fitting)} rows have {fields}, not one. There are: {there}.")
    return fitting[0]


def mean_costs(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the runs that know all their costs: an interrupted one has none."""
    whole = [cost for cost in costs if cost]
    names = [name for name in whole[0] if all(name in cost for cost in whole)] if whole else []
    return {name: fmean(cost[name] for cost in whole) for name in names}
