from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from umm.errors import ConfigError, UmmError
from umm.heads.dit import DiT
from umm.latents.base import LatentSpec
from umm.layers import patchify, unpatchify
from umm.rng import seeded_init
from umm.settings import DiTSettings

PUBLISHED = LatentSpec(768, 16, 16, 256)
SMALL = LatentSpec(8, 4, 4, 32)
LIGHTNING = {"head_depth": 0}
PLAIN = {"head_depth": 0, "norm": "layer", "mlp": "gelu", "rope": False, "time": "sinusoid", "patch": 2}
RAEV2 = {"conditioning": "tokens", "sincos": False, "qk_norm": True, "base_depth": 1}
KINDS = {"DiT^DH": {}, "LightningDiT": LIGHTNING, "DiT": PLAIN, "RAEv2": RAEV2, "RAEv2 narrow": RAEV2 | LIGHTNING}
kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


def meta(spec: LatentSpec = PUBLISHED, **changes) -> DiT:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DiT(DiTSettings(**changes), spec, num_classes=1000)


def inputs(spec: LatentSpec = SMALL, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, *spec.shape, generator=generator), torch.rand(batch, generator=generator)
    return x, t, torch.arange(batch)


def test_a_network_with_classes_begins_as_one_without():
    """So that a reader alone, whose trunk knows no classes, begins as the one beside a generator."""
    made = []
    for classes, changes in [(0, {}), (6, {}), (6, {"repa_depth": 1})]:
        with seeded_init("same"):
            made.append(DiT(DiT.tiny(SMALL, **changes).config, SMALL, classes).state_dict())
    shared = made[0].keys() - {"label.weight"}
    assert all(torch.equal(made[0][key], other[key]) for other in made[1:] for key in shared)
    assert torch.equal(made[0]["label.weight"], made[1]["label.weight"][-1:])  # of no class


@pytest.mark.parametrize(
    "changes, count",
    [
        ({"size": "S"}, 196_455_764),
        ({"size": "B"}, 294_295_892),
        ({"size": "L"}, 621_744_436),
        ({"size": "XL"}, 838_675_796),
        ({"size": "S"} | LIGHTNING, 33_649_792),
        ({"size": "XL"} | LIGHTNING, 677_248_384),
    ],
)
def test_published_networks_have_the_published_counts(changes, count):
    assert meta(**changes).parameter_count() == count


@pytest.mark.parametrize("width, heads, count", [(1440, 20, 875_216_500), (1152, 16, 620_434_324)])
def test_raev2_networks_have_the_published_counts(width, heads, count):
    changes = {"size": "custom", "width": width, "depth": 28, "heads": heads} | RAEV2 | {"base_depth": 8}
    assert meta(LatentSpec(1024, 16, 16, 256), **changes).parameter_count() == count


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_plain_dits_have_the_published_counts(size, millions):
    """DiT, arXiv 2212.09748, table 4; their XL/2 counts 675,129,632 with its output for the variance."""
    dit = meta(LatentSpec(4, 32, 32, 256), size=size, **PLAIN)
    variance = sum(p.numel() for p in dit.final.linear.parameters())
    assert abs(dit.parameter_count() / 1e6 - millions) < 0.6
    assert size != "XL" or dit.parameter_count() + variance == 675_129_632


def test_512_pixels_change_only_the_tables():
    dit = meta(LatentSpec(768, 32, 32, 512))
    assert dit.parameter_count() == 839_560_532
    assert sum(p.numel() for p in dit.parameters()) == 838_380_628  # trainable: without positions and frequencies


@kinds
def test_the_output_is_zero_at_initialisation(changes):
    """So the first loss is 1 + mean z^2, whatever the network."""
    small = {"size": "custom", "width": 32, "depth": 2, "heads": 4, "head_width": 48, "head_heads": 4} | changes
    outputs = DiT(DiTSettings(**small), SMALL, 10)(*inputs(), auxiliary=True)
    assert not outputs.prediction.any() and outputs.prediction.shape == (3, *SMALL.shape)
    if outputs.base is not None:
        assert not outputs.base.any()


