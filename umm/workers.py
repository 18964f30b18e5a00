"""Long-lived worker processes: heavy imports are paid once, a job that crashes does not take the others along."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """One process and the job it has in hand."""

    def __init__(self, function: Callable[[Any], Any], threads: int):
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, function, threads))
        self.process.start()
        theirs.close()
        self.job: Any = None

    def give(self, job: Any, log: Path) -> None:
        self.job = job
        self.pipe.send((job, str(log)))

    def answer(self) -> tuple[str, Any]:
        """("done", result) or ("failed", a line that says why)."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return "failed", f"its process ended with status {self.process.exitcode}"

    def stop(self) -> None:
        """Let a busy process save its work: it is told as by `kill`."""
        if self.job is not None and self.process.is_alive():
            self.process.terminate()

    def close(self) -> None:
        """Wait for a process that has nothing more to do."""
        self.pipe.close()
        self.process.join()


def in_workers(
    function: Callable[[Any], Any], jobs: Iterable[tuple[Any, Path]], workers: int
) -> Iterator[tuple[str, Any, Any]]:
    """Call `function(job)` for every (job, log file), a few at a time; ("started" | "done" | "failed", job, result).

    Everything a job prints goes into its log file. The processor's cores are shared out among the workers. When the
    caller stops asking, busy workers get SIGTERM and are waited for.
    """
    queue, crew = iter(jobs), []
    threads = max(1, cores() // workers)
    try:
        for job, log in queue:
            worker = next((w for w in crew if w.job is None), None)
            if worker is None:
                worker = Worker(function, threads)
                crew.append(worker)
            worker.give(job, log)
            yield "started", job, None
            if sum(w.job is not None for w in crew) == workers:
                yield from finished(crew)
        while any(w.job is not None for w in crew):
            yield from finished(crew)
    finally:
        for worker in crew:  # all are told before any is waited for
            worker.stop()
        for worker in crew:
            worker.close()


def finished(crew: list[Worker]) -> list[tuple[str, Any, Any]]:
    """Wait for the next answers; workers that died leave the crew."""
    busy = {worker.pipe: worker for worker in crew if worker.job is not None}
    events = []
    for pipe in wait(list(busy)):
        worker = busy[pipe]
        kind, result = worker.answer()
        events.append((kind, worker.job, result))
        worker.job = None
        if worker.process.exitcode is not None:
            worker.close()
            crew.remove(worker)
    return events


def serve(pipe: Connection, function: Callable[[Any], Any], threads: int) -> None:
    """The life of a worker: jobs until its pipe closes."""
    os.setpgrp()  # Ctrl-C in the terminal is the parent's to hear; it ends its workers one by one
    os.environ |= {name: str(threads) for name in THREADS}  # read when numerical libraries are first imported
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            job, log = pipe.recv()
            with output_to(log):
                try:
                    answer = "done", function(job)
                except Exception as error:
                    traceback.print_exc()
                    answer = "failed", f"{type(error).__name__}: {error}".strip().splitlines()[-1]
            pipe.send(answer)


@contextlib.contextmanager
def output_to(file: str) -> Iterator[None]:
    """Standard output and error of the process, and of what it starts, appended to a file."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    old = [os.dup(1), os.dup(2)]
    with open(file, "a") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        for stream, number, before in zip((sys.stdout, sys.stderr), (1, 2), old):
            stream.flush()
            os.dup2(before, number)
            os.close(before)
