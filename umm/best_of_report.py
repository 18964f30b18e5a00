"""What `umm best-of` found: numbers with intervals, a table, a verdict in words, a plot and a grid of pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from umm.best_of import MOST, NEEDS, Contest, Pool, Request, open_contest
from umm.choosing import Verdict, gap_closed, picks, pool_sizes, spread, spread_change, verdict, worth
from umm.errors import UmmError
from umm.metrics.kid import kid
from umm.metrics.prdc import prdc, squared_distances
from umm.pictures import save_grid
from umm.plots import look, new_axes, styled
from umm.rng import derive_seed
from umm.runs import provenance, write_atomic, writing
from umm.stats import Interval, bootstrap

FORMAT = 1  # raised when a number's definition changes
SHOWN = (6, 8)  # classes and requests of the picture grid
COLUMNS = ("judge", "on real", "agreement", "95 %", "gain over random", "95 %", "gap closed", "kid", "precision",
           "recall", "coverage", "spread", "GFLOP", "ms")  # fmt: skip


def best_of(folder: str, request: Request) -> str:
    """Draw, judge, choose, write, and return the table.

    Raises:
        UmmError: see `open_contest`; a pool or a number of requests too small to say anything.
    """
    if not 2 <= request.pool <= MOST or request.per_class < 2:
        raise UmmError(f"--pool must be 2 to {MOST} and --per-class at least 2.")
    contest, config = open_contest(folder, request)
    pool = contest.draw(request.pool, request.per_class * contest.drawer.dit.num_classes)
    result = measure(contest, pool, request, config.eval.neighbors, config.eval.bootstrap)
    result |= {"request": asdict(request), "run": folder, "provenance": provenance(config)}
    out = Path(request.out or Path(folder) / "best-of")
    with writing(out, "the results"):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "best_of.json", json.dumps(result, indent=1))
    plot(out / "best_of.png", result)
    grid(out / "pictures.png", contest, pool)
    return "\n".join([table(result), *result["says"], f"wrote {out}/best_of.json, best_of.png and pictures.png"])


def measure(contest: Contest, pool: Pool, request: Request, neighbors: int, resamples: int) -> dict:
    """Everything, JSON-able: a row for each judge and pool size, of the largest also how the chosen are spread."""
    costs, largest, rows, gains = contest.costs(), request.pool, [], {}
    for size in pool_sizes(largest):
        outcomes = {judge: worth(pool.scores[judge], pool.right, size) for judge in NEEDS}
        for judge, chosen in outcomes.items():
            draw = np.random.default_rng(derive_seed(request.seed, "best of", judge, size))
            gains[judge] = bootstrap(chosen - outcomes["random"], draw, resamples)
            found = {"judge": judge, "size": size, "agreement": numbers(bootstrap(chosen, draw, resamples))}
            found |= {"gain": numbers(gains[judge]), "cost": cost(costs, judge, size)}
            rows.append(found | {"gap_closed": numbers(gap_closed(chosen, outcomes["random"], outcomes["oracle"]))})
    chosen = {judge: pool.features[range(len(pool.labels)), picks(pool.scores[judge], pool.ties, largest)]
              for judge in NEEDS}  # fmt: skip
    sets = compare_sets(chosen, contest.metric.real, contest.real_labels, pool.labels, neighbors)
    draw = np.random.default_rng(derive_seed(request.seed, "best of", "verdict"))
    flops = costs["latent"]["flops"], costs["re-encoded"]["flops"]
    differences = outcomes["latent"] - outcomes["re-encoded"]
    found = verdict(gains["latent"], differences, flops, request.margin, draw, resamples)
    result = {"format": FORMAT, "rows": rows, "sets": sets, "costs": costs, "accuracy": contest.accuracy}
    result |= {"requests": len(pool.labels), "pool": largest, "classes": contest.drawer.dit.classes}
    result["spaces"] = {"external": contest.external.space.fingerprint(), "metric": contest.metric.space.fingerprint()}
    result["verdict"] = asdict(found) | {"beats_random": found.beats_random, "cheaper": found.cheaper,
                                         "holds": found.holds}  # fmt: skip
    result["says"] = in_words(found, sets, result)
    return json.loads(json.dumps(result))


def numbers(interval: Interval | None) -> dict | None:
    return None if interval is None else {"value": interval.value, "low": interval.low, "high": interval.high}


def cost(costs: dict[str, dict[str, float]], judge: str, size: int) -> dict[str, float]:
    """Of one chosen picture: `size` candidates drawn and judged, the winner decoded."""
    facts = {"evaluations": size * costs["draw"]["evaluations"]}
    for key in ("flops", "seconds"):
        facts[f"judge_{key}"] = size * costs[judge][key]
        facts[f"total_{key}"] = size * (costs["draw"][key] + costs[judge][key]) + costs["decode"][key]
    return facts


def compare_sets(
    chosen: dict[str, Tensor], real: Tensor, real_labels: Tensor, labels: np.ndarray, neighbors: int
) -> dict[str, dict]:
    """The chosen pictures of each judge (R, d) as a set, in the metric's space: kid, prdc, spread within a class."""
    real, found = real.double().cpu(), {}
    scale = spread(distances(real), real_labels.numpy())
    everywhere = distances(chosen["random"].double())
    for judge, features in chosen.items():
        x = features.double()
        mine, k = distances(x), min(neighbors, len(x) - 1, len(real) - 1)
        facts = {"kid": kid(real, x), "neighbors": k} | prdc(real, x, k)
        facts["spread"] = spread(mine, labels) / scale
        found[judge] = facts | {"spread_change": numbers(spread_change(mine, everywhere, labels))}
    return found


