"""Numbers that describe a cloud of latents: its spectrum, its channels, its layout in space.

z is (n, C, h, w) latents of n pictures, N = h * w tokens each, in whatever coordinates they come: say which. lam is
(..., C), eigenvalues of the tokens' covariance in falling order. All sums are float64.

"Per picture" returns (n,), whose mean has an ordinary interval. Of a statistic of the whole set, G values come back:
that of all pictures first, then those without each of `groups` parts of them, for `jackknife`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from umm.layers import tokens_of
from umm.stats import Interval

CHUNK = 64  # pictures converted to float64 at once


def jackknife(values: Tensor, n: int, level: float = 0.95) -> Interval:
    """Interval of values[0] from the G - 1 leave-one-group-out values (G,); n pictures in all.

    Delete-a-group jackknife with Student's t, G - 2 degrees of freedom (Shao & Tu 1995, section 2.3).
    """
    from scipy.stats import t

    whole, parts = float(values[0]), values[1:].double()
    groups = len(parts)
    spread = math.sqrt((groups - 1) / groups * float((parts - parts.mean()).square().sum()))
    half = float(t.ppf((1 + level) / 2, groups - 1)) * spread
    return Interval(whole, whole - half, whole + half, n, level)


def with_left_out(sums: Tensor) -> Tensor:
    """Sums of each part (g, ...) -> the whole, then the whole without each part, (1 + g, ...); one part: the whole."""
    whole = sums.sum(0, keepdim=True)
    return whole if len(sums) == 1 else torch.cat([whole, whole - sums])


# ------------------------------------------------------------------------------------------------------- spectrum


def covariances(z: Tensor, groups: int = 1) -> Tensor:
    """Population covariance of the tokens over pictures and positions, (G, C, C)."""
    origin = z.mean((0, 2, 3), dtype=torch.float64)
    parts = [_second_moments(part, origin) for part in z.tensor_split(groups)]
    count, first, second = (with_left_out(torch.stack(sums)) for sums in zip(*parts))
    mean = first / count[:, None]
    return second / count[:, None, None] - mean[:, :, None] * mean[:, None, :]


def _second_moments(z: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of tokens, their sum (C,) and the sum of their outer products (C, C), about an origin."""
    first, second = torch.zeros_like(origin), origin.new_zeros(len(origin), len(origin))
    for part in z.split(CHUNK):
        x = tokens_of(part).flatten(0, 1).double() - origin  # (B N, C)
        first += x.sum(0)
        second += x.T @ x
    return origin.new_tensor(len(z) * z[0, 0].numel()), first, second


def eigenvalues(covariance: Tensor) -> Tensor:
    """(..., C, C) -> lam (..., C), falling, not below 0."""
    return torch.linalg.eigvalsh(covariance).flip(-1).clamp_min(0)


def participation_ratio(lam: Tensor) -> Tensor:
    """(sum lam)^2 / sum lam^2, directions in use, 1 .. C. Insensitive to the tail (Gao et al. 2017, bioRxiv 214262)."""
    return lam.sum(-1).square() / lam.square().sum(-1)


def effective_rank(lam: Tensor) -> Tensor:
    """exp(-sum p ln p) with p = lam / sum lam, directions in use, 1 .. C (Roy & Vetterli 2007, on covariances)."""
    return torch.special.entr(lam / lam.sum(-1, keepdim=True)).sum(-1).exp()


def components_for(lam: Tensor, share: float = 0.9) -> Tensor:
    """R_share: how many leading components hold that share of the variance, 1 .. C.

    Published R_90 (arXiv 2609.28473) are of tokens scaled to length 1 and then centred; here tokens keep their lengths,
    so numbers agree where lengths do, as after a layer norm.
    """
    held = lam.cumsum(-1) / lam.sum(-1, keepdim=True)
    return (held < share - 1e-12).sum(-1) + 1


