"""One HTML file that needs nothing else: text, tables, pictures and plots for a screen, a phone, and paper.

    page = Page("Two decoders", "Trained alike but for the noise.")
    page.text("## Results\\n\\nThe first is **better**.")
    page.table([{"run": "a", "psnr": Measured(31.5, 31.3, 31.6)}], "Higher is better.")
    page.figure("samples.png", "Originals above reconstructions.", "two rows of eight pictures")
    page.save("report.html")

Cells, names and captions stand as they are; only `text` and `note` read marks: blank lines, `- ` lists, ## and ###
headings, **bold** and `code`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from umm.errors import UmmError
from umm.plots import COLOURS, DASHES, to_svg
from umm.runs import write_atomic, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass(frozen=True)
class Measured:
    """A number with its interval, or with its standard deviation over repetitions: a cell of a table."""

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None


class Page:
    """A page that grows downwards; `html` gives it whole.

    Args:
        title: the page's name, literally.
        lead: what it is about, in a sentence or two, with marks.
    """

    def __init__(self, title: str, lead: str = ""):
        self.title, self.lead = title, lead
        self.blocks: list[str] = []
        self.sections: list[str] = []  # the headings of level 2
        self.figures = 0

    def heading(self, words: str, level: int = 2) -> None:
        """A literal heading of level 2 or 3; a 3 must stand below a 2."""
        if not 2 <= level <= 3 or (level == 3 and not self.sections):
            raise ValueError(f"a heading of level {level} has no place here: '{words}'.")
        if level == 2:
            self.sections.append(words)
            self.blocks.append(f'<h2 id="section-{len(self.sections)}">{escape(words)}</h2>')
        else:
            self.blocks.append(f"<h3>{escape(words)}</h3>")

    def text(self, paragraphs: str) -> None:
        """Paragraphs, lists and headings with marks."""
        for part in re.split(r"\n\s*\n", paragraphs.strip()):
            lines = [line.strip() for line in part.splitlines()]
            if found := re.fullmatch(r"(##|###) (.+)", " ".join(lines)):
                self.heading(found[2], len(found[1]))
            elif all(line.startswith("- ") for line in lines):
                self.blocks.append("<ul>" + "".join(f"<li>{marked(line[2:])}</li>" for line in lines) + "</ul>")
            else:
                self.blocks.append(f"<p>{marked(' '.join(lines))}</p>")

    def note(self, sentence: str) -> None:
        """A sentence that a reader of what stands above must see."""
        self.blocks.append(f'<p class="note">{marked(sentence)}</p>')

    def code(self, text: str) -> None:
        """Lines as they are."""
        self.blocks.append(f'<pre tabindex="0">{escape(text)}</pre>')

    def table(self, rows: Sequence[Mapping], caption: str, columns: Mapping[str, str] | Sequence[str] = ()) -> None:
        """Rows of {column: cell}; the first column names the row.

        Args:
            columns: which, in this order, perhaps with other headings {column: heading}; default: all, as they come.
        """
        columns = columns or dict.fromkeys(key for row in rows for key in row)
        heads = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns)
        wide = [key for key in heads if any(isinstance(row.get(key), Measured) for row in rows)]  # value, interval
        numeric = [key for key in heads if key not in wide and all(is_number(row.get(key)) for row in rows)]
        head = "".join(
            f'<th scope="col"{" class=number" * (key in numeric)}{" colspan=2" * (key in wide)}>'
            f"{escape(str(name or key))}</th>"
            for key, name in heads.items()
        )
        body = "".join(table_row(row, list(heads), wide) for row in rows)
        self.blocks.append(
            f'<div class="table" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
            f"<caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>\n"
            f"<tbody>{body}</tbody></table></div>"
        )

    def legend(self, labels: Sequence[str]) -> None:
        """The names of the lines of the plots that follow, in the order of `umm.plots.look`."""
        keys = [
            f'<li><span class="line" style="border-top: 2px {DASHES[i // len(COLOURS) % len(DASHES)]} '
            f'var(--c{i % len(COLOURS)})"></span>{escape(label)}</li>'
            for i, label in enumerate(labels)
        ]
        self.blocks.append(f'<ul class="legend">{"".join(keys)}</ul>')

    def figure(self, picture: bytes | str | Path | Figure, caption: str, alt: str) -> None:
        """A picture (a file or its bytes) or a matplotlib figure; figures that follow each other share a row.

        Args:
            alt: what is to be seen, for those who do not see it.

        Raises:
            UmmError: this is no picture that browsers show.
        """
        self.figures += 1
        if isinstance(picture, bytes | str | Path):
            shown, kind = image(picture, alt), "picture"
        else:
            shown = to_svg(picture, f"f{self.figures}")
            shown = shown.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
            kind = "plot"
        words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self.blocks.append(f'<figure class="{kind}">{shown}{words}</figure>')

    @contextlib.contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """What is added inside is hidden until asked for."""
        before, self.blocks = self.blocks, []
        try:
            yield
        finally:
            inside, self.blocks = self.blocks, before
            self.blocks.append(f"<details><summary>{escape(summary)}</summary>{in_rows(inside)}</details>")

    def html(self) -> str:
        contents = "".join(
            f'<li><a href="#section-{i}">{escape(words)}</a></li>' for i, words in enumerate(self.sections, 1)
        )
        contents = f'<nav aria-label="Contents"><ul>{contents}</ul></nav>' if len(self.sections) > 2 else ""
        lead = f'<p class="lead">{marked(self.lead)}</p>' if self.lead else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(self.title)}</title>\n<style>{VARIABLES}{RULES}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{escape(self.title)}</h1>\n{lead}\n{contents}\n{in_rows(self.blocks)}\n</main>\n</body>\n</html>\n"
        )

    def save(self, file: str | Path) -> Path:
        """Write the page, whole or not at all."""
        path = Path(file)
        with writing(path.parent, path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self.html())
        return path


def in_rows(blocks: Sequence[str]) -> str:
    """The blocks below each other, neighbouring figures beside each other."""
    found, row = [], []
    for block in [*blocks, ""]:
        if block.startswith("<figure"):
            row.append(block)
            continue
        if row:
            found.append(f'<div class="figures">{"".join(row)}</div>')
            row = []
        found.append(block)
    return "\n".join(found)


def marked(text: str) -> str:
    """**bold** and `code`; everything else as it is."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


