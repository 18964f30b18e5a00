"""`umm diagnose` from pictures to files, and the principal components it leaves for latent.name=pca."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from fakes.pictures import Config as Pictures
from fakes.pictures import Ramps
from fakes.space import Patches
from omegaconf import OmegaConf
from torch.testing import assert_close

from umm.battery import QUESTIONS, Battery
from umm.cli import cli
from umm.diagnose import Request, diagnose, read_results
from umm.errors import ConfigError, UmmError
from umm.latents.base import RunningStats
from umm.latents.pca import PCA, principal_basis, save_basis
from umm.latents.pixels import Pixels
from umm.model import UnifiedModel
from umm.settings import PCASettings

FAKES = ["data.name=fakes.pictures", "latent.name=fakes.space", "train.device=cpu"]
PIXELS = ["data.name=fakes.pictures", "train.device=cpu"]
PIXELS += ["latent.name=pixels", "latent.image_size=16", "latent.patch=4", "latent.normalizer=none"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UMM_CACHE", str(tmp_path / "cache"))


def components_of_patches(**changes) -> PCASettings:
    return PCASettings(**{"image_size": 16, "components": 4, "base": {"name": "fakes.space"}} | changes)


def measured(out, overrides, **changes):
    told = diagnose(Request(overrides=overrides, out=str(out), few=8, features="pixels", **{"images": 30} | changes))
    return told, json.loads((out / "diagnose.json").read_text())


def values(result, coordinates="standardised"):
    return {row["metric"]: row["value"] for row in result["numbers"] if row["coordinates"] == coordinates}


def test_a_space_is_measured_and_stands_beside_another(tmp_path):
    told, result = measured(tmp_path / "patches", FAKES)
    for row in result["numbers"]:
        assert row["n"] in (8, 30) and row.get("low", row["value"]) <= row["value"] <= row.get("high", row["value"])
    assert result["images"] == 30 and result["provenance"]["versions"]["umm"] and result["latent"]["statistics"]
    assert list(QUESTIONS)[2] in told and list(QUESTIONS)[4] not in told and "give --run" in told
    assert (tmp_path / "patches" / "diagnose.png").stat().st_size > 10_000
    other = [*FAKES, "latent.normalizer=none"]
    told, _ = measured(tmp_path / "unstandardised", other, against=[str(tmp_path / "patches")])
    assert "patches" in told.splitlines()[0] and "was measured with other" not in told
    told, _ = measured(tmp_path / "fewer", FAKES, images=20, against=[str(tmp_path / "patches" / "diagnose.json")])
    assert "patches was measured with other images" in told


def test_results_of_folders_with_one_name_stand_beside_each_other(tmp_path):
    for name in ("a", "b"):
        measured(tmp_path / name / "space", FAKES)
    against = [str(tmp_path / name / "space") for name in "ab"]
    assert list(read_results(against, "other")) == ["a/space", "b/space"]
    assert list(read_results(against[:1], "other")) == ["space"]
    assert list(read_results(against[:1], "space")) == ["a/space"]
    told, _ = measured(tmp_path / "c" / "space", FAKES, against=against)
    assert told.splitlines()[0].split()[4:8] == ["white", "noise", "a/space", "b/space"]


def test_the_tails_of_a_space_are_the_median_of_absolute_kurtoses():
    """Half of the channels have tails lighter than a Gaussian's, half heavier: signed, they would cancel."""
    draw = torch.Generator().manual_seed(0)
    flat = torch.rand(200, 4, 8, 8, generator=draw, dtype=torch.float64)  # excess kurtosis -1.2
    signs = 2 * torch.rand(flat.shape, generator=draw).round() - 1
    heavy = torch.empty_like(flat).exponential_(generator=draw) * signs
    battery = Battery(0)
    battery.channels(torch.cat([flat, heavy], 1), "raw")  # Laplace: 3
    found = {row["metric"]: row["value"] for row in battery.numbers}
    assert found["kurtosis"] == pytest.approx(1.2, abs=0.05)  # the lower of the two in the middle
    assert min(battery.curves["kurtosis raw"]) < -1 and max(battery.curves["kurtosis raw"]) > 2


def test_the_same_command_gives_the_same_numbers(tmp_path):
    first, second = (measured(tmp_path / name, FAKES)[1] for name in ("a", "b"))
    assert first["numbers"] == second["numbers"] and first["curves"] == second["curves"]


