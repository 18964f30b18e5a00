"""What every latent space must do; a new file in umm/latents is tested without a new test."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import umm
from umm.errors import MissingHead, UmmError
from umm.latents.base import Features, LatentSpace, RunningStats
from umm.rng import generator

pytestmark = pytest.mark.parametrize("name", umm.names("latents"))


def build(name: str) -> LatentSpace:
    return umm.find("latents", name).tiny()


def pictures(space: LatentSpace, count: int = 3) -> Tensor:
    side = space.spec.image_size
    return torch.rand(count, 3, side, side, generator=generator("pictures"))


def fitted(space: LatentSpace) -> LatentSpace:
    space.normalizer.fit(RunningStats().update(space.raw(pictures(space, 8))))
    return space


def test_settings_are_a_dataclass_that_carries_the_spaces_name(name):
    config = umm.find("latents", name).Config
    assert dataclasses.is_dataclass(config)
    assert config().name == name


def test_latents_have_the_shape_the_spec_says_and_are_float32(name):
    space = build(name)
    for latents in (space.raw(pictures(space)), space.encode(pictures(space))):
        assert latents.shape == (3, *space.spec.shape)
        assert latents.dtype == torch.float32
        assert latents.isfinite().all()
    assert space.spec.image_size % space.spec.height == 0


def test_equal_spaces_are_built_and_the_global_generator_is_left_alone(name):
    before = torch.random.get_rng_state()
    first, second = build(name), build(name)
    latents = first.raw(pictures(first))
    assert torch.equal(latents, second.raw(pictures(second)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_it_is_frozen_until_something_says_otherwise(name):
    space = build(name).train()
    assert not any(p.requires_grad for p in space.parameters())
    assert torch.equal(space.raw(pictures(space)), space.raw(pictures(space)))


def test_a_picture_does_not_depend_on_its_batch(name):
    space = build(name)
    torch.testing.assert_close(space.raw(pictures(space))[:1], space.raw(pictures(space)[:1]), rtol=0, atol=1e-5)


def test_different_pictures_have_different_latents(name):
    space = build(name)
    latents = space.raw(pictures(space))
    assert (latents[0] - latents[1]).abs().max() > 1e-3


def test_encode_is_the_standardised_raw_latent(name):
    space = fitted(build(name))
    raw, latents = space.raw(pictures(space)), space.encode(pictures(space))
    torch.testing.assert_close(latents, space.normalizer(raw))
    if space.normalizer.mode != "sphere":
        torch.testing.assert_close(space.normalizer.undo(latents), raw, rtol=1e-4, atol=1e-4)


def test_a_saved_space_gives_the_same_latents(name, tmp_path):
    first, second = fitted(build(name)), build(name)
    state = {key: value.contiguous() for key, value in first.state_dict().items()}
    for value in second.state_dict().values():
        value.zero_()
    save_file(state, tmp_path / "space.safetensors")
    second.load_state_dict(load_file(tmp_path / "space.safetensors"))
    assert torch.equal(first.encode(pictures(first)), second.encode(pictures(second)))


def test_features_have_one_vector_a_token(name):
    space = build(name)
    final, layered = space.features(pictures(space)), space.features(pictures(space), layers=(0, -1))
    assert isinstance(final, Features) and len(layered) == 2
    for found in (final, *layered):
        assert found.patches.shape[:2] == (3, space.spec.tokens)
        assert found.cls is None or found.cls.shape == (3, found.patches.shape[-1])
    torch.testing.assert_close(layered[1].patches, final.patches)


def test_the_identity_is_json_and_stays_the_same(name):
    first, second = build(name), fitted(build(name))
    identity = first.identity()
    assert identity and json.loads(json.dumps(identity)) == identity
    assert second.identity() == identity, "statistics are no part of the raw latents"


def test_decode_gives_pictures_or_says_which_task_trains_a_decoder(name):
    space = build(name)
    latents = space.encode(pictures(space))
    try:
        assert space.decode(latents).shape == (3, 3, space.spec.image_size, space.spec.image_size)
    except MissingHead as error:
        assert "--task recon" in str(error)


def test_pictures_of_another_kind_are_one_sentence(name):
    space = build(name)
    for bad in (pictures(space)[0], pictures(space)[..., :-1], (pictures(space) * 255).byte()):
        with pytest.raises(UmmError, match="images must be"):
            space.raw(bad)
