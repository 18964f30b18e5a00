"""Random numbers belong to pictures."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umm.rng import PictureRNG, derive_seed, generator, seeded_init


@settings(max_examples=25, deadline=None, derandomize=True)
@given(indices=st.lists(st.integers(0, 10**9), min_size=1, max_size=6, unique=True), cut=st.integers(0, 6))
def test_a_draw_depends_on_the_picture_and_not_on_its_batch(indices, cut):
    whole = PictureRNG(indices, 0, "gen").randn(3, 2)
    parts = [PictureRNG(part, 0, "gen").randn(3, 2) for part in (indices[:cut], indices[cut:]) if part]
    assert torch.equal(whole, torch.cat(parts))


def test_streams_are_independent_of_each_other():
    base = PictureRNG([7], 0, "gen")
    streams = [base, base.fork("noise"), PictureRNG([7], 0, "recon"), PictureRNG([7], 1, "gen")]
    draws = [stream.randn(4) for stream in streams]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_seeds_are_the_same_on_every_machine():
    assert derive_seed(0, "recon", "order", 3) == 3546896303613577103


def test_seeds_do_not_confuse_their_parts():
    assert derive_seed("ab", "c") != derive_seed("a", "bc")


def test_seeded_init_leaves_the_callers_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded_init("weights"):
        first = torch.nn.Linear(2, 2).weight
    assert torch.equal(torch.rand(2), expected)
    with seeded_init("weights"):
        assert torch.equal(torch.nn.Linear(2, 2).weight, first)


def test_uniform_and_integer_draws_keep_their_range():
    rng = PictureRNG(range(200), 0, "x")
    uniform, integers = rng.rand(5), rng.randint(3, 5)
    assert uniform.min() >= 0 and uniform.max() < 1 and set(integers.unique().tolist()) == {0, 1, 2}
    assert abs(float(uniform.mean()) - 0.5) < 0.03


def test_generators_with_equal_parts_agree():
    assert torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "a")))
