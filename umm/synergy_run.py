"""`umm synergy run`: every arm with every seed, in parallel, resumable; what it finds lies in files.

<folder>/declaration.json                          sealed before the first run
<folder>/<arm>/seed<i>/                            an ordinary run folder, and result.json once it is judged
<folder>/tuning/<arm>/trial<k>/seed<i>/, tuning.json   where settings are tuned, and what was chosen
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from umm.errors import UmmError
from umm.many_runs import Job, Judge, perform, results, row_of, sigterm_raises, train_and_judge, work
from umm.runs import lock, reading, write_atomic
from umm.synergy import Declaration, Endpoint, read_declaration
from umm.workers import cores

TUNED = "tuning.json"
TRIAL = " trial "  # between an arm and the number of its trial; no arm has a space in its name


def run_synergy(
    file: str | Path,
    jobs: int | None = None,
    limit_seeds: int | None = None,
    out: str | None = None,
    judge: Judge | None = None,
) -> str:
    """Run what is not finished of an experiment; returns what came of it, in a sentence.

    Args:
        file: the declaration, YAML.
        jobs: runs at a time; None: one a core.
        limit_seeds: only the first so many seeds, for a first look; the rest can follow.
        out: folder; None: the declaration's.
        judge: what makes rows of a configuration; None: train the run and evaluate it.

    Raises:
        UmmError: some runs failed; all others were done before.
    """
    declared = read_declaration(file)
    folder = Path(out or declared.folder)
    declared.seal(folder)
    lock(folder)
    todo = partial(work, jobs=jobs or cores(), do=partial(perform_arm, judge or train_and_judge, declared))
    with sigterm_raises():
        chosen: dict[str, dict[str, Any]] = {}
        if declared.tuning:
            todo(tuning_jobs(declared, folder), "tuning")
            chosen = choose(declared, folder)
        jobs_to_do = final_jobs(declared, folder, chosen, limit_seeds)
        todo(jobs_to_do, declared.about or folder.name)
    return f"all {len(jobs_to_do)} runs are in: umm synergy report {folder}"


def final_jobs(declared: Declaration, folder: Path, chosen: dict[str, dict], limit_seeds: int | None) -> list[Job]:
    """Seed by seed, so that an experiment cut short has whole pairs."""
    jobs = []
    for number, seed in enumerate(declared.seeds[:limit_seeds]):
        for name, arm in declared.arms.items():
            if number < len(declared.seeds_of(name)):
                place = folder / name / f"seed{seed}"
                tuned = chosen.get(arm.tuned_as or name)
                settings = declared.settings(name, place, seed, declared.split, tuned)
                jobs.append(Job(name, seed, place, declared.task, settings, declared.sha256))
    return jobs


def perform_arm(judge: Judge, declared: Declaration, job: Job) -> None:
    """Do a job; an endpoint whose row is not among those found fails the first run, not the report."""
    arm = declared.arms[job.group.partition(TRIAL)[0]]

    def look_up(rows: list[dict]) -> None:
        for name in arm.measures:
            number(rows, declared.endpoints[name], name)

    perform(judge, job, look_up)


# ------------------------------------------------------------------------------------------------------------ numbers


def number(rows: list[dict], endpoint: Endpoint, name: str) -> dict:
    """The one row an endpoint speaks of.

    Raises:
        UmmError: no row or several have those fields, or the row's direction is not the endpoint's.
    """
    found = row_of(rows, endpoint.row, f"endpoint '{name}'")
    higher = endpoint.error != "value"
    if found.get("higher_is_better", higher) not in (higher, None):
        better = "lower" if higher else "higher"
        raise UmmError(f"endpoint '{name}': its metric is better {better}, which contradicts error={endpoint.error}.")
    return found


def error_of(value: float, endpoint: Endpoint) -> float:
    """The error that a number means."""
    error = {"value": value, "1 - value": 1 - value, "100 - value": 100 - value}[endpoint.error]
    return error if endpoint.floor is None else max(error, endpoint.floor)


# ------------------------------------------------------------------------------------------------------------- tuning


def tuning_jobs(declared: Declaration, folder: Path) -> list[Job]:
    jobs = []
    for name in declared.tuning.arms:
        for k, trial in enumerate(declared.tuning.trials()):
            for seed in declared.tuning.seeds:
                place = folder / "tuning" / name / f"trial{k}" / f"seed{seed}"
                settings = declared.settings(name, place, seed, "val", trial)
                jobs.append(Job(f"{name}{TRIAL}{k}", seed, place, declared.task, settings, declared.sha256))
    return jobs


def choose(declared: Declaration, folder: Path) -> dict[str, dict[str, Any]]:
    """{arm: the trial with the least mean log error over its primary endpoints and the tuning seeds}, also a file."""
    chosen, scores = {}, {}
    for name in declared.tuning.arms:
        places = [folder / "tuning" / name / f"trial{k}" for k in range(len(declared.tuning.trials()))]
        scores[name] = [score(declared, name, results(place, declared.sha256)) for place in places]
        best = min(range(len(places)), key=scores[name].__getitem__)
        chosen[name] = declared.tuning.trials()[best]
    text = {"trials": declared.tuning.trials(), "mean_log_error": scores, "chosen": chosen}
    write_atomic(folder / TUNED, json.dumps(text, indent=1))
    return chosen


def chosen_before(folder: Path) -> dict[str, dict[str, Any]]:
    """What `choose` has written in the folder of an experiment; empty where nothing was tuned."""
    file = folder / TUNED
    with reading(file, "umm synergy run writes it anew"):
        return json.loads(file.read_text())["chosen"] if file.exists() else {}


def score(declared: Declaration, arm: str, found: dict[int, dict]) -> float:
    """Mean log error of one trial; an error that is not positive is as good as it gets, one not finite as bad."""
    endpoints = {name: declared.endpoints[name] for name in declared.arms[arm].measures if name in declared.primary}
    errors = [
        error_of(number(result["rows"], endpoint, name)["value"], endpoint)
        for result in found.values()
        for name, endpoint in endpoints.items()
    ]
    logs = [math.log(max(error, 1e-12)) if math.isfinite(error) else math.inf for error in errors]
    return sum(logs) / len(logs)