def decay_exponent(lam: Tensor) -> Tensor:
    """a in lam_i ~ i^-a, least squares of the logarithms over the ranks C/20 .. C/2; 0 is a flat spectrum.

    Head and tail are left out: the one is a few directions, the other noise (Stringer et al. 2019).
    """
    channels = lam.shape[-1]
    low, high = max(channels // 20, 1), max(channels // 2, 3)
    ranks = torch.arange(low, min(high, channels) + 1, dtype=torch.float64, device=lam.device)
    log_rank = ranks.log() - ranks.log().mean()
    log_lam = lam[..., low - 1 : min(high, channels)].double().clamp_min(1e-300).log()
    return -(log_lam * log_rank).sum(-1) / log_rank.square().sum()


def path_condition(lam: Tensor, t: float = 0.1) -> Tensor:
    """Condition number of the noisy latents' covariance (1 - t)^2 lam + t^2, t = 1 is noise; 1 or more.

    Standardised coordinates only: it compares variances with the noise's (RiT, arXiv 2605.21981, t = 0.1).
    """
    noisy = (1 - t) ** 2 * lam + t**2
    return noisy.amax(-1) / noisy.amin(-1)


def width_floor(lam: Tensor, width: int) -> Tensor:
    """Share of the velocity eps - z that a network of that width must leave unexplained, 0 .. 1.

    sum_{i > width} (1 + lam_i) / sum_i (1 + lam_i), as cov(eps - z) = 1 + cov(z): RAE's lower bound of the loss
    (arXiv 2510.11690, section 4), standardised coordinates only.
    """
    return (1 + lam[..., width:]).sum(-1) / (1 + lam).sum(-1)


# ------------------------------------------------------------------------------------------------------- channels


def moments(z: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and fourth central moment of each channel over pictures and positions, each (G, C)."""
    origin = z.mean((0, 2, 3), dtype=torch.float64)
    sums = torch.stack([_powers(part, origin) for part in z.tensor_split(groups)])  # (g, 5, C)
    count, a, b, c, d = with_left_out(sums).unbind(1)
    a, b, c, d = a / count, b / count, c / count, d / count
    return origin + a, b - a**2, d - 4 * a * c + 6 * a**2 * b - 3 * a**4


def _powers(z: Tensor, origin: Tensor) -> Tensor:
    """Sums of the powers 0 .. 4 of z - origin, (5, C)."""
    total = origin.new_zeros(5, len(origin))
    for part in z.split(CHUNK):
        x = part.double() - origin[:, None, None]
        total += torch.stack([(x**power).sum((0, 2, 3)) for power in range(5)])
    return total


def excess_kurtosis(var: Tensor, fourth: Tensor) -> Tensor:
    """E(z - mu)^4 / sigma^4 - 3 of each channel, -2 or more; a Gaussian has 0, sparse codes are far above.

    NaN for a channel without variance.
    """
    return fourth / torch.where(var > 0, var, torch.nan).square() - 3


def mean_power(mean: Tensor, var: Tensor) -> Tensor:
    """sum mu^2 / sum (mu^2 + sigma^2): share of the latents' power that says nothing about the picture, 0 .. 1."""
    return mean.square().sum(-1) / (mean.square() + var).sum(-1)


def top_share(var: Tensor, k: int = 6) -> Tensor:
    """Share of all variance in the k largest channels, k/C .. 1."""
    return var.topk(min(k, var.shape[-1]), -1).values.sum(-1) / var.sum(-1)


def outlier_channels(var: Tensor, times: float = 10.0) -> Tensor:
    """Number of channels with more than `times` the median channel's variance (massive activations, 2402.17762)."""
    return (var > times * var.median(-1, keepdim=True).values).sum(-1)


def hoyer(z: Tensor) -> Tensor:
    """Per picture, mean over tokens of (sqrt C - |z|_1 / |z|_2) / (sqrt C - 1), 0 dense .. 1 one channel (Hoyer 2004).

    Gaussian tokens have (1 - sqrt(2 / pi)) sqrt C / (sqrt C - 1), 0.202 for many channels.
    """
    root = math.sqrt(z.shape[1])
    return torch.cat([
        ((root - part.abs().sum(1) / part.norm(dim=1).clamp_min(1e-30)) / (root - 1)).flatten(1).mean(1)
        for part in (chunk.double() for chunk in z.split(CHUNK))
    ])  # fmt: skip


def token_norms(z: Tensor) -> Tensor:
    """Length of every token, (n, N)."""
    return torch.cat([part.double().norm(dim=1).flatten(1) for part in z.split(CHUNK)])


def token_outliers(norms: Tensor) -> Tensor:
    """Per picture, share of tokens longer than median + 3 robust standard deviations (1.4826 MAD), 0 .. 1.

    Such tokens hold global information where a patch should be (registers, arXiv 2309.16588); Gaussian: 0.001. After a
    layer norm all lengths are equal but for rounding, so a thousandth of the median is no deviation.
    """
    median = norms.median()
    deviation = 1.4826 * (norms - median).abs().median()
    return (norms > median + (3 * deviation).clamp_min(1e-3 * median)).double().mean(1)


# ---------------------------------------------------------------------------------------------------------- space


def cosine_by_distance(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of token pairs at Manhattan distance 0 .. h + w - 2, (n, D), and how many pairs there are, (D,)."""
    rows, columns = torch.meshgrid(*(torch.arange(side, device=z.device) for side in z.shape[2:]), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], 1)  # (N, 2)
    distance = (place[:, None] - place[None]).abs().sum(-1).flatten()  # (N N,)
    member = torch.nn.functional.one_hot(distance).double()  # (N N, D)
    pairs, profiles = member.sum(0), []
    for part in z.split(CHUNK):
        x = torch.nn.functional.normalize(tokens_of(part).double(), dim=-1)
        profiles.append((x @ x.mT).flatten(1) @ member / pairs)
    return torch.cat(profiles), pairs


def self_similarity(profile: Tensor, pairs: Tensor) -> Tensor:
    """LDS, per picture: mean cosine of 4-neighbours minus that of far tokens, -2 .. 2 (iREPA, arXiv 2512.10794).

    Far is a Manhattan distance of at least 3/8 of the grid's side, 6 on 16 x 16. Higher: parts of a picture cohere.
    """
    distances = torch.arange(len(pairs), device=pairs.device)
    side = len(pairs) / 2 + 0.5  # h + w - 1 distances
    far = torch.where(distances >= max(2, math.ceil(3 / 8 * side)), pairs, 0)
    return profile[:, 1] - profile @ far / far.sum()


def power_spectrum(z: Tensor) -> Tensor:
    """Per picture, squared orthonormal DCT-II coefficients of z minus the mean latent, channels averaged, (n, h, w)."""
    mean = z.mean(0, dtype=torch.float64)
    rows, columns = (dct_matrix(side, z.device) for side in z.shape[2:])
    parts = [rows @ (part.double() - mean) @ columns.T for part in z.split(CHUNK)]
    return torch.cat([part.square().mean(1) for part in parts])


def dct_matrix(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal DCT-II, (size, size), row u is frequency u / (2 size) cycles per token."""
    k = torch.arange(size, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def high_frequency(power: Tensor, beyond: float = 0.5) -> Tensor:
    """SEC, per picture: share of the power at u + v > beyond (h + w - 2), 0 .. 1; lower is smoother (2606.03578).

    White noise has the share of coefficients up there.
    """
    u, v = _frequencies(power)
    return (power * (u + v > beyond * (u.max() + v.max()))).sum((1, 2)) / power.sum((1, 2))


def spectral_slope(power: Tensor) -> Tensor:
    """b in power ~ f^-b, per picture, by least squares of the logarithms; 0 white noise, 2 natural pictures.

    f is the distance from zero frequency, which itself is left out (van der Schaaf & van Hateren 1996).
    """
    u, v = _frequencies(power)
    radius = torch.hypot(u / power.shape[1], v / power.shape[2]).flatten()[1:]
    log_f = radius.log() - radius.log().mean()
    log_power = power.flatten(1)[:, 1:].clamp_min(1e-300).log()
    return -(log_power @ log_f) / log_f.square().sum()


def _frequencies(power: Tensor) -> tuple[Tensor, Tensor]:
    u, v = (torch.arange(side, dtype=torch.float64, device=power.device) for side in power.shape[1:])
    return torch.meshgrid(u, v, indexing="ij")
