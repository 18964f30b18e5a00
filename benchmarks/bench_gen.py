"""Training and sampling speed of DiT^DH: pictures a second, and the share of the machine's matrix speed they use.

    python benchmarks/bench_gen.py --size S --batch 2 --steps 2 --compile          some minutes on two CPU cores
    python benchmarks/bench_gen.py --size S XL --batch 64 --precision fp32 bf16 --compile     on a GPU

Latents are 16 x 16 tokens of a picture of 256 px. The step is the real one: the loss of `umm.tasks.gen` with its random
numbers, gradient clip, AdamW and average; uncached, the encoder runs before it. Model FLOPs are counted on the forward
pass and taken three times for a step; utilisation is against a large matrix product measured on the same machine in the
same precision. The share is what network, backward pass, clip, optimiser and average take of a whole step; the rest is
random numbers and the path.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings

import torch
from _bench import measure, report
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from umm.config import load
from umm.latents.base import LatentSpace, LatentSpec
from umm.latents.dinov2 import DINOv2
from umm.learner import Learner
from umm.rng import generator
from umm.sampling import GROUP, Drawer
from umm.settings import DINOv2Settings, SamplerSettings
from umm.tasks.gen import Gen

CLASSES = 1000


class Classes:
    """A data set of which only the class names are read."""

    def __init__(self):
        self.classes = [str(number) for number in range(CLASSES)]


def learner_of(size: str, space: LatentSpace, accelerator: Accelerator, compiled: bool) -> Learner:
    """The task's network with its optimiser and average, as a run has them."""
    config = load("gen", None, [f"gen.dit.size={size}", "cache.dir=unused", "latent.image_size=256"])
    task = Gen(config, space, Classes())
    with torch.no_grad():  # at zero, whole branches would cost nothing
        for parameter in task.dit.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator("weights"))
    return Learner(task.groups()[0], accelerator, 10**9, compiled)


def bench(size: str, precision: str, compiled: bool, asked: argparse.Namespace) -> dict:
    """Numbers of one configuration."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision))
    device = accelerator.device
    space = DINOv2.from_config(DINOv2Settings(weights=asked.weights)).to(device)
    learner, batch = learner_of(size, space, accelerator, compiled), asked.batch
    dit, spec = learner.phase.module, space.spec
    draw = generator("latents")
    pictures = {
        "latent": torch.randn(batch, *spec.shape, generator=draw).to(device),
        "label": torch.randint(CLASSES, (batch,), generator=draw).to(device),
    }
    flops = forward_flops(dit, spec, device)
    micro_batches, plan = {"gen": [pictures]}, {"gen": [list(range(batch))]}
    step = measure(lambda: learner.step(micro_batches, plan, 0), batch, warmup=2, repetitions=5)
    images = torch.rand(batch, 3, 256, 256, generator=draw).to(device)
    with torch.inference_mode(), accelerator.autocast():
        encoding = measure(lambda: space.raw(images), batch, warmup=1, repetitions=5)
    both = step["seconds"]["median"] + encoding["seconds"]["median"]
    network = measure(lambda: network_step(learner, pictures), batch, warmup=1, repetitions=5)
    sampler = Drawer(dit.eval(), learner.group.turns[0].task.settings.flow, SamplerSettings(steps=asked.steps))
    autocast = accelerator.autocast() if precision != "fp32" else contextlib.nullcontext()
    count = batch + -batch % GROUP  # fewer cost as much
    with autocast:
        drawn = measure(lambda: sampler.latents(range(count), [0] * count, 0), count, warmup=1, repetitions=3)
        peak = matrix_speed(device, accelerator.autocast)
    used = 3 * flops * step["per_second"]["median"]
    return {
        "train_cached": step,
        "encode": encoding,
        "train_uncached_per_second": batch / both,
        "sample": drawn | {"steps_of_the_sampler": asked.steps},
        "network_share": network["seconds"]["median"] / step["seconds"]["median"],
        "forward_gflops": flops / 1e9,
        "model_tflops_per_second": used / 1e12,
        "matrix_tflops_per_second": peak / 1e12,
        "utilisation": used / peak,
    }


def network_step(learner: Learner, pictures: dict) -> None:
    """Forward, backward, clip, optimiser and average, on numbers that are there already."""
    latent = pictures["latent"]
    time = torch.full((len(latent),), 0.5, device=latent.device)
    learner.wrapped(latent, time, pictures["label"], auxiliary=True).prediction.square().mean().backward()
    learner.update(1e-4)


@torch.no_grad()
def forward_flops(dit: torch.nn.Module, spec: LatentSpec, device: torch.device) -> float:
    """Of one picture: two for each multiplication of matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        type(dit).forward(dit, torch.zeros(1, *spec.shape, device=device), torch.zeros(1, device=device))
    return counter.get_total_flops()


@torch.no_grad()
def matrix_speed(device: torch.device, autocast) -> float:
    """FLOPs a second of one large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    with autocast():
        return 2 * side**3 * measure(lambda: a @ b, 1, warmup=2, repetitions=5, steps=2)["per_second"]["high"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["S"], choices=["S", "B", "L", "XL"])
    parser.add_argument("--weights", default="asset:dinov2-small-saliency", help="of the encoder")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="also compiled")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    numbers = {}
    for size in asked.size:
        for precision in asked.precision:
            for compiled in (False, True) if asked.compile else (False,):
                name = f"DiTDH-{size} {precision} {'compiled' if compiled else 'eager'}"
                found = numbers[name] = bench(size, precision, compiled, asked)
                print(
                    f"{name}: trains {found['train_cached']['per_second']['median']:.2f} (encoding too "
                    f"{found['train_uncached_per_second']:.2f}), samples "
                    f"{found['sample']['per_second']['median']:.3f} pictures/s ({asked.steps} steps); utilisation "
                    f"{found['utilisation']:.0%}, network {found['network_share']:.0%} of a step", flush=True,
                )  # fmt: skip
    report("gen", {"weights": asked.weights, "batch": asked.batch}, numbers)


if __name__ == "__main__":
    main()
