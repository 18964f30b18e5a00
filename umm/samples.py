"""What a probe leaves behind: results.json, samples.jsonl in lmms-eval's shape, one table; and their comparison.

A *task* is one line of the table, e.g. `latent/linear`. A sample is one item of it:

    task, doc_id, doc {id, image, ...}, target, arguments, resps [[...]], filtered_resps [...], doc_hash, score
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from umm.errors import ConfigError, UmmError, nearest
from umm.paired import Comparison, compare
from umm.rng import derive_seed
from umm.runs import now, provenance, reading, write_atomic, writing

COLUMNS = {"target": "of", "address": "features", "method": "probe", "subset": "trained on", "metric": "metric"}


def sample(
    task: str, doc_id: int, item: str, target: str, response: str, score: float, image: str | None = None, **doc: object
) -> dict:
    """One line of samples.jsonl.

    Args:
        item: stable name of the item; two results are comparable when they have the same items and targets.
        image: the picture the item belongs to, where several items share one (questions); default: the item.
        doc: what else is known of the item, e.g. question and its kind.
    """
    return {
        "task": task,
        "doc_id": doc_id,
        "doc": {"id": item, "image": image or item, **doc},
        "target": target,
        "arguments": [[doc["question"]]] if "question" in doc else [],  # what was asked beside the picture
        "resps": [[response]],
        "filtered_resps": [response],
        "doc_hash": hashlib.sha256(item.encode()).hexdigest(),
        "score": score,
    }


class Results:
    """The folder of a probe command: goes on where an equal command stopped.

    Args:
        config: everything that fixes the numbers; another one in the same folder is refused.
    """

    def __init__(self, folder: str | Path, config: DictConfig):
        self.folder, self.config = Path(folder), config
        with writing(self.folder, "the results"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.facts = provenance(config) | {"command": " ".join(["python -m umm.probe", *sys.argv[1:]])}
        self.rows: list[dict] = []
        self.notes: list[str] = []
        if self.file.exists():
            self._resume()
        self._rewrite_samples()

    @property
    def file(self) -> Path:
        return self.folder / "results.json"

    @property
    def samples_file(self) -> Path:
        return self.folder / "samples.jsonl"

    def _resume(self) -> None:
        with reading(self.file, "delete it, or give --out another folder"):
            old = json.loads(self.file.read_text())
            found, self.rows, self.notes = old["config_hash"], old["rows"], old["notes"]
        if found != self.facts["config_hash"]:
            raise ConfigError(
                f"{self.folder} holds results of another command or configuration: give --out another folder, or "
                "delete it."
            )

    def _rewrite_samples(self) -> None:
        """Keep the samples of finished tasks only; a line cut off by a kill belongs to none."""
        if self.samples_file.exists():
            done, kept = {row["task"] for row in self.rows}, []
            for line in self.samples_file.read_text(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    kept += [line] if json.loads(line)["task"] in done else []
            write_atomic(self.samples_file, "".join(line + "\n" for line in kept))

    def has(self, task: str) -> bool:
        """Whether an earlier call of the same command has finished this task."""
        return any(row["task"] == task for row in self.rows)

    def note(self, text: str) -> None:
        """A sentence a reader of the numbers must see."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, row: dict, samples: Iterable[dict], more: bool = False) -> None:
        """Write a finished task: its line of the table (task, metric, value, low, high, n, ...) and its items.

        Args:
            more: lines that belong together with this one follow; all count as finished with the last of them.
        """
        with writing(self.folder, "samples.jsonl"), self.samples_file.open("a") as out:
            out.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in samples)
        self.rows.append(row)
        if not more:
            self.write()

    def write(self) -> None:
        container = OmegaConf.to_container(self.config, resolve=True)
        seconds = round(sum(row.get("seconds", 0.0) for row in self.rows), 2)
        whole = {**self.facts, "written": now(), "seconds": seconds, "flops": sum(r.get("flops", 0) for r in self.rows)}
        whole |= {"rows": self.rows, "notes": self.notes, "config": container}
        write_atomic(self.file, json.dumps(whole, indent=1))

    def table(self) -> str:
        """All tasks, one line each, and the notes."""
        return "\n".join([table(self.rows), *(f"note: {note}" for note in self.notes), f"wrote {self.file}"])


def table(rows: Sequence[dict]) -> str:
    """Rows as text; columns that say the same in every row are left out, but for the metric's."""
    columns = [key for key in COLUMNS if key == "metric" or len({row.get(key) for row in rows}) > 1]
    head = (*(COLUMNS[key] for key in columns), "value", "95 % interval", "n", "chosen")
    lines = [head]
    for row in rows:
        cells = [str(row.get(key) or "") for key in columns]
        interval = f"{row['low']:.4f} .. {row['high']:.4f}" if "low" in row else ""
        lines.append((*cells, f"{row['value']:.4f}", interval, str(row["n"]), str(row.get("chosen") or "")))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


