"""Everything that is computed of a finished experiment, as one dictionary that goes into report.json.

Every score is a list over paired seeds and is tested the same way (`tested`); positive is better together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from umm import seed_stats
from umm.many_runs import mean_costs, results
from umm.seed_stats import mean_of
from umm.stats import standardised
from umm.synergy import CONTROLS, Declaration
from umm.synergy_run import chosen_before, error_of, number


class Numbers:
    """The results of a folder: the endpoints' numbers of every arm and seed, and what tuning chose."""

    def __init__(self, folder: Path):
        self.declared = Declaration.sealed(folder)
        self.tuned = chosen_before(folder) if self.declared.tuning else {}
        self.found = {name: results(folder / name, self.declared.sha256) for name in self.declared.arms}
        self.rows: dict[tuple[str, str], dict[int, dict]] = {}  # (arm, endpoint) -> {seed: row}
        for name, arm in self.declared.arms.items():
            for endpoint in arm.measures:
                row_of = {
                    seed: number(result["rows"], self.declared.endpoints[endpoint], endpoint)
                    for seed, result in self.found[name].items()
                }
                self.rows[name, endpoint] = row_of
        self.problems = {e: sentence for e in self.declared.endpoints if (sentence := self.no_logarithm(e))}

    def no_logarithm(self, endpoint: str) -> str | None:
        """Why an endpoint has no scores: an error that is not positive, or not finite."""
        for (arm, name), rows in self.rows.items():
            for seed, error in zip(rows, self.errors(arm, endpoint, list(rows)) if name == endpoint else ()):
                if not 0 < error < math.inf:
                    return (
                        f"{endpoint} has no scores: the error of {arm} seed {seed} is {error:.4g}, which has no "
                        "finite logarithm. Declare an endpoint off its ceiling, or one with a floor."
                    )
        return None

    def finite(self, arm: str, endpoint: str) -> list[int]:
        """The seeds whose number is finite."""
        return [seed for seed, row in self.rows[arm, endpoint].items() if math.isfinite(row["value"])]

    def left_out(self) -> list[str]:
        """A sentence for every mean that is not over all seeds."""
        said = []
        for (arm, endpoint), rows in self.rows.items():
            if lost := sorted(set(rows) - set(self.finite(arm, endpoint))):
                seeds = ", ".join(map(str, lost))
                said.append(f"The mean of {arm} leaves out seed {seeds}, whose {endpoint} is not a finite number.")
        return said

    def place(self, arm: str) -> float:
        """Where an arm lies on the front: by tuning, where that chose it, else as declared."""
        key, declared = self.declared.front.key, self.declared.arms[arm]
        tuned = {} if declared.role == "front" else self.tuned.get(declared.tuned_as or arm, {})
        return (declared.overrides | tuned)[key]

    def seeds(self, endpoint: str, *arms: str) -> list[int]:
        """The seeds with which all these arms can be compared."""
        if endpoint in self.problems:
            return []
        common = set.intersection(*(set(self.rows.get((arm, endpoint), {})) for arm in arms))
        return [seed for seed in self.declared.seeds if seed in common]

    def values(self, arm: str, endpoint: str, seeds: Sequence[int]) -> np.ndarray:
        return np.array([self.rows[arm, endpoint][seed]["value"] for seed in seeds])

    def errors(self, arm: str, endpoint: str, seeds: Sequence[int]) -> np.ndarray:
        how = self.declared.endpoints[endpoint]
        return np.array([error_of(float(value), how) for value in self.values(arm, endpoint, seeds)])

    def score(self, arm: str, reference: str, endpoint: str, seeds: Sequence[int]) -> np.ndarray:
        """s = log(error of the reference / error of the arm) per seed."""
        single, joint = self.errors(reference, endpoint, seeds), self.errors(arm, endpoint, seeds)
        return seed_stats.log_error_ratio(single, joint)


