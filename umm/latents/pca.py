"""The leading k principal components of another space's tokens: the same pictures with fewer numbers a token.

For the question whether latent dimension itself makes generation harder (experiments/compare/dimension.yaml).
B batch, K channels of the base space, k components kept, h w token grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from umm.config import choice_settings, merge
from umm.errors import ConfigError, UmmError
from umm.latents._stats import load_stats
from umm.latents.base import Features, LatentSpace, Normalizer
from umm.pretrained import read_tensors, sha256_of
from umm.registry import find
from umm.rng import generator
from umm.runs import writing
from umm.settings import PCASettings

OWN = ("components", "base.normalizer.")  # what a saved model must hold


class PCA(LatentSpace):
    """z_k = components (k, K) z, z the base's standardised latents; the same components at every position.

    Of this space's own normalisers `scalar` keeps the components' relative sizes, so that k = K is the base turned;
    `channel` and `position` whiten, which blows small components up.

    Args:
        base: frozen, with fitted statistics.
        components: orthonormal rows, k or more, largest variance first; None: to be loaded.
    """

    Config = PCASettings

    def __init__(
        self,
        base: LatentSpace,
        k: int,
        components: Tensor | None = None,
        normalizer: str = "scalar",
        settings: PCASettings | None = None,
    ):
        super().__init__()
        channels = base.spec.channels
        if not 1 <= k <= channels:
            raise ConfigError(f"latent.components={k}: the base space has 1 to {channels} of them.")
        self.base, self.families, self.settings = base, base.families, settings
        self.per_picture = base.per_picture
        self.spec = replace(base.spec, channels=k)
        self.normalizer = Normalizer(self.spec.shape, normalizer)
        self.register_buffer("components", torch.full((k, channels), torch.nan))
        if components is not None:
            self.components.copy_(components[:k])

    @classmethod
    def from_config(cls, config: PCASettings) -> PCA:
        config = OmegaConf.to_object(config) if OmegaConf.is_config(config) else config
        if "name" not in config.base:
            raise ConfigError("latent.name=pca needs the space it reduces: set latent.base.name, and what it needs.")
        schema = OmegaConf.structured(choice_settings("latent", config.base["name"]))
        given = OmegaConf.create({"image_size": config.image_size, **config.base})
        settings = OmegaConf.to_object(merge(schema, given, "latent.base"))
        if settings.image_size != config.image_size:
            raise ConfigError("latent.base.image_size is not latent.image_size: leave it out, it follows.")
        base = find("latents", settings.name).from_config(settings)
        components = None if config.basis is None else load_basis(Path(config.basis), base)
        space = cls(base, config.components, components, config.normalizer, replace(config, basis=None, stats=None))
        if config.stats is not None:
            space.normalizer.set(*load_stats(config.stats))
        return space

    @classmethod
    def tiny(cls, k: int = 6, **changes) -> PCA:
        """A random basis on the pixels of small pictures."""
        base = find("latents", "pixels").tiny(normalizer="none")
        size = base.spec.channels
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator("tiny pca"))).Q
        return cls(base, k, basis, **changes)

    def raw(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, k, h, w), uncorrelated on what the basis was measured on."""
        if not self.components.isfinite().all():
            raise UmmError("this PCA space has no basis: set latent.basis to the file that umm diagnose writes.")
        return torch.einsum("kc,bchw->bkhw", self.components, self.base.encode(images).float())

    def features(self, images: Tensor, layers: tuple[int, ...] | None = None) -> Features | list[Features]:
        """The base's."""
        return self.base.features(images, layers)

    def identity(self) -> dict[str, object]:
        facts = {"space": "pca", "components": self.spec.channels, "basis": sha256_of(self.own_state())}
        return facts | {"normalizer": self.base.normalizer.mode, "base": self.base.identity()}

    def own_state(self) -> dict[str, Tensor]:
        """The basis, and the statistics of the base."""
        return {key: value for key, value in self.state_dict().items() if key.startswith(OWN)}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `own_state`."""
        self.load_state_dict({**self.state_dict(), **state})


# ----------------------------------------------------------------------------------------------------------- basis


def principal_basis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance (K, K) -> orthonormal components (K, K), a row each, and their variances (K,), largest first.

    A component's largest entry is positive, so that equal covariances give equal components.
    """
    lam, vectors = torch.linalg.eigh(covariance.double())
    components = vectors.T.flip(0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * largest.sign(), lam.flip(0).clamp_min(0)


def save_basis(file: Path, base: LatentSpace, covariance: Tensor, **facts: object) -> Path:
    """Write what `latent.basis` reads: components, variances, the base's statistics.

    Args:
        covariance: (K, K) of the base's standardised tokens.
        facts: what it was measured on.
    """
    components, variances = principal_basis(covariance)
    state = {"components": components.float(), "variances": variances.float()}
    state |= {f"normalizer.{key}": value for key, value in base.normalizer.state_dict().items()}
    state = {name: value.cpu().contiguous() for name, value in state.items()}
    with writing(file.parent, file.name):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file, {"base": base_digest(base), "facts": json.dumps(facts)})
    return file


def load_basis(file: Path, base: LatentSpace) -> Tensor:
    """The components of a file of `save_basis`; the base takes over its statistics.

    Raises:
        MissingWeights: no such file.
        UmmError: it holds no basis, or that of another space.
    """
    state = read_tensors(file)
    with safe_open(file, "pt") as opened:
        belongs = (opened.metadata() or {}).get("base")
    if belongs != base_digest(base) or "components" not in state:
        raise UmmError(
            f"{file} is no basis of latent.base as it is set: make one with umm diagnose on that very space, or set "
            "latent.base to what it was measured on."
        )
    own = {key.removeprefix("normalizer."): value for key, value in state.items() if key.startswith("normalizer.")}
    base.normalizer.load_state_dict(own)
    return state["components"]


def base_digest(base: LatentSpace) -> str:
    facts = {"normalizer": base.normalizer.mode} | base.identity()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
