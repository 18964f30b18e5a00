"""Training a generator: what is learned, what is drawn, and what micro-batches and interruptions may not change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fakes.gen import gen_settings
from fakes.interrupting import interrupted_after
from fakes.space import Patches
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import umm
from umm import flow
from umm.config import load
from umm.errors import ConfigError, DataError, MissingHead, UmmError
from umm.evaluate import evaluate_run
from umm.heads.dit import DiT
from umm.latents.base import LatentSpec
from umm.latents.dinov2 import DINOv2
from umm.learner import Learner, finished
from umm.metrics._probe import RidgeProbe
from umm.rng import PictureRNG, generator
from umm.runs import Run
from umm.settings import FlowSettings
from umm.tasks.gen import TIME_BINS, Gen, by_time, misalignment
from umm.train import train

CONFIGS = Path(__file__).parents[1] / "configs"
RAEV2 = """
    gen.dit.conditioning=tokens gen.dit.sincos=false gen.dit.qk_norm=true gen.dit.base_depth=1 gen.flow.prediction=x
    gen.flow.truncate=1 eval.sampler.guidance.kind=internal eval.sampler.guidance.scale=1.5
""".split()
RECON = """
    recon.decoder.size=custom recon.decoder.width=32 recon.decoder.depth=1 recon.decoder.heads=2 recon.decoder.mlp=64
    recon.perceptual.name=none recon.adversarial.weight=0 recon.optim.warmup=0 recon.optim.lr=3e-3 train.images=1000
    train.batch_size=16 train.workers=0 train.device=cpu train.log_every=100 data.name=fakes.pictures
    latent.name=fakes.space
""".split()


def run_of(settings: list[str], **changes) -> Run:
    return Run(train(load("gen", None, [*settings, *(f"{k}={v}" for k, v in changes.items())])).parent)


def final_tensors(run: Run) -> dict[str, torch.Tensor]:
    folder = run.latest()
    tensors = {f"model/{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    tensors |= {f"ema/{k}": v for k, v in load_file(folder / "ema.safetensors").items()}
    moments = torch.load(folder / "state.pt", weights_only=True)["optimizers"]["gen.dit"]["state"]
    return tensors | {f"adam/{i}/{k}": v for i, values in moments.items() for k, v in values.items()}


def assert_close(a: Run, b: Run) -> None:
    one, other = final_tensors(a), final_tensors(b)
    for key in (key for key in one if key.startswith("model/")):
        torch.testing.assert_close(one[key], other[key], rtol=5e-4, atol=5e-5, msg=lambda m, k=key: f"{k}: {m}")


def task_of(settings: list[str], **changes) -> Gen:
    config = load("gen", None, [*settings, *(f"{k}={v}" for k, v in changes.items())])
    space = Patches.tiny()
    data = umm.find("data", "fakes.pictures")
    return Gen(config, space, data.from_config(data.Config(), "val"))


@pytest.fixture
def settings(tmp_path):
    return gen_settings(tmp_path)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A recon run on the same latent space."""
    folder = tmp_path_factory.mktemp("decoder") / "recon"
    return train(load("recon", None, [*RECON, f"run={folder}"])).parent


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, decoder):
    """A run that has learned to draw, with its decoder."""
    settings = gen_settings(tmp_path_factory.mktemp("drawn"))
    changes = {"gen.decoder": decoder, "train.images": 1200, "train.save_every": 600, "train.log_every": 30}
    return run_of(settings, **changes)


# ------------------------------------------------------------------------------------------------------------ training


def test_training_lowers_the_loss_and_leaves_a_whole_run(drawn):
    log = drawn.read_log()
    assert log[-1]["gen.dit.loss"] < 0.7 * log[0]["gen.dit.loss"]
    assert {"dit.safetensors", "decoder.safetensors", "config.yaml"} <= {f.name for f in drawn.folder.glob("model/*")}
    assert (drawn.folder / "samples" / "000001200.png").stat().st_size > 1000


