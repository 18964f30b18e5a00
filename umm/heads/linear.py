"""Linear classifiers: one head on latents, and DINOv2's grid of learning rates trained in one pass.

B batch, D width, h w grid, K classes, R learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.heads.base import Head
from umm.latents.base import LatentSpec
from umm.rng import generator, seeded_init
from umm.settings import LinearSettings

MOMENTUM, REFERENCE_BATCH, INIT_STD = 0.9, 256, 0.01


class LinearReader(Head):
    """Latents (B, D, h, w) -> logits (B, K): mean over positions, layer norm without affine, one linear map.

    The norm makes one learning rate fit features of any scale, and treats each picture alone.

    Args:
        width: D; None: the latent's channels.
        classes: their names.
    """

    Config = LinearSettings

    def __init__(self, spec: LatentSpec, classes: Sequence[str], width: int | None = None):
        super().__init__()
        self.spec, self.classes = spec, list(classes)
        self.linear = nn.Linear(width or spec.channels, len(self.classes))
        nn.init.normal_(self.linear.weight, std=INIT_STD)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def from_config(cls, config: LinearSettings, spec: LatentSpec, **facts) -> LinearReader:
        return cls(spec, facts["classes"], facts.get("width"))

    @classmethod
    def tiny(cls, spec: LatentSpec) -> LinearReader:
        with seeded_init("tiny linear"):
            return cls(spec, ["a", "b", "c"])

    def forward(self, latents: Tensor) -> Tensor:
        pooled = latents.flatten(2).mean(2)  # (B, D)
        return self.linear(F.layer_norm(pooled, pooled.shape[-1:]))


class LinearGrid:
    """R linear classifiers on one feature, each with a learning rate of its own, trained together without autograd.

    Cross-entropy and SGD with momentum 0.9, no weight decay, rate * batch / 256 falling to 0 by a cosine; weights from
    N(0, 0.01), biases 0 (DINOv2's released linear evaluation). Each classifier is what it would be if trained alone.

    Args:
        width, classes: D and K.
        rates: R learning rates at batch size 256.
        steps: length of the schedule.
        seed: with the rate and the name, of a classifier's first weights.
    """

    def __init__(
        self, width: int, classes: int, rates: Sequence[float], steps: int, seed: int, name: str = "", device="cpu"
    ):
        self.classes, self.rates, self.steps, self.taken = classes, list(rates), steps, 0
        drawn = [torch.randn(classes, width, generator=generator(seed, "linear", name, rate)) for rate in self.rates]
        self.weight = (INIT_STD * torch.cat(drawn)).to(device)  # (R * K, D)
        self.bias = torch.zeros(len(self.weight), device=device)
        self.momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.row_rates = torch.tensor(self.rates, device=device).repeat_interleave(classes)  # (R * K,)

    def logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, R, K)."""
        return torch.addmm(self.bias, x, self.weight.T).unflatten(1, (len(self.rates), self.classes))

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step of all classifiers on features (B, D) and labels (B,)."""
        # of mean cross-entropy the gradient at the logits is (softmax - one-hot) / B
        gradient = self.logits(x).softmax(2)
        gradient -= F.one_hot(y, self.classes)[:, None]
        gradient = gradient.flatten(1) / len(x)  # (B, R * K)
        cosine = 0.5 * (1 + math.cos(math.pi * self.taken / self.steps))
        rates = self.row_rates * (cosine * len(x) / REFERENCE_BATCH)
        weight_momentum, bias_momentum = self.momenta
        weight_momentum.addmm_(gradient.T, x, beta=MOMENTUM)  # of R * K rows: every pass over them counts
        bias_momentum.mul_(MOMENTUM).add_(gradient.sum(0))
        self.weight.addcmul_(rates[:, None], weight_momentum, value=-1)
        self.bias.addcmul_(rates, bias_momentum, value=-1)
        self.taken += 1
