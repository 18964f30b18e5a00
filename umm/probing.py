"""`python -m umm.probe classify`: features x probes on any run or latent space, one table, nothing chosen on the test.

Of the training pictures a share is held out; on it learning rates and readings are chosen. The test pictures are
looked at once. Baselines in every table: raw pixels, and the first feature of a network with random weights.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from umm import features
from umm.build import settings_of
from umm.data.base import collate
from umm.errors import ConfigError, DataError, UnknownName, nearest
from umm.feature_cache import Extraction, FeatureSet, no_labels
from umm.features import Address, Reader
from umm.fitting import METHODS, TOKEN_METHODS, Found, Problem, mean_iou
from umm.loader import permutation, to_device
from umm.paired import wilson
from umm.rng import derive_seed, generator
from umm.samples import Results, sample
from umm.stats import resampled_means
from umm.subjects import Subject, open_subject

# DINOv2 on ImageNet-1k, top-1 in percent (its model card and arXiv 2304.07193, table 4)
ANCHORS = {
    "facebook/dinov2-small": {"linear": 81.1, "knn": 79.0},
    "facebook/dinov2-base": {"linear": 84.5, "knn": 82.1},
    "facebook/dinov2-large": {"linear": 86.3, "knn": 83.5},
    "facebook/dinov2-giant": {"linear": 86.5, "knn": 83.5},
}
ANCHOR_TOLERANCE = {"linear": 0.5, "knn": 0.3}  # percent; the published linear probe sees augmented pictures
IMAGENET_SIZES = (1_281_167, 50_000, 1000)  # training pictures, test pictures, classes
RESAMPLES = 1000  # for the interval of mIoU
READS = ("seed", "data", "latent", "cache", "probe", "train.device", "train.workers")  # settings that count here


# -------------------------------------------------------------------------------------------------------- the command


def probe_classes(
    targets: Sequence[str],
    addresses: str,
    methods: str,
    file: str | None,
    overrides: Sequence[str],
    out: str,
    limit: int | None = None,
    dry_run: bool = False,
) -> str:
    """What `classify` does; returns the table, or with `dry_run` the plan."""
    chosen = parse_methods(methods)
    wanted = [features.parse(text) for text in addresses.split(",")]
    names = [str(target) for target in targets] or [None]
    subjects = [open_subject(name, file, overrides, Path(out), limit) for name in names]
    refuse_ignored(overrides)
    for setting in ("subsets", "rates", "token_rates"):
        if not subjects[0].config.probe[setting]:
            raise ConfigError(f"probe.{setting} is empty: give it at least one value.")
    if dry_run:
        return "\n\n".join(plan(subject, wanted, chosen) for subject in subjects)
    described = {subject.name: OmegaConf.to_container(subject.config) for subject in subjects}
    whole = {"seed": subjects[0].config.seed, "features": addresses, "methods": chosen, "subjects": described}
    results = Results(out, OmegaConf.create(whole))
    for subject in subjects:
        for address in [*wanted, *baselines(wanted, subject)]:
            probe_address(subject, address, chosen, results, several=len(subjects) > 1)
    results.write()
    return results.table()


def refuse_ignored(overrides: Sequence[str]) -> None:
    """Raise for a setting that changes nothing here: probes take of `und` and `train` nearly nothing."""
    for text in overrides:
        key = text.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in READS):
            raise ConfigError(f"'{text}' would be ignored: classify reads {', '.join(READS)}.")


def parse_methods(text: str) -> list[str]:
    methods = [name.strip() for name in text.split(",")]
    for name in methods:
        if name not in METHODS:
            raise UnknownName(f"no probe is called '{name}'.{nearest(name, METHODS)} There are: {', '.join(METHODS)}.")
    return methods


def baselines(wanted: list[Address], subject: Subject) -> list[Address]:
    """Raw pixels, and the first learned feature of an encoder (or trunk) with random weights."""
    if not subject.config.probe.baselines:
        return []
    learned = [address for address in wanted if address.kind not in ("pixels", "own") and not address.random]
    extra = ["pixels", *(f"random:{address.text}" for address in learned[:1])]
    return [features.parse(text) for text in extra if text not in {address.text for address in wanted}]


def probe_address(subject: Subject, address: Address, methods: list[str], results: Results, several: bool) -> None:
    """All methods and subsets on one address; what an earlier call has finished is left alone."""
    if address.is_vector and any(method in TOKEN_METHODS for method in methods):
        results.note(f"{address.text} is one vector a picture: probes of tokens ({', '.join(TOKEN_METHODS)}) skip it.")
        methods = [method for method in methods if method not in TOKEN_METHODS]
    prefix = f"{subject.name}/" if several else ""
    todo = {
        f"{prefix}{address.text}/{method}" + (f"/{subset}" if subset != "all" else ""): (method, subset)
        for method in methods
        for subset in subject.config.probe.subsets
    }
    todo = {task: what for task, what in todo.items() if not results.has(task)}
    if not todo:
        return
    if address.kind in ("latent", "trunk") and not address.random:
        subject.fit()
    reader = features.open_reader(address, subject.space, subject.dit, subject.config.seed)
    tokens = any(method in TOKEN_METHODS for method, _ in todo.values())
    train, test = (extract(subject, reader, split, tokens) for split in ("train", subject.config.probe.split))
    classes = class_names(train, test, subject.config, results)
    for task, (method, subset) in todo.items():
        problem = build_problem(subject, reader, train, test, classes, subset)
        run_probe(task, method, subset, subject, problem, results)


def run_probe(task: str, method: str, subset: str, subject: Subject, problem: Problem, results: Results) -> None:
    """Fit, judge and write down one probe."""
    started = time.perf_counter()
    found = METHODS[method](problem)
    seconds = round(time.perf_counter() - started, 3)
    address, train, test = problem.reader.address, problem.train, problem.test
    row = {"task": task, "target": subject.name, "address": address.text, "method": method, "subset": subset}
    row |= {"train": len(problem.fit), "held_out": len(problem.held), "validation": found.validation}
    row |= {"chosen": found.chosen, "seconds": seconds, "flops": found.flops}
    row |= {"standardised": problem.standardise, "label_fed": address.labelled}
    row |= {"feature_flops": train.meta["flops"] + test.meta["flops"]}
    row |= {"feature_seconds": round(train.meta["seconds"] + test.meta["seconds"], 3)}
    numbers, samples = (judged_masks if method == "segmentation" else judged)(task, problem, found)
    row |= numbers
    notes = [*problem.reader.notes, *found.notes, *subset_notes(subset, problem)]
    for note in [*notes, *anchor_notes(subject, row, train, test)]:
        results.note(note)
    results.add(row, samples)


def extract(subject: Subject, reader: Reader, split: str, tokens: bool) -> FeatureSet:
    """The features of a split, from their cache or made now."""
    config = subject.config
    data = subject.data(split, latents=reader.needs == "latent")
    identity = subject.source(split).identity()
    made = Extraction(reader, subject.space, data, identity, tokens, config.probe.dtype)
    return made.open(subject.accelerator.device, config.latent.encode_batch, config.train.workers)


# ------------------------------------------------------------------------------------------------------------- labels


def class_names(train: FeatureSet, test: FeatureSet, config: DictConfig, results: Results) -> list[str]:
    """Names of the classes, checked against the labels of both splits.

    Raises:
        DataError: a label outside the set, or a class without a training picture.
    """
    classes = train.classes or [str(k) for k in range(int(train.labels.max()) + 1)]
    for split, found in {"train": train, config.probe.split: test}.items():
        wrong = (found.labels < 0) | (found.labels >= len(classes))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"picture '{found.ids[row]}' of the {split} split has the label {int(found.labels[row])}, outside the "
                f"{len(classes)} classes: labels count from 0, in the order of the classes of the training pictures."
            )
    empty = [name for name, count in zip(classes, train.labels.bincount(minlength=len(classes))) if not count]
    if empty and config.data.limit is None:
        raise DataError(
            f"the class '{empty[0]}' has no training picture ({len(empty)} of {len(classes)} classes): remove it from "
            "the data set, or add pictures of it."
        )
    if empty:
        results.note(f"with data.limit={config.data.limit} {len(empty)} of {len(classes)} classes have no training "
                     "picture: these numbers test the command and not the features.")  # fmt: skip
    return classes


def build_problem(
    subject: Subject, reader: Reader, train: FeatureSet, test: FeatureSet, classes: list[str], subset: str
) -> Problem:
    """Held-out pictures first, the same for every subset; the subset is drawn from the rest."""
    settings, seed = settings_of(subject.config.probe), subject.config.seed
    order = permutation(len(train), seed, "probe hold-out", 0)
    held = round(settings.holdout * len(train))
    if not 0 < held < len(train):
        raise ConfigError(
            f"probe.holdout={settings.holdout} of {len(train)} training pictures leaves none to choose on, or none to "
            "train on: set a share between 0 and 1."
        )
    fit = choose_subset(subset, order[held:], train.labels, classes, seed)
    return Problem(reader, train, test, fit, order[:held], classes, settings, seed, subject.accelerator.device)


def choose_subset(text: str, rows: Tensor, labels: Tensor, classes: Sequence[str], seed: int) -> Tensor:
    """`all`, `5-shot` (pictures a class) or `10%` of rows, seeded and sorted.

    Raises:
        ConfigError: it is none of these.
        DataError: a class has too few pictures for it.
    """
    if text == "all":
        return rows.sort().values
    shots, share = re.fullmatch(r"(\d+)-shot", text), re.fullmatch(r"(\d*\.?\d+)%", text)
    mixed = rows.sort().values[torch.randperm(len(rows), generator=generator(seed, "probe subset", text))]
    if shots and int(shots[1]) > 0:
        found = [mixed[labels[mixed] == k][: int(shots[1])] for k in range(len(classes))]
        short = [name for name, part in zip(classes, found) if len(part) < int(shots[1])]
        chosen = torch.cat(found)
    elif share and 0 < float(share[1]) <= 100:
        chosen = mixed[: max(1, round(len(mixed) * float(share[1]) / 100))]
        there = set(labels[chosen].tolist())
        short = [name for k, name in enumerate(classes) if k not in there]
    else:
        raise ConfigError(f"probe.subsets: '{text}' is no subset; write all, 5-shot or 10%.")
    if short:
        raise DataError(f"the subset {text} has too few pictures of the class '{short[0]}': take a larger one.")
    return chosen.sort().values


def subset_notes(subset: str, problem: Problem) -> Iterator[str]:
    if subset != "all":
        yield f"{subset}: fitted on {len(problem.fit)} pictures, chosen on {len(problem.held)} held-out ones."


# ------------------------------------------------------------------------------------------------------------ numbers


def judged(task: str, problem: Problem, found: Found) -> tuple[dict, Iterator[dict]]:
    """Top-1 accuracy with Wilson's interval, and a sample a picture."""
    names, test = problem.classes, problem.test
    right = found.predictions == test.labels
    interval = wilson(int(right.sum()), len(right))
    numbers = {"metric": "accuracy", "value": interval.value, "low": interval.low, "high": interval.high}
    answers = zip(test.ids, test.labels.tolist(), found.predictions.tolist())
    samples = (
        sample(task, number, name, names[label], names[guess], float(label == guess))
        for number, (name, label, guess) in enumerate(answers)
    )
    return numbers | {"n": len(right)}, samples


