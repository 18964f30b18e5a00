"""Flow matching against closed forms: a Gaussian mixture's exact velocity, published times, properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, norm
from torch import Tensor

from umm import flow
from umm.errors import UmmError
from umm.latents.base import LatentSpec
from umm.rng import PictureRNG, generator
from umm.settings import FlowSettings, SamplerSettings

S = math.sqrt(768 * 16 * 16 / 4096)  # DINOv2-B at 256 px, 6.9282
RAEV2 = FlowSettings(prediction="x", truncate=1.0)
quick = settings(max_examples=30, derandomize=True, deadline=None)
shifts = st.floats(0.1, 20)
unit = st.floats(0, 1)
inner = st.floats(0.05, 0.95)  # where no clamp acts
kinds = st.sampled_from(flow.KINDS)


def normal(*shape: int, seed: object = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator("test", seed), dtype=dtype)


class Mixture:
    """Gaussian mixture data with diagonal covariances: density, score and velocity of x_t in closed form."""

    def __init__(self):
        self.weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        self.means = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=torch.float64)
        self.stds = torch.tensor([[0.3, 0.6], [0.5, 0.2], [0.8, 0.4]], dtype=torch.float64)

    def components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets from each component's mean (B, K, D), its variances (B, K, D), log weight x density (B, K)."""
        t = t[:, None, None]
        offset = x[:, None] - (1 - t) * self.means
        var = ((1 - t) * self.stds) ** 2 + t**2
        log_density = -0.5 * (offset**2 / var + var.log() + math.log(2 * math.pi)).sum(-1)
        return offset, var, self.weights.log() + log_density

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        return self.components(x, t)[2].logsumexp(-1)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps - z | x_t = x]."""
        offset, var, joint = self.components(x, t)
        t = t[:, None, None]
        z = self.means + (1 - t) * self.stds**2 * offset / var
        return (joint.softmax(-1)[..., None] * (t * offset / var - z)).sum(1)

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        second = (self.weights[:, None, None] * (self.means[:, :, None] * self.means[:, None, :])).sum(0)
        return second + torch.diag(self.weights @ self.stds**2) - torch.outer(self.mean, self.mean)


def moment_errors(x: Tensor, mixture: Mixture) -> tuple[float, float]:
    """Largest deviation of mean and covariance from the exact ones, in standard errors of a sample of this size."""
    offset = x - mixture.mean
    products = offset[:, :, None] * offset[:, None, :]

    def worst(values: Tensor, exact: Tensor) -> float:
        return ((values.mean(0) - exact) / (values.std(0) / len(x) ** 0.5)).abs().max().item()

    return worst(x, mixture.mean), worst(products, mixture.cov)


# ------------------------------------------------------------------------------------------- path, predictions, loss


def test_the_path_runs_from_data_to_noise():
    z, eps = normal(3, 4, 2, 2, seed="z"), normal(3, 4, 2, 2, seed="eps")
    assert torch.equal(flow.interpolate(z, eps, torch.zeros(3)), z)
    assert torch.equal(flow.interpolate(z, eps, torch.ones(3)), eps)
    half = flow.interpolate(z, eps, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(half[1], (z[1] + eps[1]) / 2)
    torch.testing.assert_close(half[0], 0.75 * z[0] + 0.25 * eps[0])


@quick
@given(t=inner, source=kinds, to=kinds)
def test_predictions_convert_into_each_other(t, source, to):
    z, eps, time = normal(2, 3, 2, 2, seed="z"), normal(2, 3, 2, 2, seed="eps"), torch.full((2,), t).double()
    x_t = flow.interpolate(z, eps, time)
    got = flow.convert(flow.target(z, eps, source), x_t, time, source, to)
    torch.testing.assert_close(got, flow.target(z, eps, to), rtol=1e-10, atol=1e-10)
    back = flow.convert(got, x_t, time, to, source)
    torch.testing.assert_close(back, flow.target(z, eps, source), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "times"), [("x", [0.0, 0.02]), ("noise", [1.0, 0.98])])
def test_a_velocity_is_clamped_where_the_prediction_does_not_determine_it(kind, times):
    prediction, x_t = normal(2, 5, seed="p"), normal(2, 5, seed="x")
    v = flow.to_velocity(prediction, x_t, torch.tensor(times), kind, t_eps=0.05)
    sign = 1 if kind == "x" else -1
    torch.testing.assert_close(v, sign * (x_t - prediction) / 0.05, rtol=1e-6, atol=0)
    assert v.isfinite().all()


@pytest.mark.parametrize("space", ["velocity", "x", "noise"])
@pytest.mark.parametrize("kind", flow.KINDS)
def test_the_loss_is_the_distance_of_the_converted_prediction_to_the_converted_target(kind, space):
    z, eps, guess = (normal(4, 3, 2, 2, seed=s) for s in ("z", "eps", "guess"))
    t = torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=torch.float64)
    x_t = flow.interpolate(z, eps, t)
    there = flow.convert(guess, x_t, t, kind, space)
    wanted = flow.convert(flow.target(z, eps, kind), x_t, t, kind, space)
    got = flow.loss(guess, z, eps, t, FlowSettings(prediction=kind, loss_space=space))
    torch.testing.assert_close(got, (there - wanted).square().flatten(1).mean(1), rtol=1e-8, atol=0)
    assert flow.loss(flow.target(z, eps, kind), z, eps, t, FlowSettings(prediction=kind, loss_space=space)).max() == 0


def test_raev2_loss_is_the_clamped_x_error():
    z, eps, guess = (normal(3, 8, seed=s) for s in ("z", "eps", "guess"))
    t = torch.tensor([0.0, 0.04, 0.5], dtype=torch.float64)
    want = (guess - z).square().mean(1) / t.clamp(min=0.05) ** 2
    torch.testing.assert_close(flow.loss(guess, z, eps, t, RAEV2), want)


def test_a_network_that_says_nothing_starts_near_loss_two():
    z, eps = normal(64, 512, seed="z"), normal(64, 512, seed="eps")
    losses = flow.loss(torch.zeros_like(z), z, eps, torch.rand(64), FlowSettings())
    assert losses.shape == (64,)
    assert losses.mean().item() == pytest.approx(2.0, abs=4 * math.sqrt(8 / z.numel()))  # Var (eps - z)^2 = 8


# ------------------------------------------------------------------------------------------------------ time and shift


@quick
@given(s=shifts, r=shifts, t=unit)
def test_shifts_invert_and_compose_by_product(s, r, t):
    t = torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(flow.unshift_time(flow.shift_time(t, s), s), t, rtol=1e-9, atol=1e-12)
    least = 1e-300  # nearer to zero a double has no nine digits
    composed = flow.shift_time(flow.shift_time(t, s), r)
    torch.testing.assert_close(composed, flow.shift_time(t, s * r), rtol=1e-9, atol=least)


@quick
@given(s=shifts)
def test_a_shift_is_monotone_and_fixes_data_and_noise(s):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = flow.shift_time(t, s)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()
    assert ((shifted - t) * (s - 1) >= -1e-12).all(), "s > 1 moves times towards noise, s < 1 towards data"


@pytest.mark.parametrize(
    ("channels", "side", "want"), [(768, 16, 6.9282), (1024, 16, 8.0), (1152, 16, 8.4853), (768, 32, 13.8564)]
)
def test_the_shift_follows_from_the_shape_of_the_latent(channels, side, want):
    spec = LatentSpec(channels, side, side, image_size=16 * side)
    assert flow.shift_for(spec.dim, FlowSettings()) == pytest.approx(want, abs=5e-5)
    assert flow.shift_for(spec.dim, FlowSettings(shift_base=1024)) == pytest.approx(2 * want, abs=1e-4)
    assert flow.shift_for(spec.dim, FlowSettings(shift=1.0)) == 1.0


PUBLISHED_GRIDS = [  # recipe sheet, section 9
    ("rae", S, {0: 1, 1: 0.997005, 2: 0.993902, 10: 0.964354, 25: 0.869531, 40: 0.610492, 47: 0.231979,
                48: 0.131505, 49: 0.006887}),
    ("rae", 2 * S, {47: 0.376595, 48: 0.232443, 49: 0.013680}),
    ("full", 8.0, {0: 1, 1: 0.997455, 2: 0.994819, 10: 0.969697, 25: 0.888889, 40: 0.666667, 48: 0.25,
                   49: 0.140351, 50: 0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shift", "points"), PUBLISHED_GRIDS)
def test_time_grids_are_the_published_ones(kind, shift, points):
    grid = flow.time_grid(50, shift, kind)
    assert len(grid) == (50 if kind == "rae" else 51)
    assert {i: grid[i].item() for i in points} == pytest.approx(points, abs=1e-6)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize(
    ("density", "quantiles", "mean"),
    [("logit_normal", [0.573, 0.778, 0.874, 0.931], 0.837), ("uniform", [0.271, 0.697, 0.874, 0.954], 0.787)],
)
def test_training_times_have_the_published_quantiles(density, quantiles, mean):
    """To 0.005: the published figures come from a finite sample (uniform at 5 %: exactly 0.267)."""
    rae = FlowSettings(density=density)
    got = flow.training_time(torch.tensor([0.05, 0.25, 0.5, 0.75], dtype=torch.float64), S, rae)
    assert got.tolist() == pytest.approx(quantiles, abs=5e-3)
    even = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert flow.training_time(even, S, rae).mean().item() == pytest.approx(mean, abs=2e-3)


def test_training_times_are_the_quantiles_of_the_truncated_density():
    """u = P(t <= value | t <= 0.999), stated backwards with scipy's logit-normal and by hand for uniform."""
    u = torch.tensor([0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999], dtype=torch.float64)
    t = flow.unshift_time(flow.training_time(u, S, FlowSettings(mean=-0.4, std=1.3)), S)
    below = norm(-0.4, 1.3).cdf(t.logit()) / norm(-0.4, 1.3).cdf(math.log(999))
    assert below == pytest.approx(u.numpy(), abs=1e-9)
    t = flow.unshift_time(flow.training_time(u, S, FlowSettings(density="uniform")), S)
    torch.testing.assert_close(t / 0.999, u)


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_rae_truncates_times_before_the_shift_and_raev2_does_not(density):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    cut = flow.training_time(ends, 1.0, FlowSettings(density=density))
    assert cut.tolist() == pytest.approx([0.0, 0.999], abs=1e-6)
    whole = flow.training_time(ends, 1.0, FlowSettings(density=density, truncate=1.0))
    assert whole.tolist() == [0.0, 1.0]


