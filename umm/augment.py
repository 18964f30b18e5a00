"""`umm augment`: are generated latents training data for a probe?

A linear probe learns from a few real labelled latents a class and as many more in each arm, for equal steps:

    duplicated  the same few once more: what the steps alone bring
    generated   samples of the classes, drawn by the run: what is asked about
    more real   other real labelled latents: the most that could be hoped for

Arms are paired: one seed has the same few pictures, the same held-out ones, the same first weights and the same order
of classes in all of them. The learning rate is chosen on the held-out training pictures, arm by arm.

n pictures, K classes, D channels, S seeds, R learning rates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor

from umm.best_of import open_drawer
from umm.build import judged_data, open_source
from umm.data.base import DataSource, collate
from umm.errors import DataError, UmmError
from umm.evaluate import run_config
from umm.fitting import batches
from umm.heads.linear import LinearGrid
from umm.loader import to_device
from umm.model import UnifiedModel
from umm.progress import Progress
from umm.rng import derive_seed, generator
from umm.runs import Run, provenance, write_atomic, writing
from umm.sampling import BATCH, Drawer
from umm.seed_stats import exact_sign_flip_p, jackknife_t, smallest_p
from umm.stats import Interval, t_interval
from umm.tasks.und import check_classes, labelled

ARMS = ("duplicated", "generated", "more real")
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # at batch size 256
BATCH_SIZE = 64
HELD = 1000  # training pictures that choose the rate, at most


@dataclass
class Request:
    """What to compare; `overrides` are those of `umm eval`."""

    shots: int = 5  # real labelled pictures a class
    added: int = 50  # a class, in every arm
    seeds: int = 8
    steps: int = 500
    seed: int = 0
    out: str | None = None
    overrides: Sequence[str] = ()


@dataclass
class Examples:
    """Mean tokens of standardised latents, layer-normed, (n, D), and classes (n,)."""

    x: Tensor
    y: Tensor

    def rows(self, rows: Tensor) -> Examples:
        return Examples(self.x[rows], self.y[rows])

    def and_also(self, other: Examples) -> Examples:
        return Examples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


def augment(folder: str, request: Request) -> str:
    """Train the probes of all arms and seeds, write what came out, and return the table.

    Raises:
        UmmError: the run draws without classes; too few seeds or pictures.
    """
    if request.seeds < 2 or min(request.shots, request.added, request.steps) < 1:
        raise UmmError("umm augment needs at least 2 seeds and 1 of everything else.")
    config = run_config(Run(folder), request.overrides)
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    model = UnifiedModel.load(folder, accelerator.device)
    drawer = open_drawer(model, config)
    train, test = (read(model, config, split, drawer, accelerator) for split in ("train", config.eval.split))
    scores = compare(drawer, train, test, request)
    result = {"accuracy": scores, "labels of the generator": len(open_source(run_config(Run(folder), []), "train")),
              "labels of the probe": request.shots * drawer.dit.num_classes, "test pictures": len(test.y),
              "request": asdict(request), "run": folder, "provenance": provenance(config)}  # fmt: skip
    result |= {"differences": differences(scores)}
    out = Path(request.out or Path(folder) / "augment")
    with writing(out, "the results"):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "augment.json", json.dumps(result, indent=1))
    return f"{table(result)}\nwrote {out / 'augment.json'}"


# ---------------------------------------------------------------------------------------------------------- examples


def read(model: UnifiedModel, config: DictConfig, split: str, drawer: Drawer, accelerator: Accelerator) -> Examples:
    """The real pictures of a split."""
    source = judged_data(config, model.space, open_source(config, split), accelerator)
    check_classes(source, drawer.dit.classes)
    total = min(len(source), (config.eval.images if split != "train" else None) or len(source))
    found = []
    with Progress(total, what=f"{split} latents") as progress:
        for start in range(0, total, config.eval.batch_size):
            batch = collate(items(source, range(start, min(start + config.eval.batch_size, total))))
            there = {key: to_device(value, model.device) for key, value in batch.items()}
            found.append(Examples(pooled(model.latents_of(there)), batch["label"]))
            progress.advance(len(batch["label"]))
    return Examples(torch.cat([part.x for part in found]), torch.cat([part.y for part in found]))


def items(source: DataSource, rows: Sequence[int]) -> list[dict]:
    """Latents where there are some, else pictures; and labels."""
    found = [labelled(source[i]) for i in rows]
    key = "latent" if "latent" in found[0] else "image"
    return [{name: item[name] for name in (key, "label")} for item in found]


def pooled(latents: Tensor) -> Tensor:
    """Standardised latents (B, D, h, w) -> (B, D) on the CPU, as `LinearReader` sees them."""
    means = latents.flatten(2).mean(2)
    return F.layer_norm(means, means.shape[-1:]).float().cpu()


def drawn(drawer: Drawer, count: int, seed: int) -> Examples:
    """`count` samples of every class, class after class."""
    labels = torch.arange(drawer.dit.num_classes).repeat_interleave(count)
    parts = torch.arange(len(labels)).split(BATCH)
    x = [pooled(drawer.latents(part.tolist(), labels[part].tolist(), seed)) for part in parts]
    return Examples(torch.cat(x), labels)


def split_rows(labels: Tensor, classes: int, shots: int, added: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the few pictures, of as many others as are added, and held-out ones; both of the first by class.

    Raises:
        DataError: a class has too few pictures.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "augment rows"))
    by_class = [order[labels[order] == k] for k in range(classes)]
    least = min(map(len, by_class))
    if least <= shots + added:
        raise DataError(f"a class has {least} training pictures, {shots + added + 1} are needed: lower --added.")
    held = torch.cat([rows[shots + added :] for rows in by_class])
    held = held[torch.randperm(len(held), generator=generator(seed, "augment held"))[:HELD]]
    return torch.cat([rows[:shots] for rows in by_class]), torch.cat([r[shots:][:added] for r in by_class]), held


def repeated(few: Tensor, shots: int, added: int) -> Tensor:
    """Rows of `few`, `shots` a class, in turn until there are `added` a class."""
    return few.unflatten(0, (-1, shots))[:, torch.arange(added) % shots].flatten()


# ---------------------------------------------------------------------------------------------------------- learning


def compare(drawer: Drawer, train: Examples, test: Examples, request: Request) -> dict[str, list[float]]:
    """Accuracy {arm: (S,)} on the test pictures."""
    classes, scores = drawer.dit.num_classes, {arm: [] for arm in ARMS}
    with Progress(request.seeds, what="seeds") as progress:
        for number in range(request.seeds):
            seed = derive_seed(request.seed, "augment", number)
            few, others, held = split_rows(train.y, classes, request.shots, request.added, seed)
            extra = {
                "duplicated": train.rows(repeated(few, request.shots, request.added)),
                "generated": drawn(drawer, request.added, seed),
                "more real": train.rows(others),
            }
            for arm, more in extra.items():
                known = train.rows(few).and_also(more)
                scores[arm].append(probe(known, train.rows(held), test, classes, request.steps, seed))
            progress.advance(1)
    return scores


def probe(known: Examples, held: Examples, test: Examples, classes: int, steps: int, seed: int) -> float:
    """Accuracy on `test` of the classifier that is best on `held`, of one for each rate."""
    grid = LinearGrid(known.x.shape[1], classes, RATES, steps, seed, "augment")
    for rows in batches(torch.arange(len(known.y)), BATCH_SIZE, steps, seed, "augment"):
        grid.step(known.x[rows], known.y[rows])
    right = (grid.logits(held.x).argmax(2) == held.y[:, None]).double().mean(0)  # (R,)
    answers = grid.logits(test.x)[:, int(right.argmax())].argmax(1)
    return float((answers == test.y).double().mean())


# ------------------------------------------------------------------------------------------------------------- words


def differences(scores: dict[str, list[float]]) -> dict[str, dict]:
    """Of the arms to `duplicated`, over seeds; and the share of what real pictures bring that generated ones do."""
    rows = np.array([scores[arm] for arm in ARMS], dtype=np.float64).T  # (S, arms)
    found = {}
    for number, arm in enumerate(ARMS[1:], 1):
        gained = rows[:, number] - rows[:, 0]
        facts = numbers(t_interval(gained))
        found[arm] = facts | {"p": exact_sign_flip_p(gained), "smallest_p": smallest_p(len(gained))}
    if found["more real"]["low"] > 0:  # else the share has no meaning

        def share(some: np.ndarray) -> float:
            return float((some[:, 1] - some[:, 0]).mean() / (some[:, 2] - some[:, 0]).mean())

        found["share"] = numbers(jackknife_t(share, rows))
    return found


def numbers(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def table(result: dict) -> str:
    """The arms, and in words what they show."""
    found, request = result["differences"], result["request"]
    lines = [f"{'arm':<12}accuracy  against duplicated, 95 % interval over {request['seeds']} seeds"]
    for arm, values in result["accuracy"].items():
        line = f"{arm:<12}{np.mean(values):.4f}"
        if arm in found:
            line += "    {value:+.4f}  {low:+.4f} .. {high:+.4f}, exact sign-flip p = {p:.3g}".format(**found[arm])
        lines.append(line)
    one = found["generated"]
    shown = "help" if one["low"] > 0 else "harm" if one["high"] < 0 else "are not shown to matter"
    lines.append(f"generated latents {shown}: {request['shots']} real and {request['added']} more a class in all arms, "
                 f"{request['steps']} steps, {result['test pictures']} test pictures.")  # fmt: skip
    if "share" in found:
        lines.append("  they bring {value:.0%} ({low:.0%} .. {high:.0%}) of what as many real labelled ones "
                     "bring.".format(**found["share"]))  # fmt: skip
    known, few = result["labels of the generator"], result["labels of the probe"]
    lines.append(f"  the generator learned from {known} labelled pictures, the probe from {few} real ones: "
                 + ("it may hand labels on that the probe has never seen." if known > few
                    else "it knows no label more."))  # fmt: skip
    lines.append(f"  each arm chooses its learning rate on up to {HELD} more real ones.")
    return "\n".join(lines)
