"""The run folder: what a run is, what it said, and where it can go on from.

    config.yaml       complete: umm train --task T --config runs/x/config.yaml run=runs/y repeats the run
    run.json          command, commit, versions, machine, seed, config hash, times
    log.jsonl         one object per logged step          metrics.jsonl   one object per measured number
    items/*.parquet   values per picture                  samples/*.png   pictures
    checkpoints/<step>/{model,ema}.safetensors, state.pt  checkpoints/latest names the newest, written last
    model/            what umm.load reads
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from umm import __version__
from umm.config import combine, config_hash, first_difference, to_yaml
from umm.errors import ConfigError, UmmError

# settings that may change when a run goes on: they do not touch its numbers
MAY_CHANGE = ("run", "train.workers", "train.log_every", "train.sample_every", "train.save_every", "train.keep")
MAY_CHANGE += ("train.trackers", "train.evaluate_every", "eval.*", "probe.*")
MAY_CHANGE += ("gen.decoder",)  # it only draws: a finished generator gets one by its umm train command, given again
LOCKED: set[Path] = set()  # run folders of this process; its lock files stay open, as closing one gives the lock back


class Run:
    """A run folder; every write is atomic or an append of one line."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @classmethod
    def create(cls, config: DictConfig, argv: list[str] | None = None) -> Run:
        """Open the folder `config.run` for this process alone, or go on with an equal run in it.

        Raises:
            ConfigError: another configuration was run there; names the first setting that differs.
            UmmError: another process trains there.
        """
        run = cls(str(config.run))
        with writing(run.folder, "the run folder"):
            (run.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock(run.folder)
        if run.config_file.exists() and not run.begun and first_difference(run.config_now, config, MAY_CHANGE):
            run.forget()
        if run.config_file.exists():
            run.check_same(config)
            run.take_decoder(config)
            run.note(resumed=now())
        else:
            write_atomic(run.config_file, to_yaml(config))
            run.note(**provenance(config, argv), created=now())
        return run

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def config(self) -> DictConfig:
        if not self.config_file.exists():
            raise UmmError(f"{self.folder} is not a run: it has no config.yaml. Runs are made by umm train.")
        with reading(self.config_file, "give back the file, or train into another folder"):
            config = OmegaConf.load(self.config_file)
            if "task" not in config:
                raise UmmError("no task is named in it")
        return config

    @property
    def config_now(self) -> DictConfig:
        """The configuration with the defaults of settings that it is older than."""
        saved = self.config
        try:
            return combine(saved.task, [(str(self.config_file), saved)])
        except UmmError:  # it has settings that are no more
            return saved

    @property
    def begun(self) -> bool:
        """Whether there is something to go on with: a run that failed before its first step has nothing."""
        return (self.folder / "log.jsonl").exists() or bool(self.checkpoints()) or (self.folder / "model").exists()

    def forget(self) -> None:
        """Drop what is written before the first step, so that a run with mended settings can begin."""
        for name in ("config.yaml", "run.json", "stats.safetensors"):
            (self.folder / name).unlink(missing_ok=True)

    def check_same(self, config: DictConfig) -> None:
        difference = first_difference(self.config_now, config, ignore=MAY_CHANGE)
        if difference:
            raise ConfigError(
                f"{self.folder} holds a run in which {difference} now: give run=<another folder>, or delete it."
            )

    def take_decoder(self, config: DictConfig) -> None:
        """Save the decoder that a generator is given later, for what reads config.yaml: its checkpoints' samples."""
        decoder, saved = OmegaConf.select(config, "gen.decoder"), self.config
        if decoder not in (None, OmegaConf.select(saved, "gen.decoder")):
            OmegaConf.update(saved, "gen.decoder", decoder)
            write_atomic(self.config_file, to_yaml(saved))

    def note(self, **facts: object) -> None:
        """Add facts to run.json."""
        write_atomic(self.folder / "run.json", json.dumps(self.facts | facts, indent=1, default=str))

    @property
    def facts(self) -> dict:
        file = self.folder / "run.json"
        with reading(file, "delete it: only where the run comes from is lost with it"):
            return json.loads(file.read_text()) if file.exists() else {}

    def log(self, record: dict, file: str = "log.jsonl") -> None:
        """Append one object."""
        with writing(self.folder, file), open(self.folder / file, "a") as out:
            out.write(json.dumps(record) + "\n")

    def read_log(self, file: str = "log.jsonl") -> list[dict]:
        """All whole lines of a log; a line cut off by a kill is left out."""
        path, records = self.folder / file, []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def rewind(self, step: int) -> None:
        """Drop what an interrupted run logged after its last checkpoint: those steps are taken again."""
        kept = [record for record in self.read_log() if record.get("step", 0) <= step]
        if (self.folder / "log.jsonl").exists():
            write_atomic(self.folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    # ------------------------------------------------------------------------------------------------ checkpoints

    def latest(self) -> Path | None:
        """The checkpoint that `latest` names; where there is no such file, the newest one."""
        pointer, done = self.folder / "checkpoints" / "latest", self.checkpoints()
        if not pointer.exists():
            return done[-1] if done else None
        name = pointer.read_text().strip()
        if name not in [folder.name for folder in done]:
            others = f"write one of {', '.join(folder.name for folder in done)} into it, or " if done else ""
            raise UmmError(f"{pointer} names checkpoint '{name}', which is missing: {others}start in another folder.")
        return pointer.parent / name

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(folder for folder in (self.folder / "checkpoints").glob("*") if folder.name.isdigit())

    def save(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """Call `write(folder)` for a temporary folder, then make it checkpoint `step` in one rename."""
        final = self.folder / "checkpoints" / f"{step:08d}"
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with writing(self.folder, f"checkpoint {final.name}", cleanup=partial):
            partial.mkdir(parents=True)
            write(partial)
            for file in partial.iterdir():
                sync(file)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(final.parent)
            write_atomic(final.parent / "latest", final.name)
        self.prune(step, keep)
        return final

    def prune(self, step: int, keep: int) -> None:
        """Keep the newest `keep` checkpoints up to `step`; later ones are of a run that was taken back."""
        done = self.checkpoints()
        past = [folder for folder in done if int(folder.name) <= step]
        for folder in set(done) - set(past[-keep:]):
            shutil.rmtree(folder, ignore_errors=True)


def lock(folder: Path) -> None:
    """Keep other processes out of a run folder until this one ends, however it ends.

    Raises:
        UmmError: another process is in it.
    """
    import fcntl

    if folder.resolve() in LOCKED:
        return
    file = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(file)
        raise UmmError(f"another process is training in {folder}: let it end, or give run=<another folder>.") from error
    except OSError:  # a file system without locks
        os.close(file)
        return
    LOCKED.add(folder.resolve())


@contextlib.contextmanager
def writing(folder: Path, what: str, cleanup: Path | None = None) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one sentence; a half-written `cleanup` folder is removed."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        if cleanup is not None:
            shutil.rmtree(cleanup, ignore_errors=True)
        raise UmmError(
            f"cannot write {what} in {folder}: {getattr(error, 'strerror', None) or error}. What was saved before is "
            "untouched: make room or choose another place, then give the same command again."
        ) from error


@contextlib.contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn a damaged or missing file into one sentence that ends in what to do."""
    try:
        yield
    except Exception as error:  # every format has exceptions of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UmmError(f"{path} cannot be read ({reason}): {remedy}.") from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, whole."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path.parent, path.name):
        partial.write_text(text)
        sync(partial)
        partial.replace(path)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def provenance(config: DictConfig, argv: list[str] | None = None) -> dict[str, object]:
    """What a result must carry to be repeated."""
    packages = ("torch", "torchvision", "transformers", "timm", "accelerate", "torchmetrics", "numpy")
    return {
        "command": " ".join(["umm", *(argv if argv is not None else sys.argv[1:])]),
        "config_hash": config_hash(config),
        "seed": config.get("seed"),
        "commit": commit(),
        "versions": {"umm": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        "host": {"machine": platform.machine(), "cores": os.cpu_count()},
    }


def commit() -> str | None:
    """The checkout's commit, with `+` when it has uncommitted changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None
