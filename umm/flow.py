"""Flow matching: path, predictions, loss, time, guidance and samplers, as functions on tensors. No networks here.

Time runs from data to noise. With a latent z at t = 0 and Gaussian noise eps at t = 1,

    x_t = (1 - t) z + t eps        v = dx_t / dt = eps - z

(Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003), a network predicts v, z ("x") or eps ("noise"), and
sampling integrates dx = v dt from t = 1 down. Where a codebase counts from noise to data (SiT, LightningDiT), its
time is 1 - t, its velocity -v and its shift 1/s.

x, z, eps, v are (B, ...) of one shape, t is (B,) in [0, 1]. A *field* is a function (x, t, *conditions) -> (B, ...):
a network, or what guidance makes of one. docs/formulas.md maps every equation to its function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from umm.errors import UmmError, nearest
from umm.rng import PictureRNG
from umm.settings import FlowSettings, SamplerSettings

Field = Callable[..., Tensor]
Callback = Callable[[Tensor, float], None]  # called after every step with x and the time it has reached
Interval = tuple[float, float]  # closed, in shifted time
KINDS = ("velocity", "x", "noise")  # what a network may predict

# ----------------------------------------------------------------------------------------------- path and predictions


def interpolate(z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The point x_t = (1 - t) z + t eps of the straight path."""
    t = _column(t, z)
    return (1 - t) * z + t * eps


def target(z: Tensor, eps: Tensor, kind: str = "velocity") -> Tensor:
    """What a network of this `kind` (velocity, x, noise) should say."""
    if kind == "velocity":
        return eps - z
    if kind not in ("x", "noise"):
        raise _unknown("prediction", kind, KINDS)
    return z if kind == "x" else eps


def to_velocity(prediction: Tensor, x_t: Tensor | float, t: Tensor, kind: str, t_eps: float = 0.05) -> Tensor:
    """The velocity that a prediction of z, (x_t - z) / t, or of eps, (eps - x_t) / (1 - t), stands for.

    Both divisors are kept at or above `t_eps`, which makes the velocity too short there: t < t_eps for x, t > 1 - t_eps
    for noise. RAEv2 (arXiv 2605.18324) clamps x predictions at 0.05, in its loss and in its sampler.
    """
    if kind == "velocity":
        return prediction
    t = _column(t, prediction)
    if kind == "x":
        return (x_t - prediction) / t.clamp(min=t_eps)
    if kind == "noise":
        return (prediction - x_t) / (1 - t).clamp(min=t_eps)
    raise _unknown("prediction", kind, KINDS)


def from_velocity(v: Tensor, x_t: Tensor | float, t: Tensor, kind: str) -> Tensor:
    """z = x_t - t v, eps = x_t + (1 - t) v, or v itself: never singular."""
    if kind == "velocity":
        return v
    t = _column(t, v)
    if kind == "x":
        return x_t - t * v
    if kind == "noise":
        return x_t + (1 - t) * v
    raise _unknown("prediction", kind, KINDS)


def convert(prediction: Tensor, x_t: Tensor | float, t: Tensor, source: str, to: str, t_eps: float = 0.05) -> Tensor:
    """A prediction of kind `source` as one of kind `to`, by way of the velocity and with its clamp."""
    if source == to:
        return prediction
    return from_velocity(to_velocity(prediction, x_t, t, source, t_eps), x_t, t, to)


