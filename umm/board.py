"""The table that stands on the screen while many runs are at work; plain lines where nobody looks."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from umm.progress import clock

MARKS = {"waiting": "[dim]·[/]", "started": "[yellow]▸[/]", "done": "[green]✓[/]", "failed": "[red]✗[/]"}


class Board:
    """Groups of jobs over seeds; a job has `group`, `seed` and `done`.

    Args:
        jobs: all of them, done ones too.
        workers: how many are at work at a time, for the time to go.
    """

    def __init__(self, jobs: list, title: str, workers: int):
        self.title, self.workers = title, workers
        self.states = {(job.group, job.seed): "done" if job.done else "waiting" for job in jobs}
        self.started: dict[tuple[str, int], float] = {}
        self.seconds: dict[str, list[float]] = {}
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def note(self, kind: str, job, why: object) -> None:
        """A job was started, done or failed."""
        key = job.group, job.seed
        self.states[key] = kind
        if kind == "started":
            self.started[key] = time.perf_counter()
            return
        took = time.perf_counter() - self.started.pop(key)
        self.seconds.setdefault(job.group, []).append(took)
        if not self.console.is_terminal or kind == "failed":
            reason = f": {why}" if kind == "failed" else ""
            line = f"{job.group} seed {job.seed} {kind} in {clock(took)}{reason} ({self.summary()})"
            print(line, file=sys.stderr, flush=True)

    def summary(self) -> str:
        """Where the whole stands."""
        over = sum(state in ("done", "failed") for state in self.states.values())
        return f"{over} of {len(self.states)}, {clock(self.to_go())} to go"

    def to_go(self) -> float:
        """Seconds that are left, from the mean time of each group so far."""
        every = [took for group in self.seconds.values() for took in group]
        mean = sum(every) / len(every) if every else 0.0
        left = 0.0
        for (group, seed), state in self.states.items():
            mine = self.seconds.get(group)
            expected = sum(mine) / len(mine) if mine else mean
            if state == "waiting":
                left += expected
            elif state == "started":
                left += max(0.0, expected - (time.perf_counter() - self.started[group, seed]))
        return left / self.workers

    def table(self) -> Table:
        seeds = sorted({seed for _, seed in self.states})
        table = Table(title=f"{self.title}: {self.summary()}", title_justify="left")
        for name in ("", *map(str, seeds), "s a run"):
            table.add_column(name, justify="left" if not name else "right")
        for group in dict.fromkeys(group for group, _ in self.states):
            marks = [MARKS[self.states[group, seed]] if (group, seed) in self.states else "" for seed in seeds]
            took = self.seconds.get(group)
            table.add_row(group, *marks, f"{sum(took) / len(took):.0f}" if took else "")
        return table
