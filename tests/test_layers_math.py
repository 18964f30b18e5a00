from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from umm.layers import (
    Attention,
    RMSNorm,
    SwiGLU,
    ViTBlock,
    apply_rope,
    at_least_float32,
    grid_of,
    rope_2d,
    sincos_2d,
    tokens_of,
)
from umm.rng import seeded_init


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_sine_cosine_positions_have_the_published_values():
    row = sincos_2d(1152, 16, 16)[53]  # token (row 3, column 5)
    want = torch.tensor([-0.958924, 0.283662, 0.141120, -0.989992])  # sin 5, cos 5, sin 3, cos 3
    torch.testing.assert_close(row[[0, 288, 576, 864]], want, rtol=0, atol=1e-6)


def test_sine_cosine_positions_refuse_an_odd_width():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(30, 2, 2)


def test_rotary_positions_have_the_published_values():
    cos, sin = rope_2d(72, 16, 16)
    want = torch.tensor([-0.989992, -0.989992, -0.225695, -0.225695, 0.283662, 0.283662])
    torch.testing.assert_close(cos[53, [0, 1, 2, 3, 36, 37]], want, rtol=0, atol=1e-6)
    turned = apply_rope(torch.arange(72.0).expand(256, 72), cos, sin)[53]
    want = torch.tensor([-0.14112, -0.98999, 45.69204, -24.02577])
    torch.testing.assert_close(turned[[0, 1, 36, 37]], want, rtol=0, atol=1e-4)


def test_rotation_is_the_same_compiled_and_in_half_precision():
    """Where there is no compiler, what it would compile is run as it is."""
    (cos, sin), x = rope_2d(16, 4, 4), draw(2, 3, 16, 16)
    with mock.patch("torch.compiler.is_compiling", lambda: True):
        compiled = apply_rope(x, cos, sin)
    torch.testing.assert_close(apply_rope(x, cos, sin), compiled)
    half = apply_rope(x.bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, apply_rope(x.bfloat16().float(), cos, sin).bfloat16())


@settings(max_examples=10, derandomize=True, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3))
def test_rotary_products_depend_on_the_distance_alone(row, column, down, right):
    cos, sin = rope_2d(16, 8, 8)
    q, k = draw(2, 1, 16).unbind()

    def product(a: int, b: int) -> torch.Tensor:
        return apply_rope(q, cos[a], sin[a]) @ apply_rope(k, cos[b], sin[b]).T

    start, moved = 8 * row + column, 8 * (row + down) + column + right
    torch.testing.assert_close(product(start, moved), product(0, 8 * down + right), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "dim, hidden", [(384, 1024), (768, 2048), (1024, 2730), (1152, 3072), (1440, 3840), (2048, 5461)]
)
def test_swiglu_has_the_published_widths(dim, hidden):
    with torch.device("meta"):
        assert SwiGLU(dim).w3.in_features == hidden


def test_swiglu_gates_with_the_first_half():
    layer = SwiGLU(4, 6).double()
    x = draw(3, 4)
    a, b = layer.w12(x)[:, :6], layer.w12(x)[:, 6:]
    torch.testing.assert_close(layer(x), layer.w3(F.silu(a) * b))


def test_rms_norm_has_unit_mean_square_and_keeps_the_dtype():
    norm, x = RMSNorm(64, eps=0.0), 7 * draw(5, 64)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(5, dtype=torch.float64))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_half_precision_is_widened_and_double_is_kept():
    half, double = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)
    assert at_least_float32(half).dtype == torch.float32
    assert at_least_float32(double) is double


def test_the_block_is_torchs_pre_norm_encoder_layer():
    with seeded_init("block"):
        ours = ViTBlock(32, 4, 64, eps=1e-12).double()
        theirs = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True, norm_first=True
        ).double()
    names = {
        "attn.qkv.": "self_attn.in_proj_",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    state = {}
    for name, value in ours.state_dict().items():
        for mine, other in names.items():
            name = name.replace(mine, other)
        state[name] = value
    theirs.load_state_dict(state)
    x = draw(2, 9, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_attention_with_rope_and_normed_queries_is_the_written_out_formula():
    layer, x = Attention(16, 2, qk_norm=True).double(), draw(1, 6, 16)
    rope = rope_2d(8, 2, 3)
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    q, k = apply_rope(layer.q_norm(q), *rope), apply_rope(layer.k_norm(k), *rope)
    mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(layer(x, rope), layer.proj(mixed.transpose(1, 2).flatten(2)))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="divisor"):
        Attention(30, 4)


@settings(max_examples=10, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_tokens_and_grids_are_inverse_and_row_by_row(b, c, h, w):
    x = draw(b, c, h, w)
    tokens = tokens_of(x)
    assert torch.equal(grid_of(tokens, h, w), x)
    assert torch.equal(tokens[:, (h - 1) * w + w - 1], x[:, :, h - 1, w - 1])
    if w > 1:
        assert torch.equal(tokens[:, 1], x[:, :, 0, 1])
