"""All heads of one model beside the runs trained for one of them: whose difference it is, and from which pairs."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from umm.cli import cli
from umm.config import load
from umm.errors import DataError, MissingHead, UmmError
from umm.evaluate import evaluate_run
from umm.joint_eval import Judged, compared, evaluate_joint, part_config
from umm.judging import Records
from umm.runs import Run
from umm.tasks.recon import Recon
from umm.tasks.und import Und
from umm.train import train

QUICK = ["eval.images=24", "eval.bootstrap=50", "eval.features=[pixels]", "eval.noises=[0]", "eval.sampler.steps=2"]
RECON = """
    recon.decoder.size=custom recon.decoder.width=16 recon.decoder.depth=1 recon.decoder.heads=2 recon.decoder.mlp=32
    recon.perceptual.name=none recon.adversarial.weight=0 recon.optim.warmup=0 recon.optim.lr=3e-3
""".split()
GEN = "gen.dit.size=custom gen.dit.width=16 gen.dit.depth=1 gen.dit.heads=2 gen.dit.head_depth=0".split()
VQA = "und.kind=vqa und.vqa.width=16 und.vqa.heads=2 und.vqa.depth=1".split()


def common(folder, data: str = "fakes.shades") -> list[str]:
    return f"""
        data.name={data} latent.name=fakes.space cache.dir={folder / data} cache.dtype=float32 train.images=96
        train.batch_size=16 train.workers=0 train.device=cpu train.log_every=2 train.save_every=96
        train.sample_every=1000
    """.split()


def trained(task: str, folder, *settings: str) -> str:
    train(load(task, None, [*settings, f"run={folder}"]))
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    """A joint model whose parts share nothing, so that every part is bit for bit what it is alone."""
    folder = tmp_path_factory.mktemp("joint")
    base = common(folder)
    joint = [*base, *RECON, *GEN, *QUICK, "joint.share=nothing", "joint.parts=[gen,und,recon]"]
    return {
        "joint": trained("joint", folder / "joint", *joint),
        "recon": trained("recon", folder / "recon", *base, *RECON),
        "gen": trained("gen", folder / "gen", *base, *GEN, f"gen.decoder={folder / 'recon'}"),
        "und": trained("und", folder / "und", *base),
        "other": trained("recon", folder / "other", *base, *RECON, "seed=1"),
    }


def found(run: str, split: str = "val") -> dict:
    return json.loads((Run(run).folder / "eval" / f"{split}-joint.json").read_text())


def test_parts_that_share_nothing_differ_from_their_baselines_by_nothing(runs):
    text = evaluate_joint(runs["joint"], [runs["recon"], runs["gen"], runs["und"]])
    rows = found(runs["joint"])["rows"]
    assert {row["part"] for row in rows} == {"recon", "gen", "und"}
    against = {(row["part"], row["metric"], row.get("space")): row for row in rows}
    for key in [("recon", "psnr", None), ("und", "accuracy", None)]:
        difference = against[key]["difference"]
        assert (difference["value"], difference["low"], difference["high"], difference["p"]) == (0, 0, 0, 1)
        assert difference["n"] == against[key]["n"] == 24
    for part, space in [("recon", "pixels"), ("gen", "latents")]:
        assert against[part, "fd", space]["difference"] == {"value": 0}, "sets have no pairs, so no interval"
    assert "training images of each part" in text and "FLOPs" not in text and "trained with" not in text
    judged = json.loads((Run(runs["joint"]).folder / "eval" / "val.json").read_text())["numbers"]
    assert {row["part"] for row in judged} == {"recon", "gen", "und"}


def test_differences_are_those_of_the_pairs_in_the_items(runs):
    evaluate_joint(runs["joint"], [runs["other"]])
    row = next(row for row in found(runs["joint"])["rows"] if row["metric"] == "psnr")
    places = runs["joint"], f"{runs['other']}/baseline"  # it has another seed than it is judged with
    items = [pq.read_table(Run(place).folder / "items" / "val.parquet") for place in places]
    one, other = ({i: v for i, v in zip(t["id"].to_pylist(), t["psnr"].to_pylist()) if v is not None} for t in items)
    differences = np.array([one[i] - other[i] for i in other])
    assert row["difference"]["value"] == pytest.approx(differences.mean(), abs=1e-12)
    assert row["difference"]["value"] == pytest.approx(row["value"] - row["baseline_value"], abs=1e-9)
    half = 1.96 * differences.std(ddof=1) / len(differences) ** 0.5
    width = row["difference"]["high"] - row["difference"]["low"]
    assert row["difference"]["low"] < differences.mean() < row["difference"]["high"]
    assert 0.6 * 2 * half < width < 1.6 * 2 * half, "50 resamples of 24 pairs"


def test_a_baseline_judged_alike_before_is_not_judged_again_and_one_judged_otherwise_is(runs, monkeypatch):
    calls, whole = [], Recon.evaluate
    monkeypatch.setattr(Recon, "evaluate", staticmethod(lambda *given: calls.append(1) or whole(*given)))
    evaluate_joint(runs["joint"], [runs["recon"]])
    calls.clear()
    evaluate_joint(runs["joint"], [runs["recon"]])
    assert len(calls) == 1, "the joint model only"
    evaluate_joint(runs["joint"], [runs["recon"]], ["eval.images=20"])
    assert len(calls) == 3
    assert next(row for row in found(runs["joint"])["rows"] if row["metric"] == "psnr")["difference"]["n"] == 20


def test_a_baseline_keeps_its_own_evaluation(runs):
    file = Run(runs["recon"]).folder / "eval" / "val.json"
    evaluate_run(runs["recon"], ["eval.images=30", "eval.bootstrap=20"])
    own = file.read_text()
    evaluate_joint(runs["joint"], [runs["recon"]])
    assert file.read_text() == own and json.loads(own)["settings"]["images"] == 30
    beside = json.loads((Run(runs["recon"]).folder / "baseline" / "eval" / "val.json").read_text())
    assert beside["settings"]["images"] == 24


def test_what_a_baseline_learnt_from_otherwise_is_said(runs, tmp_path):
    other = [*common(tmp_path), *RECON, "data.count=60", "train.images=48", "train.save_every=48"]
    text = evaluate_joint(runs["joint"], [trained("recon", tmp_path / "few", *other)])
    words = "trained with data.count=60 (joint: 90), train.images=48 (joint: 96)"
    assert f"note: few, {words}: what differs is not its partner's doing alone" in text
    assert not (tmp_path / "few" / "eval").exists() and (tmp_path / "few" / "baseline" / "eval").exists()


def test_answers_with_other_classes_are_not_compared(runs, tmp_path):
    reader = trained("und", tmp_path / "und", *common(tmp_path), "data.empty=true", "data.limit=90")
    with pytest.raises(UmmError, match=r"knows the classes dark, middle, light, nobody \(4\), the joint model dark"):
        evaluate_joint(runs["joint"], [reader])
    many = trained("gen", tmp_path / "gen", *common(tmp_path), *GEN, "data.empty=true")
    text = evaluate_joint(runs["joint"], [many])
    assert "gen, gen: agreement with other classes is not compared" in text
    rows = [row for row in found(runs["joint"])["rows"] if row.get("baseline") == "gen"]
    assert "fd" in {row["metric"] for row in rows} and "class_agreement" not in {row["metric"] for row in rows}


def test_a_joint_model_of_fewer_parts_is_a_baseline_of_those(runs, tmp_path):
    """Its borrowed decoder is not its own result."""
    settings = [*common(tmp_path), *GEN, *QUICK, "joint.share=nothing", f"gen.decoder={runs['recon']}"]
    alone = trained("joint", tmp_path / "alone", *settings, "joint.parts=[gen]")
    evaluate_joint(runs["joint"], [alone])
    rows = [row for row in found(runs["joint"])["rows"] if row.get("baseline") == "alone"]
    assert {row["part"] for row in rows} == {"gen"}
    assert all(row["difference"]["value"] == pytest.approx(0) for row in rows if row["space"] == "latents")
    assert (tmp_path / "alone" / "eval" / "val.json").exists()  # the same pictures and seed: as umm eval judges it


def test_named_metrics_go_to_the_parts_that_can_take_them(runs):
    config = load("joint", None, ["eval.metrics=[psnr,fd,nearest]"])
    assert list(part_config(config, "recon", True).eval.metrics) == ["psnr", "fd"]
    assert list(part_config(config, "gen", True).eval.metrics) == ["fd", "nearest"]
    assert "psnr" in part_config(load("joint"), "recon").eval.metrics, "a joint run's metrics are the generator's"
    assert part_config(load("recon"), "vqa").und.kind == "vqa", "a section the run lacks has its defaults"


def test_questions_are_compared_with_pictures_as_the_unit(tmp_path):
    base = [*common(tmp_path, "fakes.riddles"), *VQA]
    settings = [*base, *GEN, *QUICK, "gen.conditional=false", "joint.share=nothing"]
    joint = trained("joint", tmp_path / "joint", *settings)
    alone = trained("und", tmp_path / "alone", *base)
    evaluate_joint(joint, [alone])
    rows = {row["metric"]: row for row in found(joint)["rows"] if row["part"] == "vqa"}
    assert rows["vqa accuracy"]["difference"] == {"value": 0, "low": 0, "high": 0, "p": 1, "n": 48}
    assert rows["vqa accuracy on colour"]["difference"] == {"value": 0}


def records(**scores: float) -> Records:
    row = {"metric": "vqa accuracy", "value": sum(scores.values()) / len(scores), "higher_is_better": True}
    row |= {"headline": True, "conflict": None, "n": len(scores)}
    return Records([row], {"vqa accuracy": {key.replace("_", "#"): value for key, value in scores.items()}})


def test_two_questions_of_a_picture_are_one_observation():
    """By hand: picture a differs by 1 on both questions, b and c on none; the mean is 1/3 with sandwich error
    sqrt(3/2 * (4/9 * 4 + ...)) / 6, so t = 1 on 2 degrees of freedom and p = 0.4226."""
    one = records(a_0=1, a_1=1, b_0=1, b_1=0, c_0=0, c_1=1)
    other = records(a_0=0, a_1=0, b_0=1, b_1=0, c_0=0, c_1=1)
    rows, notes = compared(Judged("j", {"vqa": one}, []), [Judged("b", {"vqa": other}, [])], 0, 200)
    difference = rows[0]["difference"]
    assert difference["value"] == pytest.approx(1 / 3) and not notes
    assert difference["p"] == pytest.approx(0.42265, abs=1e-4)


def test_other_pictures_are_said_and_not_paired():
    one, other = records(a_0=1, b_0=0), records(a_0=1, c_0=1)
    rows, notes = compared(Judged("j", {"vqa": one}, []), [Judged("b", {"vqa": other}, [])], 0, 200)
    assert rows[0]["difference"] == {"value": -0.5} and "same pictures" in notes[0]


def test_a_part_that_cannot_be_judged_is_a_note(runs, monkeypatch):
    def refuse(*given):
        raise DataError("these pictures have no labels.")

    monkeypatch.setattr(Und, "evaluate", staticmethod(refuse))
    text = evaluate_joint(runs["joint"], [runs["recon"]])
    assert "note: joint, und was not judged: these pictures have no labels." in text and "psnr" in text
    with pytest.raises(DataError, match="have no labels"):
        evaluate_joint(runs["und"])


def test_baselines_of_another_space_or_without_a_common_head_are_refused(runs, tmp_path):
    with pytest.raises(MissingHead, match="has no head to compare with recon"):
        evaluate_joint(runs["recon"], [runs["und"]])
    settings = common(tmp_path)
    far = trained("recon", tmp_path / "wide", *settings, *RECON, "latent.channels=8")
    with pytest.raises(UmmError, match=r"another latent space \('channels' is 8, here 12\)"):
        evaluate_joint(runs["joint"], [far])


def test_the_command_compares_and_refuses_a_baseline_alone(runs):
    refused = CliRunner().invoke(cli, ["eval", runs["joint"], "--baseline", runs["recon"]])
    assert refused.exit_code == 2 and "give --joint too" in refused.output
    done = CliRunner().invoke(cli, ["eval", "--joint", runs["joint"], "--baseline", runs["und"]])
    assert done.exit_code == 0 and "baseline" in done.output and "-joint.json" in done.output
