"""Published weights in and out."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from umm.errors import MissingWeights, UmmError
from umm.heads.decoder import Decoder
from umm.interop import (
    OfficialRAE,
    decoder_config,
    decoder_names,
    decoder_state,
    load_decoder_state,
    load_diffusers,
    load_official_rae,
    save_diffusers,
    save_official_rae,
)
from umm.latents.base import LatentSpec
from umm.latents.dinov2 import DINOv2
from umm.rng import generator, seeded_init

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 14, "image_size": 518}


def model(registers: int = 4, normalizer: str = "position", grid: int = 4, **changes) -> OfficialRAE:
    """A small random RAE of the kind diffusers can build, with statistics; each token is drawn as 8 x 8 pixels."""
    with seeded_init("interop"):
        if registers:
            encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES))
        else:
            encoder = Dinov2Model(Dinov2Config(**SIZES))
        space = DINOv2(encoder, image_size=8 * grid, encoder_size=14 * grid, normalizer=normalizer, **changes)
        decoder = Decoder(space.spec, width=32, depth=2, heads=4, mlp=48)
    numbers = generator("stats")
    shape = space.spec.shape
    space.normalizer.set(torch.randn(shape, generator=numbers), torch.rand(shape, generator=numbers) + 0.003)
    return OfficialRAE(space, {"decoder": decoder})


def pictures(size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=generator("pictures"))


def assert_same(first, second, size: int = 32) -> None:
    images = pictures(size)
    latents = first.encode(images)
    assert_close(second.encode(images), latents, rtol=1e-5, atol=1e-5)
    assert_close(second.decode(latents), first.decode(latents), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the authors' files


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("normalizer", ["position", "channel", "none"])
def test_what_is_written_as_published_reads_back_the_same(tmp_path, registers, normalizer):
    first = model(registers, normalizer)
    folder = save_official_rae(first, tmp_path / "rae")
    stats = folder / "stat.pt"
    config = json.loads((folder / "decoder_config.json").read_text())
    second = load_official_rae(
        folder / "encoder", folder / "decoder.pt", config, stats if stats.exists() else None, encoder_input_size=56
    )
    assert stats.exists() == (normalizer != "none")
    assert_same(first, second)


def test_a_stat_file_without_mean_only_divides(tmp_path):
    first = model()
    folder = save_official_rae(first, tmp_path)
    var = first.space.normalizer.var
    rae = load_official_rae(
        folder / "encoder", decoder_state(first.head("decoder")), decoder_config(first.head("decoder")),
        {"mean": None, "var": var}, 56,
    )  # fmt: skip
    assert_close(rae.encode(pictures()), rae.space.raw(pictures()) / (var + 1e-5).sqrt())


@pytest.mark.parametrize(("depth", "keys"), [(12, 200), (24, 392), (28, 456)])
def test_the_key_counts_are_the_published_ones(depth, keys):
    assert sum(len(theirs) for theirs in decoder_names(depth).values()) == keys


def test_a_decoder_that_does_not_fit_says_what_is_wrong_with_which_tensors():
    spec = LatentSpec(8, 4, 4, 32)
    decoder = Decoder(spec, width=16, depth=1, heads=2, mlp=24)
    state = decoder_state(decoder)
    broken = {key: value for key, value in state.items() if key != "decoder_norm.bias"}
    broken |= {"decoder_pos_embed": torch.zeros(1, 5, 16), "extra": torch.zeros(1)}
    with pytest.raises(MissingWeights) as error:
        load_decoder_state(decoder, broken)
    for said in ("1 missing (decoder_norm.bias)", "1 left over (extra)", "(1, 5, 16) instead of (1, 17, 16)"):
        assert said in str(error.value)


def test_pickled_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("",))

    torch.save({"decoder_embed.weight": Trap()}, tmp_path / "model.pt")
    first = model()
    folder = save_official_rae(first, tmp_path)
    with pytest.raises(MissingWeights, match=r"model\.pt cannot be read"):
        load_official_rae(folder / "encoder", tmp_path / "model.pt", decoder_config(first.head("decoder")), None, 56)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_decoder_number_is_named(tmp_path):
    first = model()
    folder = save_official_rae(first, tmp_path)
    config = decoder_config(first.head("decoder"))
    del config["decoder_hidden_size"]
    with pytest.raises(UmmError, match="decoder_hidden_size"):
        load_official_rae(folder / "encoder", folder / "decoder.pt", config, None, 56)


def test_latents_of_several_layers_are_not_written_as_a_published_rae(tmp_path):
    with pytest.raises(UmmError, match=r"blocks \[0, 1\]"):
        save_official_rae(model(layers=(0, 1)), tmp_path)


# --------------------------------------------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def diffusers_rae():
    """A random one of diffusers' own making, with statistics."""
    diffusers = pytest.importorskip("diffusers")
    numbers = generator("diffusers")
    with seeded_init("diffusers"):
        rae = diffusers.AutoencoderRAE(
            encoder_hidden_size=64,
            encoder_num_hidden_layers=2,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=48,
            patch_size=8,
            encoder_input_size=56,
            latents_mean=torch.randn(64, 4, 4, generator=numbers),
            latents_std=torch.rand(64, 4, 4, generator=numbers) + 0.001,
        )
    return rae.eval()


