"""Judging a run: what is measured, what is marked, what is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from fakes.launching import launch

import umm
from umm.config import load
from umm.errors import ConfigError, DataError, UmmError
from umm.evaluate import evaluate_run, reconstruct_files
from umm.train import train
from umm.transforms import to_pil

QUICK = ["eval.metrics=[psnr,ssim,fd]", "eval.features=[pixels]", "eval.bootstrap=50"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged") / "run"
    settings = f"""
        run={folder} data.name=fakes.pictures latent.name=fakes.space recon.decoder.size=custom recon.decoder.width=32
        recon.decoder.depth=1 recon.decoder.heads=2 recon.decoder.mlp=64 recon.perceptual.name=none
        recon.adversarial.weight=0 recon.noise=0 recon.optim.warmup=0 recon.optim.lr=3e-3 recon.ema=0.9
        train.images=4000 train.batch_size=16 train.workers=0 train.device=cpu cache.dir={folder.parent}/cache
    """
    train(load("recon", None, settings.split()))
    return folder


def numbers(folder: Path, split: str = "val") -> dict[str, dict]:
    return {row["metric"]: row for row in json.loads((folder / "eval" / f"{split}.json").read_text())["numbers"]}


def test_a_trained_decoder_beats_both_baselines(run):
    evaluate_run(str(run), QUICK)
    found = numbers(run)
    best = found["psnr"]
    assert best["low"] > found["psnr of the mean picture"]["high"] + 3
    assert best["low"] > found["psnr of an untrained decoder"]["high"] + 3
    assert best["low"] <= best["value"] <= best["high"] and best["n"] == 37


def test_the_numbers_are_those_of_the_public_interface(run):
    """What the table says is what a user computes with umm.load and a for loop."""
    evaluate_run(str(run), QUICK)
    items = pq.read_table(run / "items" / "val.parquet").to_pydict()
    model, source = umm.load(run), umm.find("data", "fakes.pictures")
    source = source.from_config(source.Config(), "val")
    for picture, psnr in list(zip(items["id"], items["psnr"]))[:5]:
        real = source[source.ids.index(picture)]["image"].float() / 255
        fake = (model.reconstruct(real[None])[0] * 255).round() / 255
        assert psnr == pytest.approx(float(-10 * torch.log10((real - fake).double().square().mean())), abs=1e-4)


def test_every_number_has_a_fingerprint_and_its_provenance(run):
    evaluate_run(str(run), [*QUICK, "eval.split=test"])
    result = json.loads((run / "eval" / "test.json").read_text())
    assert {"psnr", "ssim", "fd@pixels"} <= result["fingerprints"].keys()
    assert result["provenance"]["commit"] and result["provenance"]["seed"] == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(row["split"] == "test" and row["metric"] == "psnr" for row in logged)


def test_a_judge_that_took_part_in_training_is_marked_and_not_in_the_headline(run, monkeypatch):
    from umm.metrics.psnr import PSNR

    monkeypatch.setattr(PSNR, "families", ("patches",))
    text = evaluate_run(str(run), QUICK)
    assert "psnr †" in text and "patches took part in training" in text
    lines = text.splitlines()
    assert next(i for i, l in enumerate(lines) if l.startswith("ssim")) < next(
        i for i, l in enumerate(lines) if l.startswith("psnr †")
    )
    assert numbers(run)["psnr"]["headline"] is False


def test_missing_weights_are_said_and_do_not_stop_the_rest(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = evaluate_run(str(run), ["eval.metrics=[psnr,lpips,fd]", "eval.features=[inception]"])
    assert "psnr" in text and text.count("note: not measured") == 2


def test_evaluation_cannot_change_what_was_trained(run):
    with pytest.raises(UmmError, match="would change what"):
        evaluate_run(str(run), ["recon.noise=1"])
    with pytest.raises(UmmError, match="would change what"):
        evaluate_run(str(run), ["train.images=3"])


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(UmmError, match="is not a run"):
        evaluate_run(str(tmp_path))


def test_reconstruct_draws_any_picture_beside_its_reconstruction(run, tmp_path):
    for i, size in enumerate([(40, 30), (16, 16), (9, 50)]):
        to_pil(torch.rand(3, *size, generator=torch.Generator().manual_seed(i))).save(tmp_path / f"{i}.png")
    (tmp_path / "note.txt").write_text("not a picture")
    text = reconstruct_files(str(run), [str(tmp_path)], str(tmp_path / "out" / "grid.png"))
    assert text.count("psnr") == 3 and (tmp_path / "out" / "grid.png").stat().st_size > 1000


def test_an_unreadable_picture_of_a_folder_is_left_out_and_one_that_was_named_is_an_error(run, tmp_path):
    to_pil(torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"junk")
    out = str(tmp_path / "grid")
    text = reconstruct_files(str(run), [str(tmp_path), str(tmp_path / "good.png")], out)
    assert text.count("psnr") == 1 and re.search(r"note: left out: .*bad.png cannot be read", text)
    with pytest.raises(DataError, match=r"bad.png cannot be read"):
        reconstruct_files(str(run), [str(tmp_path / "bad.png")], out)
    (tmp_path / "good.png").unlink()
    with pytest.raises(DataError, match=r"holds no readable picture. left out: .*bad.png"):
        reconstruct_files(str(run), [str(tmp_path)], out)


def test_a_run_is_judged_on_another_data_set(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        picture = to_pil(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)))
        picture.save(tmp_path / "pictures" / f"{i}.png")
    other = ["data.name=folder", f"data.root={tmp_path / 'pictures'}", "data.holdout=0.3", "eval.metrics=[psnr]"]
    shutil.copytree(run, tmp_path / "run")
    evaluate_run(str(tmp_path / "run"), [*other, "eval.bootstrap=20"])
    ids = pq.read_table(tmp_path / "run" / "items" / "val.parquet")["id"].to_pylist()
    assert ids and all(picture.endswith(".png") for picture in ids)


def test_set_metrics_without_a_feature_space_are_an_error(run):
    with pytest.raises(ConfigError, match=r"fd compare features: .*eval.features="):
        evaluate_run(str(run), ["eval.metrics=[psnr,fd]", "eval.features=[]"])


def test_a_model_with_other_encoder_weights_is_refused(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    config = (tmp_path / "model" / "config.yaml").read_text()
    (tmp_path / "model" / "config.yaml").write_text(config.replace('"channels": 12', '"channels": 13'))
    with pytest.raises(UmmError, match="'channels' is 13"):
        umm.load(tmp_path / "model")


@pytest.mark.slow
def test_two_processes_judge_like_one(run):
    evaluate_run(str(run), QUICK)
    alone = numbers(run)
    done = launch(2, "eval", str(run), *QUICK)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, row in numbers(run).items():
        assert row["value"] == pytest.approx(alone[name]["value"], rel=1e-9), name
        assert row["n"] == alone[name]["n"]
