"""Readers of classes in the common loop: what they learn, what they read, and what the loop promises them."""

from __future__ import annotations

import json

import pytest
import torch
from fakes.interrupting import interrupted_after
from fakes.launching import launch
from safetensors.torch import load_file

import umm
from umm.config import load
from umm.errors import ConfigError, DataError, MissingHead, UmmError
from umm.evaluate import evaluate_run
from umm.heads.attentive import AttentiveReader
from umm.heads.dit import DiT
from umm.latents.base import LatentSpec
from umm.runs import Run
from umm.tasks.und import Und, class_records, read_parts, require_known
from umm.train import train

TRUNK = """
    und.train=trunk und.dit.size=custom und.dit.width=24 und.dit.depth=3 und.dit.heads=2 und.dit.head_depth=0
    und.dit.conditioning=tokens und.block=1 und.time=0.2 train.images=96
""".split()


@pytest.fixture
def settings(tmp_path):
    return f"""
        run={tmp_path / "run"} data.name=fakes.shades latent.name=fakes.space train.images=320 train.batch_size=16
        train.workers=0 train.device=cpu train.log_every=2 train.save_every=32 und.optim.lr=3e-2
        cache.dir={tmp_path / "latents"} cache.dtype=float32
    """.split()


def trained(settings, *more, **changes):
    return Run(train(load("und", None, [*settings, *more, *(f"{k}={v}" for k, v in changes.items())])).parent)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.latest() / "model.safetensors")


@pytest.mark.parametrize("reader", ["linear", "attentive"])
def test_a_reader_learns_classes_and_is_judged(settings, reader):
    run = trained(settings, "train.images=3200", f"und.reader={reader}")
    log = run.read_log()
    assert log[-1]["und.probe.loss"] < 0.8 * log[0]["und.probe.loss"]
    table = evaluate_run(str(run.folder))
    found = {r["metric"]: r for r in json.loads((run.folder / "eval" / "val.json").read_text())["numbers"]}
    assert found["accuracy"]["low"] > found["accuracy of the most frequent class alone"]["value"]
    assert "recall of middle" in table and "most often mistaken for" in table


def test_classify_gives_the_probabilities_that_evaluation_counts(settings):
    run = trained(settings, "train.images=1600")
    model, source = umm.load(run.folder), umm.find("data", "fakes.shades")
    source = source.from_config(source.Config(), "val")
    images = torch.stack([source[i]["image"] for i in range(len(source))]).float() / 255
    answers = model.classify(images)
    torch.testing.assert_close(answers.sum(1), torch.ones(len(images)))
    evaluate_run(str(run.folder))
    found = json.loads((run.folder / "eval" / "val.json").read_text())["numbers"][0]
    right = answers.argmax(1) == torch.tensor([source[i]["label"] for i in range(len(source))])
    assert found["value"] == pytest.approx(float(right.float().mean()))
    assert model.head("und").classes == ["dark", "middle", "light"]
    torch.testing.assert_close(model.classify(images[:1]), answers[:1])


def test_a_reader_of_a_width_of_its_own_is_as_large_for_every_latent(settings):
    readers = [AttentiveReader(LatentSpec(channels, 2, 2, 16), ["a", "b"], inner=128) for channels in (16, 384)]
    rest = [reader.parameter_count() - 128 * (reader.spec.channels + 1) for reader in readers]
    assert rest[0] == rest[1] and readers[0].heads == 2
    run = trained(settings, "und.reader=attentive", "und.attentive.width=24", "und.attentive.heads=3")
    reader = umm.load(run.folder).head("und")
    assert tuple(reader.enter.weight.shape) == (24, 12) and reader.heads == 3
    with pytest.raises(ConfigError, match=r"und.attentive.width.* must be at least 1"):
        load("und", None, ["und.attentive.width=0"])


