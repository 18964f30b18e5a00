"""Statistics, normalisers, and the DINOv2 space."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel

from umm.config import load
from umm.errors import ConfigError, DataError, MissingWeights, UmmError
from umm.latents._encoder import default_encoder_size, grid_side
from umm.latents._stats import load_stats
from umm.latents.base import LatentSpec, Normalizer, RunningStats
from umm.latents.dinov2 import DINOv2
from umm.model import UnifiedModel
from umm.pretrained import sha256_of
from umm.registry import find
from umm.rng import PictureRNG, generator
from umm.settings import DINOv2Settings
from umm.tasks.recon import Recon

SHAPE = (3, 2, 2)
MODES = ("none", "scalar", "channel", "position", "sphere")
few = settings(max_examples=25, deadline=None, derandomize=True)


def numbers(*shape: int, seed: object = 0, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=generator("latents", seed), dtype=torch.float64) * std + mean


# ------------------------------------------------------------------------------------------------------ statistics


@few
@given(cuts=st.lists(st.integers(0, 40), max_size=5), order=st.permutations(range(6)), mean=st.floats(-1e4, 1e4))
def test_statistics_do_not_depend_on_chunks_order_or_merging(cuts, order, mean):
    data = numbers(40, *SHAPE, mean=mean)
    edges = [0, *sorted(cuts), 40]
    chunks = [data[a:b] for a, b in itertools.pairwise(edges)]
    stats = RunningStats()
    for index in order:
        if index < len(chunks):
            stats.merge(RunningStats().update(chunks[index]))
    assert stats.count == 40
    assert_close(stats.mean, data.mean(0), rtol=1e-12, atol=1e-9)
    assert_close(stats.var, data.var(0, correction=0), rtol=1e-9, atol=1e-9)


def test_statistics_of_numbers_far_from_zero_keep_their_variance():
    """The sum-of-squares formula loses every digit here."""
    data = numbers(64, 1, mean=1e9, std=1e-2)
    stats = RunningStats()
    for row in data.split(7):
        stats.update(row)
    assert_close(stats.var, data.var(0, correction=0), rtol=1e-4, atol=0)


def test_statistics_survive_being_stored():
    stats = RunningStats().update(numbers(5, *SHAPE))
    again = RunningStats.from_state(stats.state_dict()).update(numbers(3, *SHAPE, seed=1))
    both = torch.cat([numbers(5, *SHAPE), numbers(3, *SHAPE, seed=1)])
    assert_close(again.var, both.var(0, correction=0))


def test_statistics_of_nothing_are_an_error():
    with pytest.raises(UmmError, match="not one latent"):
        _ = RunningStats().update(numbers(0, *SHAPE)).var


# ------------------------------------------------------------------------------------------------------ normaliser


@pytest.mark.parametrize("mode", ["scalar", "channel", "position"])
def test_standardised_latents_have_mean_zero_and_variance_one_over_what_shares_a_number(mode):
    data = numbers(500, *SHAPE, mean=3, std=2) + numbers(*SHAPE, seed=1) * 5
    z = Normalizer(SHAPE, mode).double().fit(RunningStats().update(data))(data)
    axes = {"scalar": (0, 1, 2, 3), "channel": (0, 2, 3), "position": (0,)}[mode]
    mean, var = z.mean(axes), z.var(axes, correction=0)
    assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
    assert_close(var, torch.ones_like(var), rtol=0, atol=1e-4)


@few
@given(mode=st.sampled_from(MODES[:-1]), mean=st.floats(-100, 100), std=st.floats(1e-3, 100))
def test_undo_is_the_inverse(mode, mean, std):
    data = numbers(8, *SHAPE, mean=mean, std=std)
    normalizer = Normalizer(SHAPE, mode).double().fit(RunningStats().update(data))
    assert_close(normalizer.undo(normalizer(data)), data, rtol=1e-9, atol=1e-9)


def test_on_the_sphere_every_token_has_norm_root_c_and_keeps_its_direction():
    data = numbers(2, *SHAPE, std=7)
    z = Normalizer(SHAPE, "sphere").double()(data)
    assert_close(z.norm(dim=1), torch.full((2, 2, 2), 3**0.5, dtype=torch.float64))
    assert_close(F.cosine_similarity(z, data, dim=1), torch.ones(2, 2, 2, dtype=torch.float64))


def test_restored_latents_are_what_use_gives_back():
    """Bit for bit themselves, but on the sphere, where lengths are lost."""
    data = numbers(8, *SHAPE, std=7)
    for mode in MODES[:-1]:
        assert Normalizer(SHAPE, mode).double().fit(RunningStats().update(data)).restored(data) is data
    sphere = Normalizer(SHAPE, "sphere").double()
    assert torch.equal(sphere.restored(data), sphere.undo(sphere(data)))


def test_a_decoder_learns_what_it_is_given_in_use():
    """On the sphere tokens lose their lengths: one that learned with them would draw worse without."""
    small = "size=custom width=16 depth=1 heads=2 mlp=32".split()
    overrides = [*(f"recon.decoder.{s}" for s in small), "recon.perceptual.name=none", "recon.adversarial.weight=0"]
    overrides += ["recon.noise=0", "latent.name=fakes.space", "data.name=fakes.pictures", "latent.normalizer=sphere"]
    config, x, seen = load("recon", None, overrides), images(16), []
    space = find("latents", "fakes.space").from_config(config.latent)
    task = Recon(config, space, None)
    task.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    task.begin("decoder")
    task.loss("decoder", {"latent": space.raw(x), "image": x}, PictureRNG(range(len(x)), "test"), 0)
    UnifiedModel(space, {"decoder": task.decoder}).reconstruct(x)
    assert_close(seen[0], seen[1])


def test_pooled_statistics_equal_those_of_pooled_numbers():
    data = numbers(50, *SHAPE) * numbers(*SHAPE, seed=1) + numbers(*SHAPE, seed=2)
    stats = RunningStats().update(data)
    assert_close(Normalizer(SHAPE, "channel").double().fit(stats).var.flatten(), data.var((0, 2, 3), correction=0))
    assert_close(Normalizer(SHAPE, "scalar").double().fit(stats).var.flatten(), data.var(correction=0)[None])


def test_given_statistics_pool_like_measured_ones():
    """A stat.pt holds one number a position whatever mode reads it."""
    stats = RunningStats().update(numbers(50, *SHAPE))
    for mode in MODES:
        measured = Normalizer(SHAPE, mode).fit(stats)
        given_ones = Normalizer(SHAPE, mode).set(stats.mean.float(), stats.var.float())
        assert_close(given_ones.var, measured.var)
        assert measured.fitted and given_ones.fitted


def test_an_unfitted_normaliser_says_so_and_standard_ones_need_no_fitting():
    fitted = {mode: bool(Normalizer(SHAPE, mode).fitted) for mode in MODES}
    assert fitted == {"none": True, "sphere": True, "scalar": False, "channel": False, "position": False}


def test_statistics_of_another_shape_are_refused():
    with pytest.raises(UmmError, match=r"\(5, 2, 2\).*\(3, 2, 2\)"):
        Normalizer(SHAPE).set(None, torch.ones(5, 2, 2))
    with pytest.raises(UmmError, match="choose one of"):
        Normalizer(SHAPE, "batch")


def test_statistics_are_read_from_every_kind_of_file(tmp_path):
    stats = RunningStats().update(numbers(9, *SHAPE))
    torch.save({"mean": None, "var": stats.var.float()}, tmp_path / "stat.pt")
    save_file(stats.state_dict(), tmp_path / "stats.safetensors")
    assert load_stats(tmp_path / "stat.pt")[0] is None
    assert_close(load_stats(str(tmp_path / "stat.pt"))[1], stats.var.float())
    for found, want in zip(load_stats(tmp_path / "stats.safetensors"), (stats.mean, stats.var)):
        assert_close(found, want)
    mean, var = load_stats({"var": stats.var})
    assert mean is None and torch.equal(var, stats.var)


def test_files_without_statistics_are_named(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"other\.pt holds no latent statistics"):
        load_stats(tmp_path / "other.pt")
    with pytest.raises(MissingWeights, match=r"gone\.pt"):
        load_stats(tmp_path / "gone.pt")


# ------------------------------------------------------------------------------------------------------------ spec


def test_derived_numbers_of_the_published_space():
    spec = LatentSpec(768, 16, 16, 256)
    assert (spec.tokens, spec.dim, spec.patch) == (256, 196_608, 16)


# ---------------------------------------------------------------------------------------------------------- dinov2


def images(size: int = 64, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=generator("images"))


def library_hidden(space: DINOv2, x: torch.Tensor):
    """All block outputs by the library's own forward pass, from a picture that needs no resizing."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (space.spec.pixel_mean, space.spec.pixel_std))
    with torch.no_grad():
        return space.encoder((x - mean) / std, output_hidden_states=True)


