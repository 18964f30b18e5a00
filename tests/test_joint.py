"""Several tasks in one loop: what they may not do to each other, what they do, and that it is written down."""

from __future__ import annotations

import json

import pytest
import torch
from fakes.interrupting import interrupted_after
from fakes.launching import launch
from safetensors.torch import load_file

import umm
from umm.config import load
from umm.data.shapes import ShapesSource
from umm.errors import ConfigError
from umm.evaluate import evaluate_run
from umm.loader import View
from umm.runs import Run
from umm.settings import ShapesSettings
from umm.train import train

OPTIM = "lr=2e-3 final_lr=1e-4 warmup=16 constant=0 decay=cosine decay_images=null clip=0.5 weight_decay=0.1".split()
DIT = "size=custom width=32 depth=3 heads=2 head_depth=0 norm=rms".split()
UND = "und.block=1 und.time=0.1 und.reader=attentive und.attentive.heads=2".split()
RECON = """
    recon.decoder.size=custom recon.decoder.width=32 recon.decoder.depth=1 recon.decoder.heads=2 recon.decoder.mlp=64
    recon.perceptual.name=none recon.adversarial.weight=0 recon.optim.warmup=0 recon.optim.lr=3e-3 recon.ema=0.9
""".split()


@pytest.fixture
def common(tmp_path):
    return f"""
        data.name=fakes.shades latent.name=fakes.space cache.dir={tmp_path / "cache"} cache.dtype=float32
        train.images=96 train.batch_size=16 train.workers=0 train.device=cpu train.log_every=2 train.save_every=32
        train.sample_every=1000 train.keep=9
    """.split()


def sections(*names: str) -> list[str]:
    """The same networks and optimisers for every task that has them."""
    found = [f"{name}.optim.{text}" for name in names for text in OPTIM] + [f"{name}.ema=0.9" for name in names]
    if "und" in names:
        found += [f"und.dit.{text}" for text in DIT] + [*UND, "und.train=trunk"]
    if "gen" in names:
        found += [f"gen.dit.{text}" for text in DIT] + ["gen.conditional=false"]
    return found


@pytest.fixture
def joint(common):
    mine = [f"gen.dit.{text}" for text in DIT] + [f"joint.optim.{text}" for text in OPTIM]
    return [*common, *mine, *UND, "joint.ema=0.9", "gen.conditional=false"]


def run_of(task: str, folder, settings: list[str], *more: str) -> Run:
    return Run(train(load(task, None, [*settings, f"run={folder}", *more])).parent)


def tensors(run: Run, learner: str, step: int | None = None, file: str = "model") -> dict[str, torch.Tensor]:
    folder = run.latest() if step is None else run.folder / "checkpoints" / f"{step:08d}"
    found = load_file(folder / f"{file}.safetensors")
    return {key.removeprefix(f"{learner}/"): value for key, value in found.items() if key.startswith(f"{learner}/")}


def same(one: dict, other: dict, prefixes: tuple[str, ...]) -> bool:
    """Are all tensors of `one` under these prefixes in `other`, bit for bit?"""
    keys = [key for key in one if key.startswith(prefixes)]
    assert keys
    return all(torch.equal(one[key], other[key]) for key in keys)


READ = ("dit.embed", "dit.time", "dit.blocks.0", "dit.blocks.1", "reader")  # what und sees with und.block=1


def test_a_part_alone_is_the_run_of_its_own_task(common, joint, tmp_path):
    gen = tensors(run_of("gen", tmp_path / "gen", common, *sections("gen")), "gen.dit")
    alone = run_of("joint", tmp_path / "g", joint, "joint.parts=[gen]")
    assert same({f"dit.{k}": v for k, v in gen.items()}, tensors(alone, "joint.trunk"), ("dit.",))
    und = run_of("und", tmp_path / "und", common, *sections("und"))
    alone = run_of("joint", tmp_path / "u", joint, "joint.parts=[und]")
    for file in ("model", "ema"):
        assert same(tensors(und, "und.trunk", file=file), tensors(alone, "joint.trunk", file=file), READ)


def test_a_stopped_partner_changes_nothing_and_a_moving_one_does(joint, tmp_path):
    runs = {
        name: tensors(run_of("joint", tmp_path / name, joint, *more), "joint.trunk")
        for name, more in {
            "gen": ["joint.parts=[gen]"],
            "und": ["joint.parts=[und]"],
            "both": [],
            "und stopped": ["joint.stop=[und]"],
            "gen stopped": ["joint.stop=[gen]"],
        }.items()
    }
    assert same(runs["gen"], runs["und stopped"], ("dit.",))
    assert same(runs["und"], runs["gen stopped"], READ)
    assert not same(runs["gen"], runs["both"], ("dit.blocks.0",))
    assert not same(runs["und"], runs["both"], ("dit.blocks.0",))
    assert not same(runs["gen"], runs["gen stopped"], ("dit.final",))  # it stands on another trunk