def test_an_untrained_network_loses_one_plus_the_latents_second_moment(settings):
    """The network says 0, and |eps - z|^2 has mean 1 + mean z^2: 2 for standardised latents."""
    task = task_of(settings, **{"latent.normalizer": "none"})
    latent = 1.5 * torch.randn(4096, *task.space.spec.shape, generator=generator("latents"))
    task.space.normalizer.mode = "none"
    batch = {"latent": latent, "label": torch.zeros(4096, dtype=torch.int64)}
    loss = task.loss("dit", batch, PictureRNG(range(4096), 0), 0)["loss"]
    assert loss.item() == pytest.approx(1 + 1.5**2, rel=0.01)


def test_micro_batches_train_like_one_large_batch(settings, tmp_path):
    """Times, noise and dropped labels belong to the picture, whatever batch it comes in."""
    runs = [run_of(settings, run=tmp_path / f"x{n}", **{"train.accumulate": n}) for n in (1, 4)]
    assert_close(*runs)
    with_base = [run_of([*settings, *RAEV2], run=tmp_path / f"y{n}", **{"train.accumulate": n}) for n in (1, 2)]
    assert_close(*with_base)


def test_cached_and_encoded_latents_train_alike(settings, tmp_path):
    cached = run_of(settings, run=tmp_path / "a", **{"cache.dtype": "float32"})
    assert_close(cached, run_of(settings, run=tmp_path / "b", **{"cache.dir": "null"}))


def test_an_interrupted_run_ends_bit_identical(settings, tmp_path):
    whole = run_of(settings, run=tmp_path / "whole")
    stopped = [*settings, f"run={tmp_path / 'stopped'}"]
    with interrupted_after(9):
        train(load("gen", None, stopped))
    a, b = final_tensors(whole), final_tensors(run_of(stopped))
    assert a.keys() == b.keys() and not [key for key in a if not torch.equal(a[key], b[key])]


def test_a_shorter_run_is_the_beginning_of_a_longer_one(settings, tmp_path):
    """While the rate is constant; so the network after 1 % of a training is one command away."""
    whole = run_of(settings, run=tmp_path / "whole").folder / "checkpoints" / "00000008"
    part = run_of(settings, run=tmp_path / "part", **{"train.images": 64}).latest()
    for name in ("model", "ema"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, part))
        assert not [key for key in a if not torch.equal(a[key], b[key])]


def test_the_saved_model_holds_the_average_and_not_the_weights(drawn):
    saved, tensors = load_file(drawn.folder / "model" / "dit.safetensors"), final_tensors(drawn)
    assert torch.equal(saved["final.linear.weight"], tensors["ema/gen.dit/final.linear.weight"])
    assert not torch.equal(saved["final.linear.weight"], tensors["model/gen.dit/final.linear.weight"])


def test_the_auxiliary_output_is_trained_and_logged(settings):
    log = run_of([*settings, *RAEV2], **{"train.images": 400}).read_log()
    assert log[-1]["gen.dit.base"] < log[0]["gen.dit.base"]
    assert log[-1]["gen.dit.loss"] == pytest.approx(log[-1]["gen.dit.flow"] + log[-1]["gen.dit.base"], rel=1e-4)


@pytest.mark.parametrize("target,cache", [("latent", True), ("features", True), ("features", False)])
def test_alignment_pulls_hidden_tokens_towards_clean_ones(settings, target, cache):
    extra = ["gen.dit.repa_depth=1", "gen.repa.weight=0.5", f"gen.repa.target={target}"]
    extra += [] if cache else ["cache.dir=null"]
    log = run_of([*settings, *extra], **{"train.images": 200}).read_log()
    assert log[-1]["gen.dit.repa"] < log[0]["gen.dit.repa"] < 1.3
    tokens = torch.randn(2, 5, 7)
    assert float(misalignment(tokens, 3 * tokens)) == pytest.approx(0, abs=1e-6)
    assert float(misalignment(tokens, -tokens)) == pytest.approx(2)


