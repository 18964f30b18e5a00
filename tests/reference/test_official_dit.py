"""Official stage-2 networks against tensors computed with their public implementations (the .json files say how)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from umm.errors import ConfigError, MissingWeights
from umm.flow import autoguidance, classifier_free, euler, internal_guidance, time_grid, velocity_field
from umm.heads.dit import DiT
from umm.interop_dit import load_official_dit, official_state_dict, read_config
from umm.latents.base import LatentSpec
from umm.settings import DiTSettings

HERE = Path(__file__).parent
RAE = json.loads((HERE / "rae_small.json").read_text())
RAEV2 = json.loads((HERE / "raev2_small.json").read_text())
SHIFT = RAE["sampling"]["shift"]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(HERE / "rae_small.safetensors") | load_file(HERE / "raev2_small.safetensors")


def weights(reference: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}.weights."
    return {key.removeprefix(prefix): value for key, value in reference.items() if key.startswith(prefix)}


def inputs(reference: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(reference[f"{name}.{part}"] for part in "xty")


def config(name: str) -> dict:
    if name == "raev2":
        return RAEV2["config"]
    guide = {"depth": RAE["sampling"]["guide_depth"]} if name == "ditdh_guide" else {}
    return RAE["lightningdit" if name == "lightningdit" else "ditdh"] | guide


def network(reference: dict[str, Tensor], name: str) -> torch.nn.Module:
    return load_official_dit(weights(reference, name), config(name)).requires_grad_(False)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative error {error:.2g}"


@pytest.mark.parametrize("name", ["ditdh", "lightningdit"])
def test_velocities_are_those_of_the_reference(reference, name):
    assert_relative(network(reference, name)(*inputs(reference, name)), reference[f"{name}.velocity"])


def test_both_predictions_of_raev2_are_those_of_the_reference(reference):
    full, base = network(reference, "raev2")(*inputs(reference, "raev2"))
    assert_relative(full, reference["raev2.x_pred"])
    assert_relative(base, reference["raev2.x_pred_base"])


@pytest.mark.parametrize("points", [8, 50])
def test_euler_trajectories_end_where_the_reference_ends(reference, points):
    x, _, y = inputs(reference, "ditdh")
    field = partial(_bound, network(reference, "ditdh"), y)
    assert_relative(euler(field, x, time_grid(points, SHIFT, "rae")), reference[f"ditdh.euler{points}"])


@pytest.mark.parametrize("kind", ["cfg8", "autoguidance8"])
def test_guided_trajectories_end_where_the_reference_ends(reference, kind):
    x, _, y = inputs(reference, "ditdh")
    dit, facts = network(reference, "ditdh"), RAE["sampling"]
    if kind == "cfg8":
        guided = classifier_free(dit, dit.null_label, facts["cfg_scale"], tuple(facts["cfg_interval"]))
    else:
        guided = autoguidance(dit, network(reference, "ditdh_guide"), facts["autoguidance_scale"])
    end = euler(partial(_bound, guided, y), x, time_grid(8, SHIFT, "rae"))
    assert_relative(end, reference[f"ditdh.{kind}"])


@pytest.mark.parametrize("kind", ["euler10", "internal_guidance10"])
def test_raev2_trajectories_end_where_the_reference_ends(reference, kind):
    x, _, y = inputs(reference, "raev2")
    pair, facts = network(reference, "raev2"), RAEV2["sampling"]
    scale = facts["w"] if kind == "internal_guidance10" else 1.0
    guided = internal_guidance(pair, scale, (facts["t_min"], 1.0))
    field = velocity_field(guided, "x", facts["t_eps"])
    end = euler(partial(_bound, field, y), x, time_grid(10, facts["shift"], "full"))
    assert_relative(end, reference[f"raev2.{kind}"])


def _bound(field, y: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return field(x, t, y)


@pytest.mark.parametrize("name", ["ditdh", "ditdh_guide", "lightningdit", "raev2"])
def test_exported_weights_are_the_official_file(reference, name):
    """Tables included: the official loader is strict too."""
    module = network(reference, name)
    state, expected = official_state_dict(getattr(module, "dit", module)), weights(reference, name)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6 if "rope" in key or key == "pos_embed" else 0)


@pytest.mark.parametrize("wrap", ["flat.pt", "ema.pt", "flat.safetensors"])
def test_files_and_averaged_weights_of_checkpoints_are_read(reference, wrap, tmp_path):
    state, file = weights(reference, "lightningdit"), tmp_path / wrap
    if wrap.endswith(".pt"):
        torch.save({"ema": state} if wrap == "ema.pt" else state, file)
    else:
        save_file(state, file)
    dit = load_official_dit(file, config("lightningdit"))
    assert_relative(dit(*inputs(reference, "lightningdit")), reference["lightningdit.velocity"])


@pytest.mark.parametrize(
    "name, settings, keys, numel",
    [
        ("DiTDH-S", {"size": "S"}, 190, 196_554_068),
        ("DiTDH-XL", {"size": "XL"}, 382, 838_778_196),
        ("LightningDiT-S", {"size": "S", "head_depth": 0}, 160, None),
        ("LightningDiT-XL", {"size": "XL", "head_depth": 0}, 352, None),
    ],
)
@pytest.mark.filterwarnings("ignore:this DiT is")
def test_official_files_have_the_published_number_of_keys(name, settings, keys, numel):
    with torch.device("meta"):
        state = official_state_dict(DiT(DiTSettings(**settings), LatentSpec(768, 16, 16, 256), 1000))
    assert len(state) == keys
    assert numel in (None, sum(value.numel() for value in state.values()))


def test_the_raev2_file_has_the_published_number_of_keys():
    published = {"hidden_size": [1440, 2048], "depth": [28, 2], "num_heads": [20, 16], "base_model_depth": 8}
    settings, spec = read_config(published | {"input_size": 16, "in_channels": 1024, "patch_size": [1, 1]})
    with torch.device("meta"):
        state = official_state_dict(DiT(settings, spec, 1000))
    assert len(state) == 572
    assert sum(value.numel() for value in state.values()) == 875_320_628


def test_what_does_not_fit_is_reported_a_line_each(reference):
    state = weights(reference, "ditdh")
    state["stranger"] = state.pop("final_layer.linear.bias")
    state["s_projector.weight"] = state["s_projector.weight"][:3]
    state["enc_feat_rope.freqs_cos"] = state["enc_feat_rope.freqs_cos"] + 0.5
    with pytest.raises(MissingWeights) as error:
        load_official_dit(state, config("ditdh"))
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "missing: final_layer.linear.bias (32,)",
        "unexpected: stranger (32,)",
        "shape: s_projector.weight is (3, 48), the configuration asks for (64, 48)",
        "table: enc_feat_rope.freqs_cos differs from this grid's rotary table by 0.5",
    ]


def test_at_most_ten_misfits_are_listed(reference):
    with pytest.raises(MissingWeights, match="and 60 more") as error:
        load_official_dit({}, config("ditdh"))
    assert len(str(error.value).splitlines()) == 12


def test_a_trained_position_table_is_kept_and_told(reference):
    """The public training script thaws it: a converter that rebuilds the table changes such a network silently."""
    state = weights(reference, "lightningdit")
    state["pos_embed"] = state["pos_embed"] + 0.25
    with pytest.warns(UserWarning, match="pos_embed was trained"):
        dit = load_official_dit(state, config("lightningdit"))
    assert torch.equal(dit.positions, state["pos_embed"][0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hiden_size": 3}, "Did you mean 'hidden_size'"),
        ({"wo_shift": True}, "wo_shift: true is not supported"),
        ({"depth": 2}, "a pair each"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_official_dit({}, config("ditdh") | changes)


def test_a_checkpoint_without_averaged_weights_is_refused(reference):
    with pytest.raises(MissingWeights, match="'model' is not a tensor"):
        load_official_dit({"model": weights(reference, "ditdh")}, config("ditdh"))


def test_a_plain_dit_is_that_of_diffusers():
    """LayerNorm blocks, tanh GELU, sinusoidal time, sine-cosine positions and 2x2 patches, in float64."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(4, 8, 4, 4, 2, sample_size=8, num_embeds_ada_norm=10, norm_eps=1e-6).eval().double()
    for block in theirs.transformer_blocks[1:]:  # as in its published weights
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    settings = DiTSettings(size="custom", width=32, depth=2, heads=4, head_depth=0, patch=2,
                           norm="layer", mlp="gelu", rope=False, time="sinusoid")  # fmt: skip
    ours = DiT(settings, LatentSpec(4, 8, 8, 64), num_classes=10).double()
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours.positions))
    # theirs spreads the frequencies over 127 intervals where DiT has 128
    ours.time.frequencies.copy_(10000.0 ** -(torch.arange(128) / 127))
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.tensor([0, 300, 999]), torch.tensor([1, 10, 4])
    torch.testing.assert_close(ours(x, t / 1000, y), theirs(x, t, y).sample, rtol=1e-5, atol=1e-5)


