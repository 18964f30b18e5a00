"""Training curves of any set of logs, for the pages of `umm report`.

A log is the rows of log.jsonl; its terms are called <task>.<phase>.<term>. An arm is a label and the logs of its
seeds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from umm.pages import Page
from umm.plots import COLOURS, log_scale, look, new_axes, styled

POINTS = 250  # of a line at most; more become means of neighbours
ASIDE = ("lr", "grad_norm")  # terms that are not what is learnt
BIN = re.compile(r"(.+)\.t(\d\.\d+)-(\d\.\d+)")  # the loss in an interval of the flow's time

Arms = Sequence[tuple[str, Sequence[Sequence[Mapping]]]]
Line = tuple[np.ndarray, np.ndarray]  # images, values


def add_curves(page: Page, arms: Arms) -> None:
    """A plot a term, one line an arm in the same colour everywhere; seeds become a mean and a band."""
    arms = [(label, logs) for label, logs in arms if any(logs)]
    keys = dict.fromkeys(key for _, logs in arms for log in logs for row in log for key in row if "." in key)
    if not keys:
        return
    page.heading("Training curves")
    if any(len(logs) > 1 for _, logs in arms):
        page.text("Of several seeds: the mean, and a band of one standard deviation over them.")
    page.legend([label for label, _ in arms])
    main = [key for key in keys if key.rpartition(".")[2] not in ASIDE and not BIN.fullmatch(key)]
    add_plots(page, arms, main)
    add_time_bins(page, arms, [key for key in keys if BIN.fullmatch(key)])
    aside = [key for key in keys if key.rpartition(".")[2] in ASIDE]
    speed = ["images_per_second"] * any("images_per_second" in row for _, logs in arms for log in logs for row in log)
    if aside or speed:
        with page.folded("Learning rates, gradient norms, speed"):
            page.legend([label for label, _ in arms])
            add_plots(page, arms, [*aside, *speed])


def add_plots(page: Page, arms: Arms, keys: Sequence[str]) -> None:
    """Losses first within their task and phase; a term that equals an earlier one is named in its title."""
    drawn: list[tuple[str, list[str], dict[int, list[Line]]]] = []
    order = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    for key in sorted(keys, key=lambda k: (order.index(k.rpartition(".")[0]), not k.endswith(".loss"))):
        lines = {i: found for i, (_, logs) in enumerate(arms) if (found := lines_of(logs, key))}
        prefix, _, term = key.rpartition(".")
        twin = next((one for one in drawn if one[0] == prefix and equal(one[2], lines)), None)
        if twin:
            twin[1].append(term)
        elif lines:
            drawn.append((prefix, [term], lines))
    for prefix, terms, lines in drawn:
        name = " ".join(filter(None, [prefix, " = ".join(terms).replace("_", " ")]))
        add_plot(page, name, {i: (arms[i][0], found) for i, found in lines.items()})


def add_time_bins(page: Page, arms: Arms, keys: Sequence[str]) -> None:
    """The loss by the flow's time, a plot an arm and network, a line an interval."""
    if not keys:
        return
    bins = dict.fromkeys(BIN.fullmatch(key).group(2, 3) for key in keys)
    page.heading("Loss by the time of the flow, 1 being noise", 3)
    page.legend([f"t from {low} to {high}" for low, high in bins])
    for label, logs in arms:
        for prefix in dict.fromkeys(BIN.fullmatch(key)[1] for key in keys):
            lines = {
                i: (f"t {low} to {high}", found)
                for i, (low, high) in enumerate(bins)
                if (found := lines_of(logs, f"{prefix}.t{low}-{high}"))
            }
            if lines:
                add_plot(page, f"{label}: {prefix}", lines)


def lines_of(logs: Sequence[Sequence[Mapping]], key: str) -> list[Line]:
    """(images, values) of every log that has the term."""
    rows = [[(row["images"], row[key]) for row in log if key in row and "images" in row] for log in logs]
    return [tuple(np.array(some, dtype=np.float64).T) for some in rows if some]


def equal(one: Mapping[int, list[Line]], other: Mapping[int, list[Line]]) -> bool:
    return one.keys() == other.keys() and all(
        len(one[i]) == len(other[i]) and all(np.array_equal(a, b) for a, b in zip(one[i], other[i])) for i in one
    )


def thinned(line: Line, points: int = POINTS) -> Line:
    """Means of neighbours, so that `points` are left at most."""
    x, y = line
    if len(x) <= points:
        return line
    edges = np.linspace(0, len(x), points + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def averaged(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, mean and standard deviation over seeds, where all of them have values."""
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    x = lines[0][0][(lines[0][0] >= low) & (lines[0][0] <= high)]
    values = np.stack([np.interp(x, *line) for line in lines])  # (seeds, points)
    return x, values.mean(0), values.std(0, ddof=1)


def add_plot(page: Page, name: str, lines: Mapping[int, tuple[str, list[Line]]]) -> None:
    """One plot; `lines` are {number of the line's look: (what it is, its seeds)}."""
    figure, axes = new_axes(name, "images")
    said, lowest, highest = [], np.inf, -np.inf
    with styled():
        for i, (label, seeds) in lines.items():
            x, y, spread = averaged(seeds) if len(seeds) > 1 else (*seeds[0], None)
            if not len(x):
                continue
            x, y, *band = thinned_together(x, y, spread)
            axes.plot(x, y, marker="o" if len(x) == 1 else None, markersize=3, **look(i))
            if band:
                axes.fill_between(x, y - band[0], y + band[0], color=COLOURS[i % len(COLOURS)], alpha=0.2, linewidth=0)
            lowest, highest = min(lowest, y.min()), max(highest, y.max())
            said.append(f"{label} from {y[0]:.4g} at {x[0]:,.0f} images to {y[-1]:.4g} at {x[-1]:,.0f}")
        if lowest > 0 and highest > 10 * lowest:
            log_scale(axes)
        axes.xaxis.set_major_formatter(thousands)
    if said:
        page.figure(figure, "", f"{name} against images: {'; '.join(said)}")


def thinned_together(x: np.ndarray, y: np.ndarray, spread: np.ndarray | None) -> list[np.ndarray]:
    found = list(thinned((x, y)))
    return found if spread is None else [*found, thinned((x, spread))[1]]


def thousands(images: float, _position: int = 0) -> str:
    """20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(images) >= size:
            return f"{images / size:g}{letter}"
    return f"{images:g}"