def test_training_times_come_from_pictures_or_from_a_generator():
    rae = FlowSettings()
    batch = flow.training_time(PictureRNG(range(6), 0, "gen").rand(), S, rae)
    assert batch.shape == (6,) and batch.min() >= 0 and batch.max() <= 1
    for rows in ([5], [2, 0]):
        assert torch.equal(flow.training_time(PictureRNG(rows, 0, "gen").rand(), S, rae), batch[rows])
    drawn = flow.training_time(torch.rand(4000, generator=generator(0)), S, rae)
    assert drawn.median().item() == pytest.approx(0.874, abs=0.01)


# ------------------------------------------------------------------------------------------------------------ guidance


class Counting:
    """An element-wise network (x, t, y) that notes the batch sizes it is called with."""

    def __init__(self, phase: float = 0.0, dtype: torch.dtype | None = None):
        self.phase, self.dtype, self.batches = phase, dtype, []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.batches.append(len(x))
        t, y = (v.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) for v in (t, y))
        return torch.sin(2 * x + t + y + self.phase).to(self.dtype or x.dtype)


NULL = 9


@quick
@given(scale=st.floats(-1, 5), t=unit)
def test_guidance_acts_on_every_channel_alike(scale, t):
    net, weak = Counting(), Counting(1.0)
    x, time, y = normal(2, 7, 2, 2), torch.full((2,), t).double(), torch.tensor([1, 4])
    full = net(x, time, y)
    for base, guided in (
        (net(x, time, torch.full_like(y, NULL)), flow.classifier_free(net, NULL, scale)),
        (weak(x, time, y), flow.autoguidance(net, weak, scale)),
        (weak(x, time, y), flow.internal_guidance(lambda *a: (net(*a), weak(*a)), scale, (0.0, 1.0))),
    ):
        torch.testing.assert_close(guided(x, time, y), base + scale * (full - base))


