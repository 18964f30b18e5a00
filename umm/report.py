"""umm report: any set of runs as one HTML page. What is compared is decided here, how it looks in `umm/pages.py`."""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

from omegaconf import OmegaConf

from umm import config as configuration
from umm.errors import UmmError
from umm.metrics._conflict import MARK
from umm.pages import Measured, Page
from umm.progress import clock
from umm.run_curves import add_curves
from umm.run_facts import Seen, flat, is_finite, look_at
from umm.runs import MAY_CHANGE, now

PARTS = {
    "recon": "Reconstruction",
    "gen": "Generation",
    "und": "Understanding",
    "vqa": "Question answering",
    "llm": "Question answering with a language model",
    "joint": "All parts",
}
BETTER = {True: "higher", False: "lower", None: ""}


@dataclass(frozen=True)
class Arm:
    """Runs of one configuration that differ in their seed; mostly a single one."""

    label: str
    runs: list[Seen]


def write_report(folders: Sequence[str], out: str) -> str:
    """Write the page of these runs; returns what there is to say about it.

    Raises:
        UmmError: a folder is no run.
    """
    file = report(look_at(folders)).save(out)
    return f"wrote {file} ({file.stat().st_size / 1e3:,.0f} kB, one file with everything in it)"


def report(seen: Sequence[Seen]) -> Page:
    """The page of these folders."""
    runs, probes = [one for one in seen if one.is_run], [one for one in seen if one.probe]
    page, arms = Page(title(seen), lead(seen)), arms_of(runs)
    page.heading("What these are")
    add_overview(page, seen)
    add_settings(page, seen)
    add_curves(page, [(arm.label, [run.log for run in arm.runs]) for arm in arms])
    add_pictures(page, arms)
    if any(run.evaluations for run in runs):
        page.heading("Evaluation")
        add_evaluations(page, arms)
    for run in runs:
        for split, found in run.joint.items():
            add_joint(page, run, split, found)
    if probes:
        page.heading("Probes")
        for one in probes:
            add_probe(page, one)
    if remarks := [remark for one in seen for remark in one.remarks]:
        page.heading("Notes")
        for remark in dict.fromkeys(remarks):
            page.note(remark)
    add_origin(page, seen)
    return page


def title(seen: Sequence[Seen]) -> str:
    names = [one.name for one in seen]
    if len(names) <= 3:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more runs"


def lead(seen: Sequence[Seen]) -> str:
    tasks = [one.task for one in seen if one.is_run]
    counts = [f"{tasks.count(task)} of task {task}" for task in dict.fromkeys(tasks) if task]
    counts += [f"{len(seen) - len(tasks)} of a probe"] if len(tasks) < len(seen) else []
    what = f"{len(seen)} runs: {', '.join(counts)}" if len(seen) > 1 else f"A run {counts[0][2:] if counts else ''}"
    return f"{what}. Written by `umm report` on {now()[:10]}."


def arms_of(runs: Sequence[Seen]) -> list[Arm]:
    """Runs together whose settings are equal but for the seed and what does not touch the numbers."""
    ignored, found = ("seed", "cache.dir", *MAY_CHANGE), {}
    for run in runs:
        kept = {k: v for k, v in flat(run.config).items() if not any(fnmatch.fnmatch(k, p) for p in ignored)}
        key = json.dumps(kept, sort_keys=True, default=str) if kept else run.name
        if any(run.config.get("seed") == other.config.get("seed") for other in found.get(key, [])):
            key = run.name  # the same seed again is another question
        found.setdefault(key, []).append(run)
    return [Arm(label_of(members), members) for members in found.values()]


def label_of(runs: Sequence[Seen]) -> str:
    if len(runs) == 1:
        return runs[0].name
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs)))
    common = "".join(letters[0] for letters in same).rstrip("-_./ ") or runs[0].name
    return f"{common} ({len(runs)} seeds)"


# --------------------------------------------------------------------------------------------------------- overview