def analyse(folder: Path) -> dict:
    """The numbers of all arms, scores, Sigma, controls, the front, and the exploratory tests."""
    numbers = Numbers(folder)
    declared = numbers.declared
    joint = {name: joint_arm(numbers, name) for name in declared.with_role("joint")}
    return {
        "about": declared.about,
        "sha256": declared.sha256,
        "declaration": asdict(declared),
        "tuned": numbers.tuned,
        "runs": runs(numbers),
        "arms": {name: arm_numbers(numbers, name) for name in declared.arms},
        "joint": joint,
        "stop": stop_arms(numbers),
        "controls": controls(numbers),
        "front": front(numbers),
        "exploratory": exploratory(numbers),
        "judges": sorted({
            f"{endpoint}: {row['conflict']}"
            for (_, endpoint), rows in numbers.rows.items()
            for row in rows.values()
            if row.get("conflict") and declared.endpoints[endpoint].primary
        }),
    }  # fmt: skip


def runs(numbers: Numbers) -> dict:
    """How much of the experiment is in, and whether one code made it."""
    declared = numbers.declared
    wanted = {name: len(declared.seeds_of(name)) for name in declared.arms}
    done = {name: len(found) for name, found in numbers.found.items()}
    commits = {result.get("commit") for found in numbers.found.values() for result in found.values()}
    missing = {name: wanted[name] - done[name] for name in wanted if done[name] < wanted[name]}
    counts = {"wanted": sum(wanted.values()), "done": sum(done.values())}
    counts |= {"missing": missing, "commits": sorted(map(str, commits))}
    counts["unscored"] = [endpoint for endpoint in declared.primary if endpoint in numbers.problems]
    return counts | {"problems": [*numbers.problems.values(), *numbers.left_out()]}


def arm_numbers(numbers: Numbers, name: str) -> dict:
    """Per seed and as means with intervals, and what a run cost."""
    arm, found = numbers.declared.arms[name], numbers.found[name]
    means = mean_costs([result["costs"] for result in found.values()])
    endpoints = {}
    for endpoint in arm.measures:
        values = {seed: row["value"] for seed, row in numbers.rows[name, endpoint].items()}
        seeds = numbers.finite(name, endpoint)
        errors = mean_of(numbers.errors(name, endpoint, seeds), numbers.declared.alpha)
        mean = mean_of(numbers.values(name, endpoint, seeds), numbers.declared.alpha)
        endpoints[endpoint] = {"per_seed": values, **mean, "error": errors}
    return {"role": arm.role, "compute": arm.compute, "about": arm.about, "costs": means, "endpoints": endpoints}


def tested(scores: np.ndarray, seeds: Sequence[int], declared: Declaration) -> dict | None:
    """Mean, interval, p values and effect sizes of scores over seeds; None below two seeds.

    `decidable`: whether the deciding test can reach alpha with that many seeds, whatever the scores.
    """
    if len(scores) < 2:
        return None
    few = len(scores) <= seed_stats.MOST_SEEDS or declared.test == "sign-flip"
    p = {"sign-flip": seed_stats.exact_sign_flip_p(scores) if few else None, "t": seed_stats.t_p(scores)}
    found = {"per_seed": dict(zip(seeds, scores.tolist()))} | mean_of(scores, declared.alpha)
    found |= {"p": p[declared.test], "p_sign_flip": p["sign-flip"], "p_t": p["t"], "d": standardised(scores)}
    found["percent"] = 100 * (1 - math.exp(-found["mean"]))  # of the error that is gone
    found["decidable"] = least_p(len(scores), declared) <= declared.alpha
    significant = found["p"] <= declared.alpha
    return found | {"better": significant and found["mean"] > 0, "worse": significant and found["mean"] < 0}


def least_p(seeds: int, declared: Declaration) -> float:
    """The smallest p that the deciding test can give."""
    return seed_stats.smallest_p(seeds) if declared.test == "sign-flip" else 0.0


def detectable(scores: np.ndarray, declared: Declaration) -> float | None:
    """The mean that a t test at alpha / 2, one direction alone, would have shown four times in five.

    None where the deciding test cannot show one direction alone with so few seeds.
    """
    if 2 * least_p(len(scores), declared) > declared.alpha:
        return None
    return seed_stats.detectable(len(scores), alpha=declared.alpha / 2) * float(np.std(scores, ddof=1))


# -------------------------------------------------------------------------------------------------------- joint arms


def joint_arm(numbers: Numbers, name: str) -> dict:
    """Both directions of a joint arm against the specialists, the decisions, and Sigma."""
    declared = numbers.declared
    directions = {e: direction(numbers, name, e) for e in declared.primary if e in declared.arms[name].measures}
    return {"directions": directions, "decisions": decisions(directions, declared), "sigma": sigma(numbers, name)}


