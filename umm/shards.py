"""The files of a latent cache: written a shard at a time, so that only whole shards are ever seen; read as maps.

    <folder>/meta.json            what the numbers come from (`facts`), shape, classes; `complete: true` is written last
    <folder>/stats.safetensors    count, mean, m2 of the latents (a `RunningStats`, float64)
    <folder>/shards/00000/        one folder a shard, put in place by one rename
        latents.npy               (n, C, h, w) in the encoder's own units; bfloat16 is stored as its uint16 bits
        latents_mirrored.npy      the same of the mirrored pictures, where asked for
        images.npy  masks.npy     uint8 (n, 3, S, S), uint8 (n, S, S)
        labels.npy                int64 (n,)
        items.jsonl  lines.npy    id, caption, questions: a line a picture; where each line starts, int64 (n + 1,)
        stats.safetensors         statistics of this shard
        shard.json                count, and size and sha256 of every file

n pictures in a shard, C channels, h w latent grid, S side of the picture.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from umm.errors import DataError, UmmError
from umm.latents.base import RunningStats

FILES = {"latent": "latents.npy", "image": "images.npy", "mask": "masks.npy", "label": "labels.npy"}  # item key -> file
MIRRORED = "latents_mirrored.npy"
# .npy type -> tensor type: numpy has no bfloat16, and nothing else here is uint16
STORED = {
    "uint16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "uint8": torch.uint8,
    "int64": torch.int64,
}


# -------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """One shard, appended to batch by batch: memory stays at one batch, and the length need not be known."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.rows = folder, {}, {}
        self.count, self.lines, self.texts, self.stats = 0, [0], set(), RunningStats()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk has been reported by the write that failed
                file.close()

    def add(self, arrays: dict[str, Tensor], texts: list[dict]) -> None:
        """Append one row to each file for each picture.

        Args:
            arrays: file name -> (B, ...) on the CPU; the names are the same in every call.
            texts: a JSON-able dictionary a picture, with its id.
        """
        if not self.files:
            self.rows = {name: (array.dtype, tuple(array.shape[1:])) for name, array in arrays.items()}
            self.files = {name: (self.folder / name).open("w+b") for name in [*arrays, "items.jsonl"]}
            self._headers(0)
        if set(arrays) != set(self.rows):
            odd = ", ".join(sorted(set(arrays) ^ set(self.rows)))
            raise DataError(f"picture '{texts[0]['id']}' differs in {odd} from those before: all have it, or none.")
        for name, array in arrays.items():
            _append(self.files[name], np.ascontiguousarray(_bits(array).numpy()))
        for text in texts:
            line = json.dumps(text, ensure_ascii=False).encode() + b"\n"
            _append(self.files["items.jsonl"], line)
            self.lines.append(self.lines[-1] + len(line))
            self.texts |= set(text)
        self.count += len(texts)

    def _headers(self, count: int) -> None:
        """Write the .npy headers: numpy pads them so that a longer array has a header of the same length."""
        for name, (dtype, row) in self.rows.items():
            descr = np.lib.format.dtype_to_descr(_bits(torch.empty(0, dtype=dtype)).numpy().dtype)
            header = {"descr": descr, "fortran_order": False, "shape": (count, *row)}
            self.files[name].seek(0)
            np.lib.format.write_array_header_1_0(self.files[name], header)

    def close(self) -> None:
        """Finish every file, flush it to the disk, and list them all in shard.json."""
        self._headers(self.count)
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        np.save(self.folder / "lines.npy", np.array(self.lines, dtype=np.int64))
        write_stats(self.folder / "stats.safetensors", self.stats)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(self.folder.iterdir())}
        texts = sorted(self.texts - {"id"})
        write_json(self.folder / "shard.json", {"count": self.count, "texts": texts, "files": files})


def _bits(array: Tensor) -> Tensor:
    return array.view(torch.uint16) if array.dtype == torch.bfloat16 else array


def _append(file, data) -> None:
    """Add bytes or a C-contiguous array at the end. Not through a map: there a full disk kills the process."""
    file.write(data)


def write_json(path: Path, data: dict) -> None:
    with _atomic_file(path) as file:
        _append(file, json.dumps(data, indent=1).encode())


def write_stats(path: Path, stats: RunningStats) -> None:
    with _atomic_file(path) as file:
        _append(file, save(stats.state_dict()))


@contextlib.contextmanager
def _atomic_file(final: Path) -> Iterator:
    temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block ends well, and is removed if not."""
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if final.exists():  # damaged, or it would not be written again
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def only_writer(folder: Path, process_index: int) -> Iterator[None]:
    """Make the folder, and wait while another process, say a second run with the same cache.dir, writes its shards."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f".lock{process_index}").open("w")
    except OSError as error:
        raise UmmError(f"no latent cache can be made in {folder}: {error.strerror}; set another cache.dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn(f"another process is making the latent cache in {folder}: waiting for it", stacklevel=4)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: two builds at once would be wasteful, and one may fail
            warnings.warn(f"{folder} cannot be locked: start no second build of this cache meanwhile", stacklevel=4)
        yield


@contextlib.contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Turn the system's "no space left" into what the user can do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UmmError(
            f"the disk is full: the latent cache in {folder} could not be finished. The shards before are kept; free "
            "some space and run the same command again to go on from there."
        ) from error


# -------------------------------------------------------------------------------------------------------- reading


def shard_folder(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}"


def read_meta(folder: Path) -> dict:
    """meta.json; raises `DataError` when there is none or it is not ours."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        meta["facts"], meta["complete"]
    except FileNotFoundError:
        raise DataError(f"there is no latent cache in {folder}: make one with umm cache.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder / 'meta.json'} cannot be read: delete {folder} and run umm cache again.") from None
    return meta


def read_shard(folder: Path, number: int) -> dict | None:
    """What shard.json says, or None if the shard is missing or damaged."""
    path = shard_folder(folder, number)
    try:
        shard = json.loads((path / "shard.json").read_text())
    except (OSError, ValueError):
        return None
    return None if damaged_file(path, shard) else shard


def damaged_file(path: Path, shard: dict) -> Path | None:
    """The first file of a shard that is missing or has the wrong size."""
    for name, fact in shard["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != fact["bytes"]:
            return file
    return None


def map_file(path: Path) -> Tensor:
    """A .npy file, or any other as bytes, as a memory-mapped tensor; changes to it never reach the disk.

    torch keeps no file descriptor for a map (numpy keeps one each, and a large cache has thousands of files).
    """
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    if path.suffix != ".npy":
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
        return torch.empty(0, dtype=STORED[kind.name]).set_(storage, file.tell() // kind.itemsize, shape)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
