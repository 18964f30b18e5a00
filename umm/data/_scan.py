"""Which files of a folder are whole pictures, found out quickly and remembered."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from umm import assets
from umm.data.base import digest
from umm.errors import DataError
from umm.transforms import check_aspect, load_picture

ENDINGS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what a whole file ends in
TAIL = 1024  # bytes in which the ending must lie; cameras append a little
WIDE = 5_000  # from so many unknown files on, a progress bar
log = logging.getLogger("umm")


def faults(root: Path, files: Sequence[str]) -> dict[str, str]:
    """{file: what is wrong with it} for the unreadable ones among `files`, which are relative to `root`.

    A look at the header and the ending, and a full decoding only where these leave doubt. Answers are kept in
    `$UMM_CACHE/scans` for each (path, size, time of change).
    """
    memory = _memory(root)
    known = _read(memory)
    stats = {file: _stamp(root / file) for file in files}
    found = {file: known[file][1] for file in files if file in known and known[file][0] == stats[file]}
    unknown = [file for file in files if file not in found]
    if unknown:
        found |= zip(unknown, _examine_all(root, unknown))
        _write(memory, known | {file: [stats[file], found[file]] for file in unknown})
    return {file: found[file] for file in files if found[file]}


def examine(path: Path) -> str:
    """What is wrong with a picture file, empty when nothing is."""
    try:
        with Image.open(path) as picture:
            check_aspect(picture)
            ending = ENDINGS.get(picture.format or "")
        if not (ending and ending in _tail(path)):
            load_picture(path)
    except DataError as error:
        return str(error).removeprefix(f"{path} ")
    except Exception as error:  # on damaged files Pillow's readers raise nearly anything
        return "is empty" if path.stat().st_size == 0 else f"is no picture ({type(error).__name__})"
    return ""


def _examine_all(root: Path, files: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor() as pool:  # waiting for the disk, not for Python
        answers = pool.map(examine, [root / file for file in files])
        if len(files) >= WIDE:
            from rich.progress import track

            answers = track(answers, description=f"looking through {root.name}", total=len(files))
        return list(answers)


def _tail(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL))
        return stream.read()


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _memory(root: Path) -> Path:
    return assets.root().parent / "scans" / f"{digest([root.resolve()])}.json"


def _read(memory: Path) -> dict[str, list]:
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}


def _write(memory: Path, known: dict[str, list]) -> None:
    """Atomically, as several processes may scan one folder. It only saves time, so a full disk does not stop a run."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=memory.parent)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(known, stream)
        os.replace(name, memory)
    except OSError as error:
        log.warning("the scan of this folder cannot be kept in %s (%s): the next start will scan again", memory, error)
