"""k nearest neighbours by cosine with exponential votes: the probe without training or seeds.

n training features, m test features, D width, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from umm.errors import UmmError

TEST_BLOCK, TRAIN_BLOCK = 512, 65_536  # rows compared at once


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes (m, K): each of the k nearest training features adds exp(cosine / T) to its class.

    As DINO and DINOv2 do it (Wu et al., arXiv 1805.01978, section 3.4), k = 20 and T = 0.07. All votes of a row are
    divided by that of its nearest neighbour, which changes no ranking.

    Args:
        train, test: (n, D), (m, D), any length; compared on the device of `train`.
        labels: (n,) int64.
    """
    if not 1 <= k <= len(train):
        raise UmmError(f"{k} neighbours of {len(train)} training pictures: set probe.neighbors to 1..{len(train)}.")
    train, votes = F.normalize(train.float(), dim=1), []
    for queries in test.split(TEST_BLOCK):
        similarity, where = nearest(F.normalize(queries.to(train.device).float(), dim=1), train, k)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # (B, k)
        votes.append(weights.new_zeros(len(queries), classes).scatter_add_(1, labels[where], weights))
    return torch.cat(votes)


def nearest(queries: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest products (B, k) in falling order, and the rows of `train` they belong to."""
    best, where = queries.new_full((len(queries), k), -torch.inf), queries.new_zeros(len(queries), k, dtype=torch.int64)
    for start in range(0, len(train), TRAIN_BLOCK):
        similarity = queries @ train[start : start + TRAIN_BLOCK].T  # (B, block)
        rows = torch.arange(start, start + similarity.shape[1], device=train.device).expand_as(similarity)
        best, picked = torch.cat([best, similarity], dim=1).topk(k, dim=1)
        where = torch.cat([where, rows], dim=1).gather(1, picked)
    return best, where