@pytest.mark.parametrize("t", [0.1, 0.9])
def test_scale_zero_is_the_base_and_scale_one_is_the_full_prediction(t):
    net, weak = Counting(), Counting(1.0)
    x, time, y = normal(3, 7, 2, 2), torch.full((3,), t).double(), torch.tensor([1, 4, 2])
    full, nothing, feeble = net(x, time, y), net(x, time, torch.full_like(y, NULL)), weak(x, time, y)
    for scale, cfg, auto in ((0.0, nothing, feeble), (1.0, full, full)):
        assert torch.equal(flow.classifier_free(net, NULL, scale)(x, time, y), cfg)
        assert torch.equal(flow.autoguidance(net, weak, scale)(x, time, y), auto)
        assert torch.equal(flow.internal_guidance(lambda *a: (net(*a), weak(*a)), scale)(x, time, y), auto)


def test_the_guidance_interval_is_closed_and_rows_outside_are_conditional():
    net = Counting()
    x, y, t = normal(5, 3), torch.arange(5), torch.tensor([0.19, 0.2, 0.5, 0.9, 0.91])
    x = x.float()
    guided = flow.classifier_free(net, NULL, 2.0, (0.2, 0.9))(x, t, y)
    full, base = net(x, t, y), net(x, t, torch.full_like(y, NULL))
    assert torch.equal(guided[[0, 4]], full[[0, 4]])
    torch.testing.assert_close(guided[1:4], (2 * full - base)[1:4])


