"""What run folders hold, as far as it can be read: whatever is missing or damaged becomes a sentence, not an error.

A run folder is described in `umm/runs.py`; the folder of a probe (`umm/samples.py`) has results.json instead.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from umm.config import flatten
from umm.errors import UmmError
from umm.runs import MAY_CHANGE, Run

ANSWERING = ("vqa", "llm")  # kinds of und that answer questions


@dataclass
class Seen:
    """One folder. Log rows are in the order of their steps."""

    folder: Path
    name: str = ""
    config: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)  # run.json
    log: list[dict] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    evaluations: dict[str, dict] = field(default_factory=dict)  # split -> eval/<split>.json
    joint: dict[str, dict] = field(default_factory=dict)  # split -> eval/<split>-joint.json
    probe: dict | None = None  # results.json
    remarks: list[str] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        return (self.folder / "config.yaml").exists()

    @property
    def task(self) -> str:
        """recon, gen, joint, ..., with the kind of understanding where it is asked questions."""
        return f"und ({self.part})" if self.part in ANSWERING else self.part

    @property
    def part(self) -> str:
        """What its evaluation judges: recon, gen, und, vqa, llm or joint."""
        kind = flat(self.config).get("und.kind")
        return str(kind) if self.config.get("task") == "und" and kind in ANSWERING else str(self.config.get("task", ""))

    @property
    def finished(self) -> bool:
        return "finished" in self.facts

    @property
    def images(self) -> int:
        """Pictures trained on, as far as it was noted down."""
        logged = int(self.log[-1].get("images", 0)) if self.log else 0
        return int(self.facts.get("images", logged)) if self.finished else logged

    @property
    def seconds(self) -> float | None:
        """Seconds of training, pauses left out: from the logged speed."""
        return training_seconds(self.log)

    def grids(self) -> list[Path]:
        """Picture grids and texts that training drew, oldest first: <images> or, of several parts, <images>-<part>."""
        files = [path for path in (self.folder / "samples").glob("*") if path.suffix in (".png", ".txt")]
        return sorted(path for path in files if path.stem.partition("-")[0].isdigit())


@dataclass(frozen=True)
class Arm:
    """Runs of one configuration that differ in their seed; mostly a single one."""

    label: str
    runs: list[Seen]


def flat(config: dict) -> dict[str, object]:
    """{dotted name: value} of every leaf."""
    return dict(flatten(config))


def plain(value: object) -> str:
    """A setting as it is written on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, list) else str(value)


def training_seconds(log: Sequence[dict]) -> float | None:
    """Pictures over pictures a second, summed over the rows of a log; None where it holds no speed."""
    total, before = 0.0, 0
    for row in log:
        if row.get("images_per_second"):
            total += (row.get("images", before) - before) / row["images_per_second"]
        before = row.get("images", before)
    return total or None


def look_at(folders: Sequence[str | Path]) -> list[Seen]:
    """Every folder, each once, with names that tell them apart.

    Raises:
        UmmError: a folder holds neither a run nor the results of a probe.
    """
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    return [read(path, name) for path, name in zip(paths, short_names(paths))]


def short_names(paths: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell all of them apart."""
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, whole), default=0) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read(folder: Path, name: str) -> Seen:
    """One folder; see `look_at`."""
    seen, run = Seen(folder, name), Run(folder)
    if not seen.is_run and not (folder / "results.json").exists():
        raise UmmError(
            f"{folder} is not a run: it has neither a config.yaml (umm train) nor a results.json (python -m umm.probe)."
        )
    if (folder / "results.json").exists():
        seen.probe = read_json(folder / "results.json", seen)
        if seen.probe is not None:
            seen.config, seen.facts = seen.probe.get("config", {}), seen.probe
            seen.remarks += [f"{name}: {note}" for note in seen.probe.get("notes", [])]
    if seen.is_run:
        read_run(seen, run)
    return seen


def read_run(seen: Seen, run: Run) -> None:
    try:
        seen.config = OmegaConf.to_container(run.config)
    except UmmError as error:
        seen.remarks.append(f"{seen.name}: {error}")
    file = seen.folder / "run.json"
    seen.facts = (read_json(file, seen) or {}) if file.exists() else {}
    if not file.exists():
        seen.remarks.append(f"{seen.name}: run.json is missing, so commit and times are unknown.")
    seen.log = in_order(read_lines(seen.folder / "log.jsonl", seen))
    seen.metrics = read_lines(seen.folder / "metrics.jsonl", seen)
    for file in sorted((seen.folder / "eval").glob("*.json")):
        place = seen.joint if file.stem.endswith("-joint") else seen.evaluations
        content = read_json(file, seen)
        if content is not None:
            place[file.stem.removesuffix("-joint")] = content
    seen.remarks += state(seen)


def in_order(rows: list[dict]) -> list[dict]:
    """The numbers of the last row of each step, by step: a run taken back to a checkpoint may log steps twice."""
    found = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return [{key: value for key, value in found[step].items() if is_finite(value)} for step in sorted(found)]


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def state(seen: Seen) -> list[str]:
    """What a reader must know who expects a whole run."""
    said, planned = [], flat(seen.config).get("train.images")
    if not seen.log:
        said.append(f"{seen.name}: nothing was logged, so there are no training curves of it.")
    if not seen.finished:
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        said.append(f"{seen.name}: training has not finished, its log ends at {seen.images:,}{of} images.")
    elif not seen.evaluations:
        said.append(f"{seen.name}: not judged yet, umm eval {seen.folder} does it.")
    return said


def read_json(file: Path, seen: Seen) -> dict | None:
    """An object, or None and a remark."""
    try:
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            return content
        reason = "it holds no object"
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    seen.remarks.append(f"{seen.name}: {file.relative_to(seen.folder)} cannot be read ({reason}) and is left out.")
    return None


def read_lines(file: Path, seen: Seen) -> list[dict]:
    """The objects of a log; damaged lines are counted in a remark."""
    if not file.exists():
        return []
    lines, found = [line for line in file.read_text(errors="replace").splitlines() if line.strip()], []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        found += [content] if isinstance(content, dict) else []
    if bad := len(lines) - len(found):
        seen.remarks.append(f"{seen.name}: {bad} of {len(lines)} lines of {file.name} are damaged and left out.")
    return found


def arms_of(runs: Sequence[Seen]) -> list[Arm]:
    """Runs together whose settings are equal but for the seed and what does not touch the numbers."""
    ignored, found = ("seed", "cache.dir", *MAY_CHANGE), {}
    for run in runs:
        kept = {k: v for k, v in flat(run.config).items() if not any(fnmatch.fnmatch(k, p) for p in ignored)}
        key = json.dumps(kept, sort_keys=True, default=str) if kept else run.name
        if any(run.config.get("seed") == other.config.get("seed") for other in found.get(key, [])):
            key = run.name  # the same seed again is another question
        found.setdefault(key, []).append(run)
    labels = [label_of(members) for members in found.values()]
    whole = [", ".join(run.name for run in members) for members in found.values()]
    return [
        Arm(label if labels.count(label) == 1 else names, members)
        for label, names, members in zip(labels, whole, found.values())
    ]


def label_of(runs: Sequence[Seen]) -> str:
    if len(runs) == 1:
        return runs[0].name
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs)))
    common = "".join(letters[0] for letters in same).rstrip("-_./ ") or runs[0].name
    return f"{common} ({len(runs)} seeds)"
