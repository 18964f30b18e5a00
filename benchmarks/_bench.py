"""What every benchmark shares: timing with warm-up and spread, and a JSON record that says where it was made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "transformers", "timm", "accelerate", "numpy")


def measure(step: Callable[[], object], items: int, warmup: int = 3, repetitions: int = 10, steps: int = 1) -> dict:
    """Time `step`, which handles `items` pictures (or steps, tokens, ...).

    Args:
        steps: calls per repetition; take enough for a repetition to last at least some milliseconds.

    Returns:
        Seconds of one call: median, lowest, highest; items per second: median, lowest, highest.
    """
    for _ in range(warmup):
        step()
    seconds = [_time(step, steps) for _ in range(repetitions)]
    median, low, high = statistics.median(seconds), min(seconds), max(seconds)
    return {
        "seconds": {"median": median, "low": low, "high": high},
        "per_second": {"median": items / median, "low": items / high, "high": items / low},
        "items": items,
        "warmup": warmup,
        "repetitions": repetitions,
        "steps": steps,
    }


def _time(step: Callable[[], object], steps: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait()
    return (time.perf_counter() - start) / steps


def _wait() -> None:
    """GPU kernels run behind the program: a clock is read only when they are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(what: str, configuration: dict, numbers: dict) -> dict:
    """Write benchmarks/results/<what>_<hardware>_<date>.json and print the same record as one line, the last."""
    record = {"benchmark": what, "configuration": configuration, "results": numbers, **circumstances()}
    name = f"{what}_{slug(record['hardware'])}_{record['date'][:10]}.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to benchmarks/results/{name}")
    print(json.dumps(record), flush=True)
    return record


def circumstances() -> dict:
    """Date, commit, command, hardware, threads and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The checked-out commit, with `+changes` where tracked files differ from it."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        clean = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "..", ":!results"], cwd=root).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("" if clean else "+changes")


def hardware() -> str:
    """The GPU if torch sees one, else the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()} {os.cpu_count()} cores"


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", facts.read_text()) if facts.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def slug(text: str) -> str:
    """A file name's worth of a hardware name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)|CPU|@.*?Hz", " ", text).lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
