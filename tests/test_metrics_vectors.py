"""Known answers computed once, independently, in float64 numpy; features are a formula, so no file is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from umm.metrics import bands, fd, kid, mind, prdc, psnr, ssim
from umm.metrics._features import haar_packets
from umm.metrics._store import Moments


def wave(n: int, d: int, a: float, b: float, c: float, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Deterministic features (n, d): offset + scale sin(a (i+1) (j+1) + b i + c j^2)."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)[None]
    return offset + scale * torch.sin(a * (i + 1) * (j + 1) + b * i + c * j * j)


X, Y = wave(64, 8, 0.7, 1.3, 0.11), wave(80, 8, 0.9, 0.5, 0.23, 1.3, 0.2)


def near(value: float, rel: float = 1e-9) -> object:
    return pytest.approx(value, rel=rel, abs=0)


def gaussian(*chunks: Tensor, packets: int = 1) -> fd.Gaussian:
    moments = Moments(packets, chunks[0].shape[1] // packets)
    for chunk in chunks:
        moments.update(chunk)
    return fd.Gaussian.of(moments)


def distance(x: Tensor, y: Tensor) -> float:
    return float(fd.frechet(gaussian(x), gaussian(y)))


def pictures() -> tuple[Tensor, Tensor]:
    """Two uint8 pictures (1, 3, 64, 64): a smooth one, and the same with a pseudo-random pattern on it."""
    i, j, c = np.mgrid[:64, :64, :3]
    x = np.round(127.5 + 100 * np.sin(0.13 * i + 0.9 * c) * np.cos(0.21 * j - 0.4 * c))
    y = np.clip(x + (7 * i + 13 * j + 5 * c) % 21 - 10, 0, 255)
    assert (x.sum(), y.sum()) == (1_577_721, 1_577_643)
    return tuple(torch.from_numpy(p.astype(np.uint8)).permute(2, 0, 1)[None] for p in (x, y))


def test_the_features_are_the_ones_the_answers_belong_to():
    assert X[0, :3].tolist() == pytest.approx([0.6442176872, 0.9981524725, 0.5659562304], abs=1e-10)
    assert float(X.sum()) == near(-1.5917172052324133)
    assert float(Y.sum()) == near(129.28278486230272)


def test_the_frechet_distance_of_given_gaussians_is_the_closed_form():
    def law(mean, covariance):
        return fd.Gaussian(torch.tensor([mean]).double(), torch.tensor([covariance]).double())

    diagonal = law([1.0, 2, 2], [[4.0, 0, 0], [0, 9, 0], [0, 0, 16]])
    assert float(fd.frechet(law([0.0] * 3, torch.eye(3).tolist()), diagonal)) == near(23)
    tilted = law([0.5, -0.5], [[3.0, -1], [-1, 1]])
    assert float(fd.frechet(law([0.0, 0], [[2.0, 1], [1, 2]]), tilted)) == near(1.897279504456862)


def test_the_frechet_distance_of_features_uses_the_unbiased_covariance():
    assert distance(X, Y) == near(1.0221148242364)
    streamed = fd.frechet(gaussian(*X.split(13)), gaussian(*Y.split([33, 47])))
    assert float(streamed) == near(1.0221148242364)


def test_float32_features_give_the_same_distance_to_six_digits():
    assert distance(X.float(), Y.float()) == near(1.0221148242364, rel=1e-6)


def test_fewer_pictures_than_features_lose_no_accuracy():
    """The usual square root of a rank-deficient product is off by 2e-7 here."""
    x, y = wave(12, 32, 0.37, 0.9, 0.05), wave(10, 32, 0.41, 0.3, 0.07, 1.1, 0.1)
    assert distance(x, y) == near(27.5033286781208, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "value"),
    [(20, 1.5122988131), (32, 1.1725205187), (48, 0.8890468533), (64, 0.9414178632), (80, 1.0221148242)],
)
def test_the_frechet_distance_of_prefixes(n, value):
    assert distance(Y[:n], X) == near(value)


def test_the_finite_sample_bias():
    assert gaussian(X).bias == near(13.376080608460)
    assert gaussian(Y).bias / 80 == near(0.269038938763)


def test_the_kernel_distance_over_all_pairs():
    assert kid.kid(X, Y[:64]) == near(0.137637030623)
    assert kid.kid(X, Y) == near(0.157221177610)


def test_the_kernel_distance_over_subsets_repeats_torch_fidelity():
    mean, spread = kid.kid_subsets(X, Y, subsets=10, size=32, seed=2020)
    assert (mean, spread) == (near(0.10214924853), near(0.09484092184))


@pytest.mark.parametrize(("k", "values"), [(3, (0.8, 1.0, 0.5041666667, 0.75)), (5, (0.9375, 1.0, 0.5175, 0.921875))])
def test_precision_recall_density_coverage(k, values):
    assert tuple(prdc.prdc(X, Y, k).values()) == pytest.approx(values, rel=1e-9)


def test_a_point_on_the_rim_of_a_ball_is_outside_it():
    """With <= instead of <, precision and recall of this lattice would be 1."""
    lattice = torch.arange(10.0, dtype=torch.float64)[:, None]
    assert tuple(prdc.prdc(lattice, lattice + 3, 3).values()) == pytest.approx((0.9, 0.9, 0.7666666667, 0.8), rel=1e-9)


def test_mind_along_the_axes():
    assert mind.mind(X, Y[:64], torch.eye(8, dtype=torch.float64)) == near(2.2473634690902)


def test_a_set_that_copies_two_moments_is_invisible_to_frechet_and_not_to_mind():
    values, vectors = torch.linalg.eigh(torch.cov(X.T))
    steps = ((8 * values * 63 / 64).sqrt() * vectors).T  # (8, 8)
    atoms = torch.cat([X.mean(0) + steps, X.mean(0) - steps]).repeat(4, 1)
    assert distance(atoms, X) < 1e-12
    assert mind.mind(X, atoms, torch.eye(8, dtype=torch.float64)) == near(3.2800720078)
    assert tuple(prdc.prdc(X, atoms, 5).values()) == pytest.approx((1, 1, 1.075, 0.859375), rel=1e-9)


@pytest.mark.parametrize(("level", "value"), [(1, 5.776727942876), (2, 0.921947712514)])
def test_the_frechet_wavelet_distance(level, value):
    x, y = wave(64, 64, 0.7, 1.3, 0.11), wave(80, 64, 0.9, 0.5, 0.23, 1.3, 0.2)
    laws = [gaussian(haar_packets(z.view(-1, 1, 8, 8), level).flatten(1), packets=4**level) for z in (x, y)]
    assert float(fd.frechet(*laws).mean()) == near(value)


def test_the_first_wavelet_packet_is_the_low_pass():
    packets = haar_packets(wave(64, 64, 0.7, 1.3, 0.11).view(-1, 1, 8, 8), 2)
    assert float(packets[:, 0].sum()) == near(-16.295960353504)


def test_psnr():
    assert float(psnr.psnr(*pictures())) == near(32.487337527888)
    levels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    off = levels + torch.tensor([5, 20], dtype=torch.uint8).view(2, 1, 1, 1)  # MSE 25 and 400
    assert float(psnr.psnr(levels, off).mean()) == pytest.approx(28.1308, abs=5e-5)


def test_ssim():
    inside, whole = ssim.SSIM().measure(*pictures())[0].tolist()
    assert inside == pytest.approx(0.9364496072, abs=1e-10)
    assert whole == pytest.approx(0.9317403074, abs=2e-7)  # the answer was computed in float32


def test_band_statistics():
    retention, coherence, ratio = (v[0].tolist() for v in bands.band_statistics(*pictures()))
    assert retention == pytest.approx(
        [1.0000191432, 1.0004075595, 75.5313398324, 266.5279938, 891.0085095727], rel=1e-9
    )
    assert coherence == pytest.approx([0.9999999979, 0.9999886397, 0.1174607890, 0.0761279870, 0.1007851886], abs=1e-10)
    decibels = [10 * np.log10(value) for value in ratio]
    assert decibels == pytest.approx([83.665413, 46.426971, -18.720960, -24.233152, -29.474296], abs=1e-6)


def test_one_layer_of_lpips():
    """The package's own parts, should it ever change its normalisation."""
    lpips = pytest.importorskip("lpips")
    f, g = wave(8, 16, 0.7, 1.3, 0.11).view(1, 8, 4, 4), wave(8, 16, 0.9, 0.5, 0.23, 1.3, 0.2).view(1, 8, 4, 4)
    weights = torch.arange(1, 9).double().view(1, 8, 1, 1) / 8
    squares = (lpips.normalize_tensor(f) - lpips.normalize_tensor(g)).square()
    assert float((squares * weights).sum(1).mean()) == near(1.182711292306)
