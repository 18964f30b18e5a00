"""Opening a data set through `datasets`, which columns mean what, and what their values say."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from umm.data.base import Question, digest
from umm.errors import DataError, nearest
from umm.settings import HubSettings
from umm.transforms import load_picture, to_rgb

# ours -> column names that are taken for it when exactly one of them is there
GUESSES = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo"),
    "label": ("label", "labels", "cls", "class"),
    "caption": ("caption", "captions", "text", "txt"),
    "question": ("question",),
    "answer": ("answer", "multiple_choice_answer"),
    "answers": ("answers",),  # of several raters
    "kind": (),  # of the question
}
READERS = {  # suffix -> reader of `datasets`
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}
SHARDS = {".parquet", ".arrow", ".tar"}
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), "validation"
)


# -------------------------------------------------------------------------------------------------------- opening


def open_rows(config: HubSettings, split: str):
    """A `datasets.Dataset` or `IterableDataset` of our split, under its own column names, pictures undecoded.

    Raises:
        DataError: no such data set or split, or it cannot be reached.
    """
    import datasets

    if not config.path:
        raise DataError("data.path is not set: give a hub id, a folder or a glob of shards, data.path=...")
    name = getattr(config, f"split_{split}")
    try:
        folder = Path(config.path).expanduser()
        if (folder / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(folder)[name]
        else:
            rows = datasets.load_dataset(**_where(config), name=config.config, split=name, streaming=config.streaming)
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub and the network raise dozens of types
        raise _explained(config, split, name, error) from error
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _where(config: HubSettings) -> dict[str, object]:
    path = os.path.expanduser(config.path)
    if os.path.isdir(path):
        return _shards(Path(path)) or {"path": path}
    if not (glob.has_magic(path) or os.path.isfile(path)):
        return {"path": config.path, "revision": config.revision}
    files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise DataError(f"data.path={config.path} matches no file.")
    suffix = Path(files[0]).suffix.lower()
    if suffix not in READERS:
        raise DataError(f"data.path={config.path}: shards must be {', '.join(READERS)}, {Path(files[0]).name} is not.")
    return {"path": READERS[suffix], "data_files": _by_split({file: Path(file).name for file in files})}


def _shards(folder: Path) -> dict[str, object]:
    """A plain folder of shards; empty for any other folder, whose layout `datasets` knows."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SHARDS)
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) != 1 or (folder / "README.md").exists():  # a card says itself which files are which split
        return {}
    names = {str(file): file.relative_to(folder).as_posix() for file in files}
    return {"path": READERS[suffixes.pop()], "data_files": _by_split(names)}


def _by_split(names: Mapping[str, str]) -> dict[str, list[str]]:
    """{split: files}, from {file: its name below the given folder}; "train" where the name has no split's word.

    `datasets` would look at the whole path, so that all of /data/test_run/train-0.parquet is "test" to it.
    """
    splits: dict[str, list[str]] = {}
    for file, name in names.items():
        words = re.split("[^a-z]+", name.lower())
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
        splits.setdefault(split, []).append(file)
    return splits


def _explained(config: HubSettings, split: str, name: str, error: Exception) -> DataError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if re.match(r"(Unknown|Bad) split", said) or isinstance(error, KeyError):
        there = re.findall(r"'([^']+)'", said.partition("[")[2]) if not isinstance(error, KeyError) else []
        listed = f": there are {', '.join(there)}" if there else ""
        part = "" if config.streaming else f" (a part goes as well: data.split_{split}='train[:5%]')"
        return DataError(f"{config.path} has no split '{name}'{listed}. Set data.split_{split}{part}.")
    if isinstance(error, OSError) and re.search("reach|offline|connect|resolve|timed out", said, re.IGNORECASE):
        return DataError(
            f"the hub cannot be reached for '{config.path}', and it is neither a local folder nor in the cache. "
            "Give data.path a folder or a glob of shards; with HF_HUB_OFFLINE=1 this fails at once instead of retrying."
        )
    return DataError(f"data.path={config.path} cannot be opened: {said}")


# -------------------------------------------------------------------------------------------------------- columns


