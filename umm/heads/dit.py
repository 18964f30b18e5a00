"""The diffusion transformer: DiT, LightningDiT, DiT^DH and RAEv2's network are settings of one class.

B batch, C latent channels, h w latent grid, p patch side, N = (h / p) * (w / p) tokens, D trunk width, T conditioning
tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from umm.errors import ConfigError, UmmError
from umm.heads._dit_blocks import DiTBlock, FinalLayer, TimeEmbedding, repa_projector
from umm.heads.base import Head
from umm.latents.base import LatentSpec
from umm.layers import patchify, rope_2d, sincos_2d, unpatchify
from umm.rng import seeded_init
from umm.settings import DiTSettings

# size -> width, depth, heads (DiT, arXiv 2212.09748, table 1)
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class Outputs(NamedTuple):
    """Everything one pass can give; None for a part the network was built without."""

    prediction: Tensor  # (B, C, h, w)
    base: Tensor | None  # (B, C, h, w), of the auxiliary output
    aligned: Tensor | None  # (B, N, repa_dim), for the alignment loss


class DiT(Head):
    """Noisy latents (B, C, h, w), times (B,) and class labels (B,) -> a prediction (B, C, h, w).

    The trunk's tokens end in a linear map, or condition a wide and shallow head that reads the noisy latent again
    (DiT^DH, arXiv 2510.11690, section 5). Label `null_label` (= num_classes) means no class; forward draws no random
    numbers, so who wants label dropout passes null labels. The output is exactly zero at initialisation.

    Args:
        config: the network; see `DiTSettings` for the published ones.
        spec: shape of the latents.
        num_classes: 0 for unconditional generation.
        classes: their names, where they have any.
    """

    Config = DiTSettings

    def __init__(self, config: DiTSettings, spec: LatentSpec, num_classes: int = 0, classes: Sequence[str] = ()):
        super().__init__()
        config = sized(config)
        check(config, spec)
        self.config, self.spec = config, spec
        self.num_classes = self.null_label = num_classes
        self.classes = list(classes)
        self.grid = spec.height // config.patch, spec.width // config.patch
        width, out = config.width, spec.channels * config.patch**2
        in_context = config.conditioning == "tokens"

        self.embed = nn.Linear(out, width)
        self.time = TimeEmbedding(width, config.time)
        self.time_tokens = nn.Parameter(torch.randn(config.time_tokens, width) / width**0.5) if in_context else None
        self.class_tokens = nn.Parameter(torch.randn(config.class_tokens, width) / width**0.5) if in_context else None
        # A buffer and not a frozen parameter: nothing that says requires_grad_(True) can thaw it.
        self.register_buffer("positions", sincos_2d(width, *self.grid) if config.sincos else None)
        self._add_rope("rope", width // config.heads, config.time_tokens + config.class_tokens if in_context else 0)
        self.blocks = nn.ModuleList(DiTBlock(width, config.heads, config, not in_context) for _ in range(config.depth))
        if config.head_depth:
            self._add_wide_head(out)
        self.final = FinalLayer(config.head_width if config.head_depth else width, out, config)
        self.base_final = FinalLayer(width, out, config) if config.base_depth else None
        self._initialise()
        # drawn last: with or without them the network begins with the same weights, that of no class among them
        no_class = nn.init.normal_(torch.empty(1, width), std=0.02)
        table = torch.cat([nn.init.normal_(torch.empty(num_classes, width), std=0.02), no_class])
        self.label = nn.Embedding.from_pretrained(table, freeze=False)
        repa_dim = config.repa_dim or spec.channels
        self.repa = repa_projector(width, repa_dim, config.repa_layers) if config.repa_depth else None

    def _add_wide_head(self, patch_dim: int) -> None:
        config, width = self.config, self.config.head_width
        self.head_embed = nn.Linear(patch_dim, width)
        self.head_project = nn.Linear(config.width, width) if config.width != width else nn.Identity()
        self._add_rope("head_rope", width // config.head_heads)
        self.head_blocks = nn.ModuleList(DiTBlock(width, config.head_heads, config) for _ in range(config.head_depth))

    def _add_rope(self, name: str, head_dim: int, unturned: int = 0) -> None:
        """Tables `<name>_cos` and `<name>_sin`; `unturned` conditioning tokens at the end keep angle 0."""
        cos, sin = rope_2d(head_dim, *self.grid) if self.config.rope else (None, None)
        if unturned and cos is not None:
            cos, sin = F.pad(cos, (0, 0, 0, unturned), value=1.0), F.pad(sin, (0, 0, 0, unturned))
        self.register_buffer(f"{name}_cos", cos, persistent=False)
        self.register_buffer(f"{name}_sin", sin, persistent=False)

    def _initialise(self) -> None:
        """As published: DiT and LightningDiT xavier, networks with a wide head PyTorch's default in their blocks."""
        plain = [self.blocks, self.time] if not self.config.head_depth else []
        modules = [m for part in plain for name, m in part.named_modules() if ".modulation." not in name]
        linears = [self.embed, *(m for m in modules if isinstance(m, nn.Linear))]
        if self.config.head_depth:
            linears.append(self.head_embed)
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for weight in (self.time.mlp[0].weight, self.time.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)

    @classmethod
    def from_config(
        cls, config: DiTSettings, spec: LatentSpec, num_classes: int = 0, classes: Sequence[str] = ()
    ) -> DiT:
        return cls(config, spec, num_classes, classes)

    @classmethod
    def tiny(cls, spec: LatentSpec, num_classes: int = 10, **changes) -> DiT:
        """Random weights everywhere, also where training starts from zero."""
        small = {"size": "custom", "width": 48, "depth": 2, "heads": 4}
        small |= {"head_depth": 1, "head_width": 64, "head_heads": 4} | changes
        with warnings.catch_warnings(), seeded_init("tiny DiT"):
            warnings.simplefilter("ignore")  # it is too narrow for most latents, and meant to be
            dit = cls(DiTSettings(**small), spec, num_classes)
            for parameter in dit.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
        return dit

    def parameter_count(self) -> int:
        """Parameters and the frozen position table and Fourier frequencies, as published counts have it."""
        frozen = [self.positions, self.time.frequencies if self.config.time == "fourier" else None]
        return super().parameter_count() + sum(table.numel() for table in frozen if table is not None)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, auxiliary: bool = False) -> Tensor | Outputs:
        """The prediction, or with `auxiliary` also the base prediction and the aligned tokens.

        Args:
            x: noisy latents (B, C, h, w).
            t: times (B,) in [0, 1], 1 is noise; one number serves the whole batch.
            y: class labels (B,), int64; None: no class.
        """
        patches, time, y = self._read(x, t, y)
        depths = {self.config.depth}
        if auxiliary:
            depths |= {self.config.base_depth, self.config.repa_depth} - {0}
        hidden = self._trunk(patches, time, y, depths)
        prediction = self._picture(self._finish(hidden[self.config.depth], patches, time, y))
        if not auxiliary:
            return prediction
        base = aligned = None
        if self.base_final is not None:
            state = F.silu(time[:, None] + hidden[self.config.base_depth])
            base = self._picture(self.base_final(state, state))
        if self.repa is not None:
            aligned = self.repa(hidden[self.config.repa_depth])
        return Outputs(prediction, base, aligned)

    def features(self, z: Tensor, t: Tensor | float, block: int, y: Tensor | None = None) -> Tensor:
        """Hidden tokens (B, N, D) after a trunk block (0-based, negative from the end); later blocks do not run.

        Args: as `forward`; z are latents at time t (at t = 0: clean ones).
        """
        if not -self.config.depth <= block < self.config.depth:
            raise UmmError(f"this trunk has blocks 0 to {self.config.depth - 1}, there is no block {block}.")
        depth = range(1, self.config.depth + 1)[block]
        return self._trunk(*self._read(z, t, y), {depth})[depth]

    def _read(self, x: Tensor, t: Tensor | float, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, N, p * p * C), time embedding (B, D) and labels (B,)."""
        if x.shape[1:] != self.spec.shape:
            raise UmmError(f"this DiT reads latents (B, {', '.join(map(str, self.spec.shape))}), got {tuple(x.shape)}.")
        if y is None:
            y = torch.full((len(x),), self.null_label, device=x.device)
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        return patchify(x, self.config.patch).contiguous(), self.time(t).to(x.dtype), y

    def _trunk(self, patches: Tensor, time: Tensor, y: Tensor, depths: set[int]) -> dict[int, Tensor]:
        """{depth: picture tokens (B, N, D) after so many trunk blocks}; none beyond the deepest runs."""
        x = self.embed(patches).to(patches.dtype)
        if self.positions is not None:
            x = x + self.positions
        condition = self._condition(time, y) if self.time_tokens is None else None
        if condition is None:
            in_context = (self.time_tokens + time[:, None], self.class_tokens + self.label(y)[:, None])
            x = torch.cat([x, *in_context], dim=1)  # (B, N + T, D)
        hidden = {}
        for depth, block in enumerate(self.blocks[: max(depths)], start=1):
            x = self._run(block, x, condition, self._rope("rope"))
            if depth in depths:
                hidden[depth] = x[:, : patches.shape[1]]  # (B, N, D)
        return hidden

    def _condition(self, time: Tensor, y: Tensor) -> Tensor:
        """(B, 1, D) for adaLN. DiT^DH has a SiLU here besides the one of every modulation, as published."""
        condition = (time + self.label(y))[:, None]
        return F.silu(condition) if self.config.head_depth else condition

    def _finish(self, x: Tensor, patches: Tensor, time: Tensor, y: Tensor) -> Tensor:
        """Trunk output (B, N, D) -> predicted patches (B, N, p * p * C)."""
        if not self.config.head_depth and self.time_tokens is None:
            return self.final(x, self._condition(time, y))
        state = F.silu(time[:, None] + x)  # one condition a token; the label speaks through the trunk alone
        if not self.config.head_depth:
            return self.final(state, state)
        state = self.head_project(state)
        x = self.head_embed(patches).to(patches.dtype)
        for block in self.head_blocks:
            x = self._run(block, x, state, self._rope("head_rope"))
        return self.final(x, state)

    def _rope(self, name: str) -> tuple[Tensor, Tensor] | None:
        return (getattr(self, f"{name}_cos"), getattr(self, f"{name}_sin")) if self.config.rope else None

    def _run(self, block: DiTBlock, *inputs) -> Tensor:
        if self.config.checkpoint_gradients and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _picture(self, patches: Tensor) -> Tensor:
        return unpatchify(patches, *self.grid, self.config.patch)  # (B, C, h, w)


def sized(config: DiTSettings) -> DiTSettings:
    """The settings with width, depth and heads filled in from a named size."""
    numbers = (config.width, config.depth, config.heads)
    if config.size == "custom":
        if None in numbers:
            raise ConfigError("dit.size=custom needs dit.width, depth and heads: set all three.")
        return config
    if any(number is not None for number in numbers):
        raise ConfigError(
            f"dit.size={config.size} has fixed numbers: set dit.size=custom to choose width, depth and heads yourself."
        )
    width, depth, heads = SIZES[config.size]
    return replace(config, size="custom", width=width, depth=depth, heads=heads)


def check(config: DiTSettings, spec: LatentSpec) -> None:
    """Refuse contradictions; warn where theory says that training will stall."""
    if spec.height % config.patch or spec.width % config.patch:
        raise ConfigError(f"dit.patch={config.patch} does not divide the {spec.height}x{spec.width} latent grid.")
    for name in ("base_depth", "repa_depth"):
        if not 0 <= getattr(config, name) <= config.depth:
            raise ConfigError(f"dit.{name}={getattr(config, name)} is outside the trunk of {config.depth} blocks.")
    streams = [("", config.width, config.heads)]
    if config.head_depth:
        streams.append(("head_", config.head_width, config.head_heads))
    for prefix, width, heads in streams:
        if width % heads or (config.rope and width // heads % 4):
            multiple = f"{'4 times ' if config.rope else ''}dit.{prefix}heads"
            raise ConfigError(f"dit.{prefix}width={width} must be a multiple of {multiple} ({heads}).")
    if sentence := too_narrow(config, spec):
        warnings.warn(sentence, stacklevel=4)


def too_narrow(config: DiTSettings, spec: LatentSpec) -> str | None:
    """What narrowness costs a network, where what its output is read from is narrower than a token."""
    config = sized(config)
    token_dim, width = spec.channels * config.patch**2, config.head_width if config.head_depth else config.width
    if width >= token_dim:
        return None
    return (
        f"this DiT is {width} wide but a token has {token_dim} numbers: narrower than the token dimension, it "
        "cannot tell all the noise from the data and its loss stays high (RAE, arXiv 2510.11690, theorem 1). "
        "Widen it, or give it a wide head with dit.head_depth and dit.head_width."
    )
