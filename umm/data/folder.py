"""A folder of whatever pictures people have: class sub-folders or flat, with or without train/ val/ test/."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from umm.data._scan import faults
from umm.data.base import BadPictures, DataSource, check_split, digest
from umm.errors import DataError
from umm.rng import derive_seed
from umm.settings import FolderSettings
from umm.transforms import load_picture, prepare

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NAMED = 20  # unreadable files that a warning names
log = logging.getLogger("umm")


class FolderSource(DataSource):
    """Pictures in a fixed mixed order; the sorted names of the class folders are the classes.

    Unreadable files are found when the folder is opened (once, the answer is remembered), counted, named and left
    out. One that fails only while loading is named, and the next readable picture stands in under its id.
    """

    Config = FolderSettings

    def __init__(self, config: FolderSettings, split: str):
        check_split(split)
        self.config, self.split, self.image_size = config, split, config.image_size
        self.root, self.bad = _root(config.root), BadPictures()
        self.base, files = _pictures_of(self.root, config, split)
        self.classes = _classes(self.root) or None
        self.ids = self._readable(sorted(files, key=lambda file: derive_seed("order", file)))

    @classmethod
    def from_config(cls, config: FolderSettings, split: str) -> FolderSource:
        return cls(config, split)

    @classmethod
    def tiny(cls, split: str = "train") -> FolderSource:
        keep = tempfile.TemporaryDirectory(prefix="umm-tiny-")
        for number in range(36):
            folder = Path(keep.name, "ab"[number % 2])
            folder.mkdir(exist_ok=True)
            Image.linear_gradient("L").rotate(10 * number).resize((40 + number, 48)).save(folder / f"{number:02d}.png")
        source = cls(FolderSettings(root=keep.name, image_size=32, holdout=0.25), split)
        source.keep = keep  # the pictures live as long as the source
        return source

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, generator: torch.Generator | None = None) -> dict:
        turned = (self.ids[(index + step) % len(self)] for step in range(len(self)))
        name, picture = self.bad.first_good(((name, name) for name in turned), self._read)
        config = self.config
        image = prepare(picture, self.image_size, config.crop, config.flip, generator)
        item: dict = {"image": image, "id": self.ids[index]}
        if self.classes:
            item["label"] = self.classes.index((self.root / name).relative_to(self.base).parts[0])
        return item

    def _read(self, name: str) -> Image.Image:
        return load_picture(self.root / name, name)

    def _readable(self, files: Sequence[str]) -> list[str]:
        """The first `limit` files that are whole pictures; warns of the others once."""
        wanted = len(files) if self.config.limit is None else self.config.limit
        good: list[str] = []
        seen = 0
        while len(good) < wanted and seen < len(files):
            batch = files[seen : seen + wanted - len(good)]
            bad = faults(self.root, batch)
            self.bad.reasons |= bad
            good += [file for file in batch if file not in bad]
            seen += len(batch)
        if self.bad.reasons:
            named = [f"{file} {reason}" for file, reason in self.bad.reasons.items()]
            more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
            if not good:
                raise DataError(f"not one of the {seen} files for {self.split} in {self.root} can be read: {named[0]}.")
            log.warning("%d of %d files are left out: %s%s", len(named), seen, "; ".join(named[:NAMED]), more)
        return good

    def identity(self) -> dict[str, object]:
        config = self.config
        files = digest((name, (self.root / name).stat().st_size) for name in self.ids)
        facts = {"name": config.name, "split": self.split, "image_size": self.image_size, "crop": "adm"}
        return facts | {"items": len(self), "classes": self.classes, "files": files}


# --------------------------------------------------------------------------------------------------------- layout


def _root(given: str) -> Path:
    root = Path(given).expanduser()
    if not given:
        raise DataError("data.root is not set: give the folder of pictures, data.root=FOLDER.")
    if not root.is_dir():
        raise DataError(f"data.root={given} is not a folder.")
    return root


def _pictures_of(root: Path, config: FolderSettings, split: str) -> tuple[Path, list[str]]:
    """(Folder that the class folders lie in, pictures of the split relative to `root`)."""
    folders = _split_folders(root)
    if folders and split not in folders:
        raise DataError(f"{root} has no folder for {split}: there are {', '.join(folders.values())}.")
    base = root / folders.get(split, "")
    files = _listing(root, base)
    if not folders:
        files = [file for file in files if _held_out(file, config) == split]
    if not files:
        raise DataError(f"{base} has no pictures for {split} ({' '.join(sorted(SUFFIXES))}).")
    return base, files


def _held_out(file: str, config: FolderSettings) -> str:
    """The split of a picture: by a hash of its path, so that adding pictures moves none."""
    share = derive_seed("folder", config.seed, file) / 2**63
    return "val" if share < config.holdout else "test" if share < 2 * config.holdout else "train"


def _split_folders(root: Path) -> dict[str, str]:
    """{split: its sub-folder}, empty unless all sub-folders are splits: a class may be called "train"."""
    names = _subfolders(root)
    if "train" in names and all(name in SPLIT_NAMES for name in names):
        return {SPLIT_NAMES[name]: name for name in names}
    return {}


def _classes(root: Path) -> list[str]:
    """Sorted class names over all splits, so that a label means the same in each."""
    bases = [root / name for name in _split_folders(root).values()] or [root]
    return sorted({name for base in bases for name in _subfolders(base)})


def _listing(root: Path, base: Path) -> list[str]:
    """Pictures below `base`, sorted, relative to `root`; all in class folders or none."""
    loose = [path for path in base.iterdir() if path.is_file() and _is_picture(path)]
    folders = {name: _walk(base / name) for name in _subfolders(base)}
    empty = [name for name, files in folders.items() if not files]
    if empty:
        raise DataError(f"the class folder {base / empty[0]} has no pictures: fill or remove it.")
    if loose and folders:
        raise DataError(
            f"{base} has both pictures ({loose[0].name}) and class folders ({next(iter(folders))}): "
            "move the pictures into a class folder, or point data.root at one folder of pictures."
        )
    files = loose + [file for files in folders.values() for file in files]
    return sorted(file.relative_to(root).as_posix() for file in files)


def _walk(folder: Path) -> list[Path]:
    """Pictures below a folder, links followed, each real folder entered once."""
    found, entered = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name)]
        if os.path.realpath(here) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(here))
        found += [Path(here, name) for name in files if _is_picture(Path(name))]
    return found


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not _hidden(path.name)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))