@pytest.mark.parametrize("registers", [0, 1, 4])
def test_one_layer_is_the_final_norm_without_affine_of_the_patch_tokens(registers):
    space = DINOv2.tiny(registers, image_size=56, encoder_size=56)
    expected = library_hidden(space, images(56)).hidden_states[-1][:, 1 + registers :]
    expected = F.layer_norm(expected, (32,), eps=1e-6).transpose(1, 2).unflatten(2, (4, 4))
    assert_close(space.raw(images(56)), expected, rtol=0, atol=1e-6)


def test_several_layers_are_each_normed_and_averaged():
    space = DINOv2.tiny(image_size=56, encoder_size=56, layers=(0, -1))
    hidden = library_hidden(space, images(56)).hidden_states
    normed = [F.layer_norm(h[:, 5:], (32,), eps=1e-6) for h in (hidden[1], hidden[2])]
    expected = ((normed[0] + normed[1]) / 2).transpose(1, 2).unflatten(2, (4, 4))
    assert_close(space.raw(images(56)), expected, rtol=0, atol=1e-6)


def test_blocks_above_the_highest_layer_do_not_run():
    space = DINOv2.tiny(layers=(0,))
    before = space.raw(images())
    space.encoder.encoder.layer[1].forward = lambda *a, **k: pytest.fail("an unused block ran")
    assert torch.equal(space.raw(images()), before)


