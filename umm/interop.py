"""Published RAE weights in and out: the authors' files, and folders of diffusers' `AutoencoderRAE`.

Everything is loaded strictly: a tensor that is missing, left over or of another shape is an error that names it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from umm.errors import MissingWeights, UmmError
from umm.heads.decoder import Decoder
from umm.latents._adapted import adapter_digest
from umm.latents._encoder import pixel_stats
from umm.latents._stats import load_stats
from umm.latents.base import LatentSpec
from umm.latents.dinov2 import CLASSES, FINAL_NORM, DINOv2
from umm.model import UnifiedModel, contiguous
from umm.pretrained import UNUSED, installed_names, load_pretrained, locate, read_tensors
from umm.rng import seeded_init

DIFFUSERS_EPS = 1e-5  # diffusers divides by std + eps, where std is already sqrt(var + eps)
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

# part of a block -> its names in the published files; several are stacked along the first axis
BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
DIFFUSERS_BLOCK = BLOCK | {
    "attn.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attn.proj": ("attention.to_out.0",),
}
OUTSIDE = {"embed": "decoder_embed", "norm": "decoder_norm", "pred": "decoder_pred"}
SINGLE = {"cls": "trainable_cls_token", "positions": "decoder_pos_embed"}


class OfficialRAE(UnifiedModel):
    """A `UnifiedModel` whose `decode` does not clamp, as in the reference implementations; their callers do."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents -> images around [0, 1]."""
        return self.head("decoder")(self.space.normalizer.undo(latents.to(self.device)))


# ------------------------------------------------------------------------------------------------ the authors' files


def load_official_rae(
    encoder: str | Path,
    decoder: str | Path | Mapping[str, Tensor],
    decoder_config: Mapping[str, object],
    stats: str | Path | Mapping[str, Tensor | None] | None,
    encoder_input_size: int,
) -> OfficialRAE:
    """A released RAE from its parts: `.encode(images)`, `.decode(latents)`.

    Args:
        encoder: folder in transformers layout (or hub id) of a DINOv2 with or without registers.
        decoder: a released `model.pt`, a training checkpoint (its EMA is taken), a safetensors file, or a state dict.
        decoder_config: `decoder_hidden_size`, `decoder_intermediate_size`, `decoder_num_attention_heads`,
            `decoder_num_hidden_layers` and `patch_size`, the side in pixels that one token is drawn as. As in the
            reference, the picture size is patch_size times the tokens on a side, whatever `image_size` says.
        stats: `stat.pt` or its contents; None: latents are not standardised.
        encoder_input_size: side of the picture the encoder sees, pixels.

    Raises:
        MissingWeights: a file is absent or its tensors do not fit; the message names the first of them.
    """
    folder = locate(str(encoder))
    network = load_pretrained(folder, CLASSES)
    side = encoder_input_size // network.config.patch_size * _number(decoder_config, "patch_size")
    normalizer = "none" if stats is None else "position"
    space = DINOv2(network, side, encoder_input_size, (-1,), normalizer, *pixel_stats(folder))
    if stats is not None:
        space.normalizer.set(*load_stats(stats))
    head = build_decoder(space.spec, decoder_config)
    load_decoder_state(head, _read_decoder(decoder))
    return OfficialRAE(space, {"decoder": head})


def save_official_rae(model: UnifiedModel, folder: str | Path) -> Path:
    """Write encoder/, decoder.pt, decoder_config.json and stat.pt as the reference implementation reads them."""
    space, decoder, folder = model.space, model.head("decoder"), Path(folder)
    _refuse("the published RAE layout", _obstacles(model))
    space.encoder.save_pretrained(folder / "encoder")
    pixels = {"image_mean": list(space.spec.pixel_mean), "image_std": list(space.spec.pixel_std)}
    preprocessor = {"image_processor_type": "BitImageProcessor", **pixels}
    _write_json(folder / "encoder" / "preprocessor_config.json", preprocessor)
    _write_json(folder / "decoder_config.json", decoder_config(decoder))
    torch.save(contiguous(decoder_state(decoder)), folder / "decoder.pt")
    if space.normalizer.mode != "none":
        stats = {"mean": space.normalizer.mean, "var": space.normalizer.var}
        expanded = {key: value.expand(space.spec.shape) for key, value in stats.items()}
        torch.save(contiguous(expanded), folder / "stat.pt")
    return folder