def test_pixels_have_an_exact_decoder_of_known_slope(tmp_path):
    """Unstandardised pixels in [-1, 1] become pictures in [0, 1]: every gain is a half."""
    _, result = measured(tmp_path / "pixels", PIXELS)
    found = values(result)
    assert found["psnr"] == 100
    for metric in ("gain_random", "gain_principal", "gain_tail", "lipschitz"):
        assert found[metric] == pytest.approx(0.5, rel=1e-2), metric
    moved = values(result, "raw, channels scaled")
    assert moved["flip"] > 0.1, "inside a patch the channels change places"
    assert (tmp_path / "pixels" / "noise.png").exists() and (tmp_path / "pixels" / "interpolations.png").exists()


def test_the_components_of_the_training_pictures_are_a_space(tmp_path):
    out = tmp_path / "all"
    _, result = measured(out, FAKES, split="train", images=37)
    measured(tmp_path / "val", FAKES)
    assert not (tmp_path / "val" / "pca.safetensors").exists()
    base = Patches.tiny()
    pictures = Ramps(Pictures(), "train")
    images = torch.stack([pictures[i]["image"] for i in range(37)]).float() / 255
    base.normalizer.fit(RunningStats().update(base.raw(images)))
    whole = base.encode(images)
    lam = torch.tensor(result["curves"]["eigenvalues standardised"], dtype=torch.float64)
    for k in (12, 3):
        space = PCA.from_config(components_of_patches(components=k, basis=f"{out}/pca.safetensors"))
        z = space.raw(images)
        assert space.spec.shape == (k, 4, 4)
        covariance = z.transpose(0, 1).flatten(1).double().cov(correction=0)
        assert_close(covariance / covariance[0, 0], torch.diag(lam[:k] / lam[0]), atol=1e-5, rtol=0)
        lifted = torch.einsum("kc,bkhw->bchw", space.components, z)
        lost = (lifted - whole).square().sum() / whole.square().sum()
        assert lost == pytest.approx(float(1 - lam[:k].sum()), abs=1e-5)


def test_a_saved_model_holds_the_basis(tmp_path):
    base = Patches.tiny()
    covariance = torch.diag(torch.arange(12.0)) + 1
    base.normalizer.set(torch.zeros(12, 1, 1), torch.arange(1.0, 13.0).view(12, 1, 1))
    file = save_basis(tmp_path / "pca.safetensors", base, covariance)
    settings = components_of_patches(basis=str(file), normalizer="none")
    space, described = PCA.from_config(settings), {"latent": OmegaConf.structured(settings), "heads": {}}
    UnifiedModel(space, {}).save(tmp_path / "model", OmegaConf.create(described))
    file.unlink()
    loaded = UnifiedModel.load(tmp_path / "model").space
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.raw(images), space.raw(images)) and loaded.identity() == space.identity()


def test_components_are_orthonormal_sorted_and_have_one_sign():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    components, variances = principal_basis(x.T.cov())
    assert_close(components @ components.T, torch.eye(6, dtype=torch.float64))
    assert_close(components @ x.T.cov() @ components.T, torch.diag(variances))
    assert (variances.diff() <= 0).all() and (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()


def test_settings_of_a_basis_that_do_not_fit_are_sentences(tmp_path):
    def build(**changes):
        return PCA.from_config(components_of_patches(**changes))

    file = save_basis(tmp_path / "pca.safetensors", Patches.tiny(channels=6), torch.eye(6))
    with pytest.raises(UmmError, match=r"no basis of latent\.base"):
        build(basis=str(file))
    with pytest.raises(ConfigError, match=r"latent.base.name"):
        build(base={})
    with pytest.raises(ConfigError, match="1 to 12"):
        build(components=13)
    with pytest.raises(ConfigError, match="image_size"):
        build(base={"name": "fakes.space", "image_size": 32})
    with pytest.raises(ConfigError, match="chanels"):
        build(base={"name": "fakes.space", "chanels": 3})
    with pytest.raises(UmmError, match="has no basis"):
        build().raw(torch.rand(1, 3, 16, 16))
    with pytest.raises(UmmError, match="cannot be read"):
        build(basis=str(tmp_path / "none.safetensors"))


def test_pixels_come_back_exactly():
    space, images = Pixels.tiny(normalizer="none"), torch.rand(2, 3, 32, 32)
    assert_close(space.decode(space.encode(images)), images)
    with pytest.raises(ConfigError, match="multiple"):
        Pixels(30, 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gen.ema=0.5"], "belongs to a task"),
        (["--against", "nowhere.json"], "cannot be read"),
        (["--run", "nowhere"], "is not a run"),
        (["latent.nme=3"], "unknown setting 'latent.nme'"),
    ],
)
def test_what_it_does_not_take_is_one_sentence(arguments, says):
    result = CliRunner().invoke(cli, ["diagnose", *arguments])
    assert result.exit_code == 2 and says in result.output and len(result.output.splitlines()) == 1