def direction(numbers: Numbers, arm: str, endpoint: str) -> dict | None:
    """s of one endpoint, and what is shown about harm and equivalence within the margin."""
    how = numbers.declared.endpoints[endpoint]
    seeds = numbers.seeds(endpoint, arm, how.single)
    scores = numbers.score(arm, how.single, endpoint, seeds)
    found = tested(scores, seeds, numbers.declared)
    if found is None:
        return None
    found["detectable"] = detectable(scores, numbers.declared)
    if how.margin_in == "percent":
        differences, margin = scores, math.log1p(how.margin / 100)
    else:
        sign = -1 if how.error == "value" else 1
        differences = sign * (numbers.values(arm, endpoint, seeds) - numbers.values(how.single, endpoint, seeds))
        margin = how.margin
    harm, equal = seed_stats.no_harm(differences, margin), seed_stats.equivalence(differences, margin)
    units = "%" if how.margin_in == "percent" else ""
    return found | {"single": how.single, "margin": f"{how.margin:g}{units}", "p_harm": harm, "p_different": equal}


def decisions(directions: dict[str, dict | None], declared: Declaration) -> dict | None:
    """Both: intersection-union, no correction. Either: Holm over the two. Gain and harm are shown by the same rule.

    None while a direction has no numbers.
    """
    if len(directions) < 2 or None in directions.values():
        return None
    p = {name: found["p"] for name, found in directions.items()}
    adjusted = seed_stats.holm(p)
    p_both = seed_stats.intersection_union(p.values())

    def decided(sign: int) -> tuple[bool, list[str]]:
        """Whether both directions have that sign, and which are shown to."""
        fit = {name: sign * found["mean"] > 0 for name, found in directions.items()}
        both = all(fit.values()) and p_both <= declared.alpha
        return both, [name for name in p if both or (fit[name] and adjusted[name] <= declared.alpha)]

    (both, shown), (both_harmed, harmed) = decided(1), decided(-1)
    return {
        "p_both": p_both,
        "both": both,
        "both_harmed": both_harmed,
        "p_holm": adjusted,
        "shown": shown,
        "harmed": harmed,
        "least_p": least_p(min(found["n"] for found in directions.values()), declared),
        "no_harm": [name for name, found in directions.items() if found["p_harm"] <= declared.alpha],
        "equivalent": [name for name, found in directions.items() if found["p_different"] <= declared.alpha],
    }


def sigma(numbers: Numbers, arm: str) -> dict:
    """The budget-equivalent score with its jackknife-t interval on the log scale, and each task's share of it."""
    declared = numbers.declared
    curves = {endpoint: declared.curve(endpoint) for endpoint in declared.primary}
    if min(map(len, curves.values())) < 2:
        return {"reason": "it needs single arms at two budgets or more for each endpoint"}
    enough = [set(numbers.seeds(endpoint, arm, *names)) for endpoint, names in curves.items()]
    seeds = sorted(set.intersection(*enough))
    if len(seeds) < 2:
        return {"reason": "fewer than two seeds have all the arms it needs"}
    needed = [(endpoint, name) for endpoint in curves for name in (*curves[endpoint], arm)]
    rows = np.log([numbers.errors(name, endpoint, seeds) for endpoint, name in needed]).T  # (S, columns)
    budgets = [[declared.arms[name].compute for name in names] for names in curves.values()]
    compute = declared.arms[arm].compute

    def score(part: np.ndarray, tasks: Sequence[int] = (0, 1)) -> seed_stats.Reading:
        readings = read_back(part, budgets)
        return seed_stats.budget_equivalent([readings[task] for task in tasks], compute)

    found = {"n": len(seeds), "compute": compute, **asdict(score(rows)), "interval": interval(score, rows, declared)}
    shares = {
        endpoint: asdict(alone(rows)) | {"interval": interval(alone, rows, declared)}
        for endpoint, alone in ((e, partial(score, tasks=[task])) for task, e in enumerate(curves))
    }
    even = 1 / len(shares)
    found["mutual"] = all(share["interval"] and share["interval"][0] > even for share in shares.values())
    return found | {"shares": shares}


