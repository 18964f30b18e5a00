"""Metrics: streaming equals batch, processes merge without loss, and what other libraries say."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from umm.errors import MissingWeights, NonFinite, UmmError, UnknownName
from umm.metrics import bands, fd, kid, lpips, mind, nearest, prdc, psnr, ssim
from umm.metrics._conflict import conflicts, marked
from umm.metrics._features import FeatureSpace, Pixels, Wavelet, open_space
from umm.metrics._inception import InceptionFID, tf1_bilinear
from umm.metrics._store import FeatureStore, Moments, half_of
from umm.metrics.base import Metric, PictureIds, require_comparable
from umm.registry import find, names
from umm.settings import EvalSettings

PAIRED = (psnr.PSNR, ssim.SSIM, bands.Bands)
SETS = (fd.FrechetDistance, kid.KID, prdc.PRDC, mind.MIND)
few = settings(max_examples=8, deadline=None, derandomize=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def photos(n: int, size: int = 32, seed: int = 0, noise: float = 0.05) -> tuple[Tensor, Tensor, list[str]]:
    """Smooth uint8 pictures, noisy copies of them, and their ids."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    real = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    fake = (real + noise * draw(n, 3, size, size, seed=seed + 1).float()).clamp(0, 1)
    return real.mul(255).round().byte(), fake.mul(255).round().byte(), [f"val/{i:05d}" for i in range(n)]


class _Plain(FeatureSpace):
    """Features are given, not extracted."""

    name = "plain"


def store_of(space: FeatureSpace | None = None, **sides: Tensor) -> FeatureStore:
    store = FeatureStore(space or _Plain())
    for side, features in sides.items():
        store.add(side, features, [f"{side}/{i}" for i in range(len(features))])
    return store


def distance(x: Tensor, y: Tensor) -> float:
    laws = []
    for rows in (x, y):
        moments = Moments(1, rows.shape[1])
        moments.update(rows)
        laws.append(fd.Gaussian.of(moments))
    return float(fd.frechet(*laws))