def distances(x: Tensor) -> np.ndarray:
    centred = x - x.mean(0)
    return squared_distances(centred, centred).sqrt().numpy()


# ---------------------------------------------------------------------------------------------------------- words


def in_words(found: Verdict, sets: dict[str, dict], result: dict) -> list[str]:
    """What is and what is not shown, a sentence each."""
    gain, between = found.gain, found.difference
    evaluations = result["pool"] * result["costs"]["draw"]["evaluations"]
    lines = [
        f"latent judging {'works' if found.holds else 'is not shown to work'}: best of {result['pool']} for "
        f"{result['requests']} requests, {evaluations} velocity evaluations a chosen picture for every judge.",
        f"  {'beats' if found.beats_random else 'is not shown to beat'} random choice: agreement {gain.value:+.4f}, "
        f"95 % interval {gain.low:+.4f} .. {gain.high:+.4f}",
        f"  {'not worse' if found.not_worse < 0.05 else 'not shown to be no worse'} than decoding and re-encoding by "
        f"{found.margin:g}: {between.value:+.4f} ({between.low:+.4f} .. {between.high:+.4f}), p = {found.not_worse:.3g}"
        f"; equivalent within the margin: p = {found.equivalent:.3g}",
        f"  {'cheaper' if found.cheaper else 'not cheaper'}: {found.flops[0] / 1e6:.3g} against "
        f"{found.flops[1] / 1e6:.3g} MFLOP a candidate",
    ]
    change = sets["latent"]["spread_change"]
    how = "smaller" if change["high"] < 0 else "larger" if change["low"] > 0 else "not shown to differ"
    lines.append(f"  distances within a class, against random choice: {how}, {change['value']:+.1%} "
                 f"({change['low']:+.1%} .. {change['high']:+.1%})")  # fmt: skip
    if found.not_worse >= 0.05 and found.needed > result["requests"]:
        lines.append(f"  note: if the two were equal, about {found.needed} requests would show it.")
    random, oracle = (row_of(result, judge, result["pool"])["agreement"]["value"] for judge in ("random", "oracle"))
    if oracle - random < found.margin:
        lines.append(f"  note: the oracle itself gains {oracle - random:.4f} only; there is nothing to win here.")
    lines.append("  note: requests are the unit; another training of the generator may say something else.")
    return lines


def row_of(result: dict, judge: str, size: int) -> dict:
    return next(row for row in result["rows"] if (row["judge"], row["size"]) == (judge, size))


def table(result: dict) -> str:
    """The largest pool, a line a judge; then agreement for every size.

    "on real" is a judge's accuracy where the latents are those of real pictures.
    """
    lines = [COLUMNS]
    for judge, facts in result["sets"].items():
        row = row_of(result, judge, result["pool"])
        closed = f"{row['gap_closed']['value']:.0%}" if row["gap_closed"] else ""
        cells = [judge, f"{result['accuracy'][judge]:.3f}" if judge in result["accuracy"] else ""]
        cells += [*interval(row["agreement"], ".3f"), *interval(row["gain"], "+.3f"), closed, f"{facts['kid']:.3g}"]
        cells += [f"{facts[key]:.3f}" for key in ("precision", "recall", "coverage", "spread")]
        lines.append([*cells, f"{row['cost']['judge_flops'] / 1e9:.3g}", f"{1e3 * row['cost']['judge_seconds']:.3g}"])
    lines.append([""] * len(COLUMNS))
    sizes = sorted({row["size"] for row in result["rows"]})
    lines.append(["agreement", *(f"N={size}" for size in sizes)])
    for judge in result["sets"]:
        lines.append([judge, *(f"{row_of(result, judge, size)['agreement']['value']:.3f}" for size in sizes)])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def interval(found: dict, form: str) -> tuple[str, str]:
    return f"{found['value']:{form}}", f"{found['low']:{form}} .. {found['high']:{form}}"


# -------------------------------------------------------------------------------------------------------- pictures


def plot(file: Path, result: dict) -> None:
    """Agreement over the size of the pool, a line a judge."""
    with styled(), writing(file.parent, file.name):
        figure, axes = new_axes("share of the chosen that are of the class asked for", "candidates", size=(6, 3.8))
        for number, judge in enumerate(result["sets"]):
            rows = [row for row in result["rows"] if row["judge"] == judge]
            sizes, found = [row["size"] for row in rows], [row["agreement"] for row in rows]
            axes.plot(sizes, [row["value"] for row in found], label=judge, marker="o", **look(number))
            axes.fill_between(sizes, [row["low"] for row in found], [row["high"] for row in found], alpha=0.12,
                              color=look(number)["color"], linewidth=0)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.legend()
        figure.savefig(file, dpi=120)


def grid(file: Path, contest: Contest, pool: Pool) -> None:
    """For the first classes: what random choice and what the latent judge takes for the same requests."""
    classes = contest.drawer.dit.classes[: SHOWN[0]] or [str(k) for k in range(contest.drawer.dit.num_classes)]
    rows, names = [], []
    for k, name in list(enumerate(classes))[: SHOWN[0]]:
        asked = np.flatnonzero(pool.labels == k)[: SHOWN[1]].tolist()
        for judge in ("random", "latent"):
            taken = picks(pool.scores[judge], pool.ties, pool.right.shape[1])
            indices = [q * MOST + int(taken[q]) for q in asked]
            rows.append(contest.pictures(indices, [k] * len(asked)))
            names.append(f"{name}, {judge}")
    save_grid(file, rows, rows=names)