def score(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Gradient of log p_t at x_t: -E[eps | x_t] / t (Tweedie), with eps from the velocity. Infinite at t = 0."""
    return -from_velocity(v, x_t, t, "noise") / _column(t, x_t)


def velocity_field(network: Field, kind: str = "velocity", t_eps: float = 0.05) -> Field:
    """A network that predicts `kind`, read as a velocity in the precision of x."""

    def field(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        return to_velocity(network(x, t, *conditions).to(x.dtype), x, t, kind, t_eps)

    return field


# --------------------------------------------------------------------------------------------------------------- loss


def loss(prediction: Tensor, z: Tensor, eps: Tensor, t: Tensor, settings: FlowSettings) -> Tensor:
    """Mean squared error of each sample, (B,), between prediction and target, both converted to the loss space.

    RAE and SiT predict v and compare v. RAEv2 predicts x and compares v: |x_hat - z|^2 / max(t, 0.05)^2.
    """
    error = prediction - target(z, eps, settings.prediction)
    # conversions are affine in the prediction, so a difference of two converts with x_t = 0
    error = convert(error, 0.0, t, settings.prediction, settings.loss_space, settings.t_eps)
    return error.square().flatten(1).mean(1)


# --------------------------------------------------------------------------------------------------------------- time


def dimension_shift(dim: int, base: int = 4096) -> float:
    """s = sqrt(dim / base) for latents of `dim` numbers (RAE, arXiv 2510.11690; SD3, arXiv 2403.03206, section 5.3.2).

    The more numbers a latent has, the more noise it takes to hide what they have in common.
    """
    return math.sqrt(dim / base)


def shift_for(dim: int, settings: FlowSettings) -> float:
    """The shift the settings name, or the one that follows from latents of `dim` numbers."""
    return dimension_shift(dim, settings.shift_base) if settings.shift is None else settings.shift


def shift_time(t: Tensor, s: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t). Fixes 0 and 1, moves times towards noise for s > 1; shifts compose by product."""
    return s * t / (1 - t + s * t)  # exact at 0 and 1 in this form


def unshift_time(t: Tensor, s: float) -> Tensor:
    """The inverse of `shift_time`: a shift by 1/s."""
    return shift_time(t, 1 / s)


def training_time(u: Tensor, shift: float, settings: FlowSettings) -> Tensor:
    """Shifted training times from uniform numbers u in [0, 1): `rng.rand()` or `torch.rand(B, generator=g)`.

    u goes through the inverse of the density's distribution function, cut to [0, truncate] before the shift. RAE cuts
    at 0.999; RAEv2 does not cut (1). Logit-normal (SD3, arXiv 2403.03206, eq. 19): logit t ~ N(mean, std^2).
    """
    mean, std, cut = settings.mean, settings.std, settings.truncate
    if settings.density == "uniform":
        return shift_time(u * cut, shift)
    if settings.density != "logit_normal":
        raise _unknown("time density", settings.density, ("logit_normal", "uniform"))
    mass = NormalDist(mean, std).cdf(math.log(cut / (1 - cut))) if cut < 1 else 1.0
    return shift_time(torch.sigmoid(mean + std * torch.special.ndtri(u * mass)), shift)


def time_grid(steps: int, shift: float = 1.0, kind: str = "full") -> Tensor:
    """Descending sampling times, float64: the shift of an even grid.

    full  linspace(1, 0, steps + 1): `steps` steps, ends at exactly 0 (RAEv2)
    rae   1 - linspace(0, 0.999, steps): `steps` *points*, so steps - 1 steps, ends just above 0 (0.0069 for s = 6.93)
    """
    if kind not in ("full", "rae"):
        raise _unknown("time grid", kind, ("full", "rae"))
    if steps < (least := 2 if kind == "rae" else 1):
        raise UmmError(f"the {kind} grid needs steps of at least {least}, got {steps}.")
    if kind == "rae":
        return shift_time(1 - torch.linspace(0, 0.999, steps, dtype=torch.float64), shift)
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


# ----------------------------------------------------------------------------------------------------------- guidance
#
# All guidance is base + scale (full - base) for times in the interval and full outside of it, on every channel: scale 0
# is the base, 1 the full prediction. The weights sum to one, so it means the same for velocity, x and noise.


def classifier_free(network: Field, null: Tensor | int, scale: float, interval: Interval = (0.0, 1.0)) -> Field:
    """Guide away from the unconditional prediction (Ho & Salimans, arXiv 2207.12598; interval: arXiv 2404.07724).

    Returns a field (x, t, y). `null` is the condition that says nothing, broadcast to y. Both predictions come from one
    batch of twice the size; where guidance changes nothing (outside of the interval, at scale 1) only y's is computed.
    """

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not _acts(t, scale, interval):
            return network(x, t, y)
        nothing = torch.zeros_like(y) + null
        full, base = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nothing])).chunk(2)
        return _extrapolate(full, base, t, scale, interval)

    return guided


