"""A progress bar where somebody looks, plain lines where nobody does."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SILENCE = 20.0  # seconds between lines where nobody looks


class Progress:
    """Counts pictures, with pictures/s and time to go; `show` prints a logged record.

    Args:
        total, done: pictures.
        enabled: False on all but the first process.
        what: the bar's label.
    """

    def __init__(self, total: int | None, done: int = 0, enabled: bool = True, what: str = "training"):
        self.total, self.done, self.enabled, self.what = total, done, enabled, what
        self.console = Console(stderr=True)
        self.live = enabled and self.console.is_terminal
        self.first, self.started = done, time.perf_counter()
        self.said = self.started

    def __enter__(self) -> Progress:
        if self.live:
            rate = TextColumn("{task.fields[rate]}")
            self.bar = Bar(
                TextColumn(self.what), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(),
                console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.done, rate="")
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.bar.stop()

    @property
    def rate(self) -> float:
        """Pictures a second since the start."""
        return (self.done - self.first) / max(time.perf_counter() - self.started, 1e-9)

    def advance(self, pictures: int) -> None:
        self.done += pictures
        if self.live:
            self.bar.update(self.task, completed=self.done, rate=f"{self.rate:.1f} img/s")
        elif self.enabled and self.what != "training" and (self.done == self.total or self.quiet_for() > SILENCE):
            self.said = time.perf_counter()
            print(f"{self.what}: {self.done} of {self.total or '?'} pictures, {self.rate:.1f} img/s", file=sys.stderr)

    def quiet_for(self) -> float:
        """Seconds since the last line."""
        return time.perf_counter() - self.said

    def update(self, done: int, total: int | None = None) -> None:
        """Set the count, for callers that keep their own."""
        self.total = total or self.total
        self.advance(done - self.done)

    def show(self, record: dict) -> None:
        """One line of a record's terms."""
        if not self.enabled:
            return
        terms = [f"{key.split('.', 1)[-1]} {value:.4g}" for key, value in record.items() if "." in key]
        left = (self.total - self.done) / self.rate if self.total and self.rate > 0.01 else 0
        line = f"step {record['step']:>7}  images {record['images']:>9}  {'  '.join(terms)}  " + (
            f"{record['images_per_second']:.1f} img/s  {clock(left)} to go"
        )
        self.console.print(line, highlight=False, soft_wrap=True) if self.live else print(
            line, file=sys.stderr, flush=True
        )


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