def test_a_generator_of_classes_is_paired_with_the_reader_too(common, joint, tmp_path):
    """Its table of classes is drawn last, so that the other first weights are those of a run without classes."""
    classes = [*(text for text in joint if text != "gen.conditional=false"), "gen.conditional=true"]
    own = [text for text in sections("gen") if text != "gen.conditional=false"]
    gen = tensors(run_of("gen", tmp_path / "gen", common, *own), "gen.dit")
    und = tensors(run_of("und", tmp_path / "und", common, *sections("und")), "und.trunk")
    assert gen["label.weight"].shape[0] > 1
    for name, more in {"alone": ["joint.parts=[gen]"], "und stopped": ["joint.stop=[und]"]}.items():
        made = run_of("joint", tmp_path / name, classes, *more)
        assert same({f"dit.{k}": v for k, v in gen.items()}, tensors(made, "joint.trunk"), ("dit.",))
    for name, more in {"reader": ["joint.parts=[und]"], "gen stopped": ["joint.stop=[gen]"]}.items():
        made = run_of("joint", tmp_path / name, classes, *more)
        assert same(und, tensors(made, "joint.trunk"), READ)


def test_parts_that_share_nothing_equal_separate_runs(common, tmp_path):
    own = [*sections("gen"), *RECON, *(f"und.optim.{text}" for text in OPTIM)]
    together = run_of("joint", tmp_path / "all", common, *own, "joint.share=nothing", "joint.parts=[gen,und,recon]")
    for task, learner, settings in [
        ("gen", "gen.dit", sections("gen")),
        ("und", "und.probe", [text for text in own if text.startswith("und")]),
        ("recon", "recon.decoder", RECON),
    ]:
        alone = run_of(task, tmp_path / task, common, *settings)
        for file in ("model", "ema") if task != "und" else ("model",):
            one = tensors(alone, learner, file=file)
            assert same(one, tensors(together, learner, file=file), ("",)), task
    assert set(umm.load(together.folder).heads) == {"dit", "und", "decoder"}


def test_in_turn_each_part_has_the_pictures_and_the_schedule_it_has_alone(joint, tmp_path):
    und = tensors(run_of("joint", tmp_path / "und", joint, "joint.parts=[und]"), "joint.trunk")
    gen = tensors(run_of("joint", tmp_path / "gen", joint, "joint.parts=[gen]"), "joint.trunk")
    turns = [*joint, "joint.sequential=true", "train.images=192"]
    run = run_of("joint", tmp_path / "turns", turns, "joint.parts=[gen,und]", "joint.stop=[gen]")
    assert same(und, tensors(run, "joint.trunk"), READ)  # gen went first and moved nothing that und reads
    run = run_of("joint", tmp_path / "other", turns, "joint.parts=[gen,und]", "joint.stop=[und]")
    assert same(gen, tensors(run, "joint.trunk"), ("dit.",))
    first = [row for row in run.read_log() if row["images"] <= 96]
    assert all("gen.dit.loss" in row and "und.trunk.loss" not in row for row in first)
    with pytest.raises(ConfigError, match="choose a multiple of 32"):
        run_of("joint", tmp_path / "odd", [*turns, "train.images=80"])


def test_micro_batches_and_an_interruption_do_not_change_a_joint_run(joint, tmp_path):
    whole = run_of("joint", tmp_path / "whole", joint)
    parts = run_of("joint", tmp_path / "parts", joint, "train.accumulate=2")
    for key, value in tensors(whole, "joint.trunk").items():
        torch.testing.assert_close(tensors(parts, "joint.trunk")[key], value, rtol=1e-3, atol=1e-5)
    with interrupted_after(3):
        run_of("joint", tmp_path / "cut", joint)
    cut = run_of("joint", tmp_path / "cut", joint)
    for file in ("model", "ema"):
        assert same(tensors(whole, "joint.trunk", file=file), tensors(cut, "joint.trunk", file=file), ("",))


@pytest.mark.slow
def test_two_processes_train_a_shared_trunk_like_one(joint, tmp_path):
    one = run_of("joint", tmp_path / "one", joint)
    done = launch(2, "train", "--task", "joint", *joint, f"run={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-2000:]
    other = tensors(Run(tmp_path / "two"), "joint.trunk")
    for key, value in tensors(one, "joint.trunk").items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4)


def test_the_log_says_how_the_gradients_agree(joint, tmp_path):
    rows = run_of("joint", tmp_path / "run", joint, "train.log_every=1").read_log()
    assert all(-1 <= row["joint.trunk.cosine"] <= 1 and 0 < row["joint.trunk.norm_share"] <= 1 for row in rows)
    assert {"gen.dit.loss", "gen.dit.grad_norm", "und.trunk.loss", "und.trunk.grad_norm"} <= rows[0].keys()
    rows = run_of("joint", tmp_path / "stopped", joint, "joint.stop=[und]").read_log()
    assert "joint.trunk.cosine" not in rows[0]


def test_a_balanced_partner_weighs_what_its_weight_says(joint, tmp_path):
    """At weight 0 und moves only its reader, however its gradient is scaled; at other weights the trunk feels it."""
    plain = tensors(run_of("joint", tmp_path / "stop", joint, "joint.stop=[und]"), "joint.trunk")
    zero = run_of("joint", tmp_path / "zero", joint, "joint.balance=true", "joint.weights.und=0")
    half = run_of("joint", tmp_path / "half", joint, "joint.balance=true", "joint.weights.und=0.5")
    assert same(plain, tensors(zero, "joint.trunk"), ("dit.",))
    assert not same(plain, tensors(half, "joint.trunk"), ("dit.blocks.0",))