def add_overview(page: Page, seen: Sequence[Seen]) -> None:
    rows = [overview(one) for one in seen]
    columns = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    words = "Time is that of training, pauses left out, and speed the median of the log."
    if any(str(row["commit"]).endswith("+") for row in rows):
        words += " A + after the commit: with uncommitted changes."
    page.table(rows, words, columns)


def overview(one: Seen) -> dict[str, object]:
    config, facts = flat(one.config), one.facts
    speeds = [row["images_per_second"] for row in one.log if "images_per_second" in row]
    commit = str(facts.get("commit") or "")
    probed = one.probe is not None and not one.is_run
    return {
        "run": one.name,
        "task": "probe" if probed else one.task,
        "state": "" if probed else "finished" if one.finished else "not finished",
        "data": config.get("data.name"),
        "latent space": config.get("latent.name"),
        "weights": config.get("latent.weights"),
        "seed": plain(config.get("seed")),
        "images": one.images or None,
        "time": clock(one.seconds) if one.seconds else "",
        "images/s": round(median(speeds), 1) if speeds else None,
        "begun": str(facts.get("created", facts.get("written", "")))[:16].replace("T", " "),
        "commit": commit[:9] + "+" * commit.endswith("+"),
    }


def plain(value: object) -> str:
    """A setting as it is written on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, list) else str(value)


def add_settings(page: Page, seen: Sequence[Seen]) -> None:
    """What differs between several runs; for one, what differs from the defaults."""
    if len(seen) == 1:
        rows, words = from_defaults(seen[0]), "Settings that differ from the defaults."
    else:
        rows, words = differences(seen), "Settings in which runs differ that both have them."
    if rows:
        page.heading("Settings", 3)
        page.table(rows, words)
    elif len(seen) > 1:
        page.text("No setting that several of these runs have differs between them.")


def differences(seen: Sequence[Seen]) -> list[dict[str, object]]:
    """A row a setting that two runs have with different values; where they write does not count."""
    configs = {one.name: flat(one.config) for one in seen}
    rows = []
    for key in dict.fromkeys(key for config in configs.values() for key in config if key not in ("run", "task")):
        values = {name: plain(config[key]) for name, config in configs.items() if key in config}
        if len(set(values.values())) > 1:
            rows.append({"setting": key, **{name: values.get(name, "") for name in configs}})
    return rows


def from_defaults(one: Seen) -> list[dict[str, object]]:
    """Settings that are not the defaults; none where the schema of this run is out of reach."""
    try:
        schema = configuration.schema(str(one.config.get("task")), [("run", OmegaConf.create(one.config))])
    except (UmmError, KeyError):  # damaged, or of another version
        return []
    default = dict(configuration.flatten(schema))
    return [
        {"setting": key, "value": plain(value), "default": plain(default[key])}
        for key, value in flat(one.config).items()
        if key in default and key != "run" and plain(value) != plain(default[key])
    ]


# --------------------------------------------------------------------------------------------------------- pictures


def add_pictures(page: Page, arms: Sequence[Arm]) -> None:
    """The newest grid, or text, of every run; what cannot be shown is remarked."""
    begun = False
    for run in (run for arm in arms for run in arm.runs):
        if not (files := run.grids()):
            continue
        if not begun:
            page.heading("Newest samples")
            begun = True
        file, words = files[-1], f"{run.name} after {int(files[-1].stem):,} images"
        try:
            if file.suffix == ".txt":
                with page.folded(f"{words}: questions, answers, and the right answers"):
                    page.code(file.read_text(errors="replace"))
            else:
                page.figure(file, f"{words}.", f"picture grid drawn by {words}")
        except (UmmError, OSError) as error:
            run.remarks.append(f"{run.name}: {error}")


# ------------------------------------------------------------------------------------------------------- evaluation


def add_evaluations(page: Page, arms: Sequence[Arm]) -> None:
    """A table for each part and split, a column an arm."""
    found: dict[tuple[str, str], dict[str, list[list[dict]]]] = {}
    for arm in arms:
        for run in arm.runs:
            for split, result in run.evaluations.items():
                for part, rows in by_part(run, result).items():
                    found.setdefault((part, split), {}).setdefault(arm.label, []).append(rows)
    for part, split in sorted(found, key=lambda key: (list(PARTS).index(key[0]) if key[0] in PARTS else 99, key[1])):
        add_part(page, f"{PARTS.get(part, part)}, {split} split", found[part, split])
    for run in (run for arm in arms for run in arm.runs):
        for split, result in run.evaluations.items():
            for note in result.get("notes", []):
                page.note(f"{run.name}, {split} split: {note}")
    add_odd_settings(page, [run for arm in arms for run in arm.runs])


def by_part(run: Seen, result: dict) -> dict[str, list[dict]]:
    """{recon, gen, ...: rows of an evaluation}; rows without a number are left out and said."""
    found: dict[str, list[dict]] = {}
    listed = result.get("numbers", [])
    whole = [row for row in listed if isinstance(row, dict) and "metric" in row and is_number(row.get("value"))]
    if len(whole) < len(listed):
        run.remarks.append(f"{run.name}: {len(listed) - len(whole)} evaluated numbers are damaged and left out.")
    for row in whole:
        found.setdefault(row.get("part", run.part), []).append(row)
    return found


def is_number(value: object) -> bool:
    return isinstance(value, int | float)


def add_part(page: Page, words: str, arms: dict[str, list[list[dict]]]) -> None:
    """What an arm is judged by; folded below it diagnostics, marked judges, and the seeds one by one."""
    page.heading(words, 3)
    spread = any(len(members) > 1 for members in arms.values())
    caption = "Values with 95 % intervals over pictures" + (
        "; of several seeds mean ± standard deviation over them." if spread else "."
    )
    rows, others, reasons = evaluation_rows(arms)
    if rows:
        page.table(rows, caption)
    if others:
        with page.folded(f"Diagnostics{' and judges with a conflict of interest' if reasons else ''}"):
            page.table(others, caption)
            for reason in reasons:
                page.note(f"{MARK} conflict of interest, no judge for a headline: {reason}")
    if spread:
        with page.folded("Each seed by itself"):
            apart = {f"{arm}, {i + 1}": [rows] for arm, members in arms.items() for i, rows in enumerate(members)}
            main, others, _ = evaluation_rows(apart)
            page.table([*main, *others], "Values with 95 % intervals over pictures.")


def evaluation_rows(arms: dict[str, list[list[dict]]]) -> tuple[list[dict], list[dict], list[str]]:
    """Rows that speak for or against an arm, the others, and the reasons of the marks among those."""
    indexed = {arm: [{key_of(row): row for row in rows} for rows in members] for arm, members in arms.items()}
    keys = dict.fromkeys(key for members in indexed.values() for rows in members for key in rows)
    judges, main, others, reasons = any(judge for _, judge in keys), [], [], {}
    for key in keys:
        there = {arm: [rows[key] for rows in members if key in rows] for arm, members in indexed.items()}
        every = [row for rows in there.values() for row in rows]
        conflict = next((row["conflict"] for row in every if row.get("conflict")), None)
        direction = BETTER.get(every[0].get("higher_is_better"), "")
        row = {"metric": key[0] + f" {MARK}" * bool(conflict)} | ({"judge": key[1]} if judges else {})
        row |= {arm: summary(rows) for arm, rows in there.items()} | {"n": count(every), "better": direction}
        (main if direction and not conflict else others).append(row)
        reasons |= {conflict: None} if conflict else {}
    return main, others, list(reasons)


def count(rows: Sequence[dict]) -> int | str:
    """The number of pictures, or the different ones."""
    counts = sorted({row["n"] for row in rows if "n" in row})
    return counts[0] if len(counts) == 1 else " / ".join(f"{n:,}" for n in counts)


def key_of(row: dict) -> tuple[str, str]:
    return row["metric"], row.get("space") or ""


def summary(rows: Sequence[dict]) -> Measured | None:
    """One run's number with its interval, or the mean and spread of several."""
    if not rows:
        return None
    if len(rows) == 1:
        return Measured(rows[0]["value"], rows[0].get("low"), rows[0].get("high"))
    values = [row["value"] for row in rows]
    return Measured(fmean(values), spread=stdev(values) if all(map(is_finite, values)) else None)


