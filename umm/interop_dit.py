"""Official stage-2 networks of RAE and RAEv2, in and out.

`official_views` shows our tensors under the official names: loading copies into those views, exporting copies out of
them, and the names and shapes a file should have are theirs.

D trunk width, C latent channels, p patch side, N tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from umm.errors import ConfigError, MissingWeights, nearest
from umm.heads.dit import DiT
from umm.latents.base import LatentSpec
from umm.pretrained import read_tensors
from umm.rng import seeded_init
from umm.settings import DiTSettings

SIZES = {"input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes"}
SWITCHES = {"use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "use_pos_embed", "learn_sigma"}
RAE_KEYS = SIZES | SWITCHES | {"class_dropout_prob", "use_gembed"}  # both without effect on a trained network
RAEV2_ONLY = {"base_model_depth", "num_t_tokens", "num_c_tokens"}

TABLE_TOLERANCE = 1e-4  # official tables are computed in float32 or float64, all agree to 1e-6


class PredictionPair(nn.Module):
    """RAEv2's interface: (x, t, y) -> (prediction of the full network, prediction of its base)."""

    def __init__(self, dit: DiT):
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.dit(x, t, y, auxiliary=True)[:2]


def load_official_dit(weights: str | Path | Mapping[str, Tensor], config: Mapping[str, object]) -> nn.Module:
    """An official network with its weights, in eval mode.

    Args:
        weights: a .safetensors or .pt file, or its state dict; {"ema": state dict} is accepted.
        config: the published settings: hidden_size a pair for DiT^DH, a number for LightningDiT; with base_model_depth,
            num_t_tokens and num_c_tokens it is RAEv2's.

    Returns:
        DiT^DH and LightningDiT: a `DiT` with forward(x, t, y) -> velocity, noise - data. RAEv2: a module with
        forward(x, t, y) -> (x_pred, x_pred_base).

    Raises:
        ConfigError: settings that do not exist or are not supported.
        MissingWeights: no such file, or keys, shapes or frozen tables that do not fit, the first ten of them named.
    """
    settings, spec = read_config(config)
    with seeded_init("DiT to be loaded"):
        dit = DiT(settings, spec, int(config.get("num_classes", 1000)))
    state = read_weights(weights)
    views = official_views(dit)
    if lines := misfits(views, state):
        more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise MissingWeights("\n  ".join(["these weights do not fit this configuration:", *lines[:10], *more]))
    if "pos_embed" in views and (gap := difference(views["pos_embed"], state["pos_embed"])) > TABLE_TOLERANCE:
        # the public GPU script thaws the table: its values are part of such a network
        warnings.warn(f"pos_embed was trained, it differs by {gap:.2g} from the fixed table: kept.", stacklevel=2)
    with torch.no_grad():
        for name, view in views.items():
            if "rope" not in name:
                view.copy_(state[name])
    dit.eval()
    return PredictionPair(dit) if settings.base_depth else dit


def official_state_dict(dit: DiT) -> dict[str, Tensor]:
    """Our weights in the official layout: what `load_official_dit` and the official code read with strict=True."""
    views = official_views(dit)
    return {name: view.detach().clone(memory_format=torch.contiguous_format) for name, view in views.items()}


def official_views(dit: DiT) -> dict[str, Tensor]:
    """Official name -> view into our tensor, in the official shape.

    RAEv2 stores q, k, v and the two SwiGLU inputs apart, which we and RAE keep as one matrix.
    """
    views = {}
    rope = {name: buffer for name, buffer in dit.named_buffers() if "rope" in name}
    for ours, tensor in (dit.state_dict(keep_vars=True) | rope).items():
        names = list(official_names(ours, dit.config))
        for name, part in zip(names, official_shape(ours, tensor, dit).chunk(len(names))):
            views[name] = part
    return views


def official_shape(ours: str, tensor: Tensor, dit: DiT) -> Tensor:
    """Patch embeddings as convolutions (D, C, p, p), positions as (1, N, D), everything else as it is."""
    if ours in ("embed.weight", "head_embed.weight"):
        p = dit.config.patch
        return tensor.unflatten(1, (p, p, dit.spec.channels)).permute(0, 3, 1, 2)
    return tensor[None] if ours == "positions" else tensor


def official_names(ours: str, config: DiTSettings) -> Iterator[str]:
    """The official name of our tensor, or the names of the pieces it is cut into along its first axis."""
    raev2 = config.conditioning == "tokens"
    wide = bool(config.head_depth)
    parts = {
        "embed": "s_embedder.proj" if wide else "x_embedder.proj",
        "head_embed": "x_embedder.proj",
        "head_project": "s_projector",
        "positions": "pos_embed",
        "label": "ctx_embedder.embedding_table" if raev2 else "y_embedder.embedding_table",
        "time": "t_embedder",
        "time_tokens": "t_embedder.learnable_tokens",
        "class_tokens": "ctx_embedder.learnable_tokens",
        "final": "final_layer",
        "base_final": "base_final_layer",
        "repa": "repa_projector",
    }
    ropes = ("enc_rope", "dec_rope") if raev2 else ("enc_feat_rope" if wide else "feat_rope", "dec_feat_rope")
    for kind in ("cos", "sin"):
        parts[f"rope_{kind}"], parts[f"head_rope_{kind}"] = (f"{rope}.freqs_{kind}" for rope in ropes)
    first, *rest = ours.split(".")
    if first == "head_blocks":
        rest[0] = str(int(rest[0]) + config.depth)
    name = ".".join([parts.get(first, first.replace("head_blocks", "blocks")), *rest])
    name = name.replace(".frequencies", ".W").replace("modulation", "adaln_modulation" if raev2 else "adaLN_modulation")
    if raev2:
        cuts = {".qkv.": (".q.", ".k.", ".v."), ".w12.": (".w1.", ".w2.")}
        whole, pieces = next(((w, ps) for w, ps in cuts.items() if w in name), (".", (".",)))
        yield from (name.replace(whole, piece) for piece in pieces)
    else:
        yield name.replace("final_layer.norm.", "final_layer.norm_final.")


