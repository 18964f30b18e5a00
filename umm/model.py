"""One latent space and the heads that read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umm import __version__, sampling
from umm.config import choice_settings
from umm.errors import MissingHead, UmmError
from umm.heads._answering import share_pretrained
from umm.latents._adapted import adapted, adapter_digest
from umm.latents.base import LatentSpace, check_images
from umm.layers import grid_of
from umm.pretrained import sha256_of
from umm.registry import find
from umm.rng import generator
from umm.runs import reading, write_atomic, writing
from umm.sampling import Labels
from umm.settings import SamplerSettings

AGAIN = "give the umm train command that made it again"
HOW_TO_TRAIN = {"decoder": "recon", "dit": "gen", "vqa": "und und.kind=vqa"}  # head -> the task that trains it


class UnifiedModel(nn.Module):
    """encode, decode, reconstruct, sample, classify, answer: whatever the heads at hand allow.

    images (B, 3, H, W) float in [0, 1]; latents (B, C, h, w), standardised by the space's statistics. A head called
    `adapter` moves latents for all others: `encode`, and whatever reads `space`, gives adapted ones.
    """

    def __init__(self, space: LatentSpace, heads: dict[str, nn.Module], facts: dict | None = None):
        super().__init__()
        self.space = adapted(space, heads["adapter"]) if "adapter" in heads else space
        self.heads = nn.ModuleDict(heads)
        self.facts = facts or {}  # provenance, e.g. which networks took part in training
        self.eval()

    @property
    def spec(self):
        return self.space.spec

    @property
    def device(self) -> torch.device:
        return self.space.normalizer.mean.device

    def head(self, name: str) -> nn.Module:
        """The head of that name.

        Raises:
            MissingHead: the model has none; says which task trains one.
        """
        if name in self.heads:
            return self.heads[name]
        task = HOW_TO_TRAIN.get(name, name)
        raise MissingHead(f"this model has no {name}: train one with umm train --task {task}.")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images -> standardised latents."""
        check_images(images, self.spec)
        if not self.space.normalizer.fitted:
            raise UmmError(
                "this latent space has no statistics, so its latents cannot be standardised: fit its normalizer on "
                "training data, or give latent.stats."
            )
        return self.space.encode(images.to(self.device))

    @torch.no_grad()
    def latents_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Standardised latents of a batch on the device, which holds raw ones ("latent") or pictures only ("image")."""
        return self.space.normalizer(batch["latent"]) if "latent" in batch else self.encode(batch["image"])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents -> images, clamped to [0, 1]."""
        if tuple(latents.shape[1:]) != self.spec.shape:
            raise UmmError(f"latents must be (B, {', '.join(map(str, self.spec.shape))}), got {tuple(latents.shape)}.")
        latents = latents.to(self.device)
        if "decoder" in self.heads:
            return self.heads["decoder"](self.space.normalizer.undo(latents)).clamp(0, 1)
        return self.space.decode(latents).clamp(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """images -> latents -> images."""
        return self.decode(self.encode(images))

    @property
    def can_decode(self) -> bool:
        """Whether latents can become pictures: by a decoder head, or by the space's own."""
        return "decoder" in self.heads or type(self.space).decode is not LatentSpace.decode

    def require_pictures(self) -> None:
        """Raise where latents cannot become pictures: MissingHead."""
        if not self.can_decode:
            raise MissingHead(
                "this model has no decoder to draw with: give its umm train command again with gen.decoder=<a recon "
                "run on the same latent space>."
            )

    @torch.no_grad()
    def sample_latents(
        self, labels: Labels = "balanced", num: int | None = None, seed: int = 0, sampler: SamplerSettings | None = None
    ) -> Tensor:
        """Standardised latents (num, C, h, w) drawn by the `dit` head.

        Args:
            labels: class numbers or names, repeated in turn up to `num`; "balanced" takes all classes in turn,
                "random" draws them. Without classes: ignored.
            num: how many; None: as many as there are labels.
            seed: picture i depends on (seed, i) and its label alone.
            sampler: None: the one the model was saved with.
        """
        num = num or (1 if isinstance(labels, str) else len(labels))
        drawer = sampling.Drawer.of(self, sampler)
        indices = list(range(num))
        chosen = sampling.choose_labels(self.head("dit"), labels, indices, seed)
        parts = [slice(start, start + sampling.BATCH) for start in range(0, num, sampling.BATCH)]
        return torch.cat([drawer.latents(indices[part], chosen and chosen[part], seed) for part in parts])

    def sample(
        self, labels: Labels = "balanced", num: int | None = None, seed: int = 0, sampler: SamplerSettings | None = None
    ) -> Tensor:
        """Pictures (num, 3, H, W) in [0, 1] drawn by the `dit` head; arguments as `sample_latents`."""
        self.require_pictures()
        latents = self.sample_latents(labels, num, seed, sampler)
        return torch.cat([sampling.decode(self, part) for part in latents.split(sampling.BATCH)])

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """images -> probabilities (B, K) by the `und` head; `model.head("und").classes` names the classes."""
        return self.class_logits(self.encode(images)).softmax(1)

    def class_logits(self, latents: Tensor) -> Tensor:
        """Standardised latents -> (B, K), read from them or from the trunk, as the `und` head was trained."""
        reader, where = self.head("und"), self.facts.get("und", {}).get("trunk")
        if where is None:
            return reader(latents)
        noise = torch.randn(self.spec.shape, generator=generator("und", "noise")).to(latents)  # one for all pictures
        noisy = (1 - where["time"]) * latents + where["time"] * noise
        return reader(trunk_grid(self.head("dit"), noisy, where["time"], where["block"]))

    @torch.no_grad()
    def answer(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        """One answer a question: question i is about picture i, or all are about the only picture."""
        if isinstance(questions, str) or not all(isinstance(question, str) for question in questions):
            raise UmmError(f"questions are a list of texts, e.g. ['Is there a circle?'], got {questions!r}.")
        if len(images) not in (1, len(questions)):
            raise UmmError(f"{len(questions)} questions about {len(images)} pictures: give one each, or one picture.")
        head = self.head("llm" if "llm" in self.heads else "vqa")
        if not questions:
            return []
        pictures = torch.zeros(len(questions), dtype=torch.long) if len(images) == 1 else None
        return head.answer(self.encode(images), questions, pictures)

    # -------------------------------------------------------------------------------------------------- save, load

    def save(self, folder: str | Path, config: DictConfig) -> Path:
        """Write model/: settings of the space and the heads, their weights, the statistics.

        The frozen encoder is not copied: its weights are named by their sha256 and checked when the model is loaded.
        What a space has trained itself is: `space.safetensors`.

        Args:
            config: {"latent": settings, "heads": {name: {"settings": ..., "facts": ...}}}.
        """
        folder = Path(folder)
        partial = folder.with_name(f".{folder.name}.partial")
        described = OmegaConf.merge(config, {"umm": __version__, "facts": self.facts})
        described["identity"] = json.dumps(self.space.identity(), sort_keys=True)
        if self.space.settings is not None:
            described["latent"] = OmegaConf.structured(self.space.settings)
        with writing(folder, "the model", cleanup=partial):
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir(parents=True)
            for name, head in self.heads.items():
                save_file(contiguous(head.state_dict()), partial / f"{name}.safetensors")
            statistics = {key: value for key, value in self.space.normalizer.state_dict().items() if "." not in key}
            save_file(contiguous(statistics), partial / "normalizer.safetensors")
            if state := self.space.own_state():
                save_file(contiguous(state), partial / "space.safetensors")
            write_atomic(partial / "config.yaml", OmegaConf.to_yaml(described))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        return folder

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> UnifiedModel:
        """The model of a run folder, or of a model/ folder.

        Raises:
            UmmError: no model there, or the encoder's weights are not those it was trained with.
        """
        folder = model_folder(Path(path))
        config = read_config(folder)
        schema = OmegaConf.structured(choice_settings("latent", config.latent.name))
        space = find("latents", config.latent.name).from_config(OmegaConf.merge(schema, config.latent))
        if space.settings is not None:
            with reading(folder / "space.safetensors", AGAIN):
                space.load_own_state(load_file(folder / "space.safetensors"))
        check_identity(space, json.loads(config.identity), folder)
        with reading(folder / "normalizer.safetensors", AGAIN):
            space.normalizer.load_state_dict(load_file(folder / "normalizer.safetensors"))
        heads = {name: build_head(described, space, folder / f"{name}.safetensors")
                 for name, described in config["heads"].items()}  # fmt: skip
        share_pretrained(heads.values())
        return cls(space, heads, OmegaConf.to_container(config.facts)).to(device)


def trunk_grid(dit: nn.Module, z: Tensor, time: float, block: int) -> Tensor:
    """What a reader sees of a trunk: its tokens after `block`, without a class, as a grid (B, D, h, w)."""
    return grid_of(dit.features(z, time, block), *dit.grid)


def build_head(described: DictConfig, space: LatentSpace, weights: Path) -> nn.Module:
    """A frozen head from its {"settings", "facts"} and its file."""
    head = find("heads", described.settings.name)
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(head.Config), described.settings))
    built = head.from_config(settings, space.spec, **described.get("facts", {}))
    with reading(weights, AGAIN):
        built.load_state_dict(load_file(weights))
    return built.requires_grad_(False).eval()