def test_features_are_what_the_library_gives_with_the_affine_norm():
    space = DINOv2.tiny(image_size=56, encoder_size=56)
    torch.nn.init.normal_(space.encoder.layernorm.weight, generator=generator("affine"))
    expected = library_hidden(space, images(56))
    found = space.features(images(56))
    assert_close(found.cls, expected.last_hidden_state[:, 0])
    assert_close(found.patches, expected.last_hidden_state[:, 5:])
    first, last = space.features(images(56), layers=(0, 1))
    assert_close(last.patches, found.patches)
    assert_close(first.cls, space.encoder.layernorm(expected.hidden_states[1])[:, 0])


def test_pictures_are_resized_as_published():
    space = DINOv2.tiny(image_size=64)
    assert space.encoder_size == 56
    resized = F.interpolate(images(64), size=(56, 56), mode="bicubic", align_corners=False, antialias=False)
    mean, std = space.pixel_mean, space.pixel_std
    assert_close(space._pixels(images(64)), (resized - mean) / std)


@pytest.mark.parametrize(
    ("image", "encoder", "grid"),
    [(256, 224, 16), (512, 448, 32), (64, 56, 4), (96, 84, 6), (168, 168, 12), (70, 70, 5)],
)
def test_default_sizes(image, encoder, grid):
    assert default_encoder_size(image, patch=14) == encoder
    assert grid_side(image, encoder, patch=14) == grid
    space = DINOv2.tiny(image_size=image)
    assert space.raw(images(image, 1)).shape == (1, 32, grid, grid)


def test_sizes_that_cannot_be_are_explained():
    with pytest.raises(ConfigError, match="multiple of 14"):
        DINOv2.tiny(image_size=100)
    with pytest.raises(ConfigError, match="4 x 4 tokens"):
        DINOv2.tiny(image_size=62, encoder_size=56)
    for layers in ((), (2,), (-3,), (1, -1)):
        with pytest.raises(ConfigError, match="2: use 0 to 1"):
            DINOv2.tiny(layers=layers)


def test_it_stays_frozen_and_in_eval_mode_yet_pictures_get_gradients():
    space = DINOv2.tiny().train()
    assert not any(module.training for module in space.modules())
    assert not any(p.requires_grad for p in space.parameters())
    x = images().requires_grad_()
    space.raw(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_float32_latents(dtype):
    space = DINOv2.tiny()
    exact = space.raw(images())
    with torch.autocast("cpu", dtype=dtype):
        rough = space.raw(images())
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.02


def test_wrong_pictures_are_one_sentence():
    space = DINOv2.tiny()
    for bad in (images(56), images()[0], (images() * 255).byte()):
        with pytest.raises(UmmError, match="images must be float"):
            space.raw(bad)


# ------------------------------------------------------------------------------------------- loading and identity


@pytest.fixture
def folder(tmp_path):
    """A tiny random encoder in transformers layout, with its own pixel statistics."""
    DINOv2.tiny().encoder.save_pretrained(tmp_path / "encoder")
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps(facts))
    return tmp_path / "encoder"