def test_the_second_prediction_is_computed_only_where_guidance_acts():
    x, y = normal(4, 3), torch.arange(4)
    low, high = torch.full((4,), 0.1), torch.full((4,), 0.5)
    net, weak = Counting(), Counting()
    cfg, auto = flow.classifier_free(net, NULL, 2.0, (0.2, 1.0)), flow.autoguidance(net, weak, 1.42, (0.2, 1.0))
    for t in (low, high):
        cfg(x, t, y), auto(x, t, y)
    assert net.batches == [4, 4, 8, 4] and weak.batches == [4]
    flow.classifier_free(net, NULL, 1.0)(x, high, y), flow.autoguidance(net, weak, 1.0)(x, high, y)
    assert net.batches[4:] == [4, 4] and weak.batches == [4]


def test_guidance_means_the_same_for_every_kind_of_prediction():
    net, weak = Counting(), Counting(1.0)
    x, t, y = normal(2, 3), torch.tensor([0.3, 0.6]).double(), torch.tensor([0, 1])
    on_x = flow.velocity_field(flow.autoguidance(net, weak, 1.78), "x")
    on_v = flow.autoguidance(flow.velocity_field(net, "x"), flow.velocity_field(weak, "x"), 1.78)
    torch.testing.assert_close(on_x(x, t, y), on_v(x, t, y))


def test_guidance_wrappers_compose():
    net, weak = Counting(), Counting(1.0)
    x, t, y = normal(2, 3), torch.tensor([0.3, 0.6]).double(), torch.tensor([0, 1])
    inner = flow.internal_guidance(lambda *a: (net(*a), weak(*a)), 1.78)
    got = flow.classifier_free(inner, NULL, 1.5)(x, t, y)
    full, base = inner(x, t, y), inner(x, t, torch.full_like(y, NULL))
    torch.testing.assert_close(got, base + 1.5 * (full - base))


