"""Drawing pictures: which numbers a picture depends on, labels, shards, archives and sweeps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes.gen import gen_settings
from fakes.launching import launch
from PIL import Image

import umm
from umm import flow
from umm.config import load
from umm.errors import ConfigError, UmmError
from umm.heads.dit import DiT
from umm.latents.base import LatentSpec
from umm.rng import generator
from umm.sample_run import SHARD, Request, sample_run
from umm.sampling import Drawer, choose_labels
from umm.settings import FlowSettings, GuidanceSettings, SamplerSettings
from umm.train import train

SPEC = LatentSpec(12, 4, 4, 16)
CFG = GuidanceSettings("classifier_free", 2.0)


def drawer_of(guidance: GuidanceSettings | None = None, method: str = "euler", **network) -> Drawer:
    dit = DiT.tiny(SPEC, 3, **network).eval()
    sampler = SamplerSettings(method, steps=4, guidance=guidance or GuidanceSettings())
    return Drawer(dit, FlowSettings(), sampler)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A generator with a decoder."""
    folder = tmp_path_factory.mktemp("sampling")
    recon = f"""
        run={folder / "recon"} data.name=fakes.pictures latent.name=fakes.space recon.decoder.size=custom
        recon.decoder.width=16 recon.decoder.depth=1 recon.decoder.heads=2 recon.decoder.mlp=32
        recon.perceptual.name=none recon.adversarial.weight=0 train.images=32 train.batch_size=8 train.workers=0
        train.device=cpu
    """
    train(load("recon", None, recon.split()))
    return train(load("gen", None, [*gen_settings(folder), f"gen.decoder={folder / 'recon'}"])).parent


# ------------------------------------------------------------------------------------------- what a picture depends on


@pytest.mark.parametrize("guidance,method", [(None, "euler"), (CFG, "heun"), (None, "sde")])
def test_picture_i_is_bit_identical_in_every_batch(guidance, method):
    """One at a time, in odd batches, in another order: the numbers and the rounding belong to the picture."""
    drawer, labels = drawer_of(guidance, method), [i % 3 for i in range(20)]
    whole = drawer.latents(range(20), labels, seed=5)
    for size in (1, 8, 13):
        parts = [drawer.latents(range(20)[i : i + size], labels[i : i + size], 5) for i in range(0, 20, size)]
        assert torch.equal(torch.cat(parts), whole), size
    back = drawer.latents(list(range(20))[::-1], labels[::-1], 5)
    assert torch.equal(back.flip(0), whole)
    assert not torch.equal(drawer.latents(range(20), labels, 6), whole)


def test_a_wider_network_also_draws_bit_identically():
    drawer = drawer_of(width=256, heads=4, head_width=384, head_heads=4)
    whole = drawer.latents(range(12), [1] * 12, 0)
    assert torch.equal(torch.cat([drawer.latents([i], [1], 0) for i in (0, 7, 11)]), whole[[0, 7, 11]])


def test_the_public_interface_gives_the_same_pictures(run):
    model = umm.load(run)
    pictures = model.sample(["a", "b", 2], num=7, seed=3)
    assert pictures.shape == (7, 3, 16, 16) and pictures.min() >= 0 and pictures.max() <= 1
    latents = Drawer.of(model).latents(range(7), [0, 1, 2, 0, 1, 2, 0], 3)
    assert torch.equal(model.sample_latents([0, 1, 2], num=7, seed=3), latents)
    torch.testing.assert_close(pictures, model.decode(latents))
    assert model.sample(num=2, sampler=SamplerSettings(steps=2)).shape[0] == 2


# ------------------------------------------------------------------------------------------------------------ guidance


def guided(kind: str, scale: float, weak: Drawer | None = None, **network) -> torch.Tensor:
    drawer = drawer_of(**network)
    guidance = GuidanceSettings(kind, scale, weak="somewhere")
    return Drawer(drawer.dit, drawer.settings, replace(drawer.sampler, guidance=guidance), weak).latents([0], [1], 0)


def test_guidance_of_scale_one_changes_nothing_and_of_zero_is_the_base():
    plain = drawer_of().latents([0], [1], 0)
    assert torch.equal(guided("classifier_free", 1.0), plain)
    torch.testing.assert_close(guided("classifier_free", 0.0), drawer_of().latents([0], None, 0))
    weak = drawer_of(depth=1)
    torch.testing.assert_close(guided("auto", 0.0, weak), weak.latents([0], [1], 0))
    assert not torch.allclose(guided("auto", 2.0, weak), plain)