def test_alignment_needs_a_depth_and_an_encoder_needs_alignment(settings):
    with pytest.raises(ConfigError, match=r"repa.weight=0.5 and gen.dit.repa_depth=0"):
        task_of(settings, **{"gen.repa.weight": 0.5})
    for wrong in ({}, {"gen.dit.repa_depth": 1, "gen.repa.target": "latent"}):
        with pytest.raises(ConfigError, match=r"gen.repa.encoder is for"):
            task_of(settings, **{"gen.repa.encoder": "{name: dinov2}"}, **wrong)


def test_alignment_of_weight_0_is_plain_training_bit_for_bit(settings, tmp_path):
    """The projector neither moves the other first weights nor their gradients; the misalignment is only logged."""
    plain = run_of(settings, run=tmp_path / "plain")
    idle = run_of(settings, run=tmp_path / "idle", **{"gen.dit.repa_depth": 1, "gen.repa.weight": 0.0})
    a, b = (load_file(run.folder / "model" / "dit.safetensors") for run in (plain, idle))
    assert a.keys() == {key for key in b if not key.startswith("repa.")}
    assert not [key for key in a if not torch.equal(a[key], b[key])]
    one, other = ([row["gen.dit.flow"] for row in run.read_log()] for run in (plain, idle))
    assert one == other and "gen.dit.repa" in idle.read_log()[0]


def test_latents_can_be_aligned_with_another_encoders_features(settings, tmp_path):
    DINOv2.tiny().encoder.save_pretrained(tmp_path / "encoder")
    encoder = f"{{name: dinov2, weights: {tmp_path / 'encoder'}, encoder_size: 56}}"
    task = task_of(settings, **{"gen.dit.repa_depth": 1, "gen.repa.weight": 0.5, "gen.repa.encoder": encoder})
    assert task.teacher.families == ("dinov2",) and task.settings.dit.repa_dim == 32
    x = torch.rand(2, 3, 16, 16, generator=generator("x"))
    expected = task.teacher.features(x).patches
    assert torch.equal(task.alignment_target({"image": x}), expected)
    assert task.facts()["trained_with"] == {"dinov2": "alignment", "patches": "encoder"}


def test_labels_are_dropped_as_often_as_asked(settings):
    task = task_of(settings, **{"gen.label_dropout": 0.3})
    labels = task.labels({"label": torch.ones(4000, dtype=torch.int64)}, PictureRNG(range(4000), 0))
    assert set(labels.tolist()) == {1, task.dit.null_label}
    assert (labels == task.dit.null_label).float().mean() == pytest.approx(0.3, abs=0.03)


def test_data_without_classes_is_learned_without_or_refused(settings, tmp_path, monkeypatch):
    source = umm.find("data", "fakes.pictures")
    original = source.__init__

    def without_classes(self, *arguments):
        original(self, *arguments)
        self.classes = None

    monkeypatch.setattr(source, "__init__", without_classes)
    with pytest.raises(DataError, match=r"has no classes: set gen.conditional=false"):
        run_of(settings)
    run = run_of(settings, run=tmp_path / "without", **{"gen.conditional": "false"})
    model = umm.load(run.folder)
    assert model.head("dit").num_classes == 0 and model.sample_latents(num=3).shape == (3, 12, 4, 4)
    with pytest.raises(UmmError, match="without classes"):
        model.sample_latents([1, 2])


def test_guidance_that_would_be_ignored_is_refused(settings):
    with pytest.raises(ConfigError, match="without a kind does nothing"):
        task_of(settings, **{"eval.sampler.guidance.scale": 2})
    with pytest.raises(ConfigError, match="needs an auxiliary output"):
        task_of(settings, **{"eval.sampler.guidance.kind": "internal"})


def test_a_narrow_network_is_warned_of_once(settings):
    with pytest.warns(UserWarning, match="narrower than the token dimension") as caught:
        task_of(settings, **{"gen.dit.head_width": 8})
    assert len([w for w in caught if "narrower" in str(w.message)]) == 1


# ------------------------------------------------------------------------------------------------------------- the log


