"""The plots of a comparison: every column over the spaces, and how columns go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from umm.plots import RULE, dots, look, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 3  # columns of the table beside each other
OUTLIER = 3.0  # a value that makes the range so many times as wide as the others' is named at the edge instead


def plots(found: dict) -> dict[str, tuple[Figure, str, str]]:
    """{file name: (figure, caption, what is to be seen)} of an analysis."""
    columns = found["columns"]
    with styled():
        words = "A point a seed, mean and 95 % interval; a number at the edge lies far outside."
        drawn = {"columns": (panels(columns), words, "dots of every number by space")}
        pair = trade_off(columns)
        if pair:
            words = f"{pair[0]} and {pair[1]}, means over seeds: is a space that draws well also one to generate in?"
            drawn["trade-off"] = scatter(columns, *pair), words, f"{pair[1]} over {pair[0]} by space"
    return drawn


def panels(columns: dict[str, dict]) -> Figure:
    """An axes for each column, the spaces below each other in the same order."""
    from matplotlib.figure import Figure

    names = list(next(iter(columns.values()))["spaces"])
    down = -(-len(columns) // ACROSS)
    figure = Figure(figsize=(3.1 * min(ACROSS, len(columns)) + 0.8, down * (0.7 + 0.24 * len(names))))
    figure.set_layout_engine("constrained")
    for place, (title, one) in enumerate(columns.items()):
        axes = figure.add_subplot(down, min(ACROSS, len(columns)), place + 1, title=f"{title} {arrow(one)}")
        there = measured(one)
        inside = limits([space["mean"] for space in there.values()])
        for y, name in enumerate(names):
            if name in there:
                draw(axes, y, there[name], inside)
        axes.set_yticks(range(len(names)), names if place % ACROSS == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=4)
    return figure


def measured(one: dict) -> dict[str, dict]:
    """The spaces that have this number at all."""
    return {name: space for name, space in one["spaces"].items() if space["mean"] is not None}


def arrow(one: dict) -> str:
    return {True: "\N{UPWARDS ARROW}", False: "\N{DOWNWARDS ARROW}", None: ""}[one["higher_is_better"]]


def draw(axes: Axes, y: int, one: dict, inside: tuple[float, float]) -> None:
    if inside[0] <= one["mean"] <= inside[1]:
        dots(axes, y, list(one["per_seed"].values()), one)
        return
    right = one["mean"] > inside[1]
    axes.text(0.98 if right else 0.02, y, f"{one['mean']:.3g}", transform=axes.get_yaxis_transform(), va="center",
              ha="right" if right else "left", fontsize=8)  # fmt: skip


def limits(values: list[float]) -> tuple[float, float]:
    """(least, greatest) value to draw: without the farthest one where it dwarfs the differences of the others."""
    ordered = sorted(values) or [0.0]
    low, high = ordered[0], ordered[-1]
    for rest in (ordered[1:], ordered[:-1]):
        if len(rest) > 1 and high - low > OUTLIER * (rest[-1] - rest[0]) > 0:
            return rest[0], rest[-1]
    return low, high


def trade_off(columns: dict[str, dict]) -> tuple[str, str] | None:
    """The first column of reconstruction and the first of generation."""
    found = [next((name for name, one in columns.items() if one["part"] == part), None) for part in ("recon", "gen")]
    return None if None in found else (found[0], found[1])


def scatter(columns: dict[str, dict], across: str, up: str) -> Figure:
    figure, axes = new_axes(f"{up} {arrow(columns[up])}", f"{across} {arrow(columns[across])}", size=(5.2, 3.6))
    there, high = measured(columns[across]), measured(columns[up])
    inside = limits([one["mean"] for one in there.values()])
    for i, (name, one) in enumerate(there.items()):
        if name not in high:
            continue
        x, y = min(max(one["mean"], inside[0]), inside[1]), high[name]["mean"]
        outside = "" if x == one["mean"] else f" ({across} {one['mean']:.3g})"
        axes.plot([x], [y], "o", color=look(i)["color"], markersize=5, markeredgecolor=RULE)
        axes.annotate(name + outside, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.margins(x=0.2)
    return figure