def test_internal_guidance_extrapolates_from_the_auxiliary_output():
    network = {"base_depth": 1}
    drawer = drawer_of(**network)
    x, t, y = torch.randn(2, *SPEC.shape, generator=generator("x")), torch.full((2,), 0.6), torch.tensor([0, 2])
    strong, base = drawer.velocities(x, t, y)
    strongly = Drawer(drawer.dit, drawer.settings, replace(drawer.sampler, guidance=GuidanceSettings("internal", 1.78)))
    torch.testing.assert_close(strongly.field()(x, t, y), base + 1.78 * (strong - base))


def test_an_x_prediction_is_integrated_as_a_velocity():
    dit = DiT.tiny(SPEC, 3).eval()
    drawer = Drawer(dit, FlowSettings(prediction="x"), SamplerSettings(steps=1))
    x = torch.randn(2, *SPEC.shape, generator=generator("x"))
    t, y = torch.full((2,), 0.5), torch.tensor([0, 1])
    torch.testing.assert_close(drawer.velocity(x, t, y), (x - dit(x, t, y)) / 0.5)
    one_step = drawer.latents([0], [1], 0)  # from t = 1 straight to the predicted latent
    start = flow.normal_like(one_step, generator("unused"))
    assert one_step.shape == start.shape and one_step.isfinite().all()


def test_guidance_a_network_cannot_give_is_refused():
    for guidance, match in [
        (GuidanceSettings("none", 2.0), "without a kind"),
        (GuidanceSettings("internal", 1.5), "auxiliary output"),
        (GuidanceSettings("auto", 1.5), "weak=<run"),
        (GuidanceSettings("classifier_free", float("nan")), "not a number to scale by"),
    ]:
        with pytest.raises(ConfigError, match=match):
            drawer_of(guidance)
    with pytest.raises(ConfigError, match="trained on classes"):
        Drawer(DiT.tiny(SPEC, 0), FlowSettings(), SamplerSettings(guidance=CFG))


def test_autoguidance_loads_the_weak_run_and_refuses_another_space(run, tmp_path):
    model = umm.load(run)
    sampler = SamplerSettings(steps=3, guidance=GuidanceSettings("auto", 2.0, weak=str(run)))
    same = Drawer.of(model, sampler).latents([0], [1], 0)
    plain = Drawer.of(model, SamplerSettings(steps=3)).latents([0], [1], 0)
    torch.testing.assert_close(same, plain)  # guided away from itself: nothing changes
    with pytest.raises(UmmError, match="does not exist"):
        Drawer.of(model, replace(sampler, guidance=GuidanceSettings("auto", 2.0, weak=str(tmp_path / "no"))))


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_are_functions_of_the_pictures_number():
    dit = DiT.tiny(SPEC, 3)
    dit.classes = ["ant", "bee", "cat"]
    balanced = choose_labels(dit, "balanced", range(9), 0)
    assert [balanced.count(k) for k in range(3)] == [3, 3, 3]
    random = choose_labels(dit, "random", range(300), 0)
    assert set(random) == {0, 1, 2} and random[100:] == choose_labels(dit, "random", range(100, 300), 0)
    assert random != choose_labels(dit, "random", range(300), 1)
    assert choose_labels(dit, ["bee", 2], range(5), 0) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("label,match", [("bea", "Did you mean 'bee'"), (3, "numbers 0 to 2"), (-1, "numbers 0 to 2")])
def test_unknown_classes_are_refused_with_the_nearest_name(label, match):
    dit = DiT.tiny(SPEC, 3)
    dit.classes = ["ant", "bee", "cat"]
    with pytest.raises(UmmError, match=match):
        choose_labels(dit, [label], [0], 0)


# ------------------------------------------------------------------------------------------------------ umm sample


def folders(run) -> list[str]:
    return sorted(folder.name for folder in (run / "generated").iterdir())


def ask(run, tmp_path, **changes) -> str:
    return sample_run(str(run), Request(**{"num": 20, "out": str(tmp_path / "grid.png")} | changes))


def test_an_archive_has_the_layout_of_the_adm_evaluator(run, tmp_path):
    ask(run, tmp_path, num=SHARD + 10, npz=str(tmp_path / "out.npz"))
    archive = np.load(tmp_path / "out.npz")
    assert archive["arr_0"].shape == (SHARD + 10, 16, 16, 3) and archive["arr_0"].dtype == np.uint8
    assert archive["arr_1"].tolist() == [i % 3 for i in range(SHARD + 10)]
    pictures = umm.load(run).sample(num=SHARD + 10)
    expected = (pictures * 255 + 0.5).floor().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(archive["arr_0"], expected)


