"""`umm list`: every choice with the first line of its file, read without importing it."""

from __future__ import annotations

import ast
from pathlib import Path

from umm import assets
from umm.registry import FOLDERS, names


def summary(folder: str, name: str) -> str:
    """First line of the docstring of `umm/<folder>/<name>.py`."""
    source = (Path(__file__).parent / folder / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def listing() -> str:
    lines = []
    for folder in FOLDERS:
        lines.append(f"{folder}:")
        lines += [f"  {name:<24}{summary(folder, name)}" for name in names(folder)]
    lines.append("assets:")
    lines += [f"  {name:<24}{asset.about}" for name, asset in assets.ASSETS.items()]
    return "\n".join(lines)
