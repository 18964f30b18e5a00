"""One latent space and the heads that read it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umm import __version__
from umm.config import choice_settings
from umm.errors import MissingHead, UmmError
from umm.latents.base import LatentSpace, check_images
from umm.registry import find
from umm.runs import write_atomic, writing

HOW_TO_TRAIN = {"decoder": "recon"}  # head -> the task that trains it


class UnifiedModel(nn.Module):
    """encode, decode, reconstruct: whatever the heads at hand allow.

    images (B, 3, H, W) float in [0, 1]; latents (B, C, h, w), standardised by the space's statistics.
    """

    def __init__(self, space: LatentSpace, heads: dict[str, nn.Module], facts: dict | None = None):
        super().__init__()
        self.space = space
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

    # -------------------------------------------------------------------------------------------------- save, load

    def save(self, folder: str | Path, config: DictConfig) -> Path:
        """Write model/: settings of the space and the heads, their weights, the statistics.

        The frozen encoder is not copied: its weights are named by their sha256 and checked when the model is loaded.

        Args:
            config: {"latent": settings, "heads": {name: {"settings": ..., "facts": ...}}}.
        """
        folder = Path(folder)
        with writing(folder, "the model"):
            folder.mkdir(parents=True, exist_ok=True)
            for name, head in self.heads.items():
                save_file(contiguous(head.state_dict()), folder / f"{name}.safetensors")
            save_file(contiguous(self.space.normalizer.state_dict()), folder / "normalizer.safetensors")
        described = OmegaConf.merge(config, {"umm": __version__, "facts": self.facts})
        described["identity"] = json.dumps(self.space.identity(), sort_keys=True)
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(described))
        return folder

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> UnifiedModel:
        """The model of a run folder, or of a model/ folder.

        Raises:
            UmmError: no model there, or the encoder's weights are not those it was trained with.
        """
        folder = model_folder(Path(path))
        config = OmegaConf.load(folder / "config.yaml")
        schema = OmegaConf.structured(choice_settings("latent", config.latent.name))
        space = find("latents", config.latent.name).from_config(OmegaConf.merge(schema, config.latent))
        check_identity(space, json.loads(config.identity), folder)
        space.normalizer.load_state_dict(load_file(folder / "normalizer.safetensors"))
        heads = {}
        for name, described in config["heads"].items():
            head = find("heads", described.settings.name)
            built = head.from_config(described.settings, space.spec, **described.get("facts", {}))
            built.load_state_dict(load_file(folder / f"{name}.safetensors"))
            heads[name] = built.requires_grad_(False)
        return cls(space, heads, OmegaConf.to_container(config.facts)).to(device)


def model_folder(path: Path) -> Path:
    """`path` or its model/ sub-folder, whichever holds a model."""
    for folder in (path / "model", path):
        if (folder / "normalizer.safetensors").exists():
            return folder
    if not path.exists():
        raise UmmError(f"{path} does not exist: give a run folder, e.g. runs/recon.")
    if (path / "config.yaml").exists():
        raise UmmError(f"{path} has no model yet: its training has not ended. Give its umm train command again.")
    raise UmmError(f"{path} is neither a run nor a model folder.")


def check_identity(space: LatentSpace, expected: dict, folder: Path) -> None:
    """Refuse an encoder other than the one the heads were trained on."""
    found = json.loads(json.dumps(space.identity()))
    for key, value in expected.items():
        if found.get(key) != value:
            raise UmmError(
                f"{folder} was trained on a latent space whose '{key}' is {value!r}; the one found here has "
                f"{found.get(key)!r}. Give the original encoder weights."
            )


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as safetensors wants it: on the CPU, contiguous, nothing shared."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