def agree(one: dict, other: dict, rel: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert other[key] == pytest.approx(value, rel=rel, abs=1e-11), key


# ------------------------------------------------------------------------------------------------------- registry


@pytest.mark.parametrize("name", names("metrics"))
def test_every_file_is_one_metric_that_is_called_like_it(name):
    metric = find("metrics", name)
    assert issubclass(metric, Metric) and metric.name == name
    assert metric.__doc__ and (name == "lpips" or metric.numbers)


@pytest.mark.parametrize("metric", [*PAIRED, *SETS])
def test_settings_build_a_metric(metric):
    built = metric.from_settings(EvalSettings(neighbors=3))
    assert built.name == metric.name
    assert all(built.better(number) in (True, False, None) for number in built.numbers)


# --------------------------------------------------------------------------------------------------------- paired


def test_psnr_equals_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    real, fake, _ = photos(3)
    for x, y, value in zip(real.numpy(), fake.numpy(), psnr.psnr(real, fake).tolist()):
        assert value == pytest.approx(skimage.peak_signal_noise_ratio(x, y), rel=1e-12)


def test_identical_pictures_score_100_db_and_1():
    real, _, ids = photos(2)
    for metric in (psnr.PSNR(), ssim.SSIM()):
        metric.update(real, real, ids)
        assert set(metric.compute().values()) == ({100.0} if metric.name == "psnr" else {1.0})


def test_ssim_equals_scikit_image_inside_the_picture_and_torchmetrics_with_reflected_borders():
    skimage = pytest.importorskip("skimage.metrics")
    from torchmetrics.functional.image import structural_similarity_index_measure

    real, fake, _ = photos(3)
    real, fake = real[..., :24], fake[..., :24]  # not square
    values = ssim.SSIM().measure(real, fake)
    for x, y, value in zip(real, fake, values[:, 0].tolist()):
        arrays = (z.permute(1, 2, 0).numpy() for z in (x, y))
        options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        assert value == pytest.approx(skimage.structural_similarity(*arrays, data_range=255, **options), rel=1e-9)
    theirs = structural_similarity_index_measure(
        fake.double() / 255, real.double() / 255, data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(values[:, 1], theirs, rtol=1e-7, atol=1e-7)


def test_ssim_of_pictures_smaller_than_its_window_is_an_error():
    with pytest.raises(UmmError, match="at least 11 pixels"):
        ssim.SSIM().update(*photos(2, size=8))


def test_blur_loses_energy_and_hallucination_loses_coherence():
    real = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(real.float(), 3, 1, 1).byte()
    retention, _, _ = bands.band_statistics(real, blurred)
    _, coherence, _ = bands.band_statistics(real, real.roll(1, 0))
    assert retention[:, 3].mean() < 0.3 < 0.7 < retention[:, 0].mean()
    assert coherence[:, 3].abs().max() < 0.2


def test_a_flat_picture_has_no_band_energy_and_is_left_out_of_the_means():
    real, fake, ids = photos(3)
    real[1] = 128
    metric = bands.Bands()
    metric.update(real, fake, ids)
    assert set(metric.per_item()["coherence_2"]) == {ids[0], ids[2]}
    assert all(np.isfinite(value) for value in metric.compute().values())


def test_a_flat_reconstruction_keeps_nothing():
    real, fake, ids = photos(2)
    metric = bands.Bands()
    metric.update(real, torch.full_like(fake, 128), ids)
    numbers = metric.compute()
    assert numbers["retention_db_1"] == -100 and numbers["coherence_1"] == 0
    assert numbers["snr_db_1"] == pytest.approx(0, abs=1e-6)


def test_shuffled_pairs_are_noticed():
    """Set metrics cannot see a permutation; the paired ones would silently compare strangers."""
    real, fake, ids = photos(16)
    right, wrong = psnr.PSNR(), psnr.PSNR()
    right.update(real, fake, ids)
    wrong.update(real, fake[torch.randperm(16, generator=torch.Generator().manual_seed(1))], ids)
    assert right.notes(right.compute()) == []
    assert "shuffled" in wrong.notes(wrong.compute())[0]


@pytest.mark.parametrize("kind", PAIRED)
def test_float_pictures_are_judged_as_the_uint8_file_they_would_become(kind):
    real, fake, ids = photos(4)
    as_bytes, as_floats = kind(), kind()
    as_bytes.update(real, fake, ids)
    as_floats.update(real / 255, fake / 255 + 0.4 / 255, ids)
    assert as_bytes.compute() == as_floats.compute()


def test_a_picture_that_is_not_finite_is_an_error_and_not_black():
    real, fake, ids = photos(2)
    fake = fake / 255
    fake[1, 0, 0, 0] = torch.nan
    with pytest.raises(NonFinite):
        psnr.PSNR().update(real, fake, ids)


def test_pictures_of_different_sizes_are_an_error():
    real, _, ids = photos(2)
    with pytest.raises(UmmError, match="resize"):
        psnr.PSNR().update(real, photos(2, size=16)[1], ids)


def test_the_mean_weighs_pictures_and_not_batches():
    """130 pictures in batches of 64 leave a last batch of 2."""
    real, fake, ids = photos(130, size=16)
    fake[-2:] = 0
    whole, batched = psnr.PSNR(), psnr.PSNR()
    whole.update(real, fake, ids)
    for start in range(0, 130, 64):
        batched.update(*(z[start : start + 64] for z in (real, fake, ids)))
    assert whole.compute() == batched.compute()


def test_lpips_without_weights_says_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match="alexnet"):
        lpips.LPIPS.from_settings(EvalSettings())


def test_lpips_gives_a_value_per_picture_and_names_its_network(monkeypatch):
    package = pytest.importorskip("lpips")

    def network(net):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return package.LPIPS(net=net, pnet_rand=True, verbose=False).requires_grad_(False)

    monkeypatch.setattr(lpips, "lpips_network", network)
    metric = lpips.LPIPS("alex")
    real, fake, ids = photos(3, size=64)
    fake[0] = real[0]
    metric.update(real, fake, ids)
    values = list(metric.per_item()["lpips_alex"].values())
    assert values[0] == 0 < min(values[1:])
    expected = metric.network(real / 127.5 - 1, fake / 127.5 - 1).flatten()
    torch.testing.assert_close(torch.tensor(values).float(), expected)
    assert metric.fingerprint()["network"] == "lpips-0.1-alex" and len(metric.weights) == 64


# ------------------------------------------------------------------------------------------------ Frechet distance


@few
@given(st.integers(0, 1000), st.integers(2, 12), st.integers(5, 40))
def test_the_frechet_distance_behaves_like_a_distance(seed, width, n):
    x, y = draw(n, width, seed=seed), 1.5 * draw(n + 3, width, seed=seed + 1) + 0.3
    turn = torch.linalg.qr(draw(width, width, seed=seed + 2)).Q
    value = distance(x, y)
    assert distance(x, x) < 1e-9
    assert distance(y, x) == pytest.approx(value, rel=1e-9)
    assert distance(x @ turn, y @ turn) == pytest.approx(value, rel=1e-8)
    assert distance(x.flip(0), y) == pytest.approx(value, rel=1e-9)
    assert distance(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-9)


def test_the_frechet_distance_equals_scipys_matrix_square_root():
    from scipy.linalg import sqrtm

    x, y = draw(60, 12).numpy(), (2 * draw(70, 12, seed=1) + 1).numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    reference = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(reference, rel=1e-10)


@few
@given(st.lists(st.integers(0, 60), max_size=5), st.randoms(use_true_random=False))
def test_moments_do_not_depend_on_chunks_or_their_order(cuts, random):
    """At a mean a thousand standard deviations from zero, empty chunks included."""
    x = draw(60, 5) + 1000
    chunks = torch.tensor_split(x, sorted(cuts))
    parts = []
    for chunk in chunks:
        part = Moments(1, 5)
        part.update(chunk)
        parts.append(part)
    random.shuffle(parts)
    total = Moments(1, 5)
    for part in parts:
        total.merge(part.count, part.mean, part.m2)
    torch.testing.assert_close(total.covariance[0], torch.cov(x.T), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(total.mean[0], x.mean(0), rtol=1e-13, atol=0)


def test_excess_is_zero_for_fakes_that_are_like_reals_and_not_for_others():
    real, same, other = draw(2000, 6), draw(2000, 6, seed=1), 1.3 * draw(2000, 6, seed=2)
    metric = fd.FrechetDistance()
    like, unlike = (metric.compute(store_of(real=real, fake=fake)) for fake in (same, other))
    assert abs(like["fd_excess"]) < like["fd_floor"]
    assert unlike["fd_excess"] == pytest.approx(6 * 0.3**2, rel=0.2)
    assert "so few pictures" in metric.notes(like)[0] and metric.notes(unlike) == []


def test_the_predicted_bias_is_what_equal_laws_score_on_average():
    numbers = [
        fd.FrechetDistance().compute(store_of(real=draw(200, 6, seed=seed), fake=draw(300, 6, seed=100 + seed)))
        for seed in range(40)
    ]
    found, predicted = (np.mean([row[key] for row in numbers]) for key in ("fd", "fd_bias"))
    assert found == pytest.approx(predicted, rel=0.1)


def test_a_fake_never_meets_its_own_original_in_the_excess():
    """Perfect reconstructions: the distance is 0, and so is the excess over real against real."""
    features = draw(400, 4)
    store = FeatureStore(_Plain())
    for side in ("real", "fake"):
        store.add(side, features, [str(i) for i in range(400)])
    numbers = fd.FrechetDistance().compute(store)
    assert numbers["fd"] < 1e-9 and numbers["fd_floor"] > 1e-3
    assert numbers["fd_excess"] == pytest.approx(0, abs=1e-9)
    assert "fd_bias" not in numbers  # both sides err alike


def test_halves_are_fair():
    assert 900 < sum(half_of(f"sample/{i}") for i in range(2000)) < 1100


def test_wavelet_space_averages_the_distance_over_its_packets():
    store = FeatureStore(Wavelet())
    real, fake, ids = photos(40)
    store.update("real", real, ids)
    store.update("fake", fake, ids)
    store.space.name = "wavelet"
    mean_per_packet = fd.FrechetDistance().compute(store)["fd"]
    rows = [store.rows(side).unflatten(1, (256, -1)) for side in ("real", "fake")]
    by_hand = np.mean([distance(rows[0][:, p], rows[1][:, p]) for p in range(256)])
    assert mean_per_packet == pytest.approx(by_hand, rel=1e-9)


# ------------------------------------------------------------------------------------------------- other set metrics


def naive_prdc(real: np.ndarray, fake: np.ndarray, k: int) -> tuple:
    def apart(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    radii = [np.sort(apart(z, z), axis=1)[:, k] for z in (real, fake)]
    across = apart(real, fake)
    inside = across < radii[0][:, None]
    return inside.any(0).mean(), (across < radii[1]).any(1).mean(), inside.sum(0).mean() / k, inside.any(1).mean()


@pytest.mark.parametrize("tile", [1, 200, 1 << 25])
def test_prdc_equals_its_definition_whatever_the_tile(tile, monkeypatch):
    monkeypatch.setattr(prdc, "TILE", tile)
    real, fake = draw(60, 5) + 100, 1.2 * draw(45, 5, seed=1) + 100
    assert tuple(prdc.prdc(real, fake, 4).values()) == pytest.approx(naive_prdc(real.numpy(), fake.numpy(), 4))


def test_copies_of_a_fake_have_balls_of_radius_zero():
    """Every fake four times: with k = 3 no real picture is strictly within such a ball."""
    real = draw(200, 16).float()
    fake = draw(50, 16, seed=1).float().repeat(4, 1)
    assert prdc.prdc(real.double(), fake.double(), 3)["recall"] == 0


def test_distances_of_near_duplicates_are_exact():
    x = draw(50, 1024).float().double()
    y = x + 1e-3 * draw(50, 1024, seed=1)
    exact = (x - y).square().sum(1)
    torch.testing.assert_close(prdc.squared_distances(x, y).diagonal(), exact, rtol=1e-8, atol=0)
    assert torch.equal(prdc.squared_distances(x, x).diagonal(), torch.zeros(50, dtype=torch.float64))


def test_prdc_with_too_few_pictures_is_a_sentence():
    with pytest.raises(UmmError, match="neighbors=5"):
        prdc.prdc(draw(5, 2), draw(9, 2), 5)


@pytest.mark.parametrize("tile", [7, 4096])
def test_kid_equals_the_mean_over_pairs_whatever_the_tile(tile, monkeypatch):
    monkeypatch.setattr(kid, "TILE", tile)
    x, y = draw(20, 3), draw(15, 3, seed=1) + 0.5

    def mean_kernel(a, b, distinct):
        return np.mean(
            [((p @ q) / 3 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if i != j or not distinct]
        )

    a, b = x.numpy(), y.numpy()
    by_hand = mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)
    assert kid.kid(x, y) == pytest.approx(by_hand, rel=1e-10)


def test_mind_thins_the_larger_side_and_is_zero_on_itself():
    x = draw(300, 8)
    assert mind.MIND().compute(store_of(real=x, fake=x))["mind"] == 0
    like, wider = draw(500, 8, seed=1), 2 * draw(500, 8, seed=1)
    values = [mind.MIND().compute(store_of(real=x, fake=fake))["mind"] for fake in (like, wider)]
    assert values[0] < 1 and values[1] == pytest.approx(3 * 8, rel=0.15)  # W2 of N(0, 1) and N(0, 4) is 1


def test_mind_of_shifted_normals_is_the_squared_shift():
    """3 d times the mean over directions of (u . s)^2 is 3 |s|^2."""
    x, shift = draw(400, 8), torch.arange(8, dtype=torch.float64)
    assert mind.MIND().compute(store_of(real=x, fake=x + shift))["mind"] == pytest.approx(3 * 140, rel=0.1)


def test_copied_training_pictures_raise_the_alarm_and_new_ones_do_not():
    train, real = draw(800, 8), draw(400, 8, seed=1)
    metric = nearest.Nearest()
    new = metric.compute(store_of(train=train, real=real, fake=draw(300, 8, seed=2)))
    copied = torch.cat([train[:20] + 1e-4, draw(280, 8, seed=2)])
    old = metric.compute(store_of(train=train, real=real, fake=copied))
    assert new["nearest_ratio"] == pytest.approx(1, abs=0.1) and metric.notes(new) == []
    assert old["copied"] >= 20 / 300 and "memorisation" in metric.notes(old)[0]


def test_the_alarms_probability_is_exact():
    """One held-out distance, one fake: either is nearer with probability a half."""
    assert nearest.copies(torch.tensor([0.0]), torch.tensor([1.0])) == (1, pytest.approx(0.5))
    assert nearest.copies(torch.tensor([2.0]), torch.tensor([1.0])) == (0, pytest.approx(1.0))


# ----------------------------------------------------------------------------------------------- ids and processes


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_gives_the_numbers_of_one(world):
    """50 pictures divide by none of them; state goes through pickle as between processes."""
    real, fake, ids = photos(50)

    def judge(members: list[int]) -> tuple[list, FeatureStore]:
        metrics, store = [kind() for kind in PAIRED], FeatureStore(Pixels())
        store.space.name = "pixels"
        for batch in torch.tensor(members).split(4):
            names_ = [ids[i] for i in batch]
            for metric in metrics:
                metric.update(real[batch], fake[batch], names_)
            store.update("real", real[batch], names_)
            store.update("fake", fake[batch], names_)
        return metrics, store

    alone, store = judge(list(range(50)))
    parts = [judge(list(range(rank, 50, world))) for rank in range(world)]
    merged, merged_store = parts[-1]
    for metrics, part in parts[:-1]:
        for metric, other in zip(merged, metrics):
            metric.absorb(pickle.loads(pickle.dumps(other.state())))
        merged_store.absorb(pickle.loads(pickle.dumps(part.state())))
    for one, other in zip(alone, merged):
        agree(one.compute(), other.compute(), rel=1e-12)
        for items, others in zip(one.per_item().values(), other.per_item().values(), strict=True):
            agree(items, others, rel=1e-12)
        assert one.fingerprint() == other.fingerprint()
    for kind in SETS:
        agree(kind().compute(store), kind().compute(merged_store))
        require_comparable(kind().fingerprint(store), kind().fingerprint(merged_store))


@pytest.mark.parametrize("kind", PAIRED)
def test_a_picture_counted_twice_is_an_error(kind):
    real, fake, ids = photos(4)
    metric, other = kind(), kind()
    with pytest.raises(UmmError, match="came twice"):
        metric.update(real, fake, [*ids[:3], ids[0]])
    metric = kind()
    metric.update(real, fake, ids)
    other.update(real[3:], fake[3:], ids[3:])
    with pytest.raises(UmmError, match="val/00003"):
        metric.merge(other)


def test_a_store_refuses_overlapping_pictures_too():
    store, other = store_of(real=draw(5, 2)), store_of(real=draw(3, 2))
    with pytest.raises(UmmError, match="came twice"):
        store.merge(other)


def test_missing_and_unexpected_pictures_are_named():
    ids = PictureIds()
    ids.add(["a", "b"])
    ids.check(["b", "a"])
    with pytest.raises(UmmError, match=r"1 of 3 pictures are missing .* 'c'"):
        ids.check("abc")
    with pytest.raises(UmmError, match="unexpected"):
        ids.check("a")


def test_a_merge_with_a_process_that_saw_nothing_changes_nothing():
    real, fake, ids = photos(3)
    metric = psnr.PSNR()
    metric.merge(psnr.PSNR())
    metric.update(real, fake, ids)
    before = metric.compute()
    metric.merge(psnr.PSNR())
    assert metric.compute() == before
    with pytest.raises(UmmError, match="no picture"):
        psnr.PSNR().compute()


def test_a_store_without_rows_serves_the_frechet_distance_only():
    full, lean = FeatureStore(_Plain()), FeatureStore(_Plain(), keep_rows=False)
    for store in (full, lean):
        store.add("real", draw(30, 3), [f"r{i}" for i in range(30)])
        store.add("fake", draw(30, 3, seed=1), [f"f{i}" for i in range(30)])
    agree(fd.FrechetDistance().compute(full), fd.FrechetDistance().compute(lean))
    with pytest.raises(UmmError, match="keep_rows"):
        kid.KID().compute(lean)


def test_a_feature_that_is_not_finite_names_its_picture():
    features = draw(4, 2)
    features[2, 0] = torch.inf
    store = store_of(real=features)
    with pytest.raises(NonFinite, match="real/2"):
        store.rows("real")
    with pytest.raises(NonFinite, match="real pictures"):
        store.moments("real")


def test_a_side_nobody_added_is_a_sentence():
    with pytest.raises(UmmError, match="no 'train' pictures"):
        nearest.Nearest().compute(store_of(real=draw(5, 2), fake=draw(5, 2)))


# ---------------------------------------------------------------------------------------- fingerprints, conflicts


def test_numbers_made_differently_are_not_compared():
    store = store_of(real=draw(30, 3), fake=draw(30, 3, seed=1))
    facts = prdc.PRDC(3).fingerprint(store)
    require_comparable(facts, prdc.PRDC(3).fingerprint(store))
    with pytest.raises(UmmError, match="'k' is 3 in one and 5 in the other"):
        require_comparable(facts, prdc.PRDC(5).fingerprint(store))
    for field in ("resizing", "weights", "n_fake", "reference", "version"):
        with pytest.raises(UmmError, match=f"'{field}'"):
            require_comparable(facts, facts | {field: "other"})
    with pytest.raises(UmmError, match="absent"):
        require_comparable(facts, {key: value for key, value in facts.items() if key != "k"})


def test_a_judge_whose_relatives_trained_is_left_out_and_marked():
    judges = {"fd effnet": ["efficientnet"], "fd dinov2": ["dinov2"], "fd wavelet": [], "lpips": ["alex"]}
    excluded = conflicts(judges, {"dino": "discriminator", "vgg": "perceptual loss"})
    assert list(excluded) == ["fd dinov2"] and "dino took part in training (discriminator)" in excluded["fd dinov2"]
    assert [marked(judge, excluded) for judge in list(judges)[:2]] == ["fd effnet", "fd dinov2 †"]
    assert set(conflicts(judges, {"efficientnet": "loss", "alex": "loss"})) == {"fd effnet", "lpips"}
    assert conflicts(judges, {}) == {}


# -------------------------------------------------------------------------------------------------- feature spaces


def test_an_unknown_space_gets_the_nearest_name():
    with pytest.raises(UnknownName, match="'inception'"):
        open_space("inceptoin")
    with pytest.raises(UmmError, match="takes no weights"):
        open_space("pixels:somewhere")


def test_missing_inception_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"effnet"):
        open_space("inception")
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(MissingWeights, match=r"bad\.pth"):
        open_space(f"inception:{tmp_path / 'bad.pth'}")


def test_missing_dinov2_weights_say_what_to_do(tmp_path):
    with pytest.raises(MissingWeights, match="effnet"):
        open_space(f"dinov2:{tmp_path / 'nowhere'}")


def formula_weights(network: torch.nn.Module) -> None:
    """Fill with sines, scaled so that activations neither vanish nor explode."""
    state = network.state_dict()
    for number, (name, tensor) in enumerate(sorted(state.items())):
        if not tensor.is_floating_point():
            continue
        wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 1.7 + number).view(tensor.shape)
        if tensor.ndim > 1:
            wave = wave * (2 / tensor[0].numel()) ** 0.5
        else:
            wave = 1 + 0.5 * wave if "var" in name or name.endswith("bn.weight") else 0.1 * wave
        state[name] = wave.to(tensor)
    network.load_state_dict(state)


def test_inception_equals_torch_fidelitys_on_the_same_weights(tmp_path):
    """Expected values were computed once with torch-fidelity 0.4.0; its published file has the same tensor names."""
    network = InceptionFID()
    formula_weights(network)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    space = open_space(f"inception:{tmp_path / 'inception.pth'}")
    i, j, c = torch.meshgrid(torch.arange(40), torch.arange(56), torch.arange(3), indexing="ij")
    picture = ((7 * i * i + 13 * j + 5 * c * j) % 256).byte().permute(2, 0, 1)[None]
    (features,) = space.extract(picture)
    assert features.shape == (2048,) and features.dtype == torch.float32
    expected = [0.7008973956, 0.0018450766, 0.0147667462, 0.2061778307, 0.0511215143, 0.0, 0.069251895, 0.17181699]
    assert features[::256].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert float(features.double().norm()) == pytest.approx(17.05403544, rel=1e-5)


def test_tensorflows_bilinear_resize_starts_at_the_corner():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert tf1_bilinear(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert torch.equal(tf1_bilinear(ramp, 2)[0, 0, 0], torch.tensor([0.0, 2.0]))  # not smoothed


def test_a_dinov2_folder_is_a_space_of_class_tokens(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    space = open_space(f"dinov2:{tmp_path}")
    real, _, _ = photos(2, size=224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = space.network((real / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(space.extract(real), expected)
    assert (space.dim, space.families) == (24, ("dinov2",)) and len(space.weights) == 64


def test_effnet_knows_a_cat_and_gives_its_pooled_features():
    """Offline weights are mapped by order: one tensor off, and the cat is a teapot."""
    data = pytest.importorskip("skimage.data")
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375]
    space = open_space("effnet")
    features = space.extract(cat)
    assert features.shape == (1, space.dim)
    assert int(space.network.classifier(features).argmax()) in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    batch = space.extract(torch.cat([cat.flip(3), cat]))
    torch.testing.assert_close(batch[1:], features, rtol=1e-4, atol=1e-5)


def test_autocast_around_a_metric_changes_nothing():
    real, fake, ids = photos(12)

    def numbers() -> dict:
        store, metric = FeatureStore(Pixels()), ssim.SSIM()
        store.space.name = "pixels"
        store.update("real", real, ids)
        store.update("fake", fake, ids)
        metric.update(real, fake, ids)
        return metric.compute() | fd.FrechetDistance().compute(store) | kid.KID().compute(store)

    plain = numbers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert numbers() == plain
    assert torch.get_default_dtype() == torch.float32


def test_tf32_is_off_while_features_are_extracted_and_on_again_after():
    convolutions, seen = torch.backends.cudnn.conv, []

    class Spy(Pixels):
        def features(self, pixels):
            seen.append((convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
            return super().features(pixels)

    before = convolutions.fp32_precision
    Spy().extract(photos(1)[0])
    assert seen == [("ieee", "ieee")] and convolutions.fp32_precision == before
