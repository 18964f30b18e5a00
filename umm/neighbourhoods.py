"""Numbers about which pictures lie near each other: labels, other feature spaces, uniformity, intrinsic dimension.

x is (n, D), a vector a picture; all distances are float64, (n, n). "Per picture" returns (n,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from umm.errors import UmmError

BLOCK = 16_384  # numbers of a vector converted to float64 at once


def directions(x: Tensor) -> Tensor:
    """Unit vectors about the mean, float64: what cosines between pictures are taken of."""
    x = x.double()
    return F.normalize(x - x.mean(0), dim=1)


def neighbours(x: Tensor, k: int) -> Tensor:
    """Numbers of the k nearest other pictures by cosine about the mean, (n, k).

    Raises:
        UmmError: fewer than k other pictures.
    """
    if not 1 <= k < len(x):
        raise UmmError(f"{k} neighbours of {len(x)} pictures: take 1 to {len(x) - 1}, or more pictures.")
    unit = directions(x)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(k, dim=1).indices


def label_purity(near: Tensor, labels: Tensor) -> Tensor:
    """LNC, per picture: share of neighbours (n, k) with its own label, 0 .. 1 (2606.03578); chance: its share."""
    return (labels[near] == labels[:, None]).double().mean(1)


def mutual_neighbours(first: Tensor, second: Tensor) -> Tensor:
    """Mutual kNN, per picture: share of its neighbours (n, k) that two spaces agree on, 0 .. 1, chance k / (n - 1).

    Platonic representation hypothesis (Huh et al., arXiv 2405.07987, section 2).
    """
    return (first[:, :, None] == second[:, None, :]).any(2).double().mean(1)


def squared_distances(x: Tensor) -> Tensor:
    """(n, D) -> (n, n), a bounded number of columns at a time."""
    total = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    mean = x.mean(0, dtype=torch.float64)
    for start in range(0, x.shape[1], BLOCK):
        part = x[:, start : start + BLOCK].double() - mean[start : start + BLOCK]
        power = part.square().sum(1)
        total += power[:, None] + power[None] - 2 * part @ part.T
    return total.clamp_min_(0).fill_diagonal_(0)


def closeness(x: Tensor, t: float = 2.0) -> Tensor:
    """Per picture, mean over the others of exp(-t |x - y|^2) on unit vectors.

    The log of its mean is the uniformity loss, -2 t (about) .. 0, lower is more even (arXiv 2005.10242, eq. 2).
    """
    kernel = (-t * squared_distances(F.normalize(x.double(), dim=1))).exp().fill_diagonal_(0)
    return kernel.sum(1) / (len(x) - 1)


def alignment(x: Tensor, labels: Tensor) -> Tensor:
    """Per picture, mean |x - y|^2 of unit vectors about the mean over the others of its label, 0 .. 4, blind about 2.

    Wang & Isola (arXiv 2005.10242, eq. 1, alpha = 2), with equal labels as positive pairs; NaN for the only one of a
    label.
    """
    same = (labels[:, None] == labels[None]).double().fill_diagonal_(0)
    return (squared_distances(directions(x)) * same).sum(1) / torch.where(same.sum(1) > 0, same.sum(1), torch.nan)


def two_nn(x: Tensor, keep: float = 0.9) -> float:
    """Intrinsic dimension by TwoNN (Facco et al. 2017, arXiv 1803.06992): slope of -log(1 - F(r)) over log r.

    r is the ratio of the distances to the second and first neighbour, F its empirical distribution; the largest
    1 - keep of the ratios are left out, as there, and pictures that occur twice. With n pictures, dimensions much
    above 2 log2 n read too low.

    Raises:
        UmmError: fewer than ten different pictures.
    """
    squares = squared_distances(x).fill_diagonal_(torch.inf)
    first, second = squares.topk(2, dim=1, largest=False).values.sqrt().unbind(1)
    ratio = (second / first)[first > 1e-9 * second.max()].sort().values
    if len(ratio) < 10:
        raise UmmError(f"an intrinsic dimension needs ten different pictures, got {len(ratio)}: take more.")
    kept = ratio[: max(int(keep * len(ratio)), 2)].log()
    rank = torch.arange(1, len(kept) + 1, dtype=torch.float64, device=x.device) / len(ratio)
    return float(-(torch.log1p(-rank) * kept).sum() / kept.square().sum())
