"""`umm compare report`: one table of all spaces, what it shows and what it does not, as JSON, Markdown, plots and HTML.

Every number is a mean over seeds with Student's interval; what lies apart is told by paired t tests over seeds.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from umm import seed_stats
from umm.compare import STAGES, Declaration
from umm.compare_plots import plots
from umm.compare_run import ENCODING, warnings_of
from umm.errors import UmmError
from umm.many_runs import mean_costs, results, row_of
from umm.sections import Section, measured, number, table, write
from umm.settings import TrainSettings

ALPHA = 0.05
LEAD = "Latent spaces under one budget: decoder, generator and probe."


def report(folder: str | Path) -> str:
    """Write report/ in the folder of a comparison; returns the table and where the files are.

    Raises:
        UmmError: this is no comparison, or its files were changed.
    """
    folder = Path(folder)
    found = analyse(folder)
    drawn = plots(found)
    parts = sections(found, list(drawn))
    wrote = write(folder / "report", found["about"] or folder.name, LEAD, found, parts, drawn)
    return "\n".join([*table(parts[0].rows), "", *found["said"], wrote])


# ---------------------------------------------------------------------------------------------------------- computing


def analyse(folder: Path) -> dict:
    """Everything that is computed, JSON-able."""
    declared = Declaration.sealed(folder)
    done = {name: results(folder / name, declared.sha256) for name in declared.spaces}
    done = {name: found for name, found in done.items() if found}
    if not done:
        raise UmmError(f"{folder}: nothing is finished yet, so there is nothing to report: umm compare run goes on.")
    found = {"about": declared.about, "sha256": declared.sha256, "declaration": asdict(declared)}
    wanted = len(declared.seeds) * len(declared.spaces)
    commits = sorted({str(result.get("commit")) for one in done.values() for result in one.values()})
    found["runs"] = {"wanted": wanted, "done": sum(map(len, done.values())), "commits": commits}
    found["spaces"] = {name: space_facts(declared, name, results) for name, results in done.items()}
    found["columns"] = {name: column(declared, name, done) for name in declared.columns}
    found["numbers"] = [row for name, results in done.items() for row in all_numbers(name, results)]
    found["warnings"] = warnings_of(done)
    found["said"] = sentences(declared, found)
    return found


def space_facts(declared: Declaration, name: str, done: dict[int, dict]) -> dict:
    """What a space is like, and what its runs cost: means over seeds."""
    first = next(iter(done.values()))
    costs = {stage: mean_costs([result["costs"][stage] for result in done.values()]) for stage in first["costs"]}
    facts = {"about": declared.spaces[name].about, "kind": first["kind"], **first["space"], "seeds": list(done)}
    return facts | {"costs": costs, "changed": declared.changed(name)}


def column(declared: Declaration, name: str, done: dict[str, dict[int, dict]]) -> dict:
    """One number of every space: its values over seeds, the best mean, and which spaces are told apart from it."""
    wanted, spaces, lost = declared.columns[name], {}, []
    rows = {space: {seed: row_of(result["rows"], wanted, f"column '{name}'") for seed, result in found.items()}
            for space, found in done.items()}  # fmt: skip
    for space, found in rows.items():
        values = {seed: row["value"] for seed, row in found.items() if math.isfinite(row["value"])}
        lost += [f"{space} seed {seed}" for seed in found.keys() - values.keys()]
        spaces[space] = {"per_seed": values, **seed_stats.mean_of(list(values.values()), ALPHA)}
    every = [row for found in rows.values() for row in found.values()]
    higher = every[0].get("higher_is_better") if every else None
    conflicts = sorted({row["conflict"] for row in every if row.get("conflict")})
    facts = {"higher_is_better": higher, "conflicts": conflicts, "not_finite": sorted(lost), "spaces": spaces}
    return wanted | facts | apart(spaces, higher)


def apart(spaces: dict[str, dict], higher: bool | None) -> dict:
    """The space with the best mean, and {other space: p of no difference}: paired by seed, Holm over all pairs.

    Over all pairs and not over those with the best alone: which one is best is read off the same seeds. Spaces with
    fewer than two seeds in common have no p.
    """
    there = [space for space in spaces if spaces[space]["mean"] is not None]
    if higher is None or not there:
        return {"best": None, "p": {}}
    best = (max if higher else min)(there, key=lambda space: spaces[space]["mean"])
    p_values = {}
    for pair in combinations(there, 2):
        one, other = (spaces[space]["per_seed"] for space in pair)
        if len(seeds := sorted(one.keys() & other.keys())) > 1:
            p_values[pair] = seed_stats.t_p(np.array([one[seed] - other[seed] for seed in seeds]))
    with_best = {pair: p for pair, p in seed_stats.holm(p_values).items() if best in pair}
    return {"best": best, "p": {pair[best == pair[0]]: p for pair, p in with_best.items()}}


def all_numbers(name: str, done: dict[int, dict]) -> list[dict]:
    """A row for every number that the space's runs were judged by."""
    gathered: dict[tuple, list[float]] = {}
    for result in done.values():
        for row in result["rows"]:
            gathered.setdefault((row["part"], row["metric"], row.get("space") or ""), []).append(row["value"])
    return [
        {"latent": name, "part": part, "metric": metric, "judge": judge}
        | seed_stats.mean_of([value for value in values if math.isfinite(value)], ALPHA)
        for (part, metric, judge), values in gathered.items()
    ]


