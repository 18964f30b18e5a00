"""Parts that share an adapter: identity at first, whose gradients move it, what holds it, and that it is saved."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from fakes.interrupting import interrupted_after
from fakes.launching import launch
from fakes.riddles import Config as RiddlesConfig
from fakes.riddles import Riddles
from fakes.space import Config as SpaceConfig
from fakes.space import Patches
from test_joint import DIT, OPTIM, RECON, run_of, same, tensors

import umm
from umm.best_of import as_read
from umm.config import load
from umm.errors import ConfigError, UmmError
from umm.evaluate import evaluate_run
from umm.features import latent_facts, standardised
from umm.heads.adapter import Adapter
from umm.joint_eval import evaluate_joint
from umm.latents._adapted import adapted
from umm.latents.base import LatentSpec
from umm.model import load_head
from umm.rng import seeded_init
from umm.runs import Run
from umm.train import Trainer

SPEC = Patches(SpaceConfig()).spec
VQA = "und.kind=vqa und.vqa.width=16 und.vqa.heads=2 und.vqa.depth=1 und.blind=true".split()
OWN = {  # part -> its learner and the settings of its networks
    "gen": ("gen.dit", [f"gen.dit.{text}" for text in DIT] + ["gen.conditional=false"]),
    "und": ("und.probe", ["und.reader=attentive", "und.attentive.heads=2"]),
    "recon": ("recon.decoder", RECON[:-1]),
}
OWN = {part: (key, [*own, *(f"{part}.optim.{text}" for text in OPTIM)]) for part, (key, own) in OWN.items()}
ALL = "joint.parts=[gen,und,recon]"


@pytest.fixture
def common(tmp_path):
    return f"""
        data.name=fakes.shades latent.name=fakes.space cache.dir={tmp_path / "cache"} cache.dtype=float32
        train.images=96 train.batch_size=16 train.workers=0 train.device=cpu train.log_every=1 train.save_every=32
        train.sample_every=1000 train.keep=9
    """.split()


@pytest.fixture
def joint(common):
    mine = [f"joint.optim.{text}" for text in OPTIM] + ["joint.ema=0.9", "joint.share=adapter"]
    return [*common, *mine, "joint.adapter.hidden=16", *(text for _, own in OWN.values() for text in own)]


def adapters(run: Run, file: str = "model", step: int | None = None) -> dict[str, torch.Tensor]:
    return tensors(run, "joint.adapter", step, file)


def moved(run: Run) -> bool:
    """Has anything moved the adapter, whose last layer begins at zero?"""
    return bool(adapters(run)["residual.2.weight"].any())


def last(run: Run, key: str) -> float:
    return run.read_log()[-1][key]


def an_adapter(spec: LatentSpec, scale: float) -> Adapter:
    with seeded_init("adapter"):
        made = Adapter(spec, hidden=16, depth=2)
        torch.nn.init.normal_(made.residual[-1].weight, std=scale)
    return made


# ------------------------------------------------------------------------------------------------------------- the net


@pytest.mark.parametrize("mode", ["none", "channel", "position", "sphere"])
def test_an_untrained_adapter_changes_no_bit_and_a_trained_one_no_length(mode):
    space = Patches(SpaceConfig(normalizer=mode))
    space.normalizer.set(torch.tensor(0.1), torch.tensor(2.0))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    raw, z = space.raw(images), space.encode(images)
    fresh = adapted(space, Adapter(space.spec, 16, 2))
    assert torch.equal(fresh.encode(images), z) and torch.equal(fresh.normalizer.restored(raw), raw)
    other = adapted(space, an_adapter(space.spec, 0.5))
    y = other.encode(images)
    assert not torch.allclose(y, z, atol=0.1)
    torch.testing.assert_close(y.norm(dim=1), z.norm(dim=1))
    if mode != "sphere":
        torch.testing.assert_close(other.normalizer.undo(y), other.normalizer.restored(raw))
    assert torch.equal(space.encode(images), z), "the space itself is left as it was"


def test_a_reader_behind_the_generators_adapter_does_not_adapt_twice():
    """As `umm best-of` gives one run's latents to another's reader, which measured its own statistics."""
    images, adapter = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), an_adapter(SPEC, 0.5)
    plain, one, other = (SimpleNamespace(space=Patches(SpaceConfig())) for _ in range(3))
    one.space, other.space = (adapted(run.space, adapter) for run in (one, other))
    for run in (one, other):
        run.space.normalizer.set(torch.tensor(0.1), torch.tensor(2.0))
    z = one.space.encode(images)
    torch.testing.assert_close(as_read(other, one, z), z)
    torch.testing.assert_close(as_read(one, plain, plain.space.encode(images)), z)


def test_a_token_of_zeros_stays_and_has_a_finite_gradient():
    adapter = an_adapter(LatentSpec(4, 2, 2, 8), 0.5)
    z = torch.zeros(1, 4, 2, 2, requires_grad=True)
    out = adapter(z)
    out.sum().backward()
    assert not out.any() and z.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


# ------------------------------------------------------------------------------------------------------------- the null


def test_with_all_parts_stopped_each_is_the_run_of_its_own_task(common, joint, tmp_path):
    run = run_of("joint", tmp_path / "all", joint, ALL, "joint.stop=[gen,und,recon]")
    assert not moved(run)
    for part, (learner, own) in OWN.items():
        alone = run_of(part, tmp_path / part, [*common, *own], f"{part}.ema=0.9")
        for file in ("model", "ema"):
            assert same(tensors(alone, learner, file=file), tensors(run, learner, file=file), ("",)), (part, file)


def test_the_first_step_of_a_moving_adapter_is_that_of_a_stopped_one(joint, tmp_path):
    rows = [
        run_of("joint", tmp_path / f"run{i}", joint, ALL, f"joint.stop={stop}").read_log()
        for i, stop in enumerate(("[]", "[gen,und,recon]"))
    ]
    for key in ("gen.dit.loss", "und.probe.loss", "recon.decoder.loss", "gen.dit.grad_norm"):
        assert rows[0][0][key] == rows[1][0][key]
        assert rows[0][-1][key] != rows[1][-1][key]
    assert rows[0][0]["teacher.adapter.drift"] == 0 and rows[0][0]["teacher.adapter.variance"] == 1


@pytest.mark.parametrize("part", ["gen", "und", "recon"])
def test_a_part_that_moves_the_adapter_alone_does_so_as_if_the_others_were_not_there(joint, tmp_path, part):
    others = [other for other in OWN if other != part]
    stopped = run_of("joint", tmp_path / "stopped", joint, ALL, f"joint.stop=[{','.join(others)}]")
    alone = run_of("joint", tmp_path / "alone", joint, f"joint.parts=[{part}]")
    assert moved(alone)
    for file in ("model", "ema"):
        assert same(adapters(alone, file), adapters(stopped, file), ("",))
        learner = OWN[part][0]
        assert same(tensors(alone, learner, file=file), tensors(stopped, learner, file=file), ("",))
    assert last(stopped, f"{part}.adapter.grad_norm") > 0 == last(stopped, f"{others[0]}.adapter.grad_norm")
    assert not any("cosine" in key for key in stopped.read_log()[-1])


# ---------------------------------------------------------------------------------------------------------- what moves


def test_weights_balance_and_logged_agreement(joint, tmp_path):
    plain = run_of("joint", tmp_path / "plain", joint)
    row = plain.read_log()[-1]
    assert -1 <= row["joint.adapter.cosine"] <= 1 and 0 < row["joint.adapter.norm_share"] < 1
    three = run_of("joint", tmp_path / "three", joint, ALL).read_log()[-1]
    pairs = [key for key in three if key.startswith("joint.adapter.cosine_")]
    assert pairs == [f"joint.adapter.cosine_{pair}" for pair in ("gen_und", "gen_recon", "und_recon")]
    heavy = run_of("joint", tmp_path / "heavy", joint, "joint.weights.und=10")
    even = run_of("joint", tmp_path / "even", joint, "joint.balance=true")
    assert not same(adapters(plain), adapters(heavy), ("residual.0",))
    assert not same(adapters(plain), adapters(even), ("residual.0",))
    free = ["joint.adapter.teacher=0", "joint.weights.und=0"]
    gen = run_of("joint", tmp_path / "gen", joint, "joint.adapter.teacher=0", "joint.parts=[gen]")
    assert same(adapters(gen), adapters(run_of("joint", tmp_path / "zero", joint, *free)), ("",))


def test_a_stronger_teacher_holds_latents_nearer(joint, tmp_path):
    drifts = {}
    for weight in (0, 1, 1000):
        run = run_of("joint", tmp_path / str(weight), joint, f"joint.adapter.teacher={weight}", "train.images=480")
        drifts[weight] = last(run, "teacher.adapter.drift")
    assert drifts[1000] < 0.25 * drifts[0] and drifts[1000] < drifts[1] < drifts[0]


def test_latents_collapse_only_where_the_target_may_be_moved(joint, tmp_path):
    """Without a teacher, the flow loss flattens latents if it may: that is how easy it is to cheat."""
    free = "joint.parts=[gen] joint.adapter.teacher=0 joint.optim.lr=1e-2 train.images=1600 train.log_every=50".split()
    settings = {"both": ["joint.adapter.flow=both"], "input": []}
    settings["held"] = [*settings["both"], "joint.adapter.teacher=10"]
    kept = {}
    for name, more in settings.items():
        run = run_of("joint", tmp_path / name, joint, *free, *more)
        kept[name] = last(run, "teacher.adapter.dimension"), last(run, "gen.dit.loss")
    assert kept["both"][0] < 0.4 and kept["input"][0] > 0.7 and kept["held"][0] > 0.9
    assert kept["both"][1] < 0.9 * kept["input"][1], "the loss of a collapsed latent looks good"


@pytest.mark.parametrize("placebo", ["shuffled_tokens", "gaussian", "permuted_labels"])
def test_a_placebo_takes_the_place_of_its_part(joint, tmp_path, placebo):
    part, other = ("und", "gen") if placebo == "permuted_labels" else ("gen", "und")
    run = run_of("joint", tmp_path / "run", joint, f"joint.placebo={placebo}", f"joint.stop=[{part}]")
    alone = run_of("joint", tmp_path / "alone", joint, f"joint.parts=[{other}]")
    assert same(adapters(alone), adapters(run), ("",))
    real = run_of("joint", tmp_path / "real", joint)
    learner = OWN[part][0]
    mixed = run_of("joint", tmp_path / "mixed", joint, f"joint.placebo={placebo}")
    assert mixed.read_log()[0][f"{learner}.loss"] != real.read_log()[0][f"{learner}.loss"]
    assert (last(mixed, f"{part}.adapter.grad_norm") == 0) == (placebo == "gaussian"), "noise is not the adapter's"


def test_in_turn_each_part_has_the_pictures_it_has_alone(joint, tmp_path):
    turns = [*joint, "joint.sequential=true", "train.images=192", "joint.parts=[gen,und]"]
    run = run_of("joint", tmp_path / "turns", turns, "joint.stop=[gen]")
    und = run_of("joint", tmp_path / "und", joint, "joint.parts=[und]")
    assert same(adapters(und), adapters(run), ("",))
    assert same(tensors(und, "und.probe"), tensors(run, "und.probe"), ("",))


def test_micro_batches_and_an_interruption_do_not_change_a_run(joint, tmp_path):
    whole = run_of("joint", tmp_path / "whole", joint, ALL)
    parts = run_of("joint", tmp_path / "parts", joint, ALL, "train.accumulate=2")
    for key, value in adapters(whole).items():
        torch.testing.assert_close(adapters(parts)[key], value, rtol=1e-3, atol=1e-5)
    with interrupted_after(3):
        run_of("joint", tmp_path / "cut", joint, ALL)
    cut = run_of("joint", tmp_path / "cut", joint, ALL)
    for file in ("model", "ema"):
        for learner in ("joint.adapter", *(key for key, _ in OWN.values())):
            assert same(tensors(whole, learner, file=file), tensors(cut, learner, file=file), ("",))


@pytest.mark.slow
def test_two_processes_move_an_adapter_like_one(joint, tmp_path):
    one = run_of("joint", tmp_path / "one", joint, ALL)
    done = launch(2, "train", "--task", "joint", *joint, ALL, f"run={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-2000:]
    for key, value in adapters(one).items():
        torch.testing.assert_close(adapters(Run(tmp_path / "two"))[key], value, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ the model


def test_a_saved_model_encodes_through_the_averaged_adapter(joint, tmp_path):
    config = load("joint", None, [*joint, f"run={tmp_path / 'run'}", ALL])
    trainer = Trainer(config)
    trainer.train()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = umm.load(tmp_path / "run")
    z = model.encode(images)
    space = trainer.space  # unadapted, with the run's statistics
    learner = next(one for one in trainer.learners if one.key == "joint.adapter")
    with torch.no_grad():
        assert torch.equal(z, learner.averaged(space.encode(images)))
        assert torch.equal(z, model.latents_of({"latent": space.raw(images)})), "cached latents are adapted when read"
        assert torch.equal(z, standardised({"image": images}, model.space)), "and so is what probes read"
        assert latent_facts(model.space)["statistics"] != latent_facts(space)["statistics"]
        assert not torch.allclose(z, space.encode(images), atol=1e-4)
        undone = space.normalizer.undo(z)
        torch.testing.assert_close(model.reconstruct(images), model.head("decoder")(undone).clamp(0, 1))
    assert model.sample(num=2).shape == (2, 3, 16, 16) and model.classify(images).shape == (3, 3)
    assert model.facts["adapter"] == {"decoder": "trained on adapted latents"}


def test_a_borrowed_decoder_is_named_and_judged_on_both_latents(common, joint, tmp_path):
    decoder = run_of("recon", tmp_path / "recon", common, *OWN["recon"][1])
    settings = [f"gen.decoder={decoder.folder}", "eval.sampler.steps=2", "eval.features=[pixels]", "eval.bootstrap=50"]
    run = run_of("joint", tmp_path / "run", joint, *settings, "eval.noises=[0]", "train.images=192")
    table = evaluate_run(str(run.folder))
    assert "the decoder was trained on unadapted latents" in table
    found = {row["metric"]: row for row in json.loads((run.folder / "eval" / "val.json").read_text())["numbers"]}
    psnr = {k: found[f"psnr of the borrowed decoder, {k} latents"]["value"] for k in ("adapted", "unadapted")}
    assert found["latent drift"]["value"] > 0 and psnr["adapted"] != psnr["unadapted"]
    assert psnr["adapted"] == pytest.approx(found["psnr at latent noise 0"]["value"], abs=0.01)
    text = evaluate_joint(str(run.folder), [str(decoder.folder)])
    rows = json.loads((run.folder / "eval" / "val-joint.json").read_text())["rows"]
    own = next(row for row in rows if row["part"] == "recon" and row["metric"] == "psnr")
    assert own["value"] == pytest.approx(psnr["adapted"], abs=1e-3)
    assert own["baseline_value"] == pytest.approx(psnr["unadapted"], abs=1e-3)
    assert "through an adapter; the decoder was trained on unadapted latents" in text


def test_distances_in_latents_are_compared_behind_one_adapter_only(common, joint, tmp_path):
    quick = ["eval.sampler.steps=2", "eval.bootstrap=50", "eval.images=24"]
    run = run_of("joint", tmp_path / "run", joint, *quick, "joint.parts=[gen]")
    gen = run_of("gen", tmp_path / "gen", common, *OWN["gen"][1])
    assert "distances in latents are not compared" in evaluate_joint(str(run.folder), [str(gen.folder)])
    rows = json.loads((run.folder / "eval" / "val-joint.json").read_text())["rows"]
    assert rows and not any("baseline" in row for row in rows if row.get("space") == "latents")


def test_heads_behind_another_adapter_are_refused(joint, tmp_path):
    run = run_of("joint", tmp_path / "run", joint, ALL)
    model = umm.load(run.folder)
    load_head(run.folder, "dit", model.space)
    other = run_of("joint", tmp_path / "other", joint, ALL, "seed=1")
    with pytest.raises(UmmError, match="reads adapted latents and would get others"):
        load_head(other.folder, "dit", model.space)
    with pytest.raises(UmmError, match=r"the decoder of .* reads adapted latents"):
        run_of("joint", tmp_path / "third", joint, f"gen.decoder={run.folder}")


def test_questions_move_the_adapter_and_their_blind_twin_does_not(common, tmp_path):
    settings = [text for text in common if not text.startswith(("data.name", "train.images"))]
    settings += ["data.name=fakes.riddles", "train.images=64", *VQA, *(f"und.optim.{text}" for text in OPTIM)]
    mine = [f"joint.optim.{text}" for text in OPTIM] + ["joint.ema=0.9", "joint.share=adapter", "joint.parts=[und]"]
    run = run_of("joint", tmp_path / "run", settings, *mine, "train.sample_every=64")
    assert moved(run)
    alone = run_of("und", tmp_path / "und", settings, "und.ema=0.9")
    assert same(tensors(alone, "und.blind"), tensors(run, "und.blind"), ("",))
    assert not same(tensors(alone, "und.vqa"), tensors(run, "und.vqa"), ("",))
    still = run_of("joint", tmp_path / "still", settings, *mine, "joint.stop=[und]")
    assert same(tensors(alone, "und.vqa"), tensors(still, "und.vqa"), ("",))
    model = umm.load(run.folder)
    assert {"vqa", "blind", "adapter"} == set(model.heads)
    shown = next((run.folder / "samples").glob("*.txt")).read_text()
    image = Riddles(RiddlesConfig(), "val")[0]["image"].float() / 255
    assert f"What colour is it? {model.answer(image[None], ['What colour is it?'])[0]} (" in shown
    assert "accuracy" in evaluate_run(str(run.folder))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["gen.ema=0.5"], "set joint.ema"),
        (["recon.ema=0.5"], "set joint.ema"),
        (["joint.twice=true"], "set joint.share=trunk"),
        (["joint.placebo=gaussian", "joint.parts=[und]"], "name it in joint.parts"),
        (["joint.placebo=permuted_labels", "und.kind=vqa"], "needs und in joint.parts and und.kind=classify"),
        (["und.train=trunk"], "two trunks"),
        ([ALL, "gen.decoder=x"], "leave out one"),
        ([ALL, "latent.normalizer=sphere"], "choose another"),
        (["joint.share=trunk"], "set joint.share=adapter"),
        (["joint.share=nothing", "joint.adapter.hidden=256", "joint.stop=[recon]"], "neither weight nor stop"),
    ],
)
def test_contradictions_are_refused(joint, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        run_of("joint", tmp_path / "run", joint, *settings)