def test_half_precision_networks_are_guided_and_integrated_in_single_precision():
    net = Counting(dtype=torch.bfloat16)
    x, y = normal(2, 3, dtype=torch.float32), torch.tensor([0, 1])
    field = flow.velocity_field(flow.classifier_free(net, NULL, 2.0))
    out = flow.euler(lambda x, t: field(x, t, y), x, flow.time_grid(3))
    t = torch.ones(2)
    full, base = net(x, t, y).float(), net(x, t, torch.full_like(y, NULL)).float()
    assert out.dtype == torch.float32
    assert torch.equal(field(x, t, y), torch.lerp(base, full, 2.0))


# ------------------------------------------------------------------------------------------------------------ samplers


@quick
@given(steps=st.integers(2, 60), shift=shifts, kind=st.sampled_from(["full", "rae"]), method=st.sampled_from("eh"))
def test_a_constant_field_is_integrated_exactly(steps, shift, kind, method):
    x, c, grid = normal(2, 4, seed="x"), normal(2, 4, seed="c"), flow.time_grid(steps, shift, kind)
    solve = flow.euler if method == "e" else flow.heun
    torch.testing.assert_close(solve(lambda x, t: c, x, grid), x - (1 - grid[-1]) * c, rtol=1e-12, atol=1e-12)


@quick
@given(steps=st.integers(2, 30), shift=shifts)
def test_heun_integrates_a_field_linear_in_time_exactly(steps, shift):
    x, grid = normal(2, 4), flow.time_grid(steps, shift, "rae")
    end = grid[-1]
    got = flow.heun(lambda x, t: (3 * t - 1)[:, None].expand_as(x), x, grid)
    torch.testing.assert_close(got, x + (1.5 * end**2 - end) - 0.5, rtol=1e-10, atol=1e-10)


def slope(solve, steps: list[int]) -> float:
    """Order of convergence on the mixture: minus the slope of log error against log steps."""
    mixture, x = Mixture(), normal(32, 2)
    exact = flow.heun(mixture.velocity, x, flow.time_grid(2000))
    errors = [(solve(mixture.velocity, x, flow.time_grid(n)) - exact).norm().item() for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(("solve", "order"), [(flow.euler, 1), (flow.heun, 2)])
def test_the_samplers_converge_with_their_order(solve, order):
    assert slope(solve, [100, 200, 400]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_the_score_is_the_gradient_of_the_log_density(t):
    mixture, time = Mixture(), torch.full((32,), t, dtype=torch.float64)
    x = normal(32, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, time).sum(), x)
    torch.testing.assert_close(flow.score(mixture.velocity(x, time), x, time), gradient)


@pytest.fixture(scope="module")
def samples() -> dict[str, Tensor]:
    """10,000 samples of the mixture by each sampler, from the same noise, fine enough that the steps do not show."""
    mixture, x = Mixture(), normal(10_000, 2)
    fine = flow.time_grid(200, 2.0)
    sde = {
        f"sde {name} {noise}": flow.euler_maruyama(mixture.velocity, x, fine, generator(name), name, noise)
        for name, noise in (("sigma", 1.0), ("sigma", 2.0), ("sin2", 1.0))
    }
    return {"euler": flow.euler(mixture.velocity, x, fine), "heun": flow.heun(mixture.velocity, x, fine[::4])} | sde


SAMPLERS = ["euler", "heun", "sde sigma 1.0", "sde sigma 2.0", "sde sin2 1.0"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_mean_and_covariance_of_the_data(samples, name):
    """Within four standard errors of 10,000 samples, which six right entries exceed once in 2,600 trials."""
    mean, cov = moment_errors(samples[name], Mixture())
    assert mean < 4 and cov < 4


@pytest.mark.parametrize("name", SAMPLERS[2:])
def test_the_sde_and_the_ode_agree_in_distribution(samples, name):
    """Kolmogorov-Smirnov on both axes and a diagonal; noise of the SDE makes the two samples nearly independent."""
    for direction in ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8]):
        line = torch.tensor(direction, dtype=torch.float64)
        assert ks_2samp((samples[name] @ line).numpy(), (samples["heun"] @ line).numpy()).pvalue > 1e-3