def find_columns(rows, config: HubSettings) -> dict[str, str]:
    """{ours: theirs}: what the settings say, completed by guesses that leave no doubt. An empty name means none.

    Raises:
        DataError: no picture column, a doubtful guess or a column that is not there; lists the columns.
    """
    import datasets

    there = rows.column_names or list(next(iter(rows)))
    typed = {"image": datasets.Image, "label": datasets.ClassLabel}
    listed = f"The columns are {', '.join(there)}."
    for ours, theirs in config.columns.items():
        if ours not in GUESSES:
            raise DataError(f"data.columns knows no '{ours}', only {', '.join(GUESSES)}.")
        if theirs and theirs not in there:
            raise DataError(f"data.columns.{ours}: there is no column '{theirs}'.{nearest(theirs, there)} {listed}")
    found = dict(config.columns)
    for ours, names in GUESSES.items():
        if ours in found:
            continue
        fit = [column for column in there if column in names]
        if not fit and ours in typed and rows.features:
            fit = [column for column in there if isinstance(rows.features[column], typed[ours])]
        if len(fit) > 1:
            raise DataError(f"{' or '.join(fit)} could be the {ours}: set data.columns={{{ours}: ...}}. {listed}")
        if fit:
            found[ours] = fit[0]
    if not found.get("image"):
        raise DataError(f"no column of {config.path} looks like a picture: set data.columns={{image: ...}}. {listed}")
    return {ours: theirs for ours, theirs in found.items() if theirs}


def class_names(rows, column: str, config: HubSettings) -> list[str] | None:
    """Names in label order: the data set's own, else the words or whole numbers of the training split.

    None for a stream of plain numbers, whose range nobody knows beforehand.
    """
    feature = (rows.features or {}).get(column)
    if hasattr(feature, "names"):
        return list(feature.names)
    if config.streaming:
        if feature is None or str(getattr(feature, "dtype", "")).startswith("int"):
            return None
        raise DataError(f"a stream cannot know all the words in the label column '{column}': set data.streaming=false.")
    values = [value for value in open_rows(config, "train").unique(column) if value is not None]
    if all(isinstance(value, int) for value in values):
        return [str(value) for value in range(max(values, default=0) + 1)]
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    raise DataError(f"labels must be words or whole numbers, those in '{column}' are {feature}.")


# --------------------------------------------------------------------------------------------------------- values


def picture_of(value: object, name: str) -> Image.Image:
    """Bytes, a path, a PIL picture, or {bytes, path} as `datasets` nests them -> RGB."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) == 1:
        return picture_of(value[0], name)
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, (bytes, str)) and value:
        return load_picture(value, name)
    raise DataError(f"{name} has no picture, but {type(value).__name__}.")


def digest_of(values: Iterable[object]) -> str:
    """Stands for pictures still undecoded; a path by its last part, as folders move."""
    facts = []
    for value in values:
        value = (value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else value
        facts.append(Path(value).name if isinstance(value, str) else value)
    return digest(facts)


def label_of(value: object, classes: list[str] | None, name: str) -> int:
    """Number of the class.

    Raises:
        DataError: missing, unknown or out of range; names the row.
    """
    if isinstance(value, str) and classes and value in classes:
        return classes.index(value)
    if isinstance(value, int) and 0 <= value < (len(classes) if classes else value + 1):
        return int(value)
    known = f"one of {len(classes)} classes" if classes else "a class"
    raise DataError(f"{name}: the label {value!r} is not {known}. Leave labels out with data.columns={{label: ''}}.")


def questions_of(row: Mapping, columns: Mapping[str, str]) -> list[Question]:
    """One question a row, or parallel lists of them; raters' answers as strings or as VQAv2's {"answer": ...}."""
    fields = {role: row.get(columns[role]) for role in ("question", "answer", "answers", "kind") if role in columns}
    if not isinstance(fields["question"], list):
        fields = {role: [value] for role, value in fields.items()}
    asked = []
    for number, text in enumerate(fields["question"]):
        one = {role: values[number] for role, values in fields.items() if values}
        raters = _raters(one.get("answers"))
        answer = one.get("answer") or (Counter(raters).most_common(1)[0][0] if raters else "")
        asked.append(Question(text, str(answer), str(one.get("kind") or ""), raters))
    return asked


def _raters(value: object) -> tuple[str, ...]:
    if isinstance(value, Mapping):  # a struct of lists
        value = value.get("answer")
    return tuple(str(one["answer"] if isinstance(one, Mapping) else one) for one in value or ())
