"""Plots in one style, as SVG that belongs into a page: its colours and letters are the page's (`umm/pages.py`)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from umm.errors import UmmError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind (jfly.uni-koeln.de/color), without yellow and black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dashed", "dotted")  # of the next lines, when the colours are used up
INK, SOFT, RULE = "#1b1c1e", "#5f646b", "#d9dce0"
VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule"} | {colour: f"c{i}" for i, colour in enumerate(COLOURS)}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "umm",  # the same plot is the same file
    "text.parse_math": False,  # names of runs are no formulas
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
}


def styled():
    """The style, while figures are made and saved.

    Raises:
        UmmError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UmmError("plots need matplotlib: pip install matplotlib, or umm[demo].") from error
    return matplotlib.rc_context(STYLE)


def look(number: int) -> dict[str, str]:
    """Colour and dashes of the n-th line of a plot, to be handed to `Axes.plot`."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def new_axes(title: str, xlabel: str, ylabel: str = "", size: tuple[float, float] = (3.7, 2.5)) -> tuple[Figure, Axes]:
    """An empty plot; `size` in inches, as wide as a phone by default."""
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)


def log_scale(axes: Axes, which: str = "y") -> None:
    """Logarithmic axes, "x", "y" or "xy", with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for name in which:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())


def dots(axes: Axes, y: float, values: Sequence[float], mean: Mapping[str, float | None]) -> None:
    """A row of repetitions with their mean and interval, {mean, low, high}, below them."""
    axes.plot(values, [y + 0.18] * len(values), "o", markersize=3, alpha=0.6, color=COLOURS[0])
    ends = [[mean["mean"] - mean["low"]], [mean["high"] - mean["mean"]]] if mean["low"] is not None else None
    axes.errorbar([mean["mean"]], [y - 0.08], xerr=ends, fmt="D", markersize=4, capsize=3, color=COLOURS[1])


def to_svg(figure: Figure, prefix: str) -> str:
    """The <svg> element of a figure; its ids begin with `prefix`, so that several fit into one page."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", text).replace("xlink:href=", "href=")
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", text)  # the family is the page's
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text)