def test_the_sde_without_noise_is_the_ode():
    mixture, x, grid = Mixture(), normal(16, 2), flow.time_grid(20, 3.0)
    still = flow.euler_maruyama(mixture.velocity, x, grid, generator(0), noise=0.0)
    torch.testing.assert_close(still, flow.euler(mixture.velocity, x, grid))


def test_an_x_prediction_ends_at_its_last_guess():
    """With t = 0 on the grid the last Euler step, if not clamped, lands on what the network takes for the data."""
    guess = normal(2, 5, seed="guess")
    grid = flow.time_grid(10, 8.0)
    out = flow.euler(flow.velocity_field(lambda x, t: guess, "x"), normal(2, 5), grid)
    torch.testing.assert_close(out, guess)


@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
@pytest.mark.parametrize("grid", ["full", "rae"])
def test_the_number_of_evaluations_is_the_stated_one(method, grid):
    config, net, y = SamplerSettings(method=method, grid=grid, steps=7), Counting(), torch.zeros(2)
    reached = []
    flow.sample(
        lambda x, t: net(x, t, y), normal(2, 3), S, config, generator(0), lambda x, t: reached.append((x.shape, t))
    )
    assert len(net.batches) == flow.evaluations(config)
    assert reached == [((2, 3), t) for t in flow.time_grid(7, S, grid)[1:].tolist()]


@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
def test_a_sample_depends_on_its_seed_and_number_alone(method):
    """Bit for bit, whatever the batch size and the order; else a resumed or sharded run would draw other pictures."""
    config, labels = SamplerSettings(method=method, steps=6), torch.arange(8) % 3
    network = flow.velocity_field(flow.classifier_free(Counting(), NULL, 1.7, (0.2, 0.9)))

    def draw(indices: list[int]) -> Tensor:
        rng = PictureRNG(indices, 0, "sample")
        x, y = rng.randn(3, 2, 2), labels[indices]
        return flow.sample(lambda x, t: network(x, t, y), x, S, config, rng)

    together = draw(list(range(8)))
    assert together.std() > 0.1
    for indices in ([0, 1, 2], [3, 4, 5, 6, 7], [7], [6, 0, 3]):
        assert torch.equal(draw(indices), together[indices])


def test_sampling_builds_no_graph():
    scale = torch.ones(1, requires_grad=True)
    out = flow.heun(lambda x, t: scale * x, normal(2, 3), flow.time_grid(3))
    assert not out.requires_grad


# -------------------------------------------------------------------------------------------------------------- errors


def test_unknown_names_are_answered_with_the_choices():
    z, t = normal(2, 3), torch.rand(2)
    wrong = {
        "no prediction is called 'velocty': choose one of velocity, x, noise. Did you mean 'velocity'": (
            lambda: flow.loss(z, z, z, t, FlowSettings(prediction="velocty"))
        ),
        "no prediction is called 'v'": lambda: flow.velocity_field(lambda x, t: x, "v")(z, t),
        "no time density is called 'beta'": lambda: flow.training_time(t, 1.0, FlowSettings(density="beta")),
        "no time grid is called 'karras'": lambda: flow.time_grid(5, 1.0, "karras"),
        "rae grid needs steps of at least 2, got 1": lambda: flow.time_grid(1, 1.0, "rae"),
        "no diffusion is called 'sbdm'": lambda: flow.euler_maruyama(z, z, t, generator(0), "sbdm"),
        "no sampler is called 'ddim'": lambda: flow.sample(z, z, 1.0, SamplerSettings("ddim"), generator(0)),
    }
    for message, call in wrong.items():
        with pytest.raises(UmmError, match=message):
            call()