def from_folder(folder, **changes) -> DINOv2:
    return DINOv2.from_config(DINOv2Settings(weights=str(folder), image_size=64, **changes))


def test_a_local_folder_gives_its_weights_and_pixel_statistics(folder):
    space = from_folder(folder, layers=[0, 1], normalizer="channel")
    assert space.spec.pixel_mean == (0.1, 0.2, 0.3) and space.spec.pixel_std == (0.4, 0.5, 0.6)
    assert space.layers == (0, 1) and space.normalizer.mode == "channel"
    assert sha256_of(space.encoder.state_dict()) == sha256_of(DINOv2.tiny().encoder.state_dict())
    assert isinstance(space.encoder, type(AutoModel.from_pretrained(folder)))
    (folder / "preprocessor_config.json").unlink()
    assert from_folder(folder).spec.pixel_mean == (0.485, 0.456, 0.406)


def test_statistics_named_in_the_settings_are_loaded(folder, tmp_path):
    torch.save({"mean": None, "var": torch.full((32, 4, 4), 4.0)}, tmp_path / "stat.pt")
    space = from_folder(folder, stats=str(tmp_path / "stat.pt"))
    assert space.normalizer.fitted
    assert_close(space.encode(images()), space.raw(images()) / (4 + 1e-5) ** 0.5)


def test_the_identity_changes_with_whatever_changes_the_latents_and_with_nothing_else(folder):
    base = from_folder(folder).identity()
    assert json.loads(json.dumps(base)) == base
    assert from_folder(folder, normalizer="none").identity() == base
    assert from_folder(folder, layers=[0]).identity() != base
    assert from_folder(folder, encoder_size=112).identity() != base
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"layernorm.weight": tensors["layernorm.weight"] + 1}, file, metadata={"format": "pt"})
    assert from_folder(folder).identity() == base
    key = "embeddings.cls_token"
    save_file(tensors | {key: tensors[key] + 1e-3}, file, metadata={"format": "pt"})
    assert from_folder(folder).identity()["weights"] != base["weights"]


def test_broken_folders_are_missing_weights_not_tracebacks(folder, tmp_path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    file.write_bytes(whole[:-100])
    with pytest.raises(MissingWeights, match="cannot be read"):
        from_folder(folder)
    save_file({k: v for k, v in tensors.items() if k != "layernorm.bias"}, file, metadata={"format": "pt"})
    with pytest.raises(MissingWeights, match=r"1 tensors are missing \['layernorm\.bias'\]"):
        from_folder(folder)
    save_file(tensors | {"surplus": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(MissingWeights, match="surplus"):
        from_folder(folder)
    save_file({k: v for k, v in tensors.items() if k != "embeddings.mask_token"}, file, metadata={"format": "pt"})
    assert from_folder(folder).spec.channels == 32
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(MissingWeights, match="'siglip' model"):
        from_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingWeights, match=r"no config\.json"):
        from_folder(folder)


def test_weights_that_cannot_be_had_name_the_way_out():
    for weights in ("facebook/dinov2-with-registers-base", "./no/such/folder", "not an id"):
        with pytest.raises(MissingWeights, match="asset:dinov2-small-saliency"):
            from_folder(weights)


def test_the_offline_asset_gives_the_space_the_demo_uses():
    config = DINOv2Settings(weights="asset:dinov2-small-saliency", image_size=64, layers=[6, 7, 8, 9, 10, 11])
    space = DINOv2.from_config(config)
    assert space.spec.shape == (384, 4, 4)
    latents = space.raw(images())
    assert latents.isfinite().all()
    assert latents.mean(1).abs().max() < 1e-4, "each token has mean 0"
    assert space.identity()["weights"] == "05490edae27e06149f5a5e561ff14e3cacd41a4eb6cf58123d893b6ff07cc182"
