"""Folders, hub data sets and easy-VQA are read right, and what is wrong with them is said in a sentence."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from umm import assets
from umm.data import _scan
from umm.data._hub_rows import label_of, questions_of
from umm.data.base import SPLITS, Question, collate
from umm.data.easy_vqa import SHAPES, EasyVQASource, shape_of
from umm.data.folder import FolderSource
from umm.data.hub import HubSource
from umm.errors import DataError
from umm.registry import find, names
from umm.rng import generator
from umm.settings import EasyVQASettings, FolderSettings, HubSettings


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """An empty cache folder of our own and of `datasets`."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UMM_CACHE", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return folder


def encoded(number: int, kind: str = "PNG", size: tuple[int, int] = (40, 36)) -> bytes:
    """A picture whose red level tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number, 80, 160)).save(stream, kind)
    return stream.getvalue()


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def number_of(item: dict) -> int:
    return int(item["image"][0].float().mean().round())


# ---------------------------------------------------------------------------------------------------- every source


@pytest.mark.parametrize("name", names("data"))
@pytest.mark.parametrize("split", SPLITS)
def test_every_source_keeps_the_contract(name, split, cache):
    source = find("data", name).tiny(split)
    items = list(source.stream())
    assert len(items) == len(source) == len(source.ids) > 0
    assert [item["id"] for item in items] == list(source.ids)
    assert len(set(source.ids)) == len(source.ids)
    size = source.image_size
    for item in items:
        assert item["image"].shape == (3, size, size) and item["image"].dtype == torch.uint8
        assert 0 <= item["label"] < len(source.classes)
    again = find("data", name).tiny(split)
    assert all(torch.equal(again[index]["image"], item["image"]) for index, item in enumerate(items))
    assert json.loads(json.dumps(source.identity())) == json.loads(json.dumps(again.identity()))
    other = find("data", name).tiny("val" if split == "train" else "train")
    assert other.identity() != source.identity()
    assert [item["id"] for item in source.stream(1, 2)] == list(source.ids)[1::2]
    assert torch.equal(pickle.loads(pickle.dumps(source))[0]["image"], items[0]["image"])
    assert collate(items[:3])["image"].shape == (3, 3, size, size)


@pytest.mark.parametrize("name", ["folder", "hub", "easy_vqa"])
def test_the_splits_share_no_id(name, cache):
    ids = [picture for split in SPLITS for picture in find("data", name).tiny(split).ids]
    assert len(ids) == len(set(ids))


# ---------------------------------------------------------------------------------------------------------- folder


def folder_source(root: Path, split: str = "train", **changes) -> FolderSource:
    return FolderSource(FolderSettings(root=str(root), image_size=32, **changes), split)


def test_class_folders_become_sorted_labels(tmp_path, cache):
    files = {f"{name}/{n}.{kind}": encoded(10 * n + k, suffix)
             for k, name in enumerate(["zebra", "ant", "Moth"]) for n in range(4)
             for kind, suffix in [("jpg", "JPEG"), ("PNG", "PNG"), ("webp", "WEBP")]}  # fmt: skip
    source = folder_source(fill(tmp_path / "a", files), holdout=0.0)
    assert source.classes == ["Moth", "ant", "zebra"]
    assert sorted(source.ids) == sorted(files)
    assert all(source.classes[item["label"]] == item["id"].split("/")[0] for item in source.stream())


def test_a_flat_folder_has_no_classes_and_ignores_what_is_no_picture(tmp_path, cache):
    files = {f"{n}.png": encoded(n) for n in range(5)}
    rubbish = {".hidden.png": b"", "notes.txt": b"x", ".git/a.png": b"x", "__MACOSX/._1.png": b"x", "Thumbs.db": b"x"}
    source = folder_source(fill(tmp_path / "a", files | rubbish), holdout=0.0)
    assert sorted(source.ids) == sorted(files)
    assert source.classes is None and "label" not in source[0]


def test_a_folder_with_splits_is_read_by_split(tmp_path, cache):
    files = {
        f"{split}/{name}/{n}.png": encoded(n) for split in ("train", "validation") for name in "ab" for n in range(3)
    }
    del files["validation/a/0.png"], files["validation/a/1.png"], files["validation/a/2.png"]
    root = fill(tmp_path / "a", files)
    val = folder_source(root, "val")
    assert sorted(val.ids) == [f"validation/b/{n}.png" for n in range(3)]
    assert val.classes == ["a", "b"] and {item["label"] for item in val.stream()} == {1}
    with pytest.raises(DataError, match="no folder for test: there are train, validation"):
        folder_source(root, "test")


def test_a_class_may_be_called_train(tmp_path, cache):
    source = folder_source(
        fill(tmp_path / "a", {f"{c}/{n}.png": encoded(n) for c in ("train", "bus") for n in range(4)}), holdout=0.0
    )
    assert source.classes == ["bus", "train"]


def test_adding_pictures_moves_none_between_splits(tmp_path, cache):
    names = [f"{n}.png" for n in range(60)]
    root = fill(tmp_path / "a", {name: encoded(1) for name in names})
    before = {split: set(folder_source(root, split, holdout=0.25).ids) for split in SPLITS}
    assert sum(map(len, before.values())) == 60 and min(map(len, before.values())) >= 8
    fill(root, {f"new{n}.png": encoded(2) for n in range(30)})
    for split in SPLITS:
        assert before[split] == set(folder_source(root, split, holdout=0.25).ids) & set(names)


def test_a_limit_takes_a_fair_sample_of_the_classes(tmp_path, cache):
    root = fill(tmp_path / "a", {f"{name}/{n}.png": encoded(n) for name in "abc" for n in range(30)})
    source = folder_source(root, holdout=0.0, limit=30)
    counts = np.bincount([item["label"] for item in source.stream()], minlength=3)
    assert len(source) == 30 and counts.min() >= 4
    assert source.ids == folder_source(root, holdout=0.0).ids[:30]


BAD = {
    "zero.jpg": (b"", "is empty"),
    "text.jpg": (b"hello, I am a text file", "is no picture"),
    "short.jpg": (encoded(5, "JPEG", (200, 200))[:700], "truncated"),
    "short.png": (encoded(5, "PNG", (200, 200))[:100], ""),
    "short.webp": (encoded(5, "WEBP", (200, 200))[:80], ""),
}


def test_bad_files_are_counted_named_once_and_left_out(tmp_path, cache, caplog):
    good = {f"{n}.png": encoded(n) for n in range(6)}
    root = fill(tmp_path / "a", good | {name: content for name, (content, _) in BAD.items()})
    with caplog.at_level(logging.WARNING, "umm"):
        source = folder_source(root, holdout=0.0)
    assert sorted(source.ids) == sorted(good)
    assert set(source.bad.reasons) == set(BAD)
    assert all(reason in source.bad.reasons[name] for name, (_, reason) in BAD.items())
    assert len(caplog.records) == 1 and "5 of 11 files are left out" in caplog.text
    assert sum(caplog.text.count(name) for name in BAD) == len(BAD)


def test_a_scan_is_remembered_until_a_file_changes(tmp_path, cache, monkeypatch):
    root = fill(tmp_path / "a", {f"{n}.png": encoded(n) for n in range(6)} | {"bad.png": b"x"})
    looked, examine = [], _scan.examine
    monkeypatch.setattr(_scan, "examine", lambda path: looked.append(path.name) or examine(path))
    assert len(folder_source(root, holdout=0.0)) == 6 and len(looked) == 7
    assert len(folder_source(root, holdout=0.0)) == 6 and len(looked) == 7
    fill(root, {"bad.png": encoded(9)})
    assert len(folder_source(root, holdout=0.0)) == 7 and looked[7:] == ["bad.png"]


def test_an_unwritable_cache_only_costs_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UMM_CACHE", str(tmp_path / "file" / "cache"))
    source = folder_source(fill(tmp_path / "a", {"1.png": encoded(1)}), holdout=0.0)
    assert len(source) == 1 and "cannot be kept" in caplog.text


def test_a_file_damaged_later_is_replaced_by_the_next_and_named_once(tmp_path, cache, caplog):
    root = fill(tmp_path / "a", {f"{name}/{n}.png": encoded(10 * n) for n in range(5) for name in "ab"})
    source = folder_source(root, holdout=0.0)
    (root / source.ids[2]).write_bytes(b"broken")
    (root / source.ids[9]).write_bytes(b"broken")
    items = [source[index] for index in (2, 9, 2, 3, 0)]
    assert len(source) == 10 and items[0]["id"] == source.ids[2]
    assert torch.equal(items[0]["image"], items[3]["image"]) and items[0]["label"] == items[3]["label"]
    assert torch.equal(items[1]["image"], items[4]["image"]), "the last one is replaced by the first"
    assert len(caplog.records) == 2 and list(source.bad.reasons) == [source.ids[2], source.ids[9]]


def test_links_that_run_in_circles_end(tmp_path, cache):
    root = fill(tmp_path / "a", {"x/1.png": encoded(1), "x/deep/2.png": encoded(2)})
    os.symlink(root / "x", root / "x" / "deep" / "loop")
    assert sorted(folder_source(root, holdout=0.0).ids) == ["x/1.png", "x/deep/2.png"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a/1.png": b"x", "a/2.png": b""}, "not one of the 2 files for train"),
        ({"notes.txt": b"x"}, "has no pictures for train"),
        ({"a/1.png": encoded(1), "b/readme.txt": b"x"}, r"class folder .*b has no pictures"),
        ({"1.png": encoded(1), "b/2.png": encoded(2)}, r"both pictures \(1.png\) and class folders \(b\)"),
    ],
)
def test_a_folder_that_cannot_serve_says_why(tmp_path, cache, files, message):
    with pytest.raises(DataError, match=message):
        folder_source(fill(tmp_path / "a", files), holdout=0.0)


def test_a_missing_root_says_so(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        folder_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.root is not set"):
        FolderSource(FolderSettings(), "train")


def test_training_augments_and_evaluation_does_not(tmp_path, cache):
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    source = folder_source(fill(tmp_path / "a", {"1.png": stream.getvalue()}), holdout=0.0, crop="random", flip=True)
    draws = [source.load(0, generator("a", n))["image"] for n in range(4)]
    assert torch.equal(source.load(0, generator("a", 1))["image"], draws[1])
    assert not any(torch.equal(source[0]["image"], draw) for draw in draws)
    streamed = [item["image"] for item in source.stream(augment=lambda n: generator("a", n))]
    assert torch.equal(streamed[0], draws[0])


# ------------------------------------------------------------------------------------------------------------- hub


def table(rows: int, **columns):
    """A `datasets.Dataset` of numbered pictures."""
    import datasets

    data = {"image": [{"bytes": encoded(n), "path": None} for n in range(rows)], **columns}
    return datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())


def hub_source(path, split: str = "train", **changes) -> HubSource:
    return HubSource(HubSettings(path=str(path), image_size=32, **changes), split)


@pytest.fixture
def parquet(tmp_path, cache):
    import datasets

    folder = tmp_path / "sets"
    folder.mkdir()
    labels = datasets.ClassLabel(names=["even", "odd"])
    for split, rows in (("train", 60), ("validation", 9)):
        made = table(rows, label=[n % 2 for n in range(rows)]).cast_column("label", labels)
        made.to_parquet(folder / f"{split}-0.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_shards_is_read_by_split(parquet, streaming):
    source = hub_source(parquet, "val", streaming=streaming)
    items = list(source.stream())
    assert sorted(number_of(item) for item in items) == list(range(9))
    assert source.classes == ["even", "odd"]
    assert all(item["label"] == number_of(item) % 2 for item in items)
    assert all(item["id"] == f"val/{number_of(item)}" for item in items)


def test_map_style_rows_come_in_a_fixed_mixed_order(parquet):
    source = hub_source(parquet)
    numbers = [number_of(item) for item in source.stream()]
    assert sorted(numbers) == list(range(60)) and numbers != sorted(numbers)
    limited = hub_source(parquet, limit=7)
    assert limited.ids == source.ids[:7]


def test_a_stream_can_start_anywhere_and_is_the_same(parquet):
    """Also across the end of a pass, and for each of several readers."""
    source = hub_source(parquet, streaming=True, shuffle_buffer=16)
    whole = [number_of(item) for item in itertools.islice(source.stream(), 150)]
    assert sorted(whole[:60]) == sorted(whole[60:120]) == list(range(60))
    assert whole[:60] != whole[60:120] and whole[:60] != sorted(whole[:60])
    for start in (1, 59, 75):
        assert [number_of(item) for item in itertools.islice(source.stream(start), 40)] == whole[start : start + 40]
    for reader in range(3):
        assert [number_of(item) for item in itertools.islice(source.stream(reader, 3), 40)] == whole[reader:120:3]


def test_another_seed_streams_in_another_order(parquet):
    orders = [
        [item["id"] for item in itertools.islice(hub_source(parquet, streaming=True, seed=seed).stream(), 60)]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2] and set(orders[0]) == set(orders[2])


def test_a_folder_called_test_does_not_make_its_shards_a_test_split(tmp_path, cache):
    folder = tmp_path / "test_run"
    folder.mkdir()
    table(4).to_parquet(folder / "train-0.parquet")
    table(2).to_parquet(folder / "validation-0.parquet")
    for path in (folder, folder / "*.parquet"):
        assert [len(hub_source(path, split)) for split in ("train", "val")] == [4, 2]
    with pytest.raises(DataError, match="no split 'test'"):
        hub_source(folder, "test")


def test_a_stream_has_no_length(parquet):
    with pytest.raises(TypeError, match="no length"):
        len(hub_source(parquet, streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_rows_are_replaced_whatever_the_start(tmp_path, cache, streaming, caplog):
    import datasets

    pictures = [encoded(n) for n in range(12)]
    pictures[4] = pictures[5] = b"broken"
    datasets.Dataset.from_dict({"image": pictures}).to_parquet(tmp_path / "t.parquet")
    source = hub_source(tmp_path / "*.parquet", "val", streaming=streaming, split_val="train")
    numbers = [number_of(item) for item in source.stream()]
    assert len(numbers) == 12 and not {4, 5} & set(numbers)
    assert len(caplog.records) == 2 and "row 4 of" in caplog.text
    for start in range(12):
        assert [number_of(item) for item in source.stream(start)] == numbers[start:]
    if streaming:
        assert numbers[4:7] == [6, 6, 6]


def write_arrow(path: Path) -> None:
    import pyarrow as pa

    held = pa.table({"img": [encoded(n) for n in range(4)], "label": [0, 1, 2, 1]})
    with pa.OSFile(str(path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, held.schema) as writer:
        writer.write_table(held)


def write_webdataset(path: Path) -> None:
    with tarfile.open(path / "a.tar", "w") as archive:
        for number in range(4):
            for suffix, content in (("png", encoded(number)), ("cls", str([0, 1, 2, 1][number]).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_json(path: Path) -> None:
    fill(path, {f"p{n}.png": encoded(n) for n in range(4)})
    rows = [{"image": str(path / f"p{n}.png"), "label": [0, 1, 2, 1][n]} for n in range(4)]
    (path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "write, pattern", [(write_arrow, "*.arrow"), (write_webdataset, "*.tar"), (write_json, "*.jsonl")]
)
def test_local_shards_of_every_kind_are_read(tmp_path, cache, write, pattern, streaming):
    (tmp_path / "s").mkdir()
    write(tmp_path / "s")
    source = hub_source(tmp_path / "s" / pattern, streaming=streaming)
    labels = {number_of(item): item["label"] for item in itertools.islice(source.stream(), 4)}
    assert labels == {0: 0, 1: 1, 2: 2, 3: 1}
    assert source.classes == (None if streaming else ["0", "1", "2"])


def test_a_data_set_saved_to_disk_is_read(tmp_path, cache):
    import datasets

    datasets.DatasetDict(train=table(5)).save_to_disk(tmp_path / "saved")
    assert sorted(number_of(item) for item in hub_source(tmp_path / "saved").stream()) == list(range(5))
    with pytest.raises(DataError, match="no split 'validation'"):
        hub_source(tmp_path / "saved", "val")


def test_words_as_labels_mean_the_same_in_every_split(tmp_path, cache):
    fruit = ["pear", "fig", "fig", "apple"]
    table(4, label=fruit).to_parquet(tmp_path / "train-0.parquet")
    table(1, label=["pear"]).to_parquet(tmp_path / "test-0.parquet")
    test = hub_source(tmp_path, "test")
    assert test.classes == ["apple", "fig", "pear"] and test[0]["label"] == 2


def test_the_column_map_is_followed(tmp_path, cache):
    made = table(3, fine=[2, 1, 0], coarse=[0, 0, 0], said=["a", "b", "c"]).rename_column("image", "scan")
    made.to_parquet(tmp_path / "train-0.parquet")
    source = hub_source(tmp_path, columns={"label": "fine", "caption": "said"})
    assert {number_of(item): (item["label"], item["caption"]) for item in source.stream()} == {
        0: (2, "a"), 1: (1, "b"), 2: (0, "c"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"label": "fine_lable"}, "no column 'fine_lable'. Did you mean 'fine_label'"),
        ({"labels": "label"}, "knows no 'labels', only image, label"),
        ({}, "label or class could be the label"),
        ({"label": "", "image": ""}, "looks like a picture.*The columns are image, label, class, fine_label"),
    ],
)
def test_columns_that_leave_doubt_are_an_error_that_lists_them(tmp_path, cache, columns, message):
    zeros = [0, 0]
    table(2, **{"label": zeros, "class": zeros, "fine_label": zeros}).to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=message):
        hub_source(tmp_path, columns=columns)


@pytest.mark.parametrize("label", [None, 7, -1, "plum", 1.5])
def test_a_label_out_of_range_names_the_row(label):
    with pytest.raises(DataError, match=r"row 3.*is not one of 2 classes"):
        label_of(label, ["a", "b"], "row 3 of x")


def test_a_missing_label_is_found_while_loading(tmp_path, cache):
    table(3, label=[0, None, 1]).to_parquet(tmp_path / "train-0.parquet")
    source = hub_source(tmp_path)
    with pytest.raises(DataError, match=r"row 1 of .*label None"):
        list(source.stream())
    assert len(list(hub_source(tmp_path, columns={"label": ""}).stream())) == 3


COLUMNS = {"question": "q", "answer": "a", "answers": "many"}


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"q": "what?", "a": "cat", "many": None}, [Question("what?", "cat")]),
        ({"q": "what?", "a": None, "many": ["x", "y", "y"]}, [Question("what?", "y", "", ("x", "y", "y"))]),
        ({"q": "what?", "many": [{"answer": "x", "id": 1}]}, [Question("what?", "x", "", ("x",))]),
        ({"q": "what?", "many": {"answer": ["x", "x"]}}, [Question("what?", "x", "", ("x", "x"))]),
        ({"q": ["one?", "two?"], "a": ["1", "2"]}, [Question("one?", "1"), Question("two?", "2")]),
        ({"q": "hidden?", "a": None, "many": None}, [Question("hidden?", "")]),
    ],
)
def test_questions_of_all_layouts_are_understood(row, expected):
    assert questions_of(row, COLUMNS) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_split_lists_those_there_are(parquet, streaming):
    with pytest.raises(DataError, match=r"no split 'test': there are .*train.*Set data\.split_test"):
        hub_source(parquet, "test", streaming=streaming)


def test_a_part_of_a_split_can_serve_as_another(parquet):
    source = hub_source(parquet, "test", split_test="train[:10%]")
    assert sorted(number_of(item) for item in source.stream()) == list(range(6))


def test_an_unreachable_hub_is_one_sentence_with_the_way_out(cache):
    with pytest.raises(DataError, match=r"hub cannot be reached for 'nobody/nothing'.*HF_HUB_OFFLINE=1"):
        hub_source("nobody/nothing")


@pytest.mark.parametrize(
    "path, message",
    [("", "data.path is not set"), ("/no/where/*.parquet", "matches no file"), (__file__, "shards must be")],
)
def test_a_path_that_leads_nowhere_says_so(cache, path, message):
    with pytest.raises(DataError, match=message):
        hub_source(path)


# -------------------------------------------------------------------------------------------------------- easy-VQA


def test_easy_vqa_has_the_official_test_set_and_holds_val_out_of_train():
    sources = {split: EasyVQASource(EasyVQASettings(), split) for split in SPLITS}
    assert len(sources["test"]) == 1000 and len(sources["train"]) + len(sources["val"]) == 4000
    assert 330 < len(sources["val"]) < 470
    assert sum(len(asked) for asked in sources["test"].questions.values()) == 9673
    kinds = {question.kind for asked in sources["test"].questions.values() for question in asked}
    assert kinds == {"yes/no", "colour", "shape"}
    counts = np.bincount([item["label"] for item in sources["val"].stream()])
    assert counts.min() > 0.25 * len(sources["val"])


def test_the_shape_read_off_the_picture_is_what_the_questions_say():
    source = EasyVQASource(EasyVQASettings(), "test")
    said = 0
    for number, item in zip(source.numbers, source.stream()):
        for question in item["questions"]:
            if question.answer in SHAPES:
                assert question.answer == SHAPES[item["label"]], (number, question)
                said += 1
    assert said > 700


def test_shapes_are_told_apart_down_to_a_few_pixels():
    for side in (8, 11, 20):
        picture = Image.new("RGB", (64, 64), (240, 250, 245))
        ImageDraw.Draw(picture).rectangle((30, 30, 30 + side, 29 + side), fill="brown")
        assert shape_of(picture) == "rectangle"
    tiny = EasyVQASource.tiny()
    assert all(SHAPES[item["label"]] == item["questions"][0].answer for item in tiny.stream())


def test_damaged_questions_are_one_sentence(tmp_path, monkeypatch):
    fill(tmp_path, {"train/questions.json": b"[[broken"})
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    with pytest.raises(DataError, match=r"questions\.json is not readable"):
        EasyVQASource(EasyVQASettings(), "val")