@kinds
def test_the_prediction_depends_on_latent_time_and_class(changes):
    dit, (x, t, y) = DiT.tiny(SMALL, **changes), inputs()
    out = dit(x, t, y)
    assert not torch.allclose(out, dit(x + 1, t, y))
    assert not torch.allclose(out, dit(x, t / 2, y))
    assert not torch.allclose(out, dit(x, t, y + 1))


@kinds
def test_no_class_is_the_null_label(changes):
    dit, (x, t, y) = DiT.tiny(SMALL, **changes), inputs()
    assert torch.equal(dit(x, t), dit(x, t, torch.full_like(y, dit.null_label)))
    assert dit.null_label == dit.num_classes == 10


def test_an_unconditional_network_needs_no_classes():
    x, t, _ = inputs()
    assert DiT.tiny(SMALL, num_classes=0)(x, t).shape == x.shape


def test_one_time_serves_the_whole_batch():
    dit, (x, _, y) = DiT.tiny(SMALL), inputs()
    assert torch.equal(dit(x, torch.tensor(0.3), y), dit(x, torch.full((3,), 0.3), y))


@kinds
def test_forward_draws_no_random_numbers(changes):
    dit, before = DiT.tiny(SMALL, **changes).train(), torch.random.get_rng_state()
    assert torch.equal(dit(*inputs()), dit(*inputs()))
    assert torch.equal(before, torch.random.get_rng_state())


def test_frozen_tables_cannot_be_thawed():
    """The public training script thaws positions and frequencies by requires_grad_(True) on the whole network."""
    dit = DiT.tiny(SMALL).requires_grad_(True)
    assert {"positions", "time.frequencies"} <= dit.state_dict().keys() - dict(dit.named_parameters()).keys()
    assert dit.state_dict()["time.frequencies"].shape == (256,)


@kinds
def test_features_are_the_tokens_after_a_block(changes):
    dit, (x, t, y) = DiT.tiny(SMALL, **changes), inputs()
    seen = []
    hook = dit.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
    first = dit.features(x, t, 0, y)
    hook.remove()
    tokens = 4 if changes is PLAIN else 16
    assert first.shape == (3, tokens, 48)
    assert torch.equal(first, seen[0][:, :tokens])
    assert torch.equal(dit.features(x, t, -1, y), dit.features(x, t, 1, y))


def test_features_run_no_later_block():
    dit, (x, _, _) = DiT.tiny(SMALL), inputs()
    expected = dit.features(x, 0.0, 0)
    dit.blocks[1], dit.head_blocks = None, None
    assert torch.equal(dit.features(x, 0.0, 0), expected)


@pytest.mark.parametrize("block", [2, -3])
def test_a_block_that_is_not_there_is_an_error(block):
    with pytest.raises(UmmError, match="blocks 0 to 1"):
        DiT.tiny(SMALL).features(inputs()[0], 0.0, block)


def test_without_positions_the_network_commutes_with_permutations():
    """Nothing but rotary and sine-cosine tables tells tokens apart; the head is modulated by its own token."""
    dit, (x, t, y) = DiT.tiny(SMALL, rope=False, sincos=False).double(), inputs()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    x = x.double()
    shuffled = x.flatten(2)[..., order].unflatten(2, (4, 4))
    torch.testing.assert_close(dit(shuffled, t, y), dit(x, t, y).flatten(2)[..., order].unflatten(2, (4, 4)))
    with_rope = DiT.tiny(SMALL, sincos=False).double()
    assert not torch.allclose(with_rope(shuffled, t, y), with_rope(x, t, y).flatten(2)[..., order].unflatten(2, (4, 4)))


def test_the_base_output_and_the_aligned_tokens_come_with_the_prediction():
    dit, (x, t, y) = DiT.tiny(SMALL, depth=3, base_depth=2, repa_depth=1, repa_dim=20), inputs()
    outputs = dit(x, t, y, auxiliary=True)
    assert torch.equal(outputs.prediction, dit(x, t, y))
    assert outputs.base.shape == x.shape and outputs.aligned.shape == (3, 16, 20)
    assert torch.equal(outputs.aligned, dit.repa(dit.features(x, t, 0, y)))