@pytest.mark.parametrize("placebo", ["shuffled_tokens", "gaussian", "permuted_labels"])
def test_a_placebo_changes_its_own_side_only(joint, tmp_path, placebo):
    """With the placebo's part stopped, the other one is the specialist."""
    part, other = ("und", "gen") if placebo == "permuted_labels" else ("gen", "und")
    alone = tensors(run_of("joint", tmp_path / "alone", joint, f"joint.parts=[{other}]"), "joint.trunk")
    stopped = run_of("joint", tmp_path / "stopped", joint, f"joint.placebo={placebo}", f"joint.stop=[{part}]")
    assert same(alone, tensors(stopped, "joint.trunk"), READ if other == "und" else ("dit.",))
    real = run_of("joint", tmp_path / "real", joint).read_log()[-1]
    mixed = run_of("joint", tmp_path / "mixed", joint, f"joint.placebo={placebo}").read_log()[-1]
    key = f"{part}.{'trunk' if part == 'und' else 'dit'}.loss"
    assert mixed[key] != real[key]


def test_twice_means_another_order_and_other_noise(joint, tmp_path):
    run = run_of("joint", tmp_path / "run", joint, "joint.parts=[und]", "joint.twice=true")
    row = run.read_log()[-1]
    assert row["und.trunk.loss"] != row["und2.trunk.loss"]
    assert set(umm.load(run.folder).heads) == {"dit", "und"}


def test_permuted_labels_are_those_of_other_pictures_and_a_limit_keeps_the_first():
    source = ShapesSource(ShapesSettings(train=20, image_size=32), "train")
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    view = View(source, order=order)
    assert [view[i]["label"] for i in range(20)] == [source[int(order[i])]["label"] for i in range(20)]
    assert torch.equal(view[3]["image"], source[3]["image"])
    few = View(source, 5)
    assert len(few) == 5 and few[4]["id"] == source[4]["id"]


def test_a_joint_model_samples_classifies_and_is_judged(common, joint, tmp_path):
    decoder = run_of("recon", tmp_path / "recon", common, *RECON)
    settings = [*joint, f"gen.decoder={decoder.folder}", "eval.sampler.steps=3", "eval.features=[pixels]"]
    settings += ["eval.bootstrap=50", "eval.noises=[0]"]
    run = run_of("joint", tmp_path / "run", settings)
    model = umm.load(run.folder)
    assert model.sample(num=2).shape == (2, 3, 16, 16) and model.classify(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    table = evaluate_run(str(run.folder))
    assert "accuracy" in table and "fd" in table
    found = json.loads((run.folder / "eval" / "val.json").read_text())["numbers"]
    assert {"accuracy", "fd"} <= {row["metric"] for row in found}
    evaluate_run(str(run.folder), ["eval.cached=true"])
    cached = json.loads((run.folder / "eval" / "val.json").read_text())["numbers"]
    for one, other in zip(found, cached):
        assert one["metric"] == other["metric"] and one["value"] == pytest.approx(other["value"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["gen.optim.lr=1e-3"], "set joint.optim"),
        (["und.ema=0.9"], "set joint.ema"),
        (["und.dit.width=8"], "set gen.dit"),
        (["und.kind=vqa"], "set joint.share=nothing"),
        (["joint.parts=[gen,gen]"], "each once"),
        (["joint.parts=[recon]"], "needs gen or und"),
        (["joint.parts=[und]", "joint.placebo=gaussian"], "changes gen, which is not among"),
        (["joint.parts=[gen]", "joint.placebo=permuted_labels"], "changes und, which is not among"),
        (["joint.share=nothing", "joint.stop=[und]"], "set joint.share=trunk"),
        (["joint.share=nothing", "und.train=trunk"], "two trunks"),
        (["joint.share=nothing", "joint.weights.und=5"], "joint.weights speaks of what the parts share"),
        (["joint.parts=[und]", "joint.stop=[gen]"], "joint.stop names gen, which is not among joint.parts"),
        (["joint.parts=[und]", "joint.weights.gen=5"], "joint.weights names gen, which is not among joint.parts"),
        (["joint.parts=[und]", "joint.balance=true"], "joint.balance has no effect on und alone"),
        (["joint.parts=[gen,recon]", "joint.balance=true"], "joint.balance has no effect on gen alone"),
        (["joint.parts=[und]", "joint.sequential=true"], "joint.sequential has no effect on und alone"),
        (["joint.share=adapter", "joint.parts=[und]", "joint.stop=[gen]"], "joint.stop names gen"),
    ],
)
def test_contradictions_are_refused(joint, tmp_path, settings, words):
    settings = settings if "und.dit.width=8" not in settings else [*settings, "und.dit.size=custom"]
    with pytest.raises(ConfigError, match=words):
        run_of("joint", tmp_path / "run", [*joint, *settings])