def add_odd_settings(page: Page, runs: Iterable[Seen]) -> None:
    """Say in what runs of one task and split were judged differently: their numbers do not compare."""
    judged: dict[tuple[str, str], dict[str, dict]] = {}
    for run in runs:
        for split, result in run.evaluations.items():
            judged.setdefault((run.task, split), {})[run.name] = flat(result.get("settings") or {})
    for (task, split), settings in judged.items():
        for key in dict.fromkeys(key for one in settings.values() for key in one):
            values = {name: plain(one.get(key)) for name, one in settings.items()}
            if len(set(values.values())) > 1:
                said = ", ".join(f"{value} in {name}" for name, value in values.items())
                page.note(f"{task}, {split} split: judged with different eval.{key}: {said}.")


def add_joint(page: Page, run: Seen, split: str, found: dict) -> None:
    """What `umm eval --joint` compared."""
    page.heading(f"{run.name}: one model beside its baselines, {split} split")
    rows = [joint_row(row) for row in found.get("rows", [])]
    columns = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)] if rows else []
    if rows:
        page.table(
            rows,
            "Difference: the joint model minus the baseline on the same items, with a 95 % interval over pictures and "
            "the p of no difference; without interval where there are no values per picture.",
            columns,
        )
    if compute := found.get("compute"):
        page.table(compute, "What each of them cost to train.")
    for note in found.get("notes", []):
        page.note(note)


