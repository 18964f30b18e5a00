"""Tables of what evaluations found, for the pages of `umm report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from umm.metrics._conflict import MARK
from umm.pages import Measured, Page
from umm.run_facts import Arm, Seen, flat, is_finite, plain

PARTS = {
    "recon": "Reconstruction",
    "gen": "Generation",
    "und": "Understanding",
    "vqa": "Question answering",
    "llm": "Question answering with a language model",
    "joint": "All parts",
}
BETTER = {True: "higher", False: "lower", None: ""}


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
    runs, notes = [run for arm in arms for run in arm.runs], {}
    for run in runs:
        for split, result in run.evaluations.items():
            for note in result.get("notes", []):
                notes.setdefault((split, note), []).append(run.name)
    for (split, note), names in notes.items():
        page.note(f"{', '.join(names)}, {split} split: {note}")
    add_odd_settings(page, runs)


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
    """What `umm eval --joint` compared, a table a part."""
    page.heading(f"{run.name}: one model beside its baselines, {split} split")
    page.text(
        "Difference: the joint model minus the baseline on the same items, with a 95 % interval over pictures and the "
        "p of no difference. Numbers of whole sets have no values per picture, so neither interval nor p."
    )
    rows = [row for row in found.get("rows", []) if isinstance(row, dict) and {"part", "metric", "value"} <= row.keys()]
    for part in dict.fromkeys(row["part"] for row in rows):
        page.heading(PARTS.get(part, part), 3)
        here = [row for row in rows if row["part"] == part]
        main = [row for row in here if row.get("higher_is_better") is not None and not row.get("conflict")]
        if main:
            add_joint_rows(page, main)
        if others := [row for row in here if row not in main]:
            with page.folded("Diagnostics and judges with a conflict of interest"):
                add_joint_rows(page, others)
    if compute := found.get("compute"):
        page.heading("What it cost", 3)
        page.table(compute, "Training of each run.", with_values(compute))
    for note in found.get("notes", []):
        page.note(note)


def add_joint_rows(page: Page, rows: Sequence[dict]) -> None:
    shown = [joint_row(row) for row in rows]
    page.table(shown, "Values with 95 % intervals.", with_values(shown))


def with_values(rows: Sequence[dict]) -> list[str]:
    """The columns in which anything stands."""
    return [key for key in rows[0] if any(row.get(key) not in (None, "") for row in rows)]


def joint_row(row: dict) -> dict[str, object]:
    against = row.get("difference") or {}
    return {
        "metric": row["metric"] + f" {MARK}" * bool(row.get("conflict")),
        "judge": row.get("space") or "",
        "joint": Measured(row["value"], row.get("low"), row.get("high")),
        "n": row.get("n"),
        "baseline": row.get("baseline") or "",
        "its value": row.get("baseline_value"),
        "difference": Measured(against["value"], against.get("low"), against.get("high")) if against else None,
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
