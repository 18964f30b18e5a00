"""Judges of pictures that have nothing to do with the encoder: ridge probes of real pictures in other feature spaces.

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
from umm.progress import Progress
from umm.sampling import GROUP
from umm.tasks.und import labelled

RELATIVES = "{} and {} are relatives: the judge would be scored by itself. Choose others, e.g. convnet and effnet."


def in_groups(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """network(x) on a multiple of `GROUP` rows, so that a row rounds alike in every batch."""
    return network(torch.cat([x, x[-1:].expand(-len(x) % GROUP, *x.shape[1:])]))[: len(x)]


@dataclass
class PictureJudge:
    """A ridge probe of real training pictures in a feature space, and how often it is right on other real ones."""

    space: FeatureSpace
    probe: RidgeProbe
    real: Tensor  # (n, d) features of those others
    accuracy: float

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) -> features (B, d) and scores (B, K), float64."""
        features = in_groups(self.space.extract, pictures)
        return features, self.probe.scores(features)


def learn_judges(
    names: Mapping[str, str], trained_with: Mapping[str, str], train: DataSource, val: DataSource, config: DictConfig,
    seed: int, device: torch.device,
) -> tuple[PictureJudge, PictureJudge, Tensor]:  # fmt: skip
    """Two judges fitted on training pictures, and the labels of the real pictures both were then tried on.

    Args:
        names: {option: convnet or a feature space}, of two.
        trained_with: {family: what it did} in training the generator.
    """
    if len(set(names.values())) < len(names):
        raise ConfigError(RELATIVES.format(*names))
    spaces = {name: open_space(name, device) for name in names.values() if name != ConvNetSpace.name}
    check_independent(spaces, trained_with, names)
    size, most = config.eval.batch_size, config.eval.train_images
    if ConvNetSpace.name in names.values():
        spaces[ConvNetSpace.name] = ConvNetSpace.train(batches(train, most, size), len(train.classes), seed, device)
    known, asked = features(train, most, size, spaces, device, "training pictures")
    real, labels = features(val, config.eval.images, size, spaces, device, "real pictures")
    judges = []
    for name in names.values():
        probe = RidgeProbe(known[name], asked.to(known[name].device), len(train.classes))
        judges.append(PictureJudge(spaces[name], probe, real[name], share(probe(real[name]).cpu(), labels)))
    return *judges, labels


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
    source: DataSource, limit: int | None, size: int, spaces: Mapping[str, FeatureSpace], device: torch.device,
    what: str,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Features {space: (n, d)} and labels (n,) of the first pictures."""
    rows, labels = {name: [] for name in spaces}, []
    with Progress(min(len(source), limit or len(source)), what=what) as progress:
        for batch in batches(source, limit, size):
            labels.append(batch["label"])
            for name, space in spaces.items():
                rows[name].append(space.extract(batch["image"].to(device)))
            progress.advance(len(batch["label"]))
    return {name: torch.cat(found) for name, found in rows.items()}, torch.cat(labels)
