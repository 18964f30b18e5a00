"""Pages that need nothing but themselves."""

from __future__ import annotations

import io
import shutil
import subprocess

import pytest
from fakes.html import read
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from umm.errors import UmmError
from umm.pages import Measured, Page, number
from umm.plots import COLOURS, log_scale, look, new_axes, styled, to_svg

HOSTILE = '"><script>alert(1)</script>&amp; <img src=x onerror=y> $x^2$ _a \' ü'


def png(width: int = 4, height: int = 3) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, format="PNG")
    return out.getvalue()


def plot(title: str = "loss"):
    figure, axes = new_axes(title, "images")
    with styled():
        for i in range(8):
            axes.plot([1, 2], [i + 1, 100 * (i + 1)], **look(i))
        log_scale(axes)
    return figure


def test_a_page_of_everything_is_whole():
    page = Page("Title", "A **bold** lead with `code`.")
    page.text("## One\n\nWords.\n\n- first\n- second\n\n### Inside\n\nMore words.")
    page.table([{"run": "a", "x": Measured(1.5, 1.25, 1.75)}, {"run": "b", "x": None, "y": 3}], "Numbers")
    page.legend(["a", "b"])
    page.figure(plot(), "first", "a plot")
    page.figure(plot(), "second", "another plot")
    page.figure(png(), "", "a red square")
    with page.folded("more"):
        page.code("a < b")
        page.figure(plot(), "", "a folded plot")
    page.heading("Two")
    page.heading("Three")
    found = read(page.html())
    assert found.numbers == [1.5, 1.25, 1.75, 3.0]
    assert "A bold lead with code." in found.text and "a < b" in found.text
    assert [a["href"] for a in found.all("a")] == ["#section-1", "#section-2", "#section-3"]
    assert found.all("img")[0] | {"src": ""} == {"src": "", "width": "4", "height": "3", "alt": "a red square"}


def test_what_others_named_is_text_and_never_markup():
    page = Page(HOSTILE, HOSTILE)
    page.heading(HOSTILE)
    page.text(HOSTILE)
    page.note(HOSTILE)
    page.code(HOSTILE)
    page.table([{HOSTILE: HOSTILE}], HOSTILE)
    page.legend([HOSTILE])
    page.figure(plot(HOSTILE), HOSTILE, HOSTILE)
    page.figure(png(), HOSTILE, HOSTILE)
    with page.folded(HOSTILE):
        page.text(HOSTILE)
    found = read(page.html())
    assert found.all("img")[0]["alt"] == HOSTILE and found.text.count(HOSTILE) == 16
    assert {tag for tag, _ in found.elements}.isdisjoint({"script", "x"}) and len(found.all("img")) == 1


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_a_whole_page(text):
    page = Page(text or "t", text)
    page.text("## Begin\n\nx")
    page.note(text)
    page.table([{"a": text, "b": 1.0}], text)
    read(page.html().replace("http://", "").replace("https://", ""))


def test_plots_take_their_colours_from_the_page_and_keep_text_as_text():
    svg = to_svg(plot("shown as text"), "p1")
    assert ">shown as text<" in svg and "var(--ink)" in svg and "var(--c0)" in svg
    assert not any(colour in svg for colour in COLOURS) and "family" not in svg and "metadata" not in svg
    assert "mathdefault" not in svg, "ticks of a logarithmic axis are plain numbers"
    assert svg == to_svg(plot("shown as text"), "p1"), "the same plot is the same text"


def test_lines_beyond_the_colours_have_other_dashes():
    looks = [tuple(look(i).values()) for i in range(3 * len(COLOURS))]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(64000, "64,000"), (31.4767, "31.48"), (-0.00052, "\N{MINUS SIGN}0.00052"), (12345.6, "12,346"),
     (1e-9, "1e-09"), (0, "0"), (float("nan"), "nan"), (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_are_short_and_readable(value, shown):
    assert number(value) == shown


def test_a_damaged_or_foreign_picture_is_one_sentence(tmp_path):
    (tmp_path / "x.png").write_bytes(png(200, 200)[:-30])
    for picture in (tmp_path / "x.png", b"<svg onload=alert(1)>"):
        with pytest.raises(UmmError, match="is not a whole PNG"):
            Page("t").figure(picture, "", "x")


def test_a_heading_out_of_order_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="has no place here"):
        Page("t").text("### first")


def test_a_browser_draws_it_in_the_width_of_a_phone(tmp_path):
    """Nothing but tables may be wider than the window."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium runs this test")
    page = Page("A title of some length for a phone", "word " * 30)
    page.text("## One\n\n" + "word " * 60)
    page.table([{f"column {i}": "content of a cell" for i in range(12)}], "caption " * 20)
    page.code("x" * 400)
    page.figure(plot(), "words " * 20, "a plot")
    page.figure(png(1800, 100), "wide", "a wide picture")
    file = page.save(tmp_path / "page.html")
    measure = "<script>parent.document.title=innerWidth+' '+document.documentElement.scrollWidth</script>"
    file.write_text(file.read_text().replace("</body>", f"{measure}</body>"))
    frame = tmp_path / "frame.html"  # a headless window cannot be as narrow as a phone, a frame can
    frame.write_text(f'<title></title><iframe src="{file.name}" style="width:400px;height:900px;border:0"></iframe>')
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--hide-scrollbars", "--allow-file-access-from-files", f"--user-data-dir={tmp_path}"]
    done = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>400 400</title>" in done.stdout, done.stdout[:300]
