"""umm report: any set of runs as one HTML page. What is compared is decided here, how it looks in `umm/pages.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from omegaconf import OmegaConf

from umm import config as configuration
from umm.errors import UmmError
from umm.pages import Page
from umm.progress import clock
from umm.run_curves import add_curves
from umm.run_facts import Arm, Seen, arms_of, flat, look_at, plain
from umm.run_tables import add_evaluations, add_joint, add_probe, with_values
from umm.runs import now

MANY = 15  # settings that are folded


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


# --------------------------------------------------------------------------------------------------------- overview


def add_overview(page: Page, seen: Sequence[Seen]) -> None:
    rows = [overview(one) for one in seen]
    words = "Time is that of training, pauses left out, and speed the median of the log."
    if any(str(row["commit"]).endswith("+") for row in rows):
        words += " A + after the commit: with uncommitted changes."
    page.table(rows, words, with_values(rows))


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


def add_settings(page: Page, seen: Sequence[Seen]) -> None:
    """What differs between several runs; for one, what differs from the defaults."""
    if len(seen) == 1:
        rows, words = from_defaults(seen[0]), "Settings that differ from the defaults."
    else:
        rows, words = differences(seen), "Settings that at least two of the runs have, with different values."
    if len(rows) > MANY:
        with page.folded(f"Settings: {len(rows)} differ"):
            page.table(rows, words)
    elif rows:
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
        file, (images, _, part) = files[-1], files[-1].stem.partition("-")
        words = f"{run.name}{f' ({part})' if part else ''} after {int(images):,} images"
        try:
            if file.suffix == ".txt":
                with page.folded(f"{words}: questions, answers, and the right answers"):
                    page.code(file.read_text(errors="replace"))
            else:
                page.figure(file, f"{words}.", f"picture grid drawn by {words}")
        except (UmmError, OSError) as error:
            run.remarks.append(f"{run.name}: {error}")


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
