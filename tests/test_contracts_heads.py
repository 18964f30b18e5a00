"""What every head must do; a new file in umm/heads is tested without a new test."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import umm
from umm.latents.base import LatentSpec
from umm.rng import seeded_init

SPEC = LatentSpec(8, 4, 4, 32)

pytestmark = pytest.mark.parametrize("name", umm.names("heads"))


def build(name: str) -> torch.nn.Module:
    with seeded_init("head"):
        return umm.find("heads", name).tiny(SPEC).eval()


def outputs(head: torch.nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """The head's answer to random latents; what else it asks for is told by the parameter's name."""
    generator = torch.Generator().manual_seed(0)
    known = {"t": torch.full((4,), 0.3), "y": torch.arange(4) % 2}
    others = list(inspect.signature(head.forward).parameters.values())[1:]
    if hasattr(head, "inputs"):  # of questions, one a picture
        known |= head.inputs(["Is there a red circle?", "yes", "Is there a circle?", "red"])
    arguments = {p.name: known[p.name][:batch] for p in others if p.default is p.empty and p.name in known}
    arguments = {key: value.to(dtype) if value.is_floating_point() else value for key, value in arguments.items()}
    latents = torch.randn(4, *SPEC.shape, generator=generator)[:batch].to(dtype)
    return head(latents, **arguments)


def test_settings_are_a_dataclass_that_carries_the_heads_name(name):
    config = umm.find("heads", name).Config
    assert dataclasses.is_dataclass(config)
    assert config().name == name


def test_the_spec_is_kept_and_parameters_are_counted(name):
    head = build(name)
    assert head.spec == SPEC
    assert head.parameter_count() >= sum(p.numel() for p in head.parameters()) > 0


def test_equal_seeds_build_equal_heads_and_leave_the_global_generator_alone(name):
    before = torch.random.get_rng_state()
    first, second = build(name), build(name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_picture_does_not_depend_on_its_batch(name):
    head = build(name).double()
    whole, alone = outputs(head, 4, torch.float64), outputs(head, 1, torch.float64)
    assert whole.dtype == torch.float64 and whole.isfinite().all()
    torch.testing.assert_close(whole[:1], alone)


def test_a_saved_head_answers_the_same(name, tmp_path):
    first, second = build(name), build(name)
    with torch.no_grad():
        for value in second.state_dict().values():
            value.zero_()
    save_file({key: value.contiguous() for key, value in first.state_dict().items()}, tmp_path / "head.safetensors")
    second.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(outputs(first), outputs(second))


def test_every_trainable_parameter_gets_a_gradient(name):
    head = build(name).train()
    outputs(head).square().mean().backward()
    missing = [key for key, p in head.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