# ------------------------------------------------------------------------------------------------------------ saying


def sentences(declared: Declaration, found: dict) -> list[str]:
    """What was held equal, what stands out, and what none of it shows."""
    runs, said = found["runs"], [budget(declared)]
    if runs["done"] < runs["wanted"]:
        said.append(f"Preliminary: {runs['done']} of {runs['wanted']} are in.")
    said += [standing(name, one) for name, one in found["columns"].items() if one["best"]]
    said += [f"Not finite and left out of {name}: {', '.join(one['not_finite'])}."
             for name, one in found["columns"].items() if one["not_finite"]]  # fmt: skip
    said += [f"{name}: {text}" for name, text in found["warnings"].items()]
    said += [f"Conflict of interest in {name}: {'; '.join(one['conflicts'])}."
             for name, one in found["columns"].items() if one["conflicts"]]  # fmt: skip
    changed = [name for name, one in found["spaces"].items() if any(one["changed"].values())]
    own = f"but {', '.join(changed)} (see below)" if changed else "and none has settings of its own"
    said.append(
        f"Nothing was tuned for a single space, {own}: a space may do better with other settings, and a budget that "
        "is enough for one may be short for another. Ranks hold for these pictures, this size and this budget."
    )
    if any(one["kind"] == "trained" for one in found["spaces"].values()):
        said.append(
            "Spaces that are trained here learn encoder and decoder from the pictures that others train a decoder "
            "with, and another seed is another latent space; a pretrained encoder has seen other data before."
        )
    said.append(
        "Intervals are Student's over seeds. They say how far another seed moves a number, not other pictures to judge "
        "by, another encoder, data set or network; with few seeds they are wide, and p values need large differences."
    )
    return said


def budget(declared: Declaration) -> str:
    """What the spaces were given, in words, and which of them were given something else."""
    given = []
    for stage, what in {"recon": "a decoder", "gen": "a generator", "und": "a probe"}.items():
        if stage in declared.stages:
            given.append(f"{what} {declared.common(stage).get('train.images', TrainSettings().images)} pictures")
    own = [name for name in declared.spaces
           if any(key.startswith("train.") for stage in declared.changed(name).values() for key in stage)]  # fmt: skip
    who = f"Every space but {', '.join(own)} (see below)" if own else "Every space"
    return f"{who} has the same budget, each stage in batches of equal size: {', '.join(given)}."