def judged_masks(task: str, problem: Problem, found: Found) -> tuple[dict, Iterator[dict]]:
    """mIoU over all pictures, its bootstrap interval over pictures, and each picture's own mIoU as its score."""
    counts, test = found.predictions, problem.test
    draw = np.random.default_rng(derive_seed(problem.seed, "miou", task))
    drawn = resampled_means(counts.flatten(1).double().numpy(), draw, RESAMPLES)  # sums but for a factor
    intersection, union = drawn.reshape(RESAMPLES, 2, -1).transpose(1, 0, 2)
    share = np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0)
    low, high = np.quantile(np.nanmean(share, axis=1), [0.025, 0.975])
    numbers = {"metric": "mIoU", "value": mean_iou(counts), "low": float(low), "high": float(high), "n": len(counts)}
    samples = (
        sample(task, number, name, "mask", f"{mean_iou(counts[number : number + 1]):.4f}",
               mean_iou(counts[number : number + 1]))
        for number, name in enumerate(test.ids)
    )  # fmt: skip
    return numbers, samples


def anchor_notes(subject: Subject, row: dict, train: FeatureSet, test: FeatureSet) -> Iterator[str]:
    """The published number beside ours, where data and weights are the published ones."""
    published = ANCHORS.get(str(subject.config.latent.get("weights")), {}).get(row["method"])
    comparable = row["address"] == ("cls" if row["method"] == "knn" else "published") and row["subset"] == "all"
    sizes = (len(train), len(test), len(train.classes or []))
    if published is None or not comparable or sizes != IMAGENET_SIZES:
        return
    difference = 100 * row["value"] - published
    tolerance = ANCHOR_TOLERANCE[row["method"]]
    verdict = f"WARNING: off by more than {tolerance}" if abs(difference) > tolerance else f"within {tolerance}"
    yield f"{row['task']}: {100 * row['value']:.1f}, published {published} ({difference:+.1f}; {verdict})."