# ----------------------------------------------------------------------------------------------------- comparing


def read_samples(place: str) -> dict[str, dict[str, dict]]:
    """{task: {item: sample}} of RUN, or of one task as RUN#TASK."""
    folder, _, task = place.partition("#")
    file = Path(folder) / "samples.jsonl"
    if not file.exists():
        raise UmmError(f"there is no {file}: give the --out folder of a probe, e.g. runs/probe, or runs/probe#TASK.")
    tasks: dict[str, dict[str, dict]] = {}
    for line in file.read_text(errors="replace").splitlines():
        try:
            one = json.loads(line)
            tasks.setdefault(one["task"], {})[one["doc"]["id"]] = one
        except json.JSONDecodeError as error:
            raise UmmError(f"{file} was cut off: give the command that wrote it again, and it goes on.") from error
        except (KeyError, TypeError) as error:
            raise UmmError(f"{file} has lines that are no samples of python -m umm.probe: '{line[:60]}'.") from error
    if not tasks:
        raise UmmError(f"{file} is empty: give the command that wrote it again, and it goes on.")
    if task and task not in tasks:
        raise UmmError(f"{folder} has no task '{task}'.{nearest(task, tasks)} It has: {', '.join(tasks)}.")
    return {task: tasks[task]} if task else tasks


def same_items(first: dict[str, dict], second: dict[str, dict]) -> list[str]:
    """The items of both, sorted.

    Raises:
        UmmError: an item is on one side only, or has another target there.
    """
    if lonely := sorted(first.keys() ^ second.keys()):
        raise UmmError(
            f"a paired comparison needs the same items on both sides, but {len(lonely)} are on one only, e.g. "
            f"'{lonely[0]}': probe both on the same split with the same --limit."
        )
    for item, one in first.items():
        if one["target"] != second[item]["target"]:
            raise UmmError(
                f"item '{item}' has the target '{one['target']}' on one side and '{second[item]['target']}' on the "
                "other: these are different tasks."
            )
    return sorted(first)


def pairs_of(first: str, second: str) -> list[tuple[str, dict, str, dict]]:
    """(name, samples, name, samples) to compare: two named tasks, or all that both sides have."""
    one, other = read_samples(first), read_samples(second)
    if len(one) == len(other) == 1:
        (a, left), (b, right) = *one.items(), *other.items()
        return [(a, left, b, right)]
    common = [task for task in one if task in other]
    if not common:
        raise UmmError(
            f"{first} and {second} share no task: name one on each side as RUN#TASK, e.g. {first}#{next(iter(one))}."
        )
    return [(task, one[task], task, other[task]) for task in common]


def compare_runs(first: str, second: str, margin: float = 0.01, resamples: int = 10_000, seed: int = 0) -> str:
    """Paired tests in words and numbers, a paragraph a pair of tasks."""
    if not margin > 0:
        raise UmmError(f"--margin must be above 0, is {margin}: the largest difference that does not matter.")
    paragraphs = []
    for a, left, b, right in pairs_of(first, second):
        items = same_items(left, right)
        images = [left[item]["doc"]["image"] for item in items]
        scores = [[float(side[item]["score"]) for item in items] for side in (left, right)]
        draw = np.random.default_rng(derive_seed(seed, "compare", a, b))
        paragraphs.append(in_words(a, b, compare(*scores, images, draw, margin, resamples)))
    return "\n\n".join(paragraphs)


def in_words(first: str, second: str, found: Comparison) -> str:
    difference = found.difference
    lines = [
        f"{first} {found.first:.4f}, {second} {found.second:.4f} ({difference.n} items of {found.clusters} pictures)",
        f"  difference {difference.value:+.4f}, 95 % interval {difference.low:+.4f} .. {difference.high:+.4f} "
        f"(bootstrap over pictures), p = {found.p:.3g}",
    ]
    if found.mcnemar is not None:
        only_first, only_second, p = found.mcnemar
        kind = "exact" if found.clusters == difference.n else "clustered by picture"
        counts = f"{only_first} right in the first only, {only_second} in the second only"
        lines.append(f"  McNemar {kind} p = {p:.3g} ({counts})")
    else:
        lines.append("  McNemar's test needs scores of 0 and 1, these have values between")
    verdict = "equivalent" if found.equivalence < 0.05 else "equivalence not shown"
    lines.append(f"  {verdict} within +-{found.margin:g} (two one-sided tests, p = {found.equivalence:.3g})")
    return "\n".join(lines)
