"""The picture of `umm diagnose`: six panels, a line for each space, grey for white noise."""

from __future__ import annotations

from pathlib import Path

from umm.errors import UmmError
from umm.runs import writing

# title, what x is, what y is, curve, scales of x and y
PANELS = (
    ("spectrum, standardised", "component", "share of variance", "eigenvalues standardised", "log", "log"),
    ("channels, raw", "channel, sorted", "variance / median", "channel variance raw", "log", "log"),
    ("tails, standardised", "channel, sorted", "excess kurtosis", "kurtosis standardised", "log", "symlog"),
    ("tokens, standardised", "distance, tokens", "mean cosine", "cosine standardised", "linear", "linear"),
    ("frequencies, standardised", "diagonal frequency", "power / mean", "power standardised", "linear", "log"),
    ("decoder", "noise, latent standard deviations", "PSNR, dB", "psnr", "linear", "linear"),
)


def plot(file: Path, results: dict[str, dict]) -> Path:
    """Write the panels of {name: content of diagnose.json}.

    Raises:
        UmmError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UmmError("the plots of umm diagnose need matplotlib: pip install matplotlib, or umm[demo].") from error
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, x, y, curve, across, up) in enumerate(PANELS, 1):
        axes = figure.add_subplot(2, 3, place, title=title, xlabel=x, ylabel=y, xscale=across, yscale=up)
        for number, (name, result) in enumerate(results.items()):
            if values := result["curves"].get(curve):
                start = 1 if across == "log" else 0
                at = result["curves"]["noise"] if curve == "psnr" else range(start, len(values) + start)
                color = "0.7" if name == "white noise" else f"C{number}"
                axes.plot(at, values, color=color, label=name, marker="o" if len(values) < 20 else None)
    figure.axes[0].legend()
    with writing(file.parent, file.name):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        figure.savefig(partial, dpi=110, format="png")
        partial.replace(file)
    return file