def misfits(views: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """One line for every key that is missing, unexpected, mis-shaped, or a table other than ours."""
    lines = [f"missing: {name} {tuple(view.shape)}" for name, view in views.items() if name not in state]
    lines += [f"unexpected: {name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in views]
    for name, view in views.items():
        if name not in state:
            continue
        if state[name].shape != view.shape:
            lines.append(f"shape: {name} is {tuple(state[name].shape)}, the configuration asks for {tuple(view.shape)}")
        elif "rope" in name and (gap := difference(view, state[name])) > TABLE_TOLERANCE:
            lines.append(f"table: {name} differs from this grid's rotary table by {gap:.2g}")
    return lines


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def read_weights(weights: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A flat state dict from a file or dict; the averaged weights of a training checkpoint."""
    weights = weights if isinstance(weights, Mapping) else read_tensors(Path(weights).expanduser())
    state = weights.get("ema", weights)
    if strange := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise MissingWeights(
            f"this is not a network's state dict, '{strange[0]}' is not a tensor: give the averaged weights, or a "
            "checkpoint that has them under 'ema'."
        )
    return state


def read_config(config: Mapping[str, object]) -> tuple[DiTSettings, LatentSpec]:
    """Published settings as ours; absent ones have the official defaults."""
    config = dict(config)
    raev2 = not RAEV2_ONLY.isdisjoint(config)
    known = SIZES | RAEV2_ONLY if raev2 else RAE_KEYS
    if unknown := sorted(config.keys() - known):
        raise ConfigError(f"official networks have no setting '{unknown[0]}'.{nearest(unknown[0], known)}")
    for name in ("wo_shift", "learn_sigma"):
        if config.get(name):
            raise ConfigError(f"{name}: true is not supported: no published RAE network uses it.")
    for name in ("input_size", "in_channels", "hidden_size", "depth", "num_heads"):
        if name not in config:
            raise ConfigError(f"the configuration of an official network needs '{name}'.")
    size, channels = int(config["input_size"]), int(config["in_channels"])
    spec = LatentSpec(channels, size, size, 16 * size)  # published latents have 16 px a token
    return (raev2_settings if raev2 else rae_settings)(config), spec


def rae_settings(config: Mapping[str, object]) -> DiTSettings:
    return DiTSettings(
        **stream_settings(config),
        mlp="swiglu" if config.get("use_swiglu", True) else "gelu",
        norm="rms" if config.get("use_rmsnorm", True) else "layer",
        qk_norm=bool(config.get("use_qknorm", False)),
        rope=bool(config.get("use_rope", True)),
        sincos=bool(config.get("use_pos_embed", True)),
    )


def raev2_settings(config: Mapping[str, object]) -> DiTSettings:
    return DiTSettings(
        **stream_settings(config),
        qk_norm=True,
        sincos=False,
        conditioning="tokens",
        time_tokens=int(config.get("num_t_tokens", 4)),
        class_tokens=int(config.get("num_c_tokens", 8)),
        base_depth=int(config.get("base_model_depth", 8)),
    )


def stream_settings(config: Mapping[str, object]) -> dict[str, object]:
    """Width, depth and heads of the trunk and, where hidden_size is a pair, of the wide head; patch and MLP ratio."""
    pairs = {name: as_list(config[name]) for name in ("hidden_size", "depth", "num_heads")}
    streams = len(pairs["hidden_size"])
    pairs["num_heads"] *= streams if len(pairs["num_heads"]) == 1 else 1  # one number serves both streams
    patches = set(as_list(config.get("patch_size", 1)))
    if any(len(values) != streams for values in pairs.values()) or streams > 2 or len(patches) != 1:
        raise ConfigError("hidden_size, depth, num_heads: one number each, or a pair each; patch_size: one for both.")
    (width, head_width), (depth, head_depth), (heads, head_heads) = (
        [int(value) for value in (values + [0])[:2]] for values in pairs.values()
    )
    return {
        "size": "custom", "width": width, "depth": depth, "heads": heads,
        "head_width": head_width, "head_depth": head_depth, "head_heads": head_heads,
        "patch": int(patches.pop()), "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
    }  # fmt: skip


def as_list(value: object) -> list:
    return list(value) if isinstance(value, Sequence) else [value]
