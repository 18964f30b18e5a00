"""Reading a page as a strict reader would."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "img", "link", "br", "hr", "input", "col", "path", "use", "rect", "circle"}


class Reader(HTMLParser):
    """Closes every tag it opens, or fails; collects elements, numbers, ids and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    @property
    def numbers(self) -> list[float]:
        return [float(attributes["value"]) for attributes in self.all("data")]


def read(page: str) -> Reader:
    """Parse a page and check what every page must keep to."""
    found = Reader(page)
    tags = [tag for tag, _ in found.elements]
    assert page.startswith("<!DOCTYPE html>") and tags.count("h1") == tags.count("main") == 1
    assert "script" not in tags and not re.search(r"https?://|url\((?!#)", page), "it needs something from elsewhere"
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/")), (tag, attributes[key][:60])
    assert all(attributes.get("alt") for attributes in found.all("img"))
    assert all(attributes.get("aria-label") for attributes in found.all("svg"))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id stands for two things"
    levels = [int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3")]
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    return found