def test_a_trunk_is_trained_read_and_saved(settings):
    run = trained(settings, *TRUNK)
    model = umm.load(run.folder)
    assert set(model.heads) == {"dit", "und"} and model.facts["und"]["trunk"] == {"block": 1, "time": 0.2}
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    answers = model.classify(images)
    torch.testing.assert_close(model.classify(images[1:2]), answers[1:2])
    latents = model.encode(images)
    other = at_time(model, 0.0)
    assert not torch.allclose(other.class_logits(latents), model.class_logits(latents))


def at_time(model, time):
    """The same model reading its trunk at another time."""
    from umm.model import UnifiedModel

    return UnifiedModel(model.space, dict(model.heads.items()), {"und": {"trunk": {"block": 1, "time": time}}})


def test_only_the_read_part_of_a_trunk_is_trained(settings):
    task = Und(load("und", None, [*settings, *TRUNK]), *space_and_val())
    module = task.phases[0].module
    dit = module.dit
    batch = {"latent": torch.randn(6, *task.space.spec.shape), "label": torch.arange(6) % 3}
    task.loss("trunk", batch, umm_rng(), 0)["loss"].backward()
    given = {name for name, p in dit.named_parameters() if p.grad is not None}
    assert given == {name for name, p in dit.named_parameters() if p.requires_grad}
    assert any(name.startswith("blocks.1.") for name in given)
    assert not any(name.startswith(("blocks.2.", "final")) for name in given)


def space_and_val():
    from fakes.shades import Config, Shades
    from fakes.space import Patches

    return Patches.tiny(), Shades(Config(), "val")


def umm_rng():
    from umm.rng import PictureRNG

    return PictureRNG(range(6), 0)


def test_the_trunk_starts_as_an_unconditional_generator_with_its_seed(settings):
    und = Und(load("und", None, [*settings, *TRUNK, "seed=3"]), *space_and_val())
    changes = [text.replace("und.dit", "gen.dit") for text in TRUNK if text.startswith("und.dit")]
    gen = umm.find("tasks", "gen")
    generator = gen(load("gen", None, [*changes, "seed=3", "gen.conditional=false"]), *space_and_val())
    theirs = generator.phases[0].module.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in und.phases[0].module.dit.state_dict().items())


@pytest.mark.parametrize("kind", [[], TRUNK, ["und.reader=attentive"]])
def test_micro_batches_train_like_one_large_batch(settings, tmp_path, kind):
    one = weights(trained(settings, *kind, run=tmp_path / "one"))
    four = weights(trained(settings, *kind, run=tmp_path / "four", **{"train.accumulate": 4}))
    assert one.keys() == four.keys()
    for key in one:
        torch.testing.assert_close(one[key], four[key], rtol=2e-4, atol=2e-5)


def test_an_interrupted_trunk_ends_bit_identical(settings, tmp_path):
    whole = trained(settings, *TRUNK, run=tmp_path / "whole")
    with interrupted_after(3):
        trained(settings, *TRUNK, run=tmp_path / "stopped")
    again = trained(settings, *TRUNK, run=tmp_path / "stopped")
    ours, theirs = weights(whole), weights(again)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_two_processes_train_and_judge_like_one(settings, tmp_path):
    one = trained(settings, *TRUNK, run=tmp_path / "one")
    done = launch(2, "train", "--task", "und", *settings, *TRUNK, f"run={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = weights(one), weights(Run(tmp_path / "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=2e-4, atol=2e-5)
    evaluate_run(str(tmp_path / "two"))
    alone = json.loads((tmp_path / "two" / "eval" / "val.json").read_text())["numbers"]
    done = launch(2, "eval", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "eval" / "val.json").read_text())["numbers"] == alone


def test_without_a_cache_the_encoder_runs_in_the_loop(settings):
    run = trained([text for text in settings if not text.startswith("cache.")])
    assert run.facts["finished"]


