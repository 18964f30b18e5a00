"""A linear probe on features, to ask whether samples are of the class they were asked for.

n pictures, d feature width, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, times n
HOLDOUT = 5  # every fifth picture chooses the strength


class RidgeProbe:
    """One-hot least squares on standardised features with an L2 penalty, in closed form, float64.

    The penalty is the one that classifies every fifth training picture best when fitted on the others.

    Args:
        x: features (n, d).
        y: classes (n,), int64.
        classes: K.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: int):
        x = x.double()
        self.mean, self.std = x.mean(0), x.std(0) + 1e-6
        x, targets = self.standardised(x), F.one_hot(y, classes).double()
        held = torch.arange(len(x), device=x.device) % HOLDOUT == 0
        parts = ridge(x[~held], targets[~held])
        right = [(predict(x[held], *w) == y[held]).double().mean() for w in parts]
        self.weights = ridge(x, targets)[int(torch.stack(right).argmax())]

    def standardised(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.std

    def scores(self, x: Tensor) -> Tensor:
        """Features (n, d) -> (n, K), about 1 for the class a picture is of and 0 for others."""
        weights, bias = self.weights
        return self.standardised(x) @ weights + bias

    def __call__(self, x: Tensor) -> Tensor:
        """Features (n, d) -> classes (n,)."""
        return self.scores(x).argmax(1)


def ridge(x: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(weights (d, K), bias (K,)) for each of `STRENGTHS`: one eigendecomposition of the smaller Gram matrix."""
    centre, bias = x.mean(0), targets.mean(0)
    x, targets = x - centre, targets - bias
    wide = x.shape[1] > x.shape[0]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    right = vectors.T @ (targets if wide else x.T @ targets)
    found = []
    for strength in STRENGTHS:
        solved = vectors @ (right / (values + strength * len(x))[:, None])
        weights = x.T @ solved if wide else solved
        found.append((weights, bias - centre @ weights))
    return found


def predict(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return (x @ weights + bias).argmax(1)