def decoder_config(decoder: Decoder) -> dict[str, object]:
    """The published `decoder_*` keys, patch and picture size of a decoder."""
    block = decoder.blocks[0]
    return {
        "decoder_hidden_size": decoder.embed.out_features,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "decoder_num_attention_heads": block.attn.heads,
        "decoder_num_hidden_layers": len(decoder.blocks),
        "patch_size": decoder.patch,
        "image_size": decoder.output_size[0],
        "layer_norm_eps": decoder.norm.eps,
        "hidden_act": "gelu",
    }


def build_decoder(spec: LatentSpec, config: Mapping[str, object]) -> Decoder:
    """An unloaded decoder of the published configuration."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise UmmError(f"decoder_config has hidden_act '{config['hidden_act']}': only gelu was published.")
    with seeded_init("decoder to be loaded"):
        return Decoder(
            spec,
            width=_number(config, "decoder_hidden_size"),
            depth=_number(config, "decoder_num_hidden_layers"),
            heads=_number(config, "decoder_num_attention_heads"),
            mlp=_number(config, "decoder_intermediate_size"),
            output_size=_number(config, "patch_size") * spec.height,
            eps=float(config.get("layer_norm_eps", 1e-12)),
        )


def _number(config: Mapping[str, object], key: str) -> int:
    if key not in config:
        raise UmmError(f"decoder_config lacks '{key}'; it has {', '.join(config) or 'nothing'}.")
    return int(config[key])


# --------------------------------------------------------------------------------------------------------- the names


def decoder_names(depth: int, block: Mapping[str, tuple[str, ...]] = BLOCK) -> dict[str, tuple[str, ...]]:
    """Our tensor -> the published ones it is made of, stacked along the first axis."""
    names = {ours: (theirs,) for ours, theirs in SINGLE.items()}
    for kind in ("weight", "bias"):
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in OUTSIDE.items()}
        for i in range(depth):
            for ours, theirs in block.items():
                names[f"blocks.{i}.{ours}.{kind}"] = tuple(f"decoder_layers.{i}.{part}.{kind}" for part in theirs)
    return names


def decoder_state(decoder: Decoder, block: Mapping[str, tuple[str, ...]] = BLOCK) -> dict[str, Tensor]:
    """The decoder's tensors in the published layout (views)."""
    state, published = decoder.state_dict(), {}
    for ours, theirs in decoder_names(len(decoder.blocks), block).items():
        published |= zip(theirs, state[ours].chunk(len(theirs)) if len(theirs) > 1 else (state[ours],))
    return published


def load_decoder_state(
    decoder: Decoder, state: Mapping[str, Tensor], block: Mapping[str, tuple[str, ...]] = BLOCK
) -> None:
    """Load published tensors, the position table included (the public GPU script trains it).

    Raises:
        MissingWeights: the tensors do not fit; says which are missing, left over or of another shape.
    """
    _check_fit("the decoder", decoder_state(decoder, block), state)
    names = decoder_names(len(decoder.blocks), block)
    decoder.load_state_dict({ours: torch.cat([state[key] for key in theirs]) for ours, theirs in names.items()})


def _check_fit(what: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted.keys() & found.keys()
        if found[key].shape != wanted[key].shape
    ]
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(shapes),
    }
    said = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in problems.items() if keys]
    if said:
        raise MissingWeights(f"the tensors do not fit {what}: {'; '.join(said)}. Do its configuration and file match?")