@pytest.mark.parametrize(
    "changes,match",
    [
        (["data.labels=false"], r"no 'label'"),
        (["data.labels=false", "cache.dir=null"], r"have no labels.*data\.columns"),
        (["data.bad_label=4"], r"label 7 is outside the 3 classes"),
        (["und.time=1.5", "und.train=trunk"], r"'und\.time' .* must be from 0 to 1"),
        ([*TRUNK, "und.block=3"], r"und\.block=3: this trunk has blocks 0 to 2"),
        (["und.reader=attentive", "und.attentive.heads=5"], r"attentive\.heads=5 does not divide"),
    ],
)
def test_bad_input_is_one_sentence(settings, changes, match):
    with pytest.raises(UmmError, match=match):
        trained(settings, *changes)


def test_a_label_outside_the_classes_is_named_wherever_it_is_met():
    for labels, wrong in (([0, 3], 3), ([2, -1, 0], -1)):
        with pytest.raises(DataError, match=f"label {wrong} is outside the 3 classes of 'mine'"):
            require_known(torch.tensor(labels), ["a", "b", "c"], "mine")
    require_known(torch.tensor([0, 2]), ["a", "b", "c"], "mine")


def test_labels_outside_the_classes_are_refused_in_evaluation(settings, monkeypatch):
    run = trained(settings, "train.images=16")
    monkeypatch.setattr("umm.tasks.und.labelled", lambda item: item | {"label": -1})
    with pytest.raises(DataError, match="label -1 is outside the 3 classes"):
        evaluate_run(str(run.folder))


def test_data_without_classes_is_refused(settings):
    space, val = space_and_val()
    val.classes = None
    with pytest.raises(DataError, match="has no classes to learn"):
        Und(load("und", None, settings), space, val)


def test_other_classes_than_the_trained_ones_are_refused(settings):
    run = trained(settings)
    with pytest.raises(DataError, match=r"knows the classes dark, middle, light.*\(3\), the pictures have .*\(4\)"):
        evaluate_run(str(run.folder), ["data.empty=true"])


def test_a_model_without_a_reader_says_how_to_train_one():
    space, _ = space_and_val()
    space.normalizer.fitted.fill_(True)
    with pytest.raises(MissingHead, match="umm train --task und"):
        umm.model.UnifiedModel(space, {}).classify(torch.rand(1, 3, 16, 16))


def test_records_hold_a_confusion_matrix_in_words():
    answers = [("p0", 0, 0), ("p1", 0, 1), ("p2", 0, 1), ("p3", 1, 1), ("p4", 1, 1), ("p5", 1, 1)]
    records = class_records(answers, ["cat", "dog", "emu"])
    values = {row["metric"]: (row["value"], row["n"]) for row in records.numbers}
    assert values["accuracy"] == (pytest.approx(4 / 6), 6)
    assert values["recall of cat"] == (pytest.approx(1 / 3), 3) and values["recall of dog"] == (1.0, 3)
    assert "recall of emu" not in values, "no picture, no recall"
    assert records.notes == ["cat is most often mistaken for dog (2 of 3)"]
    assert records.items["accuracy"]["p1"] == 0.0


def test_a_picture_judged_twice_is_an_error():
    with pytest.raises(UmmError, match="came twice"):
        class_records([("p0", 0, 0), ("p0", 0, 0)], ["cat"])


def test_a_class_without_training_pictures_is_refused(settings):
    with pytest.raises(DataError, match=r"class 'nobody' has no training picture \(1 of 4 classes\)"):
        trained(settings, "data.empty=true")


@pytest.mark.parametrize("conditioning", ["adaln", "tokens"])
@pytest.mark.parametrize("head_depth", [0, 1])
def test_what_a_reader_sees_is_what_gets_a_gradient(conditioning, head_depth):
    space, _ = space_and_val()
    dit = DiT.tiny(space.spec, 0, depth=3, conditioning=conditioning, head_depth=head_depth)
    seen = {id(parameter) for parameter in read_parts(dit, -2)}
    dit.features(torch.randn(2, *space.spec.shape), 0.3, -2).sum().backward()
    assert all((p.grad is not None) == (id(p) in seen) for p in dit.parameters() if p.requires_grad)