# ------------------------------------------------------------------------------------------------------------ tables


def table_row(row: Mapping, columns: Sequence[str], wide: Sequence[str]) -> str:
    first, *others = columns
    cells = []
    for key in others:
        value = row.get(key)
        cells.append(f"<td{' class=number' * is_number(value)}>{cell(value)}</td>")
        if key in wide:
            cells.append(f"<td class=interval>{interval(value)}</td>")
    return f'<tr><th scope="row">{cell(row.get(first))}</th>{"".join(cells)}</tr>\n'


def is_number(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, int | float | Measured) and not isinstance(value, bool))


def cell(value: object) -> str:
    """A value as HTML; numbers are rounded, and carry all their digits for programs that read the page."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Measured):
        return cell(value.value)
    if isinstance(value, int | float):
        return f'<data value="{value!r}">{number(value)}</data>'
    return escape(str(value))


def interval(value: object) -> str:
    """What stands beside a measured number."""
    if not isinstance(value, Measured):
        return ""
    if value.spread is not None:
        return f"± {cell(value.spread)}"
    return f"{cell(value.low)} to {cell(value.high)}" if None not in (value.low, value.high) else ""


def number(value: int | float) -> str:
    """About four digits, thousands apart, a true minus: 31.48, 64,000, 1.2e-05."""
    if isinstance(value, int) or (math.isfinite(value) and 1000 <= abs(value) < 1e7):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text


# ---------------------------------------------------------------------------------------------------------- pictures


def image(picture: bytes | str | Path, alt: str) -> str:
    """An <img> that carries its file."""
    from PIL import Image

    content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as opened:
            kind, (width, height) = FORMATS[opened.format], opened.size
            opened.load()  # a file cut off in the middle is found here
    except (OSError, KeyError, SyntaxError) as error:
        name = "the picture" if isinstance(picture, bytes) else f"{picture}"
        raise UmmError(f"{name} is not a whole PNG, JPEG, WebP or GIF file: draw it again.") from error
    data = base64.b64encode(content).decode()
    return f'<img src="data:{kind};base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'


# Lighter line colours on dark paper; on paper proper everything is light and folded parts are open.
LIGHT = "--paper:#fff;--ink:#1b1c1e;--soft:#5f646b;--rule:#d9dce0;--wash:#f5f6f7;--link:#0b5cad;" + "".join(
    f"--c{i}:{colour};" for i, colour in enumerate(COLOURS)
)
DARK = (
    "--paper:#16181b;--ink:#e4e6e8;--soft:#a0a6ad;--rule:#353a40;--wash:#1e2125;--link:#7ab7f0;"
    "--c0:#4ba3dc;--c1:#f0803c;--c2:#2fbf95;--c3:#dd98bd;--c4:#e9b13a;--c5:#8accf3;"
)
VARIABLES = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
@media print{{:root{{color-scheme:light;{LIGHT}}}}}
"""
RULES = """\
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:72rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.25;font-weight:650;margin:0 0 .5rem}
h2{font-size:1.25rem;line-height:1.3;font-weight:650;margin:3rem 0 .75rem;padding-top:.75rem;
border-top:1px solid var(--rule)}
h3{font-size:1rem;font-weight:650;margin:2rem 0 .5rem}
h1,h2,h3,p,li,caption,figcaption,td,th,summary{overflow-wrap:break-word}
p,ul{max-width:44rem;margin:0 0 .9rem}
.lead{font-size:1.0625rem;color:var(--soft)}
.note{padding-left:.8rem;border-left:2px solid var(--rule);color:var(--soft);font-size:.9375rem;margin-bottom:.5rem}
a{color:var(--link)}
nav ul,.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:1rem 0;padding:0;
max-width:none;font-size:.9375rem}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.85em}
pre{background:var(--wash);padding:.8rem 1rem;overflow-x:auto;max-height:28rem;line-height:1.45;margin:0 0 1rem}
.table{overflow-x:auto;margin:1rem 0 1.5rem}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:0 0 .5rem}
caption span{display:inline-block;position:sticky;left:0;max-width:min(44rem,calc(100vw - 1.8rem))}
th,td{padding:.35rem 1rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
td{min-width:4.5rem;max-width:24rem}
thead th{font-weight:600;vertical-align:bottom;border-bottom-color:var(--soft)}
tbody th{font-weight:400;position:sticky;left:0;background:var(--paper);min-width:7rem;max-width:16rem}
.number{text-align:right;white-space:nowrap}
.interval{color:var(--soft);font-size:.9em;white-space:nowrap;min-width:0;padding-top:.42rem}
.number:has(+.interval){padding-right:.5rem}
.figures{display:flex;flex-wrap:wrap;gap:1.5rem;margin:1rem 0 1.5rem}
figure{margin:0;min-width:0}
.plot{flex:0 1 22rem}
.picture{flex:0 1 auto;max-width:100%}
.plot svg{display:block;width:100%;height:auto}
.plot svg *{stroke-linejoin:round;stroke-linecap:butt}
img{display:block;max-width:100%;height:auto;background:#fff}
figcaption{color:var(--soft);font-size:.875rem;line-height:1.4;margin-top:.4rem;max-width:44rem}
.line{display:inline-block;width:1.5rem;margin-right:.45rem;vertical-align:middle}
details{margin:0 0 .75rem}
summary{cursor:pointer;padding:.25rem 0}
details[open]>summary{margin-bottom:.5rem}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
@media (max-width:40rem){main{padding:1.25rem .9rem 3rem}h1{font-size:1.4rem}h2{margin-top:2.25rem}
tbody th{max-width:9.5rem;padding-right:.75rem}}
@media print{body{font-size:10pt}main{max-width:none;padding:0}nav{display:none}.table{overflow:visible}
figure,tr,h2,h3{break-inside:avoid}h2,h3{break-after:avoid}pre{max-height:none;white-space:pre-wrap}
tbody th{position:static}details::details-content{content-visibility:visible;block-size:auto}}
"""