def test_the_grid_shows_the_pictures_in_rows_of_their_classes(run, tmp_path):
    ask(run, tmp_path, num=6, npz=str(tmp_path / "out.npz"))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    corner = np.load(tmp_path / "out.npz")["arr_0"][4].repeat(6, 0).repeat(6, 1)  # picture 4: class 1, its second
    assert np.array_equal(grid[104:200, -100:-4], corner)


def test_an_interrupted_command_goes_on_at_the_first_missing_shard(run, tmp_path, monkeypatch):
    from umm import sample_run as module

    whole = ask(run, tmp_path, num=3 * SHARD, seed=1, npz=str(tmp_path / "whole.npz"))
    name = next(line for line in whole.splitlines() if line.startswith("drew")).split("/")[-1]
    folder = run / "generated" / name
    (folder / "000001.safetensors").unlink()
    (folder / "000002.partial").write_bytes(b"half")
    drawn, original = [], module.Drawer.pictures

    def remember(self, model, indices, labels, seed):
        drawn.extend(indices)
        return original(self, model, indices, labels, seed)

    monkeypatch.setattr(module.Drawer, "pictures", remember)
    ask(run, tmp_path, num=3 * SHARD, seed=1, npz=str(tmp_path / "again.npz"))
    assert drawn == list(range(SHARD, 2 * SHARD))
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(np.load(tmp_path / "whole.npz")[name], np.load(tmp_path / "again.npz")[name])


def test_a_longer_run_keeps_whole_shards_and_completes_the_last(run, tmp_path):
    ask(run, tmp_path, num=10, seed=2, npz=str(tmp_path / "few.npz"))
    ask(run, tmp_path, num=30, seed=2, npz=str(tmp_path / "many.npz"))
    few, many = np.load(tmp_path / "few.npz")["arr_0"], np.load(tmp_path / "many.npz")["arr_0"]
    assert np.array_equal(many[:10], few) and len(many) == 30


def test_pictures_of_other_weights_or_settings_are_never_taken_again(run, tmp_path):
    """A second checkpoint at the same path once scored the first one's pictures (RAE's sample_ddp.py)."""
    before = len(folders(run)) if (run / "generated").exists() else 0
    for changes in ({"seed": 7}, {"seed": 8}, {"labels": "random"}, {"method": "heun"}, {"steps": [3]}):
        ask(run, tmp_path, num=4, **{"seed": 7, **changes})
    assert len(folders(run)) == before + 5
    facts = [json.loads((run / "generated" / name / "facts.json").read_text()) for name in folders(run)]
    assert all({"dit", "decoder", "normalizer"} <= one["weights"].keys() for one in facts)
    ask(run, tmp_path, num=4, seed=7, checkpoints=[8])
    assert len(folders(run)) == before + 6
    ask(run, tmp_path, num=4, seed=7, checkpoints=[12])  # the last one is the finished model
    assert len(folders(run)) == before + 6


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(run, tmp_path):
    with pytest.raises(UmmError, match=r"no checkpoint 5\. There are: .*12"):
        ask(run, tmp_path, checkpoints=[5])


def test_a_sweep_ends_in_a_table_and_a_plot(run, tmp_path):
    text = ask(run, tmp_path, guidance=[1.0, 2.0], steps=[2, 3])
    table = [line.split() for line in text.splitlines() if "fd@pixels" in line or line.strip()[:1].isdigit()]
    assert table[0][:4] == ["guidance", "steps", "n", "fd@pixels"] and len(table) == 5
    assert (tmp_path / "grid-sweep.png").stat().st_size > 1000
    assert (tmp_path / "grid-guidance2-steps3.png").exists()


def test_other_runs_cannot_be_drawn_from(run, tmp_path):
    with pytest.raises(UmmError, match="is a recon run"):
        ask(run.parent / "recon", tmp_path)


@pytest.mark.slow
def test_two_processes_draw_the_same_pictures(run, tmp_path):
    ask(run, tmp_path, num=2 * SHARD + 5, seed=11, npz=str(tmp_path / "one.npz"))
    for folder in (run / "generated").iterdir():
        for file in folder.glob("*.safetensors"):
            file.unlink()
    arguments = ["--num", str(2 * SHARD + 5), "--seed", "11", "--npz", str(tmp_path / "two.npz")]
    done = launch(2, "sample", str(run), *arguments, "--out", str(tmp_path / "grid.png"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(np.load(tmp_path / "one.npz")["arr_0"], np.load(tmp_path / "two.npz")["arr_0"])
