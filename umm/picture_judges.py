"""Judges of pictures that have nothing to do with the encoder: ridge probes of real pictures in other feature spaces.

Every other picture they learn from is seen after the run's encoder and decoder: a probe of untouched pictures only
would judge the decoder's handwriting instead of what a sample shows.

B batch, n pictures, d feature width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor

from umm.convnet import ConvNetSpace
from umm.data.base import DataSource, collate
from umm.errors import ConfigError
from umm.metrics._conflict import conflicts, lineage
from umm.metrics._features import FeatureSpace, open_space
from umm.metrics._probe import RidgeProbe
from umm.model import UnifiedModel
from umm.progress import Progress
from umm.sampling import GROUP
from umm.tasks.und import labelled
from umm.transforms import to_uint8

RELATIVES = "{} and {} are relatives: the judge would be scored by itself. Choose others, e.g. convnet and effnet."


def in_groups(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """network(x) on a multiple of `GROUP` rows, so that a row rounds alike in every batch."""
    return network(torch.cat([x, x[-1:].expand(-len(x) % GROUP, *x.shape[1:])]))[: len(x)]


@dataclass
class PictureJudge:
    """A ridge probe of real training pictures in a feature space, and how often it is right on others, decoded."""

    space: FeatureSpace
    probe: RidgeProbe
    real: Tensor  # (n, d) features of those others
    accuracy: float

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) -> features (B, d) and scores (B, K), float64."""
        features = in_groups(self.space.extract, pictures)
        return features, self.probe.scores(features)


def learn_judges(
    names: Mapping[str, str], model: UnifiedModel, train: DataSource, val: DataSource, config: DictConfig, seed: int
) -> tuple[PictureJudge, PictureJudge, Tensor]:
    """Two judges fitted on training pictures, and the labels of the real pictures both were then tried on.

    Args:
        names: {option: convnet or a feature space}, of two.
        model: decodes; judges related to what it was trained with are refused.
    """
    size, most, images, device = config.eval.batch_size, config.eval.train_images, config.eval.images, model.device
    if len(set(names.values())) < len(names):
        raise ConfigError(RELATIVES.format(*names))
    spaces = {name: open_space(name, device) for name in names.values() if name != ConvNetSpace.name}
    check_independent(spaces, model.facts.get("trained_with", {}), names)
    classes, total = len(train.classes), min(len(train), most)
    if ConvNetSpace.name in names.values():
        lessons = decoded(batches(train, most, size), model, 2)
        spaces[ConvNetSpace.name] = ConvNetSpace.train(lessons, classes, seed, device)
    known, asked = features(decoded(batches(train, most, size), model, 2), spaces, total, device, "training pictures")
    total = min(len(val), images or len(val))
    real, labels = features(batches(val, images, size), spaces, total, device, "real pictures")
    again, _ = features(decoded(batches(val, images, size), model, 1), spaces, total, device, "decoded pictures")
    judges = []
    for name in names.values():
        probe = RidgeProbe(known[name], asked.to(device), classes)
        judges.append(PictureJudge(spaces[name], probe, real[name], share(probe(again[name]).cpu(), labels)))
    return *judges, labels


def decoded(found: Iterator[dict], model: UnifiedModel, every: int) -> Iterator[dict]:
    """The batches with the last of each `every` pictures replaced by its reconstruction."""
    for batch in found:
        images, there = batch["image"].clone(), slice(every - 1, None, every)
        if len(images[there]):
            images[there] = to_uint8(model.reconstruct(images[there].float() / 255)).cpu()
        yield batch | {"image": images}


def check_independent(
    spaces: Mapping[str, FeatureSpace], trained_with: Mapping[str, str], names: Mapping[str, str]
) -> None:
    """Refuse networks related to the generator's own, or to each other."""
    families = {name: space.families for name, space in spaces.items()}
    if related := conflicts(families, trained_with):
        raise ConfigError(f"no independent judge: {next(iter(related.values()))}. Choose another feature space.")
    related = [{name for family in space.families for name in lineage(family)} for space in spaces.values()]
    if len(related) == 2 and related[0] & related[1]:
        raise ConfigError(RELATIVES.format(*names))


def share(answers: Tensor, labels: Tensor) -> float:
    return float((answers == labels).double().mean())


def batches(source: DataSource, limit: int | None, size: int) -> Iterator[dict]:
    """{"image", "label", "id"} of the first pictures, on the CPU."""
    total = min(len(source), limit or len(source))
    for start in range(0, total, size):
        items = [labelled(source[i]) for i in range(start, min(start + size, total))]
        yield collate([{key: item[key] for key in ("image", "label", "id")} for item in items])


def features(
    found: Iterator[dict], spaces: Mapping[str, FeatureSpace], total: int, device: torch.device, what: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Features {space: (n, d)} and labels (n,) of `total` pictures."""
    rows, labels = {name: [] for name in spaces}, []
    with Progress(total, what=what) as progress:
        for batch in found:
            labels.append(batch["label"])
            for name, space in spaces.items():
                rows[name].append(space.extract(batch["image"].to(device)))
            progress.advance(len(batch["label"]))
    return {name: torch.cat(some) for name, some in rows.items()}, torch.cat(labels)