# ------------------------------------------------------------------------------------------------------------ dry run


def plan(subject: Subject, wanted: list[Address], methods: list[str]) -> str:
    """Shapes, sizes and FLOPs of what would be done, and the first row as it is read; writes nothing."""
    config, device = subject.config, subject.accelerator.device
    sources = {split: subject.source(split) for split in ("train", config.probe.split)}
    first = sources["train"][0]
    if "label" not in first:
        raise no_labels(sources["train"])
    batch = {key: to_device(value, device) for key, value in collate([first]).items()}
    lines = [f"{subject.name}: " + ", ".join(f"{len(source)} {split}" for split, source in sources.items())]
    lines += first_row(first, sources["train"].classes)
    total = sum(map(len, sources.values()))
    for address in [*wanted, *baselines(wanted, subject)]:
        reader = features.open_reader(address, subject.space, subject.dit, config.seed)
        made = Extraction(reader, subject.space, sources["train"], {}, False, config.probe.dtype)
        with torch.no_grad():
            read = reader.read(batch)
        stored = read if any(method in TOKEN_METHODS for method in methods) else reader.vector(read)
        size = stored.numel() * getattr(torch, config.probe.dtype).itemsize * total
        lines.append(
            f"{address.text}: {tuple(read.shape[1:])}, {size / 1e6:,.1f} MB to keep, "
            f"{made.cost(batch) * total / 1e12:,.3f} TFLOP to extract"
        )
        lines += [f"  {note}" for note in reader.notes]
    return "\n".join(lines)


def first_row(item: dict, classes: list[str] | None) -> list[str]:
    lines = ["first row:"]
    for key, value in item.items():
        if isinstance(value, Tensor):
            value = f"{tuple(value.shape)} {value.dtype}, {value.min().item()} to {value.max().item()}"
        elif key == "label" and classes:
            value = f"{value} ({classes[value]})"
        lines.append(f"  {key}: {value}")
    return lines