def standing(name: str, one: dict) -> str:
    """The best of a column, and what is not told apart from it, or not compared."""
    others = [space for space in one["spaces"] if space != one["best"]]
    close = [space for space in others if one["p"].get(space, 0) > ALPHA]
    untested = [space for space in others if space not in one["p"]]
    best = f"{name}: {one['best']} is best ({number(one['spaces'][one['best']]['mean'])})"
    if not one["p"]:
        return f"{best}; one seed tells nothing apart."
    apart = "all that were tested are told apart" if untested else "all others are told apart"
    said = [f"not told apart from it: {', '.join(close)}" if close else apart]
    said += [f"not tested, for want of two seeds in common: {', '.join(untested)}"] if untested else []
    return f"{best}; {'; '.join(said)}."


# ---------------------------------------------------------------------------------------------------------- sections


def sections(found: dict, drawn: list[str]) -> list[Section]:
    """The report from top to bottom."""
    main = "Means over seeds with 95 % intervals. Trained: numbers in all optimisers of decoder, generator and probe."
    costs = (
        "Means over seeds. Operations: forward and backward passes of training, matrix products and convolutions. CPU "
        "and clock seconds: training with judging. Encoding: of a picture, and once for all seeds where frozen."
    )
    changed = [{"space": name, "stage": stage, "setting": key, "value": str(value)}
               for name, one in found["spaces"].items()
               for stage, given in one["changed"].items() for key, value in given.items()]  # fmt: skip
    rows = [{"space": row["latent"], "part": row["part"], "metric": row["metric"], "judge": row["judge"],
             "value": measured(row), "seeds": row["n"]} for row in found["numbers"]]  # fmt: skip
    declared = [f"Hash of spaces, budgets, columns and seeds: `{found['sha256']}`."]
    declared += [f"Code: {', '.join(found['runs']['commits'])}."]
    made = [
        Section("The table", [], main_rows(found), main, drawn),
        Section("What it shows, and what not", found["said"]),
        Section("What it cost", [], cost_rows(found), costs),
        Section("Settings of single spaces", [], changed, "Everything else is the same for all."),
        Section("The spaces", [], [{"space": name, "about": one["about"], "kind": one["kind"],
                                    "parameters": one["parameters"]} for name, one in found["spaces"].items()],
                "trained: has networks that are trained here; complete: has a decoder; frozen: has none."),
        Section("Per seed", [], seed_rows(found), "The columns of the table with every seed."),
        Section("All numbers", [], rows, "Everything the runs were judged by."),
        Section("Declared before the first run", declared),
    ]  # fmt: skip
    return [section for section in made if section.text or section.rows]


def main_rows(found: dict) -> list[dict]:
    rows = []
    for name, one in found["spaces"].items():
        row: dict[str, Any] = {"space": name, "latent": " x ".join(map(str, one["shape"]))}
        row |= {f"trained, {stage}": parameters(one["costs"][stage]) for stage in STAGES if stage in one["costs"]}
        for column, numbers in found["columns"].items():
            mark = {True: " (higher)", False: " (lower)", None: ""}[numbers["higher_is_better"]]
            row[column + mark] = measured(numbers["spaces"].get(name))
        rows.append(row | {"seeds": len(one["seeds"])})
    return rows


def parameters(costs: dict[str, float]) -> int | None:
    """What a stage trained; unknown where every seed was interrupted."""
    return round(costs["parameters"]) if "parameters" in costs else None


def cost_rows(found: dict) -> list[dict]:
    rows = []
    for name, one in found["spaces"].items():
        row = {"space": name, "encoding, GFLOP": one["flops"] / 1e9}
        for stage in (stage for stage in STAGES if stage in one["costs"]):
            cost = one["costs"][stage]
            row |= {f"{stage}, TFLOP": cost["flops"] / 1e12 if "flops" in cost else None}
            row |= {f"{stage}, CPU s": cost.get("cpu_seconds"), f"{stage}, s": cost.get("seconds")}
        rows.append(row | {"encoding, CPU s": one["costs"][ENCODING].get("cpu_seconds")})
    return rows


def seed_rows(found: dict) -> list[dict]:
    return [
        {"space and column": f"{name}: {column}"} | {str(seed): value for seed, value in one["per_seed"].items()}
        for column, numbers in found["columns"].items()
        for name, one in numbers["spaces"].items()
    ]
