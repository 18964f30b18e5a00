"""How a generator is judged: its samples beside as many real pictures, in several feature spaces and in the latents.

N pictures on each side, K classes, d feature width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig
from torch import Tensor

from umm import flow
from umm.build import judged_data, open_source, settings_of
from umm.data.base import DataSource, collate
from umm.errors import ConfigError, DataError
from umm.judging import OF_CLASSES, Judges, Records, share_of
from umm.latents._adapted import adapted_identity
from umm.loader import to_device
from umm.metrics._conflict import conflicts
from umm.metrics._features import FeatureSpace
from umm.metrics._probe import RidgeProbe
from umm.metrics._store import FeatureStore
from umm.metrics.fd import FrechetDistance
from umm.metrics.nearest import Nearest
from umm.metrics.psnr import PSNR
from umm.model import UnifiedModel
from umm.progress import Progress
from umm.registry import find
from umm.rng import PictureRNG, derive_seed
from umm.sampling import Drawer, choose_labels, decode
from umm.stats import bootstrap


class LatentFeatures(FeatureSpace):
    """Standardised latents averaged over their tokens, (B, C): judges without decoding, in the space trained on."""

    name, families = "latents", ("latents",)

    def __init__(self, model: UnifiedModel):
        self.dim, self.identity = model.spec.channels, adapted_identity(model.space)

    def of(self, latents: Tensor) -> Tensor:
        return latents.mean((2, 3)).float()

    def fingerprint(self) -> dict[str, object]:
        return {"space": self.name, "pooling": "mean over tokens", "latent": self.identity}


def judge(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> Records:
    """Distances, class agreement, nearest training neighbours and the decode-noise curve, whole on every process.

    Raises:
        MissingHead: the model cannot draw.
        ConfigError: a metric that compares pictures with their reconstructions.
    """
    exam = Exam(model, config, accelerator)
    exam.see_real()
    exam.see_samples()
    exam.see_training()
    exam.gather()
    records = exam.judges.records(exam.trained_with, config.seed)
    records.add(exam.memorisation())
    records.add(exam.class_agreement())
    records.add(exam.decode_noise())
    protocol = exam.protocol()
    records.fingerprints = {name: facts | protocol for name, facts in records.fingerprints.items()}
    return records


class Exam:
    """The three collections of an evaluation: real pictures of `eval.split`, samples, and training pictures."""

    def __init__(self, model: UnifiedModel, config: DictConfig, accelerator: Accelerator):
        self.model, self.config, self.accelerator = model, config, accelerator
        self.settings, self.device = settings_of(config.eval), accelerator.device
        self.drawer = Drawer.of(model, self.settings.sampler)
        self.real, self.train = (
            judged_data(config, model.space, open_source(config, split), accelerator)
            for split in (self.settings.split, "train")
        )
        self.total = min(len(self.real), self.settings.images or len(self.real))
        if self.total < 2:
            raise DataError(f"the {self.settings.split} split has {self.total} pictures: choose another, eval.split.")
        self.judges = self.open_judges()
        self.labels: dict[str, int] = {}  # of every picture and sample that has one
        self.trained_with = model.facts.get("trained_with", {}) | {"latents": "target of the training"}
        self.excluded = conflicts(self.judges.families(), self.trained_with)

    def open_judges(self) -> Judges:
        """The set metrics with their feature spaces, the latents one of them."""
        names = [name for name in self.settings.metrics if name != Nearest.name]
        for name in names:
            if find("metrics", name).paired:
                raise ConfigError(f"eval.metrics: {name} compares reconstructions with originals, samples have none.")
        spaces = self.settings.features if self.model.can_decode else []
        judges = Judges(replace(self.settings, metrics=names, features=spaces), self.device)
        for store in judges.stores.values():
            store.keep_rows = True  # probe and nearest neighbours read them
        if not self.model.can_decode:
            judges.notes.append(
                "no pictures were judged: the model has no decoder, give its umm train command again with "
                "gen.decoder=<run>."
            )
        self.space = LatentFeatures(self.model)
        judges.stores["latents"] = FeatureStore(self.space)
        return judges

    def pictures(
        self, source: DataSource, total: int, what: str
    ) -> Iterator[tuple[list[int], Tensor, Tensor, list[str]]]:
        """(numbers, pictures (B, 3, H, W), latents, ids) of this process's share; labels are noted down."""
        with Progress(total, enabled=self.accelerator.is_main_process, what=what) as progress:
            for indices in share_of(total, self.accelerator, self.settings.batch_size):
                items = [source[i] for i in indices]
                self.labels |= {item["id"]: item["label"] for item in items if "label" in item}
                keys = [key for key in ("image", "latent", "id") if key in items[0]]
                batch = collate([{key: item[key] for key in keys} for item in items])
                batch = {key: to_device(value, self.device) for key, value in batch.items()}
                yield indices, batch["image"], self.model.latents_of(batch), batch["id"]
                progress.advance(len(indices) * self.accelerator.num_processes)

    def see(
        self, side: str, images: Tensor | None, latents: Tensor, ids: Sequence[str], but: Collection[str] = ()
    ) -> None:
        """Add pictures and their latents to the stores, those of the spaces `but` left out."""
        for name, store in self.judges.stores.items():
            if name == "latents":
                store.add(side, self.space.of(latents), ids)
            elif images is not None and name not in but:
                store.update(side, images, ids)

    def see_real(self) -> None:
        for _, images, latents, ids in self.pictures(self.real, self.total, "real pictures"):
            self.see("real", images, latents, ids)

    def see_training(self) -> None:
        """For the probe and the nearest neighbours, where either is asked for.

        Not in spaces related to the encoder: there, a network reads many pictures for little.
        """
        if not self.drawer.dit.num_classes and Nearest.name not in self.settings.metrics:
            return
        total = min(len(self.train), self.settings.train_images)
        for _, images, latents, ids in self.pictures(self.train, total, "training pictures"):
            self.see("train", images, latents, ids, but=self.excluded)

    def see_samples(self) -> None:
        with Progress(self.total, enabled=self.accelerator.is_main_process, what="sampling") as progress:
            for indices in share_of(self.total, self.accelerator, self.settings.batch_size):
                labels = choose_labels(self.drawer.dit, "balanced", indices, self.config.seed)
                latents = self.drawer.latents(indices, labels, self.config.seed)
                ids = [f"sample-{i:06d}" for i in indices]
                self.labels |= dict(zip(ids, labels or []))
                images = decode(self.model, latents) if self.model.can_decode else None
                self.see("fake", images, latents, ids)
                progress.advance(len(indices) * self.accelerator.num_processes)

    def gather(self) -> None:
        if self.accelerator.num_processes > 1:
            self.judges.gather(self.accelerator)
            for labels in gather_object([self.labels]):
                self.labels |= labels

    # ------------------------------------------------------------------------------------------------------- verdicts

    def row(self, metric: str, value: float, better: bool | None, space: str, n: int) -> dict:
        found = {"metric": metric, "value": value, "higher_is_better": better, "version": 1, "space": space, "n": n}
        return found | {"headline": space not in self.excluded, "conflict": self.excluded.get(space)}

    def with_training(self) -> dict[str, FeatureStore]:
        return {name: store for name, store in self.judges.stores.items() if store.count("train")}

    def memorisation(self) -> Records:
        """Nearest training neighbours, where `eval.metrics` asks for them."""
        records, metric = Records(), Nearest()
        if Nearest.name not in self.settings.metrics:
            return records
        for space, store in self.with_training().items():
            numbers = metric.compute(store)
            records.numbers += [self.row(key, value, metric.better(key), space, self.total)
                                for key, value in numbers.items()]  # fmt: skip
            records.fingerprints[f"nearest@{space}"] = metric.fingerprint(store)
            records.notes += [f"{space}: {note}" for note in metric.notes(numbers)]
        return records

    def class_agreement(self) -> Records:
        """Share of samples that a probe of real features takes for the class asked for; its accuracy on real ones."""
        records, classes = Records(), self.drawer.dit.num_classes
        for space, store in self.with_training().items() if classes else ():
            probe = RidgeProbe(store.rows("train"), self.labels_of(store, "train"), classes)
            for metric, side in zip(OF_CLASSES, ("fake", "real")):
                right = (probe(store.rows(side)).cpu() == self.labels_of(store, side).cpu()).double().tolist()
                draw = np.random.default_rng(derive_seed(self.config.seed, "bootstrap", metric, space))
                interval = bootstrap(right, draw, self.settings.bootstrap)
                found = self.row(metric, interval.value, True, space, len(right))
                records.numbers.append(found | {"low": interval.low, "high": interval.high})
                records.items[f"{metric}@{space}"] = dict(zip(sorted(store.ids(side)), right))
            facts = {"metric": "class_agreement", "probe": "ridge", "n_train": store.count("train")}
            records.fingerprints[f"class_agreement@{space}"] = facts | store.space.fingerprint()
        return records

    def labels_of(self, store: FeatureStore, side: str) -> Tensor:
        """Labels (n,) in the order of `store.rows(side)`."""
        return torch.tensor([self.labels[picture] for picture in sorted(store.ids(side))], device=self.device)

    def decode_noise(self) -> Records:
        """PSNR and Frechet distance of real latents decoded with noise added: what the decoder forgives the generator.

        FD is in the first space unrelated to the encoder.
        """
        records, spaces = Records(), [name for name in self.judges.stores if name not in self.excluded]
        if not self.model.can_decode or not self.settings.noises:
            return records
        real = {name: self.judges.stores[name] for name in spaces[:1]}
        stores = {sigma: {name: FeatureStore(store.space, keep_rows=False) for name, store in real.items()}
                  for sigma in self.settings.noises}  # fmt: skip
        psnr = {sigma: PSNR() for sigma in self.settings.noises}
        for indices, images, latents, ids in self.pictures(self.real, self.total, "decoding noise"):
            eps = PictureRNG(indices, self.config.seed, "decode noise").randn(*latents.shape[1:]).to(latents)
            for sigma in self.settings.noises:
                drawn = self.model.decode(latents + sigma * eps)
                psnr[sigma].update(images, drawn, ids)
                for store in stores[sigma].values():
                    store.update("fake", drawn, ids)
        for sigma in self.settings.noises:
            self.share(psnr[sigma], *stores[sigma].values())
            value = psnr[sigma].compute()["psnr"]
            records.numbers.append(self.row(f"psnr at latent noise {sigma:g}", value, True, "", self.total))
            for name, store in stores[sigma].items():
                store.absorb({"real": real[name].state()["real"]})
                value = FrechetDistance().compute(store)["fd"]
                records.numbers.append(self.row(f"fd at latent noise {sigma:g}", value, False, name, self.total))
        return records

    def share(self, *collections: PSNR | FeatureStore) -> None:
        """Add what the other processes saw."""
        if self.accelerator.num_processes > 1:
            for process, states in enumerate(gather_object([[each.state() for each in collections]])):
                for each, state in zip(collections, states if process != self.accelerator.process_index else ()):
                    each.absorb(state)

    def protocol(self) -> dict[str, object]:
        """How the samples were drawn and what they were compared with."""
        dit, sampler = self.drawer.dit, self.drawer.sampler
        return {
            "samples": self.total,
            "labels": "balanced" if dit.num_classes else "none",
            "sampler": asdict(sampler),
            "evaluations": flow.evaluations(sampler),
            "seed": self.config.seed,
            "reference_split": self.settings.split,
        }
