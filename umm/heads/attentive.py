"""The attentive probe: what a single query can gather from all tokens (V-JEPA, arXiv 2404.08471, appendix C).

B batch, h w grid, N = h * w tokens, D width of the tokens (`inner` where it is given), H heads, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from umm.errors import ConfigError
from umm.heads.base import Head
from umm.latents.base import LatentSpec
from umm.layers import tokens_of
from umm.rng import seeded_init
from umm.settings import AttentiveSettings


class AttentiveReader(Head):
    """Latents (B, D, h, w) -> logits (B, K): layer norm, cross-attention of one learned query, projection, linear map.

    Without V-JEPA's MLP, so that what is read must be in the tokens.

    Args:
        classes: their names.
        width: D; None: the latent's channels.
        heads: of the attention; None: see `default_heads`.
        inner: width of all this, behind a linear map of the tokens; None: D, without one.
    """

    Config = AttentiveSettings

    def __init__(
        self,
        spec: LatentSpec,
        classes: Sequence[str],
        width: int | None = None,
        heads: int | None = None,
        inner: int | None = None,
    ):
        super().__init__()
        given = width or spec.channels
        width = inner or given
        self.spec, self.classes, self.heads = spec, list(classes), heads or default_heads(width)
        if width % self.heads:
            raise ConfigError(f"attentive.heads={self.heads} does not divide the width {width} of the tokens.")
        self.enter = nn.Identity() if inner is None else nn.Linear(given, inner)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.key = nn.Linear(width, width, bias=False)  # a bias would add the same to every token's score
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.linear = nn.Linear(width, len(self.classes))
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def from_config(cls, config: AttentiveSettings, spec: LatentSpec, **facts) -> AttentiveReader:
        return cls(spec, facts["classes"], facts.get("width"), config.heads, config.width)

    @classmethod
    def tiny(cls, spec: LatentSpec) -> AttentiveReader:
        with seeded_init("tiny attentive"):
            return cls(spec, ["a", "b", "c"])

    def forward(self, latents: Tensor) -> Tensor:
        """With one query, key and value maps can be applied to it and to what it gathers, not to every token."""
        tokens = self.norm(self.enter(tokens_of(latents)))  # (B, N, D)
        of_head = (self.heads, -1, tokens.shape[2])
        queries = torch.einsum("hd,hdw->hw", self.query.unflatten(0, of_head[:2]), self.key.weight.view(of_head))
        scores = tokens @ queries.T / math.sqrt(tokens.shape[2] // self.heads)  # (B, N, H)
        gathered = scores.softmax(1).transpose(1, 2) @ tokens  # (B, H, D)
        values = torch.einsum("bhw,hdw->bhd", gathered, self.value.weight.view(of_head)).flatten(1)  # (B, D)
        return self.linear(self.proj(values + self.value.bias))


def default_heads(width: int) -> int:
    """The largest divisor of `width` that leaves each head 64 channels or more; 1 for narrow tokens."""
    return max((h for h in range(1, width // 64 + 1) if width % h == 0), default=1)
