"""Diagnostics of latents, on clouds whose numbers are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import hyp0f1
from torch import Tensor
from torch.testing import assert_close

from umm import diagnostics as cloud
from umm import neighbourhoods as near
from umm import responses
from umm.errors import UmmError
from umm.rng import PictureRNG, generator

C, SIDE, COUNT = 16, 8, 200
few = settings(max_examples=10, deadline=None, derandomize=True)


def normal(*shape: int, seed: object = 0) -> Tensor:
    return torch.randn(shape, generator=generator("diagnostics", seed), dtype=torch.float64)


def rotation(size: int, seed: object = 0) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=("rotation", seed))).Q


def turned(z: Tensor, seed: object) -> Tensor:
    return torch.einsum("kc,bchw->bkhw", rotation(z.shape[1], seed), z)


def spectrum(z: Tensor) -> Tensor:
    return cloud.eigenvalues(cloud.covariances(z))[0]


@pytest.fixture(scope="module")
def white() -> Tensor:
    return normal(COUNT, C, SIDE, SIDE)


# ------------------------------------------------------------------------------------------------------- spectrum


def test_white_noise_uses_every_dimension(white):
    lam = spectrum(white)
    assert cloud.effective_rank(lam) == pytest.approx(C, rel=2e-3)
    assert cloud.participation_ratio(lam) == pytest.approx(C, rel=5e-3)
    assert cloud.components_for(lam) == math.ceil(0.9 * C)
    assert cloud.decay_exponent(lam) < 0.05
    assert cloud.path_condition(lam) < 1.2


def test_a_low_rank_cloud_has_that_rank():
    z = torch.einsum("ck,bkhw->bchw", rotation(C)[:, :4], normal(COUNT, 4, SIDE, SIDE)) + 100
    lam = spectrum(z)
    assert cloud.effective_rank(lam) == pytest.approx(4, rel=5e-3)
    assert cloud.participation_ratio(lam) == pytest.approx(4, rel=5e-3)
    assert cloud.components_for(lam, 0.999999) == 4
    assert cloud.path_condition(lam) == pytest.approx(82, rel=0.1)  # (0.81 + 0.01) / 0.01


def test_covariances_are_numpys_whole_and_with_a_part_left_out(white):
    z = white[:30, :5] * 3 + 50
    found = cloud.covariances(z, groups=3)
    assert found.shape == (4, 5, 5)
    for k, kept in enumerate([z, z[10:], torch.cat([z[:10], z[20:]]), z[:20]]):
        tokens = kept.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
        assert_close(found[k], torch.from_numpy(np.cov(tokens.T, bias=True)), rtol=1e-9, atol=1e-9)


@few
@given(exponent=st.floats(0.0, 3.0), scale=st.floats(1e-3, 1e3), size=st.integers(3, 200))
def test_a_power_law_has_its_exponent_whatever_the_scale(exponent, scale, size):
    lam = scale * torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
    assert cloud.decay_exponent(lam) == pytest.approx(exponent, abs=1e-6)
    one = lam / scale
    for statistic in (cloud.effective_rank, cloud.participation_ratio, cloud.components_for):
        assert_close(statistic(lam), statistic(one))
    used, entropy = cloud.participation_ratio(lam), cloud.effective_rank(lam)
    assert 1 <= used <= entropy * (1 + 1e-9) <= size * (1 + 1e-8)


@few
@given(seed=st.integers(0, 99), scale=st.floats(1e-2, 1e2))
def test_dimensions_do_not_depend_on_axes_or_units(seed, scale):
    z = normal(30, 6, 3, 3, seed=seed) * torch.arange(1, 7, dtype=torch.float64)[:, None, None]
    lam, moved = spectrum(z), spectrum(scale * turned(z, seed) + 5)
    assert_close(moved / scale**2, lam, rtol=1e-8, atol=1e-8)
    assert_close(cloud.token_norms(turned(z, seed)), cloud.token_norms(z))
    assert_close(cloud.cosine_by_distance(scale * turned(z, seed))[0], cloud.cosine_by_distance(z)[0])
    assert_close(cloud.high_frequency(cloud.power_spectrum(scale * turned(z, seed) + 5)),
                 cloud.high_frequency(cloud.power_spectrum(z)))  # fmt: skip


def test_the_width_floor_is_the_share_beyond_the_width():
    lam = torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert cloud.width_floor(lam, 4) == 0
    assert cloud.width_floor(lam, 2) == 2 / 8
    assert cloud.width_floor(lam, 0) == 1


def test_the_jackknife_of_a_mean_is_students_interval():
    """With one value a group the two are the same formula."""
    from umm.stats import t_interval

    x = normal(12)
    interval = cloud.jackknife(cloud.with_left_out(x) / torch.tensor([12, *[11] * 12]), 12)
    known = t_interval(x.numpy())
    assert (interval.value, interval.low, interval.high) == pytest.approx((known.value, known.low, known.high))


# ------------------------------------------------------------------------------------------------------- channels


def test_gaussian_channels_have_no_excess_kurtosis_and_laplace_ones_three(white):
    mean, var, fourth = cloud.moments(white)
    assert cloud.excess_kurtosis(var, fourth).abs().max() < 0.15
    assert cloud.mean_power(mean, var) < 1e-3
    sparse = white.sign() * -torch.rand(white.shape, generator=generator("laplace"), dtype=torch.float64).log() + 7
    mean, var, fourth = cloud.moments(sparse)
    assert cloud.excess_kurtosis(var, fourth).median() == pytest.approx(3, abs=0.5)
    assert cloud.mean_power(mean, var) == pytest.approx(49 / 51, rel=1e-2)


def test_moments_are_numpys_and_a_constant_channel_has_no_kurtosis(white):
    z = white[:40, :3].clone() + 20
    z[:, 2] = 4
    mean, var, fourth = cloud.moments(z, groups=4)
    for k, kept in enumerate([z, z[10:]]):
        assert_close(mean[k], kept.mean((0, 2, 3)), atol=1e-9, rtol=0)
        assert_close(var[k], kept.var((0, 2, 3), correction=0), atol=1e-9, rtol=0)
        centred = kept - kept.mean((0, 2, 3), keepdim=True)
        assert_close(fourth[k], (centred**4).mean((0, 2, 3)), atol=1e-9, rtol=0)
    assert cloud.excess_kurtosis(var, fourth)[0, 2].isnan()


def test_one_huge_channel_is_found_and_does_not_hide_in_the_rank(white):
    z = white.clone()
    z[:, 5] *= 30
    _, var, _ = cloud.moments(z)
    assert cloud.outlier_channels(var) == 1 and var[0].argmax() == 5
    assert cloud.top_share(var, 1) == pytest.approx(900 / 915, rel=1e-2)
    assert cloud.participation_ratio(spectrum(z)) < 1.1 and cloud.components_for(spectrum(z)) == 1


@pytest.mark.parametrize("channels", [4, 1024])
def test_hoyer_sparsity_runs_from_constant_to_one_channel(channels):
    dense, single = torch.ones(2, channels, 3, 3), torch.zeros(2, channels, 3, 3)
    single[:, 1] = -5
    assert_close(cloud.hoyer(dense), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(cloud.hoyer(single), torch.ones(2, dtype=torch.float64))


def test_gaussian_tokens_have_hoyers_known_sparsity():
    root = math.sqrt(512)
    expected = (1 - math.sqrt(2 / math.pi)) * root / (root - 1)
    assert cloud.hoyer(normal(20, 512, 4, 4)).mean() == pytest.approx(expected, rel=5e-3)


def test_long_tokens_are_outliers(white):
    z = white.clone()
    z[:, :, 0, 0] *= 10
    before, after = (cloud.token_outliers(cloud.token_norms(x)) for x in (white, z))
    assert before.mean() < 0.01
    assert (after - before).mean() == pytest.approx(1 / SIDE**2, abs=2e-3)


# ---------------------------------------------------------------------------------------------------------- space


def test_tokens_that_repeat_in_space_cohere_and_white_noise_does_not(white):
    profile, pairs = cloud.cosine_by_distance(white)
    assert pairs[0] == SIDE**2 and pairs[1] == 4 * SIDE * (SIDE - 1) and pairs.sum() == SIDE**4
    assert_close(profile[:, 0], torch.ones(COUNT, dtype=torch.float64))
    assert cloud.self_similarity(profile, pairs).mean().abs() < 5e-3
    blocks = F.interpolate(normal(COUNT, C, 2, 2), scale_factor=SIDE // 2)  # four areas, each of one token
    similarity = cloud.self_similarity(*cloud.cosine_by_distance(blocks)).mean()
    places = [(row, column) for row in range(SIDE) for column in range(SIDE)]
    inside = {True: [], False: []}  # near or far -> whether the pair lies in one area, where its cosine is 1
    for a, b in itertools.permutations(places, 2):
        if (distance := abs(a[0] - b[0]) + abs(a[1] - b[1])) == 1 or distance >= 3:
            inside[distance == 1].append(all(p // (SIDE // 2) == q // (SIDE // 2) for p, q in zip(a, b)))
    assert similarity == pytest.approx(np.mean(inside[True]) - np.mean(inside[False]), abs=0.03)


def coloured(slope: float) -> Tensor:
    """Latents of power f^-slope: white coefficients of the transform, weighed."""
    k = torch.arange(SIDE, dtype=torch.float64)
    radius = torch.hypot(*torch.meshgrid(k, k, indexing="ij"))
    weight = torch.where(radius > 0, radius, 1.0) ** (-slope / 2)
    matrix = cloud.dct_matrix(SIDE)
    return matrix.T @ (normal(COUNT, 32, SIDE, SIDE) * weight) @ matrix


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_coloured_noise_has_its_slope(slope):
    found = cloud.spectral_slope(cloud.power_spectrum(coloured(slope)))
    assert found.mean() == pytest.approx(slope, abs=0.03)


def test_white_noise_has_the_share_of_high_frequencies_that_there_are(white):
    k = torch.arange(SIDE)
    share = ((k[:, None] + k[None]) > SIDE - 1).double().mean()
    assert cloud.high_frequency(cloud.power_spectrum(white)).mean() == pytest.approx(float(share), rel=1e-2)
    assert cloud.high_frequency(cloud.power_spectrum(coloured(2.0))).mean() < share / 5


def test_the_cosine_transform_is_orthonormal():
    matrix = cloud.dct_matrix(7)
    assert_close(matrix @ matrix.T, torch.eye(7, dtype=torch.float64))
    from scipy.fft import dct

    x = normal(7)
    assert_close(matrix @ x, torch.from_numpy(dct(x.numpy(), norm="ortho")))


# -------------------------------------------------------------------------------------------------- neighbourhoods


def clusters(classes: int = 5, each: int = 20, spread: float = 0.05) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes).repeat_interleave(each)
    return 10 * rotation(8)[labels] + spread * normal(len(labels), 8, seed="clusters"), labels


def test_separated_clusters_have_pure_neighbourhoods_and_aligned_classes():
    x, labels = clusters()
    assert near.label_purity(near.neighbours(x, 10), labels).min() == 1
    assert near.alignment(x, labels).mean() < 1e-3


def test_without_structure_purity_is_chance_and_alignment_two():
    x, labels = normal(400, 64), torch.arange(400) % 4
    purity = near.label_purity(near.neighbours(x, 10), labels)
    assert purity.mean() == pytest.approx(99 / 399, abs=0.03)
    assert near.alignment(x, labels).mean() == pytest.approx(2, rel=0.02)


def test_two_spaces_share_neighbours_by_chance_or_entirely():
    x, other = normal(200, 16), normal(200, 16, seed=1)
    ours = near.neighbours(x, 10)
    assert near.mutual_neighbours(ours, near.neighbours(3 * x @ rotation(16) + 1, 10)).min() == 1
    assert near.mutual_neighbours(ours, near.neighbours(other, 10)).mean() == pytest.approx(10 / 199, abs=0.01)


def test_too_few_pictures_for_neighbours_are_one_sentence():
    with pytest.raises(UmmError, match="1 to 4"):
        near.neighbours(normal(5, 3), 5)
    with pytest.raises(UmmError, match="ten different"):
        near.two_nn(torch.ones(30, 3))


@pytest.mark.parametrize("width", [3, 32])
def test_uniformity_of_gaussian_directions_is_the_spheres(width):
    """E exp(4 cos) = 0F1(; d/2; 4) for uniform directions in d dimensions, and |x - y|^2 = 2 - 2 cos."""
    expected = math.log(hyp0f1(width / 2, 4.0)) - 4
    assert near.closeness(normal(1500, width)).mean().log() == pytest.approx(expected, abs=0.02)
    assert_close(near.closeness(torch.ones(10, width)), torch.ones(10, dtype=torch.float64))


def swiss_roll(count: int = 1500) -> Tensor:
    """A rolled-up sheet in 20 dimensions."""
    u = torch.rand(count, 2, generator=generator("roll"), dtype=torch.float64)
    angle, height = 1.5 * math.pi * (1 + 2 * u[:, 0]), 20 * u[:, 1]
    return torch.stack([angle * angle.cos(), height, angle * angle.sin()], 1) @ rotation(20)[:3]


def test_a_swiss_roll_has_two_dimensions():
    roll = swiss_roll()
    assert near.two_nn(roll) == pytest.approx(2, abs=0.15)
    assert near.two_nn(torch.cat([roll, roll[:50]])) == pytest.approx(2, abs=0.2), "pictures that occur twice"


@pytest.mark.parametrize("dimension", [1, 5])
def test_a_flat_cloud_has_its_dimension_in_any_space(dimension):
    x = normal(1500, dimension) @ rotation(40)[:dimension]
    assert near.two_nn(1e3 * x + 7) == pytest.approx(dimension, rel=0.1)


def test_distances_are_scipys():
    from scipy.spatial.distance import cdist

    x = normal(20, 7) + 1e3
    assert_close(near.squared_distances(x), torch.from_numpy(cdist(x, x) ** 2), rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------------------------------- responses


def test_average_pooling_moves_with_the_picture_and_a_position_code_does_not():
    images = normal(12, 3, 32, 32).float()
    code = normal(3, 8, 8, seed="code").float()
    for name, (on_picture, on_latent) in responses.moves(4).items():
        error = responses.equivariance_error(lambda x: F.avg_pool2d(x, 4), images, on_picture, on_latent)
        if name in ("shift", "flip", "turn"):
            assert error.max() < 1e-6, name
            fixed = responses.equivariance_error(
                lambda x: 1e-3 * F.avg_pool2d(x, 4) + code, images, on_picture, on_latent
            )
            assert fixed.mean() == pytest.approx(1, abs=0.15), name
        else:
            assert 0.1 < error.mean() < 1.2, name


def test_smooth_pictures_survive_a_zoom_and_a_pixel():
    corners = torch.rand(12, 3, 2, 2, generator=generator("ramps"))
    images = F.interpolate(corners, (64, 64), mode="bilinear", align_corners=True)
    on_picture, on_latent = responses.moves(4)["zoom"]
    assert responses.equivariance_error(lambda x: F.avg_pool2d(x, 4), images, on_picture, on_latent).mean() < 0.05


def linear_decoder() -> tuple[Tensor, responses.Map]:
    matrix = rotation(48, "out")[:, :16] * torch.arange(16, 0, -1, dtype=torch.float64) @ rotation(16, "in")
    return matrix, lambda z: (z.double().flatten(1) @ matrix.T).view(-1, 3, 4, 4)


def test_a_linear_decoders_lipschitz_constant_is_its_largest_singular_value():
    matrix, decode = linear_decoder()
    found = responses.lipschitz(decode, normal(3, 4, 2, 2), PictureRNG(range(3), 0), iterations=60)
    assert_close(found, torch.linalg.matrix_norm(matrix, 2).expand(3), rtol=1e-3, atol=0)


def test_gains_of_a_linear_decoder_are_its_singular_values():
    matrix, decode = linear_decoder()
    _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    units = math.sqrt(16 / 48)  # numbers in a latent over those in a picture: root mean squares, not norms
    z = normal(5, 4, 2, 2)
    for k in (0, 7, 15):
        found = responses.gain(decode, z, rows[k].view(1, 4, 2, 2).expand(5, -1, -1, -1))
        assert_close(found, (values[k] * units).expand(5))
    random = responses.gain(decode, normal(400, 4, 2, 2), normal(400, 4, 2, 2, seed=3))
    assert random.square().mean() == pytest.approx(float(values.square().mean()) * units**2, rel=0.1)


def test_a_decoder_without_gradients_is_one_sentence():
    with pytest.raises(UmmError, match="no gradients"):
        responses.lipschitz(lambda z: z.detach(), normal(2, 1, 2, 2), PictureRNG(range(2), 0))


def test_directions_stay_in_their_span_and_have_unit_size():
    basis = rotation(8)[:, :3]
    direction = responses.span_noise(basis, PictureRNG(range(4), 0), (8, 5, 5)).double()
    assert_close(responses.rms(direction), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=0)
    assert_close(torch.einsum("ck,kd,bdhw->bchw", basis, basis.T, direction), direction, rtol=1e-4, atol=1e-5)


def test_interpolations_meet_both_ends_and_the_great_circle_keeps_the_length():
    a, b = normal(6, 4, 3, 3), normal(6, 4, 3, 3, seed=1)
    for path in (responses.lerp, responses.slerp):
        assert_close(path(a, b, 0.0), a)
        assert_close(path(a, b, 1.0), b)
    a, b = responses.unit(a), responses.unit(b)
    assert_close(responses.slerp(a, b, 0.3).flatten(1).norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert (responses.lerp(a, b, 0.5).flatten(1).norm(dim=1) < 0.95).all()


def test_paths_have_the_length_and_curvature_of_a_circle():
    """On a quarter of a circle in 8 steps every step turns by 90 / 8 degrees."""
    angle = torch.linspace(0, math.pi / 2, 9, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)[None]  # (1, 9, 2)
    numbers = responses.path_numbers(5 * circle)
    step = 2 * math.sin(math.pi / 32)
    assert numbers["path_curvature"] == pytest.approx(90 / 8)
    assert numbers["path_length"] == pytest.approx(64 * step**2)
    assert numbers["path_stretch"] == pytest.approx(8 * step / math.sqrt(2))