def joint_row(row: dict) -> dict[str, object]:
    against = row.get("difference") or {}
    measured = Measured(against["value"], against.get("low"), against.get("high")) if against else None
    return {
        "metric": row["metric"] + f" {MARK}" * bool(row.get("conflict")),
        "part": PARTS.get(row["part"], row["part"]),
        "judge": row.get("space") or "",
        "joint": Measured(row["value"], row.get("low"), row.get("high")),
        "n": row.get("n"),
        "baseline": row.get("baseline") or "",
        "its value": row.get("baseline_value"),
        "difference": measured,
        "p": against.get("p"),
        "better": BETTER.get(row.get("higher_is_better"), ""),
    }


def add_probe(page: Page, one: Seen) -> None:
    """The table of a probe's results."""
    if not (rows := [row for row in one.probe.get("rows", []) if isinstance(row, dict)]):
        one.remarks.append(f"{one.name}: no probe has finished.")
        return
    known = {"target": "of", "address": "features", "method": "probe", "subset": "trained on"}
    columns = ["task", *(key for key in known if len({row.get(key) for row in rows}) > 1), "metric", "value", "n"]
    shown = [row | {"value": Measured(row["value"], row.get("low"), row.get("high"))} for row in rows if "value" in row]
    page.heading(one.name, 3)
    page.table(shown, "Values with 95 % intervals over pictures.", {key: known.get(key, key) for key in columns})


def add_origin(page: Page, seen: Sequence[Seen]) -> None:
    """The command and the whole configuration of every run."""
    page.heading("How to repeat them")
    for one in seen:
        with page.folded(f"{one.name}: command, versions, configuration"):
            facts = one.facts
            versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
            lines = [f"{key}: {facts[key]}" for key in ("command", "commit", "config_hash", "created") if key in facts]
            page.code("\n".join([*lines, *([f"versions: {versions}"] if versions else [])]) or "nothing was noted down")
            file: Path = one.folder / "config.yaml"
            page.code(file.read_text(errors="replace") if file.exists() else json.dumps(one.config, indent=1))
