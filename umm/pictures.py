"""Grids of pictures as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from umm.runs import writing
from umm.transforms import to_uint8

SMALLEST = 96  # pixels; smaller pictures are enlarged by whole numbers, so that a grid can be looked at


def save_grid(
    file: Path, rows_of_pictures: Sequence[Tensor], rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> Path:
    """One row a tensor of pictures (B, 3, H, W) in [0, 1], labelled on the left and on top; atomically written."""
    pictures = [to_uint8(row.detach().float().cpu()) for row in rows_of_pictures]
    side = pictures[0].shape[-1]
    scale = max(1, -(-SMALLEST // side))
    cell, gap = side * scale, 4
    left = 8 + 7 * max((len(text) for text in rows), default=0) if rows else gap
    top = 20 if columns else gap
    width = left + max(len(row) for row in pictures) * (cell + gap)
    canvas = Image.new("RGB", (width, top + len(pictures) * (cell + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(pictures):
        y = top + r * (cell + gap)
        if rows:
            draw.text((4, y + cell // 2 - 6), rows[r], fill="black")
        for c, picture in enumerate(row):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy())  # (H, W, 3)
            canvas.paste(tile.resize((cell, cell), Image.Resampling.NEAREST), (left + c * (cell + gap), y))
    for c, text in enumerate(columns):
        draw.text((left + c * (cell + gap) + 2, 4), text, fill="black")
    with writing(file.parent, file.name):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        canvas.save(partial, format="PNG")
        partial.replace(file)
    return file