def load_head(path: str | Path, name: str, space: LatentSpace) -> tuple[nn.Module, dict, dict]:
    """One head of a saved model for a space at hand: the head, its {"settings", "facts"}, the model's facts.

    Raises:
        UmmError: no model there, or one of another latent space.
        MissingHead: it has no such head.
    """
    folder = model_folder(Path(path))
    config = read_config(folder)
    if name not in config["heads"]:
        raise MissingHead(f"{folder} has no {name}: it holds {', '.join(config['heads'])}.")
    check_identity(space, json.loads(config.identity), folder)
    check_adapter(space, config, name, folder)
    described = config["heads"][name]
    head = build_head(described, space, folder / f"{name}.safetensors").to(space.normalizer.mean.device)
    return head, OmegaConf.to_container(described), OmegaConf.to_container(config.facts)


def model_folder(path: Path) -> Path:
    """`path` or its model/ sub-folder, whichever holds a model."""
    for folder in (path / "model", path):
        if (folder / "normalizer.safetensors").exists() and (folder / "config.yaml").exists():
            return folder
    if not path.exists():
        raise UmmError(f"{path} does not exist: give a run folder, e.g. runs/recon.")
    if (path / "config.yaml").exists():
        raise UmmError(f"{path} has no model yet: its training has not ended. Give its umm train command again.")
    raise UmmError(f"{path} is neither a run nor a model folder.")


