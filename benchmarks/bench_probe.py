"""Probes on cached features: pictures per second of the linear grid, kNN and the attentive probe.

    python benchmarks/bench_probe.py            about a minute on two CPU cores, no network, no weights

Features are random, 768 wide as DINOv2-B's, 1000 classes for the linear grid and kNN: the work of ImageNet. The grid is
13 learning rates in one pass, against 13 passes of one rate (`alone`) and against 13 layers with autograd. All three do
the same sums on features in memory; what one pass saves beside them is reading the features 12 times more.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _bench import measure, report

from umm.fitting import column
from umm.heads.attentive import AttentiveReader
from umm.heads.linear import LinearGrid
from umm.knn import knn_votes
from umm.latents.base import LatentSpec
from umm.rng import generator, seeded_init
from umm.settings import ProbeSettings

WIDTH, CLASSES, BATCH, TOKENS = 768, 1000, 128, 256


def grid_step(rates: list[float], device: str):
    """One step of the linear grid."""
    grid = LinearGrid(WIDTH, CLASSES, rates, 10**6, seed=0, device=device)
    draw = generator("bench")
    x = torch.randn(BATCH, WIDTH, generator=draw).to(device)
    y = torch.randint(CLASSES, (BATCH,), generator=draw).to(device)
    return lambda: grid.step(x, y)


def autograd_step(rates: list[float], device: str):
    """The same with a layer, an optimiser and a backward pass for each rate."""
    layers = [torch.nn.Linear(WIDTH, CLASSES, device=device) for _ in rates]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9) for layer, rate in zip(layers, rates)]
    draw = generator("bench")
    x = torch.randn(BATCH, WIDTH, generator=draw).to(device)
    y = torch.randint(CLASSES, (BATCH,), generator=draw).to(device)

    def step() -> None:
        sum(F.cross_entropy(layer(x), y) for layer in layers).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def attentive_step(device: str):
    """One training step of an attentive reader on 256 tokens."""
    with seeded_init("bench"):
        head = AttentiveReader(LatentSpec(WIDTH, 16, 16, 256), [str(k) for k in range(CLASSES)]).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4)
    tokens = torch.randn(BATCH, TOKENS, WIDTH, generator=generator("bench")).to(device)
    y = torch.arange(BATCH, device=device)

    def step() -> None:
        F.cross_entropy(head(column(tokens)), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20_000, help="training pictures that kNN searches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    rates = ProbeSettings().rates
    train = torch.randn(options.pictures, WIDTH, generator=generator("bench")).to(options.device)
    labels = torch.arange(options.pictures, device=options.device) % CLASSES
    quick = {"warmup": 1, "repetitions": 5}
    numbers = {
        "grid": measure(grid_step(rates, options.device), BATCH, **quick),
        "grid_by_autograd": measure(autograd_step(rates, options.device), BATCH, **quick),
        "alone": measure(grid_step(rates[:1], options.device), BATCH, **quick),
        "knn": measure(lambda: knn_votes(train, labels, train[:512], CLASSES), 512, **quick),
        "attentive": measure(attentive_step(options.device), BATCH, warmup=1, repetitions=3),
    }
    grid = numbers["grid"]["seconds"]["median"]
    numbers["times_faster"] = {
        "than 13 passes": 13 * numbers["alone"]["seconds"]["median"] / grid,
        "than autograd": numbers["grid_by_autograd"]["seconds"]["median"] / grid,
    }
    shape = {"width": WIDTH, "classes": CLASSES, "batch": BATCH, "tokens": TOKENS, "rates": len(rates)}
    report("probe", shape | {"pictures": options.pictures, "device": options.device}, numbers)


if __name__ == "__main__":
    main()
