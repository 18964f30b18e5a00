"""Spaces that train networks of their own on a pretrained encoder: what they share, and what training asks of them.

A life in three steps. `from_config` builds the networks untrained and `stages` says how `--task recon` trains them. The
task trains a `student`, stage by stage, and puts its averaged weights into the space. The run's model folder holds them
(`own_state`, `settings`), and `latent.weights=<run>` builds a space from it that has no stages left.

B batch, C channels, h w latent grid, H W image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from umm.config import flatten
from umm.errors import ConfigError, MissingWeights
from umm.latents._stats import load_stats
from umm.latents.base import Features, LatentSpace
from umm.registry import find
from umm.rng import PictureRNG, seeded_init
from umm.runs import reading
from umm.settings import PretrainedSettings, TrainedSettings

FREE = ("normalizer", "stats_images", "encode_batch")  # settings of a finished space that may still be chosen


@dataclass(frozen=True)
class Stage:
    """A stretch of the training run; networks that it does not train stay exactly as they are."""

    name: str
    length: float  # relative to the other stages
    trains: tuple[str, ...]  # names of `TrainedSpace.parts`
    lr: float = 1.0  # times recon.optim.lr and final_lr
    perceptual: float = 1.0  # times recon.perceptual.weight
    weights: Mapping[str, float] = field(default_factory=dict)  # of the space's own losses


@dataclass
class Lesson:
    """What a space in training makes of a batch."""

    pictures: Tensor  # (B, 3, H', W') with gradients
    target: Tensor  # what they should be, of the same shape
    terms: dict[str, tuple[float, Tensor]] = field(default_factory=dict)  # its own losses: name -> (weight, value)
    # terms whose weight is multiplied by |d rec / d W| / |d term / d W|: name -> W
    balanced: dict[str, nn.Parameter] = field(default_factory=dict)


class TrainedSpace(LatentSpace):
    """A pretrained space `base`, and networks of its own beside, behind or in it.

    A subclass implements `make`, `parts`, `raw`, `draw`, `lesson`, `last_layer`, `facts` and `all_stages`. It is always
    in eval mode, and only the parts of a `student` have gradients; what differs in training happens in `lesson`.
    """

    base: LatentSpace
    resizes = False  # its lessons are about pictures of other sizes too

    def __init__(self, settings: TrainedSettings, base: LatentSpace):
        super().__init__()
        self.settings, self.base, self.families = replace(settings, weights=None, stats=None), base, base.families
        self.stages = self.all_stages()
        with seeded_init(settings.name):
            self.make()
        self.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, config: TrainedSettings) -> TrainedSpace:
        """Untrained, or from a finished run: then it is as the run had it, but for normaliser and statistics."""
        config = OmegaConf.to_object(config) if OmegaConf.is_config(config) else config
        if config.weights is None:
            space = cls.fresh(config)
        else:
            space = cls.finished(config)
        if config.stats is not None:
            space.normalizer.set(*load_stats(config.stats))
        return space

    @classmethod
    def fresh(cls, settings: TrainedSettings) -> TrainedSpace:
        return cls(settings, build_base(settings.encoder, settings.image_size))

    @classmethod
    def finished(cls, config: TrainedSettings) -> TrainedSpace:
        """The space of the run `config.weights`, its statistics too where `config` asks for the same normaliser."""
        folder = trained_folder(config.weights)
        with reading(folder, "train it again, or give another run"):
            latent = OmegaConf.load(folder / "config.yaml").latent
            own, statistics = (load_file(folder / f"{name}.safetensors") for name in ("space", "normalizer"))
        if latent.name != config.name or latent.image_size != config.image_size:
            raise ConfigError(
                f"{folder} holds latent.name={latent.name} latent.image_size={latent.image_size}, asked for are "
                f"{config.name} and {config.image_size}: make them equal."
            )
        saved = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls.Config), latent))
        check_unchanged(config, saved, folder)
        same = saved.normalizer == config.normalizer
        asked = {key: getattr(config, key) for key in FREE}
        space = cls.fresh(replace(saved, **asked))
        space.load_own_state(own)
        if same:
            space.normalizer.load_state_dict(statistics)
        return space

    # ------------------------------------------------------------------------------------------ what a subclass says

    def make(self) -> None:
        """Set `spec`, `normalizer` and the networks; called again for a student, to draw its first weights."""
        raise NotImplementedError

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What stages train, by name."""
        raise NotImplementedError

    def all_stages(self) -> tuple[Stage, ...]:
        """The training, in order."""
        raise NotImplementedError

    def lesson(self, stage: Stage, images: Tensor, rng: PictureRNG, corrupt: Callable[[Tensor], Tensor]) -> Lesson:
        """Encode and draw a batch; `corrupt` adds `recon.noise` to raw latents on their way to the decoder."""
        raise NotImplementedError

    def draw(self, raw: Tensor) -> Tensor:
        """Raw latents -> images around [0, 1], not clamped."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Parameter:
        """Of the decoder: where reconstruction and adversarial gradients are weighed against each other."""
        raise NotImplementedError

    def facts(self) -> dict[str, object]:
        """What fixes the raw latents beside the encoder, JSON-able."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- as a space

    def train(self, mode: bool = True) -> TrainedSpace:
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def decode(self, latents: Tensor) -> Tensor:
        return self.draw(self.normalizer.undo(latents))

    def features(self, images: Tensor, layers: tuple[int, ...] | None = None) -> Features | list[Features]:
        """Those of the encoder inside."""
        return self.base.features(images, layers)

    def identity(self) -> dict[str, object]:
        return {"space": self.settings.name, "encoder": self.base.identity(), **self.facts()}

    def own_state(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": v for name, part in self.parts.items() for key, v in part.state_dict().items()}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Take trained weights: nothing is left to train."""
        for name, part in self.parts.items():
            start = f"{name}."
            part.load_state_dict({key.removeprefix(start): v for key, v in state.items() if key.startswith(start)})
        self.stages = ()

    # -------------------------------------------------------------------------------------------------- in training

    def student(self, seed: int) -> TrainedSpace:
        """A copy to train, its first weights drawn from the run's seed; an encoder that stays frozen is shared."""
        trained = {name for stage in self.stages for name in stage.trains}
        shared = {} if "encoder" in trained else {id(self.base): self.base}
        twin = copy.deepcopy(self, shared)
        with seeded_init(seed, "recon", self.settings.name):
            twin.make()
        for part in twin.parts.values():
            part.requires_grad_(True)
        return twin.to(self.normalizer.mean.device)

    def begin_stage(self, stage: Stage) -> None:
        """Called on the student before the first step of a stage."""
        for name, part in self.parts.items():
            part.requires_grad_(name in stage.trains)

    def memory(self) -> dict[str, Tensor]:
        """What a student must remember over an interruption, beside its parts."""
        return {}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Undo `memory`."""


def check_unchanged(config: TrainedSettings, saved: TrainedSettings, folder: Path) -> None:
    """Refuse settings that a finished run has otherwise: they would not be heard."""
    default, trained = (dict(flatten(asdict(each))) for each in (type(config)(), saved))
    for key, value in flatten(asdict(config)):
        free = key in FREE or key in ("weights", "stats")
        if not free and value not in (default.get(key), trained.get(key)):
            raise ConfigError(f"latent.{key}={value} is not what {folder} has, {trained.get(key)}: leave it out.")


def refuse_layers(settings: TrainedSettings, instead: str) -> None:
    """Refuse blocks of the encoder where they would not be heard."""
    if settings.encoder.layers != PretrainedSettings().layers:
        raise ConfigError(f"latent.encoder.layers={settings.encoder.layers} would not be heard: {instead}.")


def build_base(settings: PretrainedSettings, image_size: int) -> LatentSpace:
    """The pretrained space inside, without statistics of its own."""
    cls = find("latents", settings.name)
    given = {key: getattr(settings, key) for key in ("weights", "revision", "encoder_size", "layers")}
    if missing := sorted(given.keys() - {entry.name for entry in fields(cls.Config)}):
        raise ConfigError(f"latent.encoder.name={settings.name} is no frozen encoder (it has no {missing[0]}).")
    return cls.from_config(cls.Config(image_size=image_size, normalizer="none", **given))


def trained_folder(weights: str) -> Path:
    """The model folder of a run whose space has weights of its own.

    Raises:
        MissingWeights: there is none.
    """
    for folder in (Path(weights) / "model", Path(weights)):
        if (folder / "space.safetensors").exists():
            return folder
    raise MissingWeights(
        f"latent.weights={weights} is no finished run of a space that trains networks of its own: make one with "
        "umm train --task recon latent.name=<space> run=<folder>."
    )


def frozen(module: nn.Module) -> nn.Module:
    """A copy that nothing trains."""
    return copy.deepcopy(module).requires_grad_(False).eval()
