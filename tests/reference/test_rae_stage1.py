"""Stage 1 against tensors computed with the public RAE implementation (rae_small.json says how)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import Dinov2WithRegistersConfig

from umm.interop import load_official_rae

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "rae_small.json").read_text())


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(HERE / "rae_small.safetensors")


@pytest.fixture(scope="module")
def encoder(reference, tmp_path_factory) -> Path:
    """The stored encoder, whose names are those of files on disk, as a transformers folder."""
    folder = tmp_path_factory.mktemp("encoder")
    Dinov2WithRegistersConfig(**FACTS["encoder_config"]).save_pretrained(folder)
    save_file(below(reference, "encoder."), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def load(encoder: Path, decoder, reference: dict[str, torch.Tensor]):
    stats = {"mean": reference["stage1.stat.mean"], "var": reference["stage1.stat.var"]}
    return load_official_rae(encoder, decoder, FACTS["decoder_config"], stats, encoder_input_size=56)


def test_latents_and_pictures_are_those_of_the_reference(encoder, reference):
    rae = load(encoder, below(reference, "decoder."), reference)
    latents = rae.encode(reference["stage1.image"])
    assert_close(latents, reference["stage1.latent"], rtol=0, atol=1e-5)
    assert_close(rae.decode(latents), reference["stage1.recon"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrap", ["flat.pt", "flat.safetensors", "checkpoint.pt"])
def test_every_file_layout_gives_the_same_decoder(encoder, reference, tmp_path, wrap):
    flat = below(reference, "decoder.")
    if wrap == "flat.safetensors":
        save_file(flat, tmp_path / wrap)
    elif wrap == "flat.pt":
        torch.save(flat, tmp_path / wrap)
    else:  # a stage-1 training checkpoint: encoder and decoder, online weights and their average
        ema = {f"decoder.{key}": value for key, value in flat.items()} | {"encoder.x": torch.zeros(1)}
        torch.save({"step": 3, "model": {key: value + 1 for key, value in ema.items()}, "ema": ema}, tmp_path / wrap)
    rae = load(encoder, tmp_path / wrap, reference)
    assert_close(rae.decode(reference["stage1.latent"]), reference["stage1.recon"], rtol=0, atol=1e-5)


def test_a_trained_position_table_is_respected(encoder, reference):
    state = below(reference, "decoder.")
    moved = state | {"decoder_pos_embed": state["decoder_pos_embed"].flip(1)}
    picture = load(encoder, moved, reference).decode(reference["stage1.latent"])
    assert (picture - reference["stage1.recon"]).abs().max() > 1e-3