def read_back(rows: np.ndarray, budgets: list[list[float]]) -> list[seed_stats.Reading]:
    """The joint model's errors on the specialists' curves, fitted to the same seeds."""
    readings, start = [], 0
    for computes in budgets:
        stop = start + len(computes)
        curve = seed_stats.LearningCurve.fit(computes, rows[:, start:stop])
        readings.append(curve.inverse(float(rows[:, stop].mean())))
        start = stop + 1
    return readings


def interval(score, rows: np.ndarray, declared: Declaration) -> list[float] | None:
    """[low, high] by the jackknife on the log scale; None where a curve's end is met, with or without any one seed."""
    parts = [rows, *(np.delete(rows, i, axis=0) for i in range(len(rows)))]
    if any(score(part).sign for part in parts):
        return None
    found = seed_stats.jackknife_t(lambda part: math.log(score(part).value), rows, 1 - declared.alpha)
    return [math.exp(found.low), math.exp(found.high)]


# ----------------------------------------------------------------------------------------------------- other arms


def stop_arms(numbers: Numbers) -> list[dict]:
    """Each stop arm against its specialist: the largest relative difference of errors, and whether that is a leak."""
    declared, rows = numbers.declared, []
    for name in declared.with_role("stop"):
        for endpoint in declared.arms[name].measures:
            single = declared.endpoints[endpoint].single
            seeds = numbers.seeds(endpoint, name, single)
            if seeds:
                gaps = np.abs(np.expm1(numbers.score(name, single, endpoint, seeds)))
                row = {"arm": name, "single": single, "endpoint": endpoint, "n": len(seeds)}
                worst = int(gaps.argmax())
                row |= {"gap": float(gaps[worst]), "seed": seeds[worst], "leak": bool(gaps[worst] > declared.tolerance)}
                rows.append(row)
    return rows


def controls(numbers: Numbers) -> list[dict]:
    """Each control arm: its own score, and the headline's score less it on the same seeds."""
    declared, rows = numbers.declared, []
    for name in declared.with_role(*CONTROLS):
        for endpoint in declared.arms[name].measures:
            single = declared.endpoints[endpoint].single
            seeds = numbers.seeds(endpoint, name, single, declared.headline)
            mine = numbers.score(name, single, endpoint, seeds)
            joint = numbers.score(declared.headline, single, endpoint, seeds)
            row = {"arm": name, "role": declared.arms[name].role, "endpoint": endpoint}
            row["score"], row["adjusted"] = tested(mine, seeds, declared), tested(joint - mine, seeds, declared)
            rows.append(row)
    return rows


def front(numbers: Numbers) -> list[dict]:
    """The headline arm at all loss weights: mean errors on common seeds, and whether no other is better in both."""
    declared = numbers.declared
    if not declared.front:
        return []
    names, points = [declared.headline, *declared.with_role("front")], []
    seeds = {endpoint: numbers.seeds(endpoint, *names) for endpoint in declared.primary}
    for name in names if all(seeds.values()) else ():
        errors = {e: mean_of(numbers.errors(name, e, seeds[e]), declared.alpha) for e in declared.primary}
        points.append({"arm": name, "value": numbers.place(name), "errors": errors})
    first, second = declared.primary
    places = [(point["errors"][first]["mean"], point["errors"][second]["mean"]) for point in points]
    for point, (x, y) in zip(points, places):
        point["best"] = not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places)
    return points


def exploratory(numbers: Numbers) -> list[dict]:
    """All that was not the question: declared comparisons, arms against their specialists, other endpoints."""
    declared = numbers.declared
    pairs = [(row.arm, row.reference, row.endpoint) for row in declared.comparisons]
    for name in declared.with_role("sequential", "floor", "joint", *CONTROLS):
        for endpoint in declared.arms[name].measures:
            if not (name == declared.headline and endpoint in declared.primary):
                pairs.append((name, declared.endpoints[endpoint].single, endpoint))
    rows = []
    for arm, reference, endpoint in dict.fromkeys(pairs):
        seeds = numbers.seeds(endpoint, arm, reference)
        found = tested(numbers.score(arm, reference, endpoint, seeds), seeds, declared)
        if found:
            rows.append({"arm": arm, "reference": reference, "endpoint": endpoint, **found})
    adjusted = seed_stats.benjamini_hochberg({i: row["p"] for i, row in enumerate(rows)})
    return [row | {"q": adjusted[i], "found": adjusted[i] <= declared.alpha} for i, row in enumerate(rows)]
