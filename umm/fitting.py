"""The probes themselves: fitted on features, chosen on held-out training pictures, asked about the test pictures.

n training pictures, m test pictures, B batch, N tokens, D width, K classes, R learning rates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from umm.errors import DataError
from umm.feature_cache import FeatureSet
from umm.features import Reader
from umm.heads.attentive import AttentiveReader
from umm.heads.linear import LinearGrid
from umm.knn import knn_votes
from umm.latents.base import LatentSpec
from umm.loader import permutation
from umm.rng import seeded_init
from umm.settings import ProbeSettings

EVAL_BATCH = 1024


@dataclass
class Problem:
    """What a probe is fitted on, chosen on and judged on; `fit` and `held` are rows of `train`."""

    reader: Reader
    train: FeatureSet
    test: FeatureSet
    fit: Tensor
    held: Tensor
    classes: list[str]
    settings: ProbeSettings
    seed: int
    device: torch.device

    @property
    def known(self) -> Tensor:
        """What a method that chooses nothing may learn from: held-out pictures too, unless a subset was asked for."""
        whole = len(self.fit) + len(self.held) == len(self.train)
        return torch.cat([self.fit, self.held]) if whole else self.fit

    @property
    def standardise(self) -> bool:
        """Whether vectors get mean 0 and variance 1 first."""
        wanted = self.settings.standardise
        return not self.reader.normed if wanted is None else wanted


@dataclass
class Found:
    """A fitted probe's answers to the test pictures, and how it was chosen.

    predictions  (m,) class numbers; of a segmentation (m, 2, K): pixels of intersection and union a class
    validation   the number it was chosen by, on the held-out training pictures
    """

    predictions: Tensor
    chosen: str = ""
    validation: float | None = None
    flops: float = 0.0
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ one vector a picture


def linear(problem: Problem) -> Found:
    """The best of all readings x learning rates, trained in one pass over the features."""
    settings, train = problem.settings, Vectors(problem)
    variants = problem.reader.variants(train.width)
    grids = {
        name: LinearGrid(
            sum(part.stop - part.start for part in parts), len(problem.classes), settings.rates, settings.steps,
            problem.seed, name, problem.device,
        )
        for name, parts in variants.items()
    }  # fmt: skip
    for rows in batches(problem.fit, settings.batch_size, settings.steps, problem.seed):
        x, y = train.rows(rows)
        for name, grid in grids.items():
            grid.step(read(x, variants[name]), y)
    best, best_accuracy = None, -1.0
    for name, grid in grids.items():
        held = map(train.rows, problem.held.split(EVAL_BATCH))
        right = [grid.logits(read(x, variants[name])).argmax(2) == y[:, None] for x, y in held]
        accuracy = torch.cat(right).double().mean(0)  # (R,)
        if float(accuracy.max()) > best_accuracy:
            best, best_accuracy = (name, int(accuracy.argmax())), float(accuracy.max())
    name, number = best
    answers = [grids[name].logits(read(x, variants[name]))[:, number].argmax(1) for x in train.test()]
    each = sum(grid.weight.numel() for grid in grids.values())
    notes = edge(problem, "linear", settings.rates, number)
    chosen = f"{name + ', ' if name else ''}rate {settings.rates[number]:g}"
    flops = 4.0 * each * settings.steps * min(settings.batch_size, len(problem.fit))  # forward, gradient of weights
    return Found(torch.cat(answers).cpu(), chosen, best_accuracy, flops, notes)


def edge(problem: Problem, method: str, rates: list[float], number: int) -> list[str]:
    """A remark where the best rate might lie outside the grid."""
    if len(rates) == 1 or number not in (0, len(rates) - 1):
        return []
    side, setting = "smallest" if number == 0 else "largest", "rates" if method == "linear" else "token_rates"
    return [f"{problem.reader.address.text}/{method}: the {side} of probe.{setting} was best; widen the grid."]


class Vectors:
    """One vector a picture, on the device, standardised by the pictures that are fitted where that is asked for."""

    def __init__(self, problem: Problem):
        self.problem, device = problem, problem.device
        self.x, self.labels = problem.train.vectors().to(device), problem.train.labels.to(device)
        self.width, self.mean, self.scale = self.x.shape[1], 0.0, 1.0
        if problem.standardise:
            fitted = self.x[problem.fit.to(device)].float()
            self.mean, self.scale = fitted.mean(0), fitted.std(0, correction=0).clamp_min(1e-6)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and labels (B,) of training pictures."""
        rows = rows.to(self.x.device)
        return self.prepared(self.x[rows]), self.labels[rows]

    def prepared(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.scale

    def test(self) -> Iterator[Tensor]:
        for part in self.problem.test.vectors().split(EVAL_BATCH):
            yield self.prepared(part.to(self.x.device))


def read(x: Tensor, parts: list[slice]) -> Tensor:
    """One reading of a vector; a view where it is one slice."""
    return x[:, parts[0]] if len(parts) == 1 else torch.cat([x[:, part] for part in parts], dim=1)


def knn(problem: Problem) -> Found:
    """Weighted votes of the nearest training pictures; nothing is trained or chosen."""
    settings, train = problem.settings, Vectors(problem)
    reading = next(iter(problem.reader.variants(train.width).values()))
    x, labels = train.rows(problem.known)
    k = min(settings.neighbors, len(x))
    test = torch.cat(list(train.test()))
    votes = knn_votes(read(x, reading), labels, read(test, reading), len(problem.classes), k, settings.temperature)
    flops = 2.0 * x.shape[0] * x.shape[1] * len(test)
    notes = [] if k == settings.neighbors else [f"kNN with {k} neighbours: there are no more training pictures."]
    return Found(votes.argmax(1).cpu(), f"k = {k}, T = {settings.temperature:g}", None, flops, notes)


# --------------------------------------------------------------------------------------------------------- all tokens


def attentive(problem: Problem) -> Found:
    """One learned query over all tokens, the best of the learning rates."""
    width = problem.train.tokens(problem.fit[:1]).shape[2]
    spec = LatentSpec(width, 1, 1, 1)
    heads = fresh(problem, "attentive", lambda: AttentiveReader(spec, problem.classes))
    labels = problem.train.labels

    def loss(head: nn.Module, tokens: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(head(column(tokens)), labels[rows].to(problem.device))

    flops = train_heads(problem, heads, loss, "attentive")
    accuracy = []
    for head in heads:
        right = [answers == labels[rows] for rows, answers in classify(problem, problem.train, problem.held, head)]
        accuracy.append(float(torch.cat(right).double().mean()))
    best = max(range(len(heads)), key=accuracy.__getitem__)
    everything = torch.arange(len(problem.test))
    answers = torch.cat([answers for _, answers in classify(problem, problem.test, everything, heads[best])])
    rates = problem.settings.token_rates
    notes = edge(problem, "attentive", rates, best)
    return Found(answers, f"rate {rates[best]:g}", accuracy[best], flops, notes)


def column(tokens: Tensor) -> Tensor:
    """(B, N, D) -> (B, D, N, 1), as heads read latents."""
    return tokens.transpose(1, 2).unsqueeze(3)


@torch.no_grad()
def classify(problem: Problem, features: FeatureSet, rows: Tensor, head: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, class numbers) batch by batch."""
    for part in rows.split(problem.settings.batch_size):
        yield part, head(column(features.tokens(part).to(problem.device))).argmax(1).cpu()


def fresh(problem: Problem, name: str, make: Callable[[], nn.Module]) -> list[nn.Module]:
    """Equal untrained heads, one for each learning rate."""
    heads = []
    for _ in problem.settings.token_rates:
        with seeded_init(problem.seed, name):
            heads.append(make().to(problem.device))
    return heads


def train_heads(problem: Problem, heads: list[nn.Module], loss: Callable, name: str) -> float:
    """AdamW and a cosine to 0, all heads on the same batches; returns the FLOPs."""
    settings, flops = problem.settings, 0.0
    optimizers = [
        torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=settings.token_decay)
        for head, rate in zip(heads, settings.token_rates)
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, settings.token_steps) for one in optimizers]
    for rows in batches(problem.fit, settings.batch_size, settings.token_steps, problem.seed, name):
        tokens = problem.train.tokens(rows).to(problem.device)
        if not flops:
            with FlopCounterMode(display=False) as counter:  # on a copy: a batch norm counts its passes
                loss(copy.deepcopy(heads[0]), tokens, rows).backward()
            flops = float(counter.get_total_flops()) * len(heads) * settings.token_steps
        for head, optimizer, schedule in zip(heads, optimizers, schedules):
            loss(head, tokens, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for head in heads:
        head.eval()
    return flops


class SegmentationReader(nn.Module):
    """Tokens (B, N, D) of a square grid -> logits (B, K, side, side): batch norm, one linear map, bilinear upsampling.

    DINOv2's linear segmentation (arXiv 2304.07193, section 7.4) on one block.
    """

    def __init__(self, width: int, classes: int, side: int):
        super().__init__()
        self.side, self.norm, self.linear = side, nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        grid = math.isqrt(tokens.shape[1])
        logits = self.linear(self.norm(tokens.transpose(1, 2).unflatten(2, (grid, grid))))
        return F.interpolate(logits, size=(self.side, self.side), mode="bilinear", align_corners=False)


def segmentation(problem: Problem) -> Found:
    """Masks from patch tokens, the best of the learning rates by mIoU."""
    if not (problem.train.has_masks and problem.test.has_masks):
        raise DataError("segmentation needs pictures with masks, and these have none: use data.name=shapes.")
    train, first = problem.train, problem.fit[:1]
    (_, tokens, width), side = train.tokens(first).shape, train.masks(first).shape[-1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise DataError(f"segmentation needs a square grid of tokens, {problem.reader.address.text} has {tokens}.")
    classes = 1 + max(highest_mask(train), highest_mask(problem.test))
    heads = fresh(problem, "segmentation", lambda: SegmentationReader(width, classes, side))

    def loss(head: nn.Module, tokens: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(head(tokens), train.masks(rows).to(problem.device))

    flops = train_heads(problem, heads, loss, "segmentation")
    scores = [mean_iou(overlaps(problem, train, problem.held, head, classes)) for head in heads]
    best = max(range(len(heads)), key=scores.__getitem__)
    counts = overlaps(problem, problem.test, torch.arange(len(problem.test)), heads[best], classes)
    rates = problem.settings.token_rates
    notes = edge(problem, "segmentation", rates, best)
    return Found(counts, f"rate {rates[best]:g}", scores[best], flops, notes)


def highest_mask(features: FeatureSet) -> int:
    return max(int(features.masks(rows).max()) for rows in torch.arange(len(features)).split(EVAL_BATCH))


@torch.no_grad()
def overlaps(problem: Problem, features: FeatureSet, rows: Tensor, head: nn.Module, classes: int) -> Tensor:
    """(m, 2, K): pixels in the intersection and in the union of prediction and mask, a picture and class."""
    counts = []
    for part in rows.split(problem.settings.batch_size):
        guess = head(features.tokens(part).to(problem.device)).argmax(1).cpu()
        counts.append(count_overlaps(guess, features.masks(part).cpu(), classes))
    return torch.cat(counts)


def count_overlaps(guess: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Masks (B, S, S) -> (B, 2, K) int64."""
    a, b = (F.one_hot(mask.flatten(1), classes) for mask in (guess, truth))  # (B, S * S, K)
    both = (a & b).sum(1)
    return torch.stack([both, a.sum(1) + b.sum(1) - both], dim=1)


def mean_iou(counts: Tensor) -> float:
    """mIoU of (m, 2, K) counts: intersections and unions are summed over all pictures, then divided class by class.

    The mean goes over the classes that occur in a mask or a prediction, background (0) included.
    """
    intersection, union = counts.sum(0).double()
    return float((intersection / union)[union > 0].mean())


# ------------------------------------------------------------------------------------------------------------- order


def batches(rows: Tensor, batch_size: int, steps: int, seed: int, name: str = "linear") -> Iterator[Tensor]:
    """`steps` batches of rows: permutation after permutation, a function of the seed; small sets come whole."""
    size, order, epoch = min(batch_size, len(rows)), rows[:0], 0
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, rows[permutation(len(rows), seed, f"probe {name}", epoch)]])
            epoch += 1
        yield order[:size]
        order = order[size:]


METHODS: dict[str, Callable[[Problem], Found]] = {
    "linear": linear,
    "knn": knn,
    "attentive": attentive,
    "segmentation": segmentation,
}
TOKEN_METHODS = ("attentive", "segmentation")