def test_the_loss_of_each_time_interval_is_the_mean_over_its_pictures():
    error, t = torch.tensor([1.0, 3.0, 5.0, 8.0]), torch.tensor([0.05, 0.15, 0.95, 1.0])
    found = finished(by_time(error, t))
    assert found == pytest.approx({"t0.0-0.2": 2.0, "t0.8-1.0": 6.5})
    assert len(by_time(error, t)) == TIME_BINS


def test_intervals_without_pictures_are_left_out_of_the_log(settings):
    log = run_of(settings, **{"train.log_every": 1, "train.batch_size": 4}).read_log()
    intervals = [{key: value for key, value in record.items() if ".t0" in key} for record in log]
    assert any(len(found) < TIME_BINS for found in intervals)
    assert all(value > 0.3 for found in intervals for value in found.values())


def test_a_window_weighs_intervals_by_their_pictures(settings):
    """Two records of one step against one of two: sums of loss and of pictures add up."""
    whole = run_of(settings, **{"train.log_every": 12}).read_log()[0]
    key = "gen.dit.t0.4-0.6"
    task = task_of(settings)
    steps = []
    for step in range(12):
        t = flow.training_time(
            PictureRNG(range(step * 8, step * 8 + 8), 0, "gen.dit").fork("time").rand(), task.shift, FlowSettings()
        )
        steps.append(((t >= 0.4) & (t < 0.6)).sum().item())
    single = run_of(settings, run=settings[0][4:] + "-single", **{"train.log_every": 1}).read_log()
    expected = sum(record.get(key, 0.0) * n for record, n in zip(single, steps)) / sum(steps)
    assert whole[key] == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------ half precision


def test_under_autocast_times_norms_and_residuals_stay_float32():
    dit = DiT.tiny(Patches.tiny().spec, qk_norm=True)
    seen: dict[str, set] = {}

    def remember(name):
        return lambda module, inputs, output: seen.setdefault(name, set()).add(output.dtype)

    for module in dit.modules():
        if type(module).__name__ in ("TimeEmbedding", "DiTBlock", "Attention"):
            module.register_forward_hook(remember(type(module).__name__))
    with torch.autocast("cpu", torch.bfloat16):
        dit(torch.randn(2, 12, 4, 4), torch.rand(2), torch.tensor([0, 1]))
    assert seen["TimeEmbedding"] == seen["DiTBlock"] == {torch.float32}
    assert seen["Attention"] == {torch.bfloat16}


def test_short_bfloat16_training_stays_close_to_float32(settings, tmp_path):
    changes = {"train.images": 200, "train.log_every": 5}
    full = run_of(settings, run=tmp_path / "full", **changes).read_log()
    AcceleratorState._reset_state()  # a process has one precision
    half = run_of(settings, run=tmp_path / "half", **changes, **{"train.precision": "bf16"}).read_log()
    AcceleratorState._reset_state()
    for a, b in zip(full, half):
        assert a["gen.dit.loss"] == pytest.approx(b["gen.dit.loss"], rel=0.02)
    assert half[-1]["gen.dit.loss"] < half[0]["gen.dit.loss"]


def steepened(dit: DiT) -> DiT:
    """Queries and keys a hundred times as large: what long training does where nothing holds them."""
    with torch.no_grad():
        for name, module in dit.named_modules():
            if name.endswith(".attn"):
                module.qkv.weight[: 2 * module.qkv.in_features] *= 100
    return dit


def trained(dit: DiT, precision: str, steps: int = 30) -> tuple[float, float]:
    """(last loss, largest gradient norm) in fp32 or under autocast to bfloat16."""
    draw = generator("half precision")
    x, target = torch.randn(2, 16, *dit.spec.shape, generator=draw)
    t, y = torch.rand(16, generator=draw), torch.arange(16) % 10
    optimizer, norms = torch.optim.AdamW(dit.parameters(), 1e-3), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = (dit(x, t, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0).item())
        optimizer.step()
    return loss.item(), max(norms)


def test_bfloat16_follows_float32_through_huge_queries_and_keys_with_qk_norm():
    spec = LatentSpec(12, 4, 4, 64)
    (loss, norm), (half, half_norm) = (
        trained(steepened(DiT.tiny(spec, qk_norm=True)), precision) for precision in ("fp32", "autocast")
    )
    assert norm < 1 and half_norm < 1
    assert half == pytest.approx(loss, rel=0.01)