def test_the_alignment_loss_trains_only_the_blocks_before_the_projector():
    dit = DiT.tiny(SMALL, repa_depth=1)
    dit(*inputs(), auxiliary=True).aligned.square().sum().backward()
    assert dit.repa[0].weight.grad is not None and dit.blocks[0].attn.qkv.weight.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in [*dit.blocks[1].parameters(), *dit.final.parameters()])


def test_parts_the_network_lacks_are_none():
    outputs = DiT.tiny(SMALL)(*inputs(), auxiliary=True)
    assert outputs.base is None and outputs.aligned is None


@kinds
def test_checkpointed_gradients_are_the_same(changes):
    plain, saving = DiT.tiny(SMALL, **changes), DiT.tiny(SMALL, checkpoint_gradients=True, **changes)
    for dit in (plain, saving):
        dit(*inputs()).square().sum().backward()
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


@kinds
def test_autocast_leaves_the_residual_stream_and_the_time_embedding_in_float32(changes):
    """In bfloat16 1000 t and 1 + scale lose their digits, and small updates vanish in the residual sums."""
    dit, (x, t, y) = DiT.tiny(SMALL, **changes), inputs()
    exact, exact_time = dit(x, t, y), dit.time(t)
    streams = []
    for block in [*dit.blocks, *getattr(dit, "head_blocks", [])]:
        block.register_forward_hook(lambda module, args, out: streams.extend([args[0], out]))
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_time = dit(x, t, y), dit.time(t)
    assert all(stream.dtype == torch.float32 for stream in streams)
    assert torch.equal(rough_time, exact_time)
    assert (rough - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_put_back_where_they_were(patch):
    x = torch.randn(2, 3, 8, 4)
    patches = patchify(x, patch)
    assert patches.shape == (2, 32 // patch**2, 3 * patch**2)
    assert torch.equal(patches[:, 0], x[:, :, :patch, :patch].permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, 8 // patch, 4 // patch, patch), x)


def test_grids_need_not_be_square():
    spec = LatentSpec(8, 4, 2, 32)
    assert DiT.tiny(spec)(*inputs(spec)).shape == (3, 8, 4, 2)


@pytest.mark.parametrize("changes, narrow", [(LIGHTNING, True), ({"head_width": 64}, True), ({}, False)])
def test_a_network_narrower_than_its_tokens_is_warned_about(changes, narrow):
    small = {"size": "custom", "width": 32, "depth": 1, "heads": 4, "head_width": 80, "head_heads": 4} | changes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DiT.from_config(DiTSettings(**small), LatentSpec(72, 4, 4, 32), num_classes=3)
    found = [("token has 72 numbers" in str(w.message), w.filename == __file__) for w in caught]
    assert found == [(True, True)] * narrow


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": "custom"}, "set all three"),
        ({"size": "S", "width": 64}, "fixed numbers"),
        ({"size": "custom", "width": 48, "depth": 2, "heads": 5}, "dit.width=48 must be a multiple"),
        ({"size": "custom", "width": 24, "depth": 2, "heads": 4}, "dit.width=24 must be a multiple of 4 times"),
        ({"head_width": 100}, "dit.head_width=100 must be a multiple"),
        ({"patch": 3}, "dit.patch=3 does not divide the 4x4 latent grid"),
        ({"base_depth": 40}, "dit.base_depth=40 is outside the trunk of 28 blocks"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        DiT(DiTSettings(**changes), SMALL)


def test_latents_of_another_shape_are_an_error():
    with pytest.raises(UmmError, match=r"reads latents \(B, 8, 4, 4\), got \(1, 8, 8, 8\)"):
        DiT.tiny(SMALL)(torch.zeros(1, 8, 8, 8), torch.zeros(1))
