"""A judge without pretrained weights: a small convolutional classifier learned from the real pictures at hand.

It shares neither data nor architecture with encoders, costs little, and is at home in pictures far smaller than those
that pretrained networks have seen. B batch, S side, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm import fitting
from umm.metrics._features import NetworkSpace
from umm.progress import Progress
from umm.rng import generator, seeded_init
from umm.transforms import resize

SIDE = 64  # pixels; larger pictures are shrunk
WIDTH = 32  # channels of the first of three levels, each twice the one before
BATCH_SIZE, RATE, DECAY = 64, 3e-3, 0.05  # of AdamW


class ConvNetSpace(NetworkSpace):
    """Pooled features of the last level, (B, 128)."""

    name, dim, resizing = "convnet", 4 * WIDTH, f"torch-bicubic-aa-{SIDE}, where larger"

    def features(self, pixels: Tensor) -> Tensor:
        return self.network(prepared(pixels))

    @classmethod
    def train(
        cls, batches: Iterable[dict], classes: int, seed: int, device: torch.device | str = "cpu", images: int = 16_000
    ) -> ConvNetSpace:
        """Learn `classes` from batches {"image": uint8 (B, 3, S, S), "label": (B,)}, read once, for `images` pictures.

        Pictures are mirrored at random; rate by one cycle (Smith & Topin, arXiv 1708.07120).
        """
        found = [(prepared(batch["image"].float()).to(device), batch["label"].to(device)) for batch in batches]
        x, y = (torch.cat(column) for column in zip(*found))
        with seeded_init(seed, "convnet"):
            network = blocks().to(device)
            head = nn.Linear(cls.dim, classes).to(device)
        size = min(BATCH_SIZE, len(x))
        parameters, steps = [*network.parameters(), *head.parameters()], -(-images // size)
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        draw = generator(seed, "convnet", "mirror")
        with Progress(images, what="training the convnet judge") as progress:
            for rows in fitting.batches(torch.arange(len(x)), size, steps, seed, "convnet"):
                mirrored = (torch.rand(len(rows), generator=draw) < 0.5).to(device)
                picked = x[rows.to(device)]
                picked = torch.where(mirrored[:, None, None, None], picked.flip(3), picked)
                F.cross_entropy(head(network(picked)), y[rows.to(device)]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.advance(len(rows))
        return cls(network, device)


def prepared(pixels: Tensor) -> Tensor:
    """0 .. 255 as float32 (B, 3, S, S) -> about [-1, 1], at most `SIDE` pixels wide."""
    return (resize(pixels, SIDE) if pixels.shape[-1] > SIDE else pixels) / 127.5 - 1


def blocks() -> nn.Sequential:
    """Two 3 x 3 convolutions a level, of which the first halves the picture, then the mean."""
    layers, before = [], 3
    for level in range(3):
        for stride in (2, 1):
            width = WIDTH * 2**level
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