def from_diffusers(state: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Its tensors under our names; each block of theirs holds the same embeddings of time and class."""
    ours = {"positions": positions}
    emb = "transformer_blocks.0.norm1.emb."
    for kind in ("weight", "bias"):
        ours[f"embed.{kind}"] = state[f"pos_embed.proj.{kind}"]
        ours[f"time.mlp.0.{kind}"] = state[f"{emb}timestep_embedder.linear_1.{kind}"]
        ours[f"time.mlp.2.{kind}"] = state[f"{emb}timestep_embedder.linear_2.{kind}"]
        ours[f"final.modulation.1.{kind}"] = state[f"proj_out_1.{kind}"]
        ours[f"final.linear.{kind}"] = state[f"proj_out_2.{kind}"]
        for i in range(2):
            block = f"transformer_blocks.{i}."
            qkv = [state[f"{block}attn1.to_{part}.{kind}"] for part in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
            ours[f"blocks.{i}.attn.proj.{kind}"] = state[f"{block}attn1.to_out.0.{kind}"]
            ours[f"blocks.{i}.mlp.fc1.{kind}"] = state[f"{block}ff.net.0.proj.{kind}"]
            ours[f"blocks.{i}.mlp.fc2.{kind}"] = state[f"{block}ff.net.2.{kind}"]
            ours[f"blocks.{i}.modulation.1.{kind}"] = state[f"{block}norm1.linear.{kind}"]
    ours["embed.weight"] = ours["embed.weight"].permute(0, 2, 3, 1).flatten(1)  # (D, C, p, p) -> (D, p * p * C)
    ours["label.weight"] = state[f"{emb}class_embedder.embedding_table.weight"]
    return ours
