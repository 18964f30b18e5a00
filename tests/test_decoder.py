from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umm.errors import ConfigError, UmmError
from umm.heads.decoder import Decoder, unpatchify
from umm.latents.base import IMAGENET_MEAN, IMAGENET_STD, LatentSpec
from umm.layers import sincos_2d
from umm.rng import seeded_init
from umm.settings import DecoderSettings

PUBLISHED = LatentSpec(768, 16, 16, 256)
SMALL = LatentSpec(8, 4, 4, 32, IMAGENET_MEAN, IMAGENET_STD)


def small(**changes) -> Decoder:
    with seeded_init("decoder"):
        return Decoder(SMALL, width=32, depth=2, heads=2, mlp=64, **changes).double()


def latents(height: int = 4, width: int = 4) -> torch.Tensor:
    return torch.randn(2, 8, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "size, total, trainable",
    [("B", 86_435_328, 86_237_952), ("L", 304_150_272, 303_887_104), ("XL", 415_352_704, 415_056_640)],
)
def test_published_sizes_have_the_published_counts(size, total, trainable):
    with torch.device("meta"):
        decoder = Decoder.from_config(DecoderSettings(size=size), PUBLISHED)
    assert decoder.parameter_count() == total
    assert sum(p.numel() for p in decoder.parameters() if p.requires_grad) == trainable


def test_512_pixels_change_only_the_position_table():
    with torch.device("meta"):
        decoder = Decoder.from_config(DecoderSettings(size="XL"), LatentSpec(768, 32, 32, 512))
    assert decoder.parameter_count() == 416_237_440


def test_images_have_the_size_the_latent_stands_for():
    assert small()(latents()).shape == (2, 3, 32, 32)
    assert small(output_size=64)(latents()).shape == (2, 3, 64, 64)


def test_a_latent_of_another_grid_is_resized_and_the_image_size_stays():
    decoder, x = small(), latents(2, 3)
    assert decoder(x).shape == (2, 3, 32, 32)
    # the embedding is affine, so resizing after it equals resizing before it
    resized = torch.nn.functional.interpolate(x, (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(x), decoder(resized))


def test_set_grid_draws_more_pixels_with_a_fresh_two_dimensional_table():
    decoder = small().set_grid(6, 5)
    assert decoder(latents(6, 5)).shape == (2, 3, 48, 40)
    assert decoder.output_size == (48, 40)
    torch.testing.assert_close(decoder.positions[0, 1:].float(), sincos_2d(32, 6, 5))
    back = decoder.set_grid(4, 4)
    assert back.spec == SMALL
    torch.testing.assert_close(back(latents()), small()(latents()), rtol=0, atol=1e-7)


def test_the_position_table_cannot_be_thawed_but_is_saved():
    decoder = small().requires_grad_(True)
    before = decoder.positions.clone()
    decoder(latents()).sum().backward()
    torch.optim.SGD(decoder.parameters(), lr=1.0).step()
    assert torch.equal(decoder.positions, before)
    assert not decoder.positions.requires_grad
    assert "positions" in decoder.state_dict()
    assert decoder.positions[0, 0].abs().max() == 0


def test_predictions_are_denormalised_with_the_encoders_statistics():
    decoder = small()
    torch.nn.init.zeros_(decoder.pred.weight)
    torch.nn.init.ones_(decoder.pred.bias)
    want = torch.tensor(IMAGENET_MEAN) + torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(decoder(latents())[0, :, 5, 7].float(), want)


@settings(max_examples=10, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_unpatchify_puts_row_column_and_channel_where_they_belong(height, width, patch):
    image = torch.arange(3 * height * patch * width * patch).view(1, 3, height * patch, width * patch)
    rows = [
        image[0, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].permute(1, 2, 0).flatten()
        for i in range(height)
        for j in range(width)
    ]
    assert torch.equal(unpatchify(torch.stack(rows)[None], height, width, patch), image)


def test_recomputed_gradients_equal_kept_ones():
    kept, recomputed = small(), small(checkpoint_gradients=True)
    for decoder in (kept, recomputed):
        decoder(latents()).square().mean().backward()
    for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_last_layer_is_the_pixel_prediction():
    decoder = small()
    assert decoder.last_layer is decoder.pred.weight


def test_custom_sizes_need_all_numbers_and_named_sizes_take_none():
    custom = DecoderSettings(size="custom", width=32, depth=3, heads=4, mlp=48)
    assert len(Decoder.from_config(custom, SMALL).blocks) == 3
    with pytest.raises(ConfigError, match="set all four"):
        Decoder.from_config(DecoderSettings(size="custom", width=32), SMALL)
    with pytest.raises(ConfigError, match="size=custom"):
        Decoder.from_config(DecoderSettings(size="B", depth=3), SMALL)


def test_impossible_sizes_and_latents_are_sentences():
    with pytest.raises(ConfigError, match="multiple of 4"):
        small(output_size=30)
    with pytest.raises(UmmError, match=r"\(B, 8, h, w\)"):
        small()(torch.zeros(1, 7, 4, 4, dtype=torch.float64))
