"""A report of sections, written as JSON, Markdown, plots and one HTML page."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from umm.pages import Measured, Page, number
from umm.plots import styled
from umm.runs import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = dict[str, tuple["Figure | Path", str, str]]  # file name -> figure or picture file, caption, what is to be seen


@dataclass
class Section:
    """A heading, what is said, a table with its caption, and the names of plots."""

    title: str
    text: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    caption: str = ""
    drawn: list[str] = field(default_factory=list)


def write(out: Path, title: str, lead: str, found: dict, parts: list[Section], drawn: Drawn) -> str:
    """report.json, report.md, report.html and the plots; returns a sentence that names them."""
    out.mkdir(exist_ok=True)
    write_atomic(out / "report.json", json.dumps(found, indent=1))
    for name, (figure, _, _) in drawn.items():
        if isinstance(figure, Path):
            shutil.copyfile(figure, out / f"{name}.png")
        else:
            with styled():
                figure.savefig(out / f"{name}.png", dpi=150)
    write_atomic(out / "report.md", markdown(title, parts, drawn))
    page(title, lead, parts, drawn).save(out / "report.html")
    return f"wrote report.html, report.md, report.json and {len(drawn)} pictures in {out}"


def measured(mean: dict | None) -> Measured | None:
    """A cell of {mean, low, high}."""
    return None if mean is None or mean["mean"] is None else Measured(mean["mean"], mean["low"], mean["high"])


def page(title: str, lead: str, parts: list[Section], drawn: Drawn) -> Page:
    """The whole report in one HTML file."""
    made = Page(title, lead)
    for part in parts:
        made.heading(part.title)
        for sentence in part.text:
            made.text(sentence)
        if part.rows:
            made.table(part.rows, part.caption)
        for name in part.drawn:
            made.figure(*drawn[name])
    return made


def markdown(title: str, parts: list[Section], drawn: Drawn) -> str:
    lines = [f"# {title}"]
    for part in parts:
        lines += ["", f"## {part.title}"]
        lines += ["", *(part.text if len(part.text) < 2 else [f"- {one}" for one in part.text])] if part.text else []
        if part.rows:
            lines += ["", part.caption, "", *table(part.rows)]
        for name in part.drawn:
            lines += ["", f"![{drawn[name][2]}]({name}.png)", "", drawn[name][1]]
    return "\n".join(lines) + "\n"


def table(rows: list[dict]) -> list[str]:
    """A table of Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows]


def cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, Measured):
        return number(value.value) + (f" [{number(value.low)}, {number(value.high)}]" if value.low is not None else "")
    return str(value).replace("|", "\\|")