def read_config(folder: Path) -> DictConfig:
    """config.yaml of a model folder."""
    with reading(folder / "config.yaml", AGAIN):
        config = OmegaConf.load(folder / "config.yaml")
        config.latent.name, config["heads"], json.loads(config.identity)  # what every model has
    return config


def check_identity(space: LatentSpace, expected: dict, folder: Path) -> None:
    """Refuse an encoder other than the one the heads were trained on."""
    found = json.loads(json.dumps(space.identity()))
    for key, value in expected.items():
        if found.get(key) != value:
            raise UmmError(
                f"{folder} was trained on a latent space whose '{key}' is {value!r}; the one found here has "
                f"{found.get(key)!r}. Give the original encoder weights."
            )


def check_adapter(space: LatentSpace, config: DictConfig, name: str, folder: Path) -> None:
    """Refuse a head that reads latents which no adapter, or another one, has moved; a decoder may read adapted ones."""
    trained = None
    if "adapter" in config["heads"]:
        with reading(folder / "adapter.safetensors", AGAIN):
            trained = sha256_of(load_file(folder / "adapter.safetensors"))
    if trained != adapter_digest(space) and not (trained is None and name == "decoder"):
        reads, here = ("adapted", "others") if trained else ("unadapted", "adapted ones")
        raise UmmError(f"the {name} of {folder} reads {reads} latents and would get {here} here: train one for these.")


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as safetensors wants it: on the CPU, contiguous, nothing shared."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
