"""Pictures are read, cropped, resized and quantised by the stated conventions."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from umm.errors import DataError
from umm.rng import generator
from umm.transforms import (
    center_crop,
    horizontal_flip,
    load_picture,
    prepare,
    random_crop,
    resize,
    to_float,
    to_pil,
    to_tensor,
    to_uint8,
)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something with low and high frequencies."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)) * 12
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 13)], -1) * 90
    return Image.fromarray((127 + waves + noise).clip(0, 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


# -------------------------------------------------------------------------------------------------------- cropping


def adm_reference(picture: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's published steps, spelled out independently of the code under test."""
    w, h = picture.size
    while min(w, h) >= 2 * size:
        w, h = w // 2, h // 2
        picture = picture.resize((w, h), resample=Image.BOX)
    ratio = size / min(w, h)
    array = np.array(picture.resize((round(w * ratio), round(h * ratio)), resample=Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("width, height, size", [(451, 300, 64), (300, 451, 256), (512, 512, 128), (40, 50, 64)])
def test_the_centre_crop_is_adms(width, height, size):
    picture = photo(width, height)
    np.testing.assert_array_equal(np.array(center_crop(picture, size)), adm_reference(picture, size))


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([16, 33, 64]))
def test_crops_are_square_whatever_the_picture(width, height, size):
    picture = Image.new("RGB", (width, height))
    assert center_crop(picture, size).size == (size, size)
    assert random_crop(picture, size, generator(width, height)).size == (size, size)


def test_a_picture_of_the_right_size_passes_untouched():
    picture = photo(64, 64)
    assert torch.equal(prepare(picture, 64), to_tensor(picture))


def test_random_crops_reach_every_place_and_follow_the_generator():
    """A ramp tells where a crop was cut: 24 of 36 pixels leave offsets 0 to 12."""
    ramp = Image.fromarray(np.tile(np.arange(36, dtype=np.uint8) * 7, (36, 1))).convert("RGB")
    lefts = {to_tensor(random_crop(ramp, 24, generator("crop", n)))[0, 0, 0].item() // 7 for n in range(300)}
    assert lefts == set(range(13))
    again = [prepare(ramp, 24, "random", True, generator("same")) for _ in range(2)]
    assert torch.equal(*again)


def test_without_a_generator_nothing_is_random():
    picture = photo(100, 80)
    assert torch.equal(prepare(picture, 32, "random", True), prepare(picture, 32))


def test_half_of_the_pictures_are_mirrored():
    picture = photo(32, 32)
    plain, mirrored = to_tensor(picture), horizontal_flip(to_tensor(picture))
    made = [prepare(picture, 32, "center", True, generator("flip", n)) for n in range(200)]
    assert all(torch.equal(image, plain) or torch.equal(image, mirrored) for image in made)
    assert 70 < sum(torch.equal(image, mirrored) for image in made) < 130


# ----------------------------------------------------------------------------------------------- numbers and sizes


def test_quantising_gives_back_every_level():
    levels = torch.arange(256)
    assert torch.equal(to_uint8(to_float(levels.to(torch.uint8))).long(), levels)
    assert torch.equal(to_uint8(levels.double() / 255).long(), levels)


def test_quantising_rounds_and_clamps():
    assert to_uint8(torch.tensor([-3.0, 0.9999, 7.0, 100.6 / 255, 100.4 / 255])).tolist() == [0, 255, 255, 101, 100]


def test_tensors_and_pictures_convert_without_loss():
    picture = photo(20, 12)
    assert to_tensor(picture).shape == (3, 12, 20)
    assert np.array_equal(np.array(to_pil(to_tensor(picture))), np.array(picture))
    assert np.array_equal(np.array(to_pil(to_float(to_tensor(picture)))), np.array(picture))


@pytest.mark.parametrize("size", [48, 100, 224])
def test_antialiased_resize_is_pillows_bicubic(size):
    """Pillow rounds to whole levels after each axis; torch does not: at most one level apart, on average a third."""
    picture = photo(160, 120)
    ours = resize(to_float(to_tensor(picture))[None], (size, size))[0].clamp(0, 1) * 255
    theirs = to_tensor(picture.resize((size, size), Image.BICUBIC)).float()
    difference = (ours - theirs).abs()
    assert difference.max() < 1.6
    assert difference.mean() < 0.35


def test_the_encoders_resize_is_the_plain_one():
    images = to_float(to_tensor(photo(64, 64)))[None]
    plain = resize(images, 56, antialias=False)
    torch.testing.assert_close(plain, F.interpolate(images, (56, 56), mode="bicubic", align_corners=False))
    assert (plain - resize(images, 56)).abs().max() > 0.02


def test_equal_sizes_are_not_resized():
    images = torch.rand(1, 3, 17, 17, generator=generator("x"))
    assert resize(images, 17) is images


# --------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    """Every orientation tag, stored the way a camera stores it, shows the same upright picture."""
    upright = photo(32, 16)
    undo = {
        1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4],
    }[orientation]  # fmt: skip
    stored = upright
    for method in undo:
        stored = stored.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.array(load_picture(encoded(stored, "PNG", exif=exif))), np.array(upright))


def test_transparency_is_composited_on_white():
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (10, 20, 30, 0))
    assert list(np.array(load_picture(encoded(picture, "PNG"))).reshape(-1, 3).tolist()) == [[255, 0, 0], [255] * 3]


def test_a_palette_with_a_transparent_colour_is_composited_too():
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 128, 0, 9, 9, 9])
    picture.putpixel((1, 0), 1)
    pixels = np.array(load_picture(encoded(picture, "PNG", transparency=1))).reshape(-1, 3).tolist()
    assert pixels == [[0, 128, 0], [255, 255, 255]]


def test_sixteen_bit_grey_is_scaled_not_truncated():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    read = np.array(load_picture(encoded(Image.fromarray(values), "PNG")))
    assert read[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.ptp(read, axis=-1).max() == 0


@pytest.mark.parametrize("mode, kind", [("L", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP")])
def test_every_common_mode_becomes_rgb_and_looks_the_same(mode, kind):
    grey = photo(40, 30).convert("L").point(lambda v: 255 * (v > 127) if mode == "1" else v)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    read = load_picture(encoded(grey.convert(mode), kind, **options))
    assert read.mode == "RGB"
    assert np.abs(np.array(read, float)[..., 1] - np.array(grey, float)).mean() < 3


BROKEN = {
    "empty.jpg": b"",
    "text.jpg": b"I am not a picture" * 20,
    "short.jpg": encoded(photo(80, 80), "JPEG")[:900],
    "short.png": encoded(photo(80, 80), "PNG")[:900],
    "short.webp": encoded(photo(80, 80), "WEBP")[:400],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=name):
        load_picture(tmp_path / name)


def test_a_missing_file_and_a_strip_are_named():
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        load_picture("nowhere.png")
    with pytest.raises(DataError, match="3000 x 2 pixels is a strip"):
        load_picture(encoded(Image.new("RGB", (3000, 2)), "PNG"))


def test_floating_point_grey_is_refused():
    with pytest.raises(DataError, match="no defined white"):
        load_picture(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