def test_without_qk_norm_huge_queries_and_keys_blow_up_gradients_in_either_precision():
    spec = LatentSpec(12, 4, 4, 64)
    for precision in ("fp32", "autocast"):
        loss, norm = trained(steepened(DiT.tiny(spec)), precision)
        assert norm > 5 and loss < 1


# --------------------------------------------------------------------------------------------------------------- speed


class NoPeeking(TorchDispatchMode):
    """Refuses what makes a GPU wait: numbers and shapes that the host has to read from a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"), func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", [[], RAEV2], ids=["rae", "raev2"])
def test_a_step_reads_no_number_on_the_host(settings, kind, monkeypatch):
    monkeypatch.setattr(F, "one_hot", lambda x, n: (x[:, None] == torch.arange(n)).long())  # only on CPUs it looks
    task = task_of([*settings, *kind])
    learner = Learner(task.groups()[0], Accelerator(cpu=True), 10**6, False)
    batch = {"latent": torch.randn(8, *task.space.spec.shape), "label": torch.zeros(8, dtype=torch.int64)}
    for first in (0, 8):
        with NoPeeking():
            terms = learner.step({"gen": [batch]}, {"gen": [list(range(first, first + 8))]}, first)
    assert torch.isfinite(terms["gen.dit.loss"])
    with pytest.raises(AssertionError), NoPeeking():
        terms["gen.dit.loss"].item()


# ------------------------------------------------------------------------------------------------------------- decoder


def test_a_decoder_of_another_latent_space_is_refused(settings, decoder, tmp_path):
    shutil.copytree(decoder / "model", tmp_path / "model")
    config = (tmp_path / "model" / "config.yaml").read_text()
    (tmp_path / "model" / "config.yaml").write_text(config.replace('"channels": 12', '"channels": 13'))
    with pytest.raises(UmmError, match="'channels' is 13"):
        task_of(settings, **{"gen.decoder": tmp_path / "model"})


def test_a_run_without_a_decoder_is_no_decoder(settings, tmp_path):
    run = run_of(settings)
    with pytest.raises(UmmError, match="has no decoder: it holds dit"):
        task_of(settings, **{"gen.decoder": run.folder})


def test_without_a_decoder_no_grid_is_drawn_and_one_sentence_said(settings, caplog):
    run = run_of(settings, **{"train.sample_every": 24})
    assert not (run.folder / "samples").exists()
    assert len([r for r in caplog.records if "gen.decoder" in r.message]) == 1


# ------------------------------------------------------------------------------------------------------------- judging


def test_samples_are_judged_beside_as_many_real_pictures(drawn):
    text = evaluate_run(str(drawn.folder))
    result = json.loads((drawn.folder / "eval" / "val.json").read_text())
    rows = {(row["metric"], row["space"]): row for row in result["numbers"]}
    for number in ("fd", "fd_excess", "kid", "coverage", "mind", "nearest_ratio", "copied", "class_agreement"):
        assert rows[number, "pixels"]["n"] == 37 and rows[number, "pixels"]["headline"]
        assert not rows[number, "latents"]["headline"]
    assert rows["psnr at latent noise 0", ""]["value"] > rows["psnr at latent noise 0.5", ""]["value"]
    assert rows["fd at latent noise 0.5", "pixels"]["value"] > 0
    assert "class_agreement" in text and "latents took part in training" in text
    facts = result["fingerprints"]["fd@pixels"]
    assert facts["samples"] == facts["n_real"] == facts["n_fake"] == 37 and facts["labels"] == "balanced"
    assert facts["sampler"]["steps"] == 4 and facts["evaluations"] == 4 and facts["reference_split"] == "val"


def test_a_finished_run_is_given_a_decoder_by_the_same_command(settings, decoder):
    run = run_of(settings)
    model = umm.load(run.folder)
    with pytest.raises(MissingHead, match=r"again with gen\.decoder="):
        model.sample(num=2)
    run_of(settings, **{"gen.decoder": decoder})
    drawing = umm.load(run.folder)
    assert drawing.sample(num=2).shape == (2, 3, 16, 16)
    assert torch.equal(drawing.sample_latents(num=2), model.sample_latents(num=2))
    assert run.config.gen.decoder == str(decoder), "its checkpoints draw with it too"


def test_without_a_decoder_the_latents_are_judged(settings):
    run = run_of(settings)
    text = evaluate_run(str(run.folder))
    assert "no pictures were judged" in text
    numbers = json.loads((run.folder / "eval" / "val.json").read_text())["numbers"]
    assert {row["space"] for row in numbers} == {"latents"}


def test_metrics_of_reconstructions_are_refused(drawn):
    with pytest.raises(ConfigError, match="psnr compares reconstructions"):
        evaluate_run(str(drawn.folder), ["eval.metrics=[psnr]"])


def test_copies_of_training_pictures_raise_the_alarm(drawn, monkeypatch):
    """A generator that gives back its training pictures scores well everywhere but here."""
    from umm.sampling import Drawer

    config = load("gen", drawn.folder / "config.yaml")
    source = umm.find("data", "fakes.pictures")
    train_pictures = source.from_config(source.Config(), "train")

    def copy(self, indices, labels, seed):
        images = torch.stack([train_pictures[i]["image"] for i in indices]).float() / 255
        return umm.load(drawn.folder).encode(images)

    monkeypatch.setattr(Drawer, "latents", copy)
    records = umm.find("tasks", "gen").evaluate(umm.load(drawn.folder), config, Accelerator(cpu=True))
    assert any("latents: memorisation alarm" in note for note in records.notes)


def test_the_probe_finds_classes_that_are_linear_and_nothing_in_noise():
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(3, (600,), generator=draw)
    directions = torch.randn(3, 20, generator=draw)
    x = 3 * directions[y] + torch.randn(600, 20, generator=draw)
    probe = RidgeProbe(x[:400], y[:400], 3)
    assert (probe(x[400:]) == y[400:]).float().mean() > 0.97
    noise = RidgeProbe(torch.randn(400, 20, generator=draw), y[:400], 3)
    assert (noise(torch.randn(200, 20, generator=draw)) == y[400:]).float().mean() < 0.5


def test_the_probe_is_the_same_from_either_gram_matrix():
    """More features than pictures and fewer are two ways to one solution."""
    from umm.metrics._probe import ridge

    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 40, generator=draw).double(), torch.randn(30, 2, generator=draw).double()
    centred, targets = x - x.mean(0), y - y.mean(0)
    for (weights, _), strength in zip(ridge(x, y), (1e-4, 1e-3, 1e-2, 1e-1, 1.0)):
        direct = torch.linalg.solve(centred.T @ centred + 30 * strength * torch.eye(40).double(), centred.T @ targets)
        torch.testing.assert_close(weights, direct)


# -------------------------------------------------------------------------------------------------------------- recipe


def test_the_published_recipe_builds_its_network():
    """DiT^DH-XL has 838,675,796 parameters; RAEv2's network some 875.2 million."""
    for name, count in (("gen", 838_675_796), ("gen_raev2", 875.2e6)):
        config = load("gen", CONFIGS / "dinov2_b" / f"{name}.yaml")
        with torch.device("meta"):
            dit = DiT(OmegaConf.to_object(config.gen.dit), LatentSpec(768, 16, 16, 256), 1000)
        assert dit.parameter_count() == pytest.approx(count, rel=0.005)
    assert config.gen.optim.clip == 1.0 and config.gen.ema == 0.9995


def test_the_tiny_recipe_shares_its_latents_with_reconstruction():
    gen, recon = (load(task, CONFIGS / "tiny" / f"{task}.yaml") for task in ("gen", "recon"))
    assert gen.latent == recon.latent and gen.cache == recon.cache
    assert {k for k in gen.data if gen.data[k] != recon.data[k]} == {"max_objects", "textured"}  # easier scenes