def _read_decoder(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The decoder's tensors of a state dict, a release, or a training checkpoint (ema before model)."""
    state = source if isinstance(source, Mapping) else read_tensors(Path(source).expanduser())
    state = next((state[key] for key in ("ema", "model") if isinstance(state.get(key), Mapping)), state)
    inner = {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")}
    return inner or state


# --------------------------------------------------------------------------------------------------------- diffusers


def save_diffusers(model: UnifiedModel, folder: str | Path) -> Path:
    """Write a folder that `diffusers.AutoencoderRAE.from_pretrained` reads, with the same latents and pictures.

    Where the decoder's positions are not the table that diffusers computes, its pictures differ and a warning says so.
    That is so for trained positions, and for every grid but 16 x 16, which diffusers stretches to 16 (its base_size).
    The file holds the positions all the same, for `load_diffusers`.

    Raises:
        UmmError: diffusers hard-wires something that this model has otherwise.
    """
    space, decoder, folder = model.space, model.head("decoder"), Path(folder)
    _refuse("diffusers' AutoencoderRAE", _obstacles(model) or _diffusers_obstacles(model))
    if not torch.allclose(decoder.positions, _diffusers_positions(decoder), atol=1e-5):
        warnings.warn(
            "diffusers computes another position table than this decoder has: its pictures will differ, while latents "
            "and umm.interop.load_diffusers stay exact",
            stacklevel=2,
        )
    mean, std = _diffusers_stats(space)
    tensors = {f"encoder.{k}": v for k, v in space.encoder.state_dict().items() if k not in FINAL_NORM}
    tensors |= {f"decoder.{k}": v for k, v in decoder_state(decoder, DIFFUSERS_BLOCK).items()}
    tensors |= {"encoder_mean": space.pixel_mean, "encoder_std": space.pixel_std}
    tensors |= {"_latents_mean": mean, "_latents_std": std}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(contiguous(tensors), folder / DIFFUSERS_WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", _diffusers_config(space, decoder, mean, std))
    return folder


def load_diffusers(folder: str | Path) -> OfficialRAE:
    """A diffusers `AutoencoderRAE` folder with a DINOv2 encoder.

    The file has no affine final norm, so `space.features` uses the plain one.

    Raises:
        UmmError: another encoder, or latents with a scaling factor.
        MissingWeights: a file is absent or its tensors do not fit.
    """
    folder = Path(folder).expanduser()
    config = _diffusers_settings(folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(file)
    parts = {name: _below(tensors, f"{name}.") for name in ("encoder", "decoder")}
    space = _diffusers_space(config, parts["encoder"], tensors)
    decoder = build_decoder(space.spec, config)
    positions = {SINGLE["positions"]: _diffusers_positions(decoder)}  # unless the file says otherwise: one of ours
    load_decoder_state(decoder, positions | parts["decoder"], DIFFUSERS_BLOCK)
    return OfficialRAE(space, {"decoder": decoder})


def _diffusers_positions(decoder: Decoder) -> Tensor:
    """The table that the installed diffusers computes for a decoder of this width and grid, (1, 1 + N, D)."""
    try:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
    except ImportError as error:
        raise UmmError("AutoencoderRAE folders need a diffusers that has it: pip install 'diffusers>=0.39'.") from error
    _, tokens, width = decoder.positions.shape
    smallest = {"decoder_num_hidden_layers": 0, "decoder_intermediate_size": 1, "hidden_size": 1, "patch_size": 1}
    with seeded_init("positions only"):
        return RAEDecoder(decoder_hidden_size=width, num_patches=tokens - 1, **smallest).decoder_pos_embed


def _diffusers_space(config: Mapping, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> DINOv2:
    width = config["encoder_hidden_size"]
    sizes = {"hidden_size": width, "num_hidden_layers": config["encoder_num_hidden_layers"]}
    sizes |= {"patch_size": config["encoder_patch_size"], "num_attention_heads": width // 64, "image_size": 518}
    with seeded_init("encoder to be loaded"):
        encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes))
    optional = {key: encoder.state_dict()[key] for key in (*UNUSED, *FINAL_NORM)}
    state = optional | installed_names(state, encoder)
    _check_fit("the encoder", encoder.state_dict(), state)
    encoder.load_state_dict(state)
    std = tensors["_latents_std"].double() + DIFFUSERS_EPS
    mean = tensors["_latents_mean"]
    mode = "scalar" if mean.numel() == std.numel() == 1 else "position"
    pixels = [tuple(tensors[f"encoder_{name}"].flatten().tolist()) for name in ("mean", "std")]
    side = config["encoder_input_size"] // config["encoder_patch_size"] * config["patch_size"]
    space = DINOv2(encoder, side, config["encoder_input_size"], (-1,), mode, *pixels)
    space.normalizer.set(mean, std.square() - space.normalizer.eps)
    return space


def _diffusers_settings(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise MissingWeights(f"{folder} has no config.json of diffusers.") from error
    for key, only in (("_class_name", "AutoencoderRAE"), ("encoder_type", "dinov2"), ("scaling_factor", 1.0)):
        if config.get(key, only) != only:
            raise UmmError(f"{folder}/config.json has {key} {config[key]!r}; only {only!r} can be read here.")
    return config


def _diffusers_stats(space: DINOv2) -> tuple[Tensor, Tensor]:
    """Mean and std such that diffusers' (z - mean) / (std + eps) is our (z - mean) / sqrt(var + eps)."""
    normalizer = space.normalizer
    if normalizer.mode == "none":
        return torch.zeros(1), torch.ones(1) - DIFFUSERS_EPS
    std = (normalizer.var.double() + normalizer.eps).sqrt() - DIFFUSERS_EPS
    return normalizer.mean, std.float()


def _diffusers_config(space: DINOv2, decoder: Decoder, mean: Tensor, std: Tensor) -> dict:
    ours = decoder_config(decoder)
    del ours["layer_norm_eps"], ours["hidden_act"]
    return {
        "_class_name": "AutoencoderRAE",
        "_diffusers_version": "0.39.0",
        "encoder_type": "dinov2",
        "encoder_hidden_size": space.spec.channels,
        "encoder_patch_size": space.encoder.config.patch_size,
        "encoder_num_hidden_layers": space.encoder.config.num_hidden_layers,
        "encoder_input_size": space.encoder_size,
        "encoder_norm_mean": list(space.spec.pixel_mean),
        "encoder_norm_std": list(space.spec.pixel_std),
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
        **ours,
    }


def _obstacles(model: UnifiedModel) -> list[str]:
    """What no published RAE has."""
    space = model.space
    if not isinstance(space, DINOv2):
        return [f"its latent space is {type(space).__name__}"]
    last = space.encoder.config.num_hidden_layers - 1
    found = {
        f"its latent comes from blocks {list(space.layers)}, not from the last, {last}": space.layers != (last,),
        "its latents are scaled to a sphere": space.normalizer.mode == "sphere",
        "its latents go through an adapter": adapter_digest(space) is not None,
    }
    return [obstacle for obstacle, met in found.items() if met]


def _diffusers_obstacles(model: UnifiedModel) -> list[str]:
    """Where the model is unlike what diffusers builds from its configuration."""
    space, decoder = model.space, model.head("decoder")
    config = space.encoder.config
    found = {
        "4 registers": space.prefix == 5,
        "attention heads of 64 channels": config.hidden_size == 64 * config.num_attention_heads,
        "an encoder trained at 518 px": config.image_size == 518,
        "an encoder MLP of ratio 4 without gate": config.mlp_ratio == 4 and not config.use_swiglu_ffn,
        "an encoder LayerNorm eps of 1e-6": config.layer_norm_eps == 1e-6,
        "a decoder LayerNorm eps of 1e-12": decoder.norm.eps == 1e-12,
    }
    return [f"diffusers wants {wanted}" for wanted, met in found.items() if not met]


def _refuse(target: str, obstacles: list[str]) -> None:
    if obstacles:
        raise UmmError(f"this model cannot be written for {target}: {'; '.join(obstacles)}.")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2))
