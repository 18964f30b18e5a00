"""Feature addresses: what a probe reads, by name.

    latent                   the latent, standardised                                                  tokens
    patches, patches@B       patch tokens after the encoder's own final norm; B: of that block         tokens
    cls, patch-mean, cls+patch-mean, with @B                                                           one vector
    published                DINOv2's four readings: CLS of the last 1 or 4 blocks, with or without mean patch
    trunk:B@T                after block B of a run's DiT at time T in [0, 1], 1 is noise; no class    tokens
    trunk:B@T+label          the same with the true class fed in: flagged, for it is no understanding
    pixels                   the picture itself, at most 32 px                                         tokens
    random:ADDRESS           the same of a network with random weights
    package.module:name      an object with encode(images) -> (B, N, D)                                tokens

Blocks are 0-based, negative from the end. B batch, N tokens, D width, C h w latent, S side of the picture.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.errors import MissingHead, UmmError, UnknownName, nearest
from umm.flow import interpolate
from umm.latents.base import Features, LatentSpace
from umm.layers import patchify, tokens_of
from umm.pretrained import sha256_of
from umm.rng import PictureRNG, generator

PLAIN = ("latent", "patches", "cls", "patch-mean", "cls+patch-mean", "published", "pixels")
ENCODER = re.compile(r"(patches|cls|patch-mean|cls\+patch-mean)(?:@(-?\d+))?")
TRUNK = re.compile(r"trunk:(-?\d+)@(\d*\.?\d+)(\+label)?")
OWN = re.compile(r"[\w.]+:\w+")
PIXEL_SIDE = 32
Batch = Mapping[str, Tensor | list]  # image (B, 3, S, S) in [0, 1], latent (B, C, h, w) raw, label (B,), id


@dataclass(frozen=True)
class Address:
    """A parsed address. `block` is None for the last one."""

    text: str
    kind: str  # one of PLAIN, trunk or own
    block: int | None = None
    time: float = 0.0
    labelled: bool = False
    random: bool = False

    @property
    def is_vector(self) -> bool:
        """Whether it is one vector a picture, and not tokens."""
        return self.kind in ("cls", "patch-mean", "cls+patch-mean", "published")


def parse(text: str) -> Address:
    """An address from its text.

    Raises:
        UnknownName: it is none; names the nearest.
    """
    text = text.strip()
    if text.startswith("random:"):
        inner = parse(text.removeprefix("random:"))
        if inner.kind in ("pixels", "own") or inner.random:
            raise UnknownName(f"'{text}': only the encoder's and the trunk's features have a random counterpart.")
        return replace(inner, text=text, random=True)
    if match := ENCODER.fullmatch(text):
        return Address(text, match[1], None if match[2] is None else int(match[2]))
    if text in PLAIN:
        return Address(text, text)
    if match := TRUNK.fullmatch(text):
        if float(match[2]) > 1:
            raise UnknownName(f"'{text}': times lie in [0, 1], 1 is noise.")
        return Address(text, "trunk", int(match[1]), float(match[2]), bool(match[3]))
    if OWN.fullmatch(text) and not text.startswith("trunk:"):
        return Address(text, "own")
    raise UnknownName(
        f"no feature is called '{text}'.{nearest(text, PLAIN)} There are: {', '.join(PLAIN)}, with @BLOCK for another "
        "block of the encoder (cls@10), trunk:BLOCK@TIME (trunk:8@0.1), random:ADDRESS and package.module:name."
    )


@dataclass
class Reader:
    """How one address is read from a batch.

    read      batch -> features (B, N, D), or (B, D)
    facts     JSON-able: weights, settings; with the pictures' identity they fix the features
    needs     "image", or "latent", which a cache may hold
    normed    a trained layer norm ended the features: the published linear probe does not standardise them
    flat      a vector of it is all its tokens, not their mean
    variants  {name: slice}: readings of the vector that the linear probe chooses from; kNN takes the first
    notes     what a reader of the numbers must know
    """

    address: Address
    read: Callable[[Batch], Tensor]
    facts: dict
    needs: str = "image"
    normed: bool = False
    flat: bool = False
    variants: Callable[[int], dict[str, list[slice]]] = lambda width: {"": [slice(0, width)]}
    notes: list[str] = field(default_factory=list)

    def vector(self, features: Tensor) -> Tensor:
        """(B, N, D) or (B, D) -> (B, D')."""
        if features.ndim == 2:
            return features
        return features.flatten(1) if self.flat else features.float().mean(1)


def open_reader(address: Address, space: LatentSpace, dit: nn.Module | None = None, seed: int = 0) -> Reader:
    """The reader of an address on a latent space, and the trunk of a run where it needs one.

    Raises:
        MissingHead: a trunk's address without a trunk.
        UmmError: what the address names does not exist in this encoder or trunk.
    """
    if address.kind == "trunk":
        return _trunk(address, space, dit, seed)
    if address.kind == "pixels":
        grid = space.spec.height
        return Reader(address, lambda batch: pixel_tokens(batch["image"], grid), {"grid": grid}, flat=True)
    if address.kind == "own":
        return _own(address)
    if address.random:
        space = randomised(space, seed)
    if address.kind == "latent":
        return _latent(address, space)
    return _encoder(address, space)


def _latent(address: Address, space: LatentSpace) -> Reader:
    """Without trained weights there are no statistics either: the encoder's own units."""
    if address.random:
        facts = {"weights": digest_of(space)}
        return Reader(address, lambda batch: tokens_of(space.raw(batch["image"])), facts)
    return Reader(address, lambda batch: tokens_of(standardised(batch, space)), latent_facts(space), "latent")


def _encoder(address: Address, space: LatentSpace) -> Reader:
    pick = {
        "patches": lambda found: found.patches,
        "patch-mean": lambda found: found.patches.mean(1),
        "cls": lambda found: _cls(found, space),
        "cls+patch-mean": lambda found: torch.cat([_cls(found, space), found.patches.mean(1)], dim=1),
    }
    facts = {"weights": digest_of(space), "space": space.identity()}
    if address.kind == "published":

        def read(batch: Batch) -> Tensor:
            blocks = space.features(batch["image"], (-1, -2, -3, -4))
            return torch.cat([_cls(found, space) for found in blocks] + [blocks[0].patches.mean(1)], dim=1)

        return Reader(address, read, facts, normed=not address.random, variants=_published)
    layers = None if address.block is None else (address.block,)

    def read(batch: Batch) -> Tensor:
        found = space.features(batch["image"], layers)
        return pick[address.kind](found if layers is None else found[0])

    return Reader(address, read, facts, normed=not address.random)


def _published(width: int) -> dict[str, list[slice]]:
    """Of [CLS of the last four blocks, last first | mean patch], each D = width / 5 (DINOv2's released evaluation)."""
    d = width // 5
    mean = slice(4 * d, 5 * d)
    return {
        "1 block": [slice(0, d)],
        "1 block + mean patch": [slice(0, d), mean],
        "4 blocks": [slice(0, 4 * d)],
        "4 blocks + mean patch": [slice(0, 4 * d), mean],
    }


def _cls(found: Features, space: LatentSpace) -> Tensor:
    if found.cls is None:
        raise UmmError(f"{type(space).__name__} has no CLS token: use patch-mean, patches or latent.")
    return found.cls


def _trunk(address: Address, space: LatentSpace, dit: nn.Module | None, seed: int) -> Reader:
    if dit is None:
        raise MissingHead(f"'{address.text}' needs a trained DiT: give a run of umm train --task gen.")
    if address.random:
        dit = randomised(dit, seed)
    notes = trunk_notes(address, dit.num_classes)

    def read(batch: Batch) -> Tensor:
        z = standardised(batch, space)
        if address.time > 0:  # noise belongs to the picture, so that features do not depend on batches
            noise = PictureRNG(batch["id"], seed, "probe trunk", device=z.device).randn(*z.shape[1:])
            z = interpolate(z, noise, torch.full((len(z),), address.time, device=z.device))
        y = batch["label"].to(z.device) if address.labelled else None
        return dit.features(z, address.time, address.block, y)

    facts = latent_facts(space) | {"trunk": sha256_of(dit.state_dict()), "seed": seed, "labelled": address.labelled}
    return Reader(address, read, facts, "latent", notes=notes)


def trunk_notes(address: Address, num_classes: int) -> list[str]:
    """What class labels in a trunk do to the meaning of its features."""
    if address.labelled:
        if not num_classes:
            raise UmmError(f"'{address.text}': this trunk was trained without classes and has no label to feed.")
        return [
            f"{address.text}: WARNING, the true class is fed to the trunk. A probe of it reads the label back and says "
            "nothing about understanding; leave out +label."
        ]
    if num_classes:
        return [
            f"{address.text}: this trunk learned from class labels, read here without one. What it adds to `latent` "
            "may come from those labels and not from generation; a trunk of gen.conditional=false decides."
        ]
    return []


def _own(address: Address) -> Reader:
    module, _, name = address.text.partition(":")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnknownName(f"'{address.text}' cannot be imported ({error}): is it on PYTHONPATH?") from error
    encoder = target() if inspect.isclass(target) else target
    if not callable(getattr(encoder, "encode", None)):
        raise UmmError(f"{address.text} has no encode(images): it must return tokens (B, N, D).")

    def read(batch: Batch) -> Tensor:
        tokens = encoder.encode(batch["image"])
        if tokens.ndim != 3 or len(tokens) != len(batch["image"]):
            raise UmmError(f"{address.text}: encode must return (B, N, D), got {tuple(tokens.shape)}.")
        return tokens

    return Reader(address, read, {"code": _code_digest(encoder)} | own_identity(encoder))


def own_identity(encoder: object) -> dict:
    """Its own `identity()`, else the digest of its weights where it is a module."""
    if callable(getattr(encoder, "identity", None)):
        return {"identity": encoder.identity()}
    return {"weights": sha256_of(encoder.state_dict())} if isinstance(encoder, nn.Module) else {}


def _code_digest(encoder: object) -> str:
    file = inspect.getsourcefile(type(encoder))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""


# ---------------------------------------------------------------------------------------------------------- parts


def standardised(batch: Batch, space: LatentSpace) -> Tensor:
    """The batch's latents, encoded here if no cache has them, (B, C, h, w)."""
    raw = batch["latent"] if "latent" in batch else space.raw(batch["image"]).float()
    return space.normalizer(raw)


def latent_facts(space: LatentSpace) -> dict:
    """What fixes standardised latents."""
    statistics = sha256_of(space.normalizer.state_dict())
    return {"space": space.identity(), "normalizer": space.normalizer.mode, "statistics": statistics}


def digest_of(space: LatentSpace) -> str:
    """All weights but the statistics; `identity` leaves out the final norm, which `features` reads."""
    return sha256_of({k: v for k, v in space.state_dict().items() if not k.startswith("normalizer.")})


def pixel_tokens(images: Tensor, grid: int) -> Tensor:
    """(B, 3, S, S) -> (B, grid * grid, 3 p p): area-averaged to the largest multiple of the grid up to 32 px."""
    patch = max(1, min(PIXEL_SIDE, images.shape[-1]) // grid)
    return patchify(F.interpolate(images, size=(grid * patch, grid * patch), mode="area"), patch)


@torch.no_grad()
def randomised(module: nn.Module, seed: int) -> nn.Module:
    """A copy in which every parameter is drawn anew from a normal with that tensor's mean and standard deviation.

    It works for any network and keeps the scales of norms and residual branches that training has found, so that the
    baseline lacks nothing but what the weights have learned.
    """
    fresh = copy.deepcopy(module)
    for name, parameter in fresh.named_parameters():
        if parameter.numel() > 1:
            draw = torch.randn(parameter.shape, generator=generator(seed, "random weights", name))
            drawn = parameter.float().mean() + parameter.float().std() * draw.to(parameter.device)
            parameter.copy_(drawn)
    return fresh