def autoguidance(full: Field, weak: Field, scale: float, interval: Interval = (0.0, 1.0)) -> Field:
    """Guide away from a smaller or less trained model under the same conditions (Karras et al., arXiv 2406.02507)."""

    def guided(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        strong = full(x, t, *conditions)
        if not _acts(t, scale, interval):
            return strong
        return _extrapolate(strong, weak(x, t, *conditions), t, scale, interval)

    return guided


def internal_guidance(network: Callable, scale: float, interval: Interval = (0.1, 1.0)) -> Field:
    """Guide away from an auxiliary head of the same network, which gives (full, base) (RAEv2, arXiv 2605.18324)."""

    def guided(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        full, base = network(x, t, *conditions)
        return _extrapolate(full, base, t, scale, interval)

    return guided


# ----------------------------------------------------------------------------------------------------------- samplers
#
# `velocity(x, t)` is a field with its conditions bound; x starts as standard normal numbers, (B, ...), at t = grid[0].


def euler(velocity: Field, x: Tensor, grid: Tensor, callback: Callback | None = None) -> Tensor:
    """dx = v dt by Euler steps: order 1, one evaluation a step."""

    def step(x: Tensor, t: float, s: float) -> Tensor:
        return x + (s - t) * velocity(x, _times(t, x))

    return _integrate(step, x, grid, callback)


def heun(velocity: Field, x: Tensor, grid: Tensor, callback: Callback | None = None) -> Tensor:
    """dx = v dt by Heun steps: order 2, two evaluations a step, 2N - 1 on a full grid.

    A step to t = 0 is an Euler step, for x predictions have no velocity there (EDM, arXiv 2206.00364, algorithm 1).
    """

    def step(x: Tensor, t: float, s: float) -> Tensor:
        v = velocity(x, _times(t, x))
        guess = x + (s - t) * v
        return guess if s == 0 else x + (s - t) / 2 * (v + velocity(guess, _times(s, x)))

    return _integrate(step, x, grid, callback)


# w(t), the squared diffusion coefficient; both vanish at t = 0 as fast as the score needs to stay finite.
# The forward process's own, 2t / (1 - t), is infinite at the start and so not offered.
DIFFUSIONS: dict[str, Callable[[float], float]] = {
    "sigma": lambda t: t,
    "sin2": lambda t: math.sin(math.pi * t) ** 2,
}


def euler_maruyama(
    velocity: Field,
    x: Tensor,
    grid: Tensor,
    rng: PictureRNG | torch.Generator,
    diffusion: str = "sigma",
    noise: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """dx = (v - w/2 score) dt + sqrt(w) dW with w = noise * DIFFUSIONS[diffusion](t): one evaluation a step.

    Run from t = 1 down it has the marginals of the ODE for every w >= 0 (SiT, arXiv 2401.08740, section 2): Langevin
    steps push x back to where p_t is high and correct what earlier steps got wrong. The last step is the ODE's. REPA's
    sampler is sigma with noise 2. With a PictureRNG, picture i depends on (seed, i) alone.
    """
    if diffusion not in DIFFUSIONS:
        raise _unknown("diffusion", diffusion, DIFFUSIONS)
    last = grid[-1].item()

    def step(x: Tensor, t: float, s: float) -> Tensor:
        time, w = _times(t, x), noise * DIFFUSIONS[diffusion](t)
        v = velocity(x, time)
        if s == last:
            return x + (s - t) * v
        return x + (s - t) * (v - w / 2 * score(v, x, time)) + math.sqrt(w * (t - s)) * normal_like(x, rng)

    return _integrate(step, x, grid, callback)


def sample(
    velocity: Field,
    x: Tensor,
    shift: float,
    settings: SamplerSettings,
    rng: PictureRNG | torch.Generator,
    callback: Callback | None = None,
) -> Tensor:
    """Carry standard normal x, (B, ...), to a sample as the settings say; the SDE takes its noise from `rng`."""
    grid = time_grid(settings.steps, shift, settings.grid)
    if settings.method == "sde":
        return euler_maruyama(velocity, x, grid, rng, settings.diffusion, settings.noise, callback)
    if settings.method not in ("euler", "heun"):
        raise _unknown("sampler", settings.method, ("euler", "heun", "sde"))
    return (euler if settings.method == "euler" else heun)(velocity, x, grid, callback)


def evaluations(settings: SamplerSettings) -> int:
    """Evaluations of the velocity that `sample` spends on a picture; classifier-free guidance doubles their cost."""
    steps = settings.steps - (settings.grid == "rae")
    return steps if settings.method != "heun" else 2 * steps - (settings.grid == "full")


def normal_like(x: Tensor, rng: PictureRNG | torch.Generator) -> Tensor:
    """Standard normal numbers of x's shape, drawn where `rng` lives and moved to x."""
    if isinstance(rng, PictureRNG):
        return rng.randn(*x.shape[1:]).to(x)
    return torch.randn(x.shape, generator=rng, device=rng.device).to(x)


# ------------------------------------------------------------------------------------------------------------ details


def _column(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) -> (B, 1, ..., 1), to broadcast over `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def _unknown(what: str, name: str, known: Iterable[str]) -> UmmError:
    return UmmError(f"no {what} is called '{name}': choose one of {', '.join(known)}.{nearest(name, known)}")


def _times(t: float, x: Tensor) -> Tensor:
    """One time for every sample of x, (B,), never coarser than float32."""
    return torch.full((len(x),), t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def _acts(t: Tensor, scale: float, interval: Interval) -> bool:
    """Whether guidance changes anything at these times. Only a true sub-interval has to look at them (a host sync)."""
    if scale == 1:
        return False
    low, high = interval
    return (low <= 0 and high >= 1) or bool(((t >= low) & (t <= high)).any())


def _extrapolate(full: Tensor, base: Tensor, t: Tensor, scale: float, interval: Interval) -> Tensor:
    """base + scale (full - base) inside the interval, full outside; bfloat16 would lose the difference."""
    dtype = torch.promote_types(full.dtype, torch.float32)
    full, base = full.to(dtype), base.to(dtype)
    inside = _column((t >= interval[0]) & (t <= interval[1]), full)
    return torch.where(inside, torch.lerp(base, full, scale), full)  # lerp is exact at 0 and 1


@torch.no_grad()
def _integrate(step: Callable[..., Tensor], x: Tensor, grid: Tensor, callback: Callback | None) -> Tensor:
    """Take x down the grid, one `step(x, t, s)` from time t to s < t after the other."""
    for t, s in pairwise(grid.tolist()):
        x = step(x, t, s)
        if callback is not None:
            callback(x, s)
    return x
