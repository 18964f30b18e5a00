"""The plots of a synergy report: learning curves with the joint arms on them, the front, and the scores per seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from umm.plots import SOFT, dots, log_scale, look, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plots(found: dict) -> dict[str, tuple[Figure, str, str]]:
    """{file name: (figure, caption, what is to be seen)} of an analysis."""
    drawn = {}
    with styled():
        for endpoint in found["joint"][found["declaration"]["headline"]]["directions"]:
            if len(curve_points(found, endpoint)) > 1:
                words = f"Error of {endpoint}: specialists by compute, and joint arms at theirs. A dotted line ends "
                words += "at the compute a specialist would need."
                drawn[f"curve-{endpoint}"] = learning_curve(found, endpoint), words, f"learning curve of {endpoint}"
            if scores := scored_arms(found, endpoint):
                words = f"s of {endpoint} against its specialist: a point a seed, mean, interval. Right of 0 is better."
                drawn[f"seeds-{endpoint}"] = seed_scores(endpoint, scores), words, f"scores of {endpoint} per seed"
        if len(found["front"]) > 1:
            words = f"The headline arm by {found['declaration']['front']['key']}; filled: no other is better in both. "
            words += "Dashed: the specialists; left of and below both lines is better than either."
            drawn["front"] = front(found), words, "front of the two errors over the loss weight"
    return drawn


def curve_points(found: dict, endpoint: str) -> list[tuple[float, dict]]:
    """[(compute, error with its interval)] of the specialists, cheapest first."""
    points = [
        (arm["compute"], arm["endpoints"][endpoint]["error"])
        for arm in found["arms"].values()
        if arm["role"] == "single" and endpoint in arm["endpoints"]
    ]
    return sorted((p for p in points if p[1]["mean"] is not None), key=lambda p: p[0])


def learning_curve(found: dict, endpoint: str) -> Figure:
    figure, axes = new_axes(f"{endpoint}: error", "compute, in that of the specialist")
    points = curve_points(found, endpoint)
    log_scale(axes, "xy")
    draw_errors(axes, [x for x, _ in points], [error for _, error in points], "alone", 0, "-")
    for i, (name, joint) in enumerate(found["joint"].items(), 1):
        arm = found["arms"][name]
        error = arm["endpoints"].get(endpoint, {}).get("error", {})
        if error.get("mean") is None:
            continue
        draw_errors(axes, [arm["compute"]], [error], name, i, "")
        share = joint["sigma"].get("shares", {}).get(endpoint)
        if share and not share["sign"]:
            needed = share["value"] * arm["compute"]
            axes.plot([arm["compute"], needed], [error["mean"]] * 2, ":", color=look(i)["color"])
    ticks = [x for x, _ in points]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.legend()
    return figure


def draw_errors(axes: Axes, x: list[float], errors: list[dict], label: str, number: int, line: str) -> None:
    """Means with their intervals where there are any."""
    means = [error["mean"] for error in errors]
    bars = [[error["mean"] - (error["low"] or error["mean"]) for error in errors],
            [(error["high"] or error["mean"]) - error["mean"] for error in errors]]  # fmt: skip
    axes.errorbar(x, means, bars, fmt=f"o{line}", markersize=4, label=label, color=look(number)["color"], capsize=2)


def scored_arms(found: dict, endpoint: str) -> list[tuple[str, dict]]:
    """[(arm, its score)] of the joint arms and the controls that have one yet."""
    rows = [(name, joint["directions"].get(endpoint)) for name, joint in found["joint"].items()]
    rows += [(row["arm"], row["score"]) for row in found["controls"] if row["endpoint"] == endpoint]
    return [(name, row) for name, row in rows if row]


def seed_scores(endpoint: str, rows: list[tuple[str, dict]]) -> Figure:
    """A row for each arm."""
    size = 4.2, 0.9 + 0.32 * len(rows)
    figure, axes = new_axes(f"{endpoint}: s per seed", "log(error alone / error together)", size=size)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    for y, (_, row) in enumerate(rows):
        dots(axes, y, list(row["per_seed"].values()), row)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def front(found: dict) -> Figure:
    first, second = found["front"][0]["errors"]
    figure, axes = new_axes(f"{second}: error", f"{first}: error")
    points = sorted(found["front"], key=lambda point: point["value"])
    x, y = ([point["errors"][endpoint]["mean"] for point in points] for endpoint in (first, second))
    axes.plot(x, y, "-", color=look(0)["color"], linewidth=0.8)
    for point, a, b in zip(points, x, y):
        axes.plot([a], [b], "o", color=look(0)["color"], fillstyle="full" if point["best"] else "none")
        axes.annotate(f"{point['value']:g}", (a, b), xytext=(4, 4), textcoords="offset points")
    singles = found["declaration"]["endpoints"]
    for endpoint, line in ((first, axes.axvline), (second, axes.axhline)):
        alone = found["arms"][singles[endpoint]["single"]]["endpoints"][endpoint]["error"]["mean"]
        if alone is not None:
            line(alone, color=look(1)["color"], linestyle="dashed")
    return figure