class Diffusers:
    """Their model behind our two methods."""

    def __init__(self, rae):
        self.rae = rae

    @torch.no_grad()
    def encode(self, images):
        return self.rae.encode(images).latent

    @torch.no_grad()
    def decode(self, latents):
        return self.rae.decode(latents).sample


def test_a_diffusers_folder_gives_the_latents_and_pictures_that_diffusers_gives(diffusers_rae, tmp_path):
    diffusers_rae.save_pretrained(tmp_path)
    assert_same(Diffusers(diffusers_rae), load_diffusers(tmp_path))


def test_a_diffusers_folder_without_statistics_is_read_too(diffusers_rae, tmp_path):
    config = {k: v for k, v in diffusers_rae.config.items() if not k.startswith(("latents_", "_"))}
    with seeded_init("without"):
        plain = type(diffusers_rae)(**config).eval()
    plain.save_pretrained(tmp_path)
    assert_same(Diffusers(plain), load_diffusers(tmp_path))


@pytest.mark.parametrize("normalizer", ["position", "channel", "scalar", "none"])
def test_diffusers_gives_our_latents_and_pictures(diffusers_rae, tmp_path, normalizer):
    first = model(normalizer=normalizer, grid=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_diffusers(first, tmp_path)
    assert_same(first, Diffusers(type(diffusers_rae).from_pretrained(tmp_path).eval()), size=128)
    assert_same(first, load_diffusers(tmp_path), size=128)


def test_positions_that_diffusers_would_not_compute_are_kept_and_warned_of(diffusers_rae, tmp_path):
    """Pictures drawn from a trained table would silently be other pictures."""
    first = model(grid=16)
    first.head("decoder").positions.copy_(first.head("decoder").positions.flip(1))
    with pytest.warns(UserWarning, match="another position table"):
        save_diffusers(first, tmp_path)
    assert_same(first, load_diffusers(tmp_path), size=128)
    theirs, latents = Diffusers(type(diffusers_rae).from_pretrained(tmp_path).eval()), first.encode(pictures(128))
    assert_close(theirs.encode(pictures(128)), latents, rtol=1e-5, atol=1e-5)
    assert (theirs.decode(latents) - first.decode(latents)).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:diffusers computes another position table")
def test_a_grid_that_diffusers_stretches_survives_our_own_round_trip(tmp_path):
    first = model(grid=4)
    assert_same(first, load_diffusers(save_diffusers(first, tmp_path)))


def test_encoder_names_of_another_transformers_version_are_understood(diffusers_rae, tmp_path):
    diffusers_rae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    classic = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    classic |= {"o_proj": "output.dense"}
    tensors = load_file(file)
    renamed = {}
    for key, value in tensors.items():
        for modern, old in classic.items():
            key = key.replace(f"attention.{modern}.", f"attention.{old}.")
        renamed[key] = value
    assert any("attention.attention.query" in key for key in renamed)
    save_file(renamed, file)
    assert_same(Diffusers(diffusers_rae), load_diffusers(tmp_path))


def test_what_diffusers_cannot_build_is_refused(tmp_path):
    with pytest.raises(UmmError, match="4 registers"):
        save_diffusers(model(registers=0), tmp_path)
    with pytest.raises(UmmError, match="sphere"):
        save_diffusers(model(normalizer="sphere"), tmp_path)


def test_other_encoders_and_scaled_latents_are_refused(diffusers_rae, tmp_path):
    diffusers_rae.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for key, value in (("encoder_type", "mae"), ("scaling_factor", 0.5), ("_class_name", "AutoencoderKL")):
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(UmmError, match=key):
            load_diffusers(tmp_path)
    with pytest.raises(MissingWeights, match=r"config\.json"):
        load_diffusers(tmp_path / "nowhere")
