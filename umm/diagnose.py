"""`umm diagnose`: what a latent space is like, in numbers beside those of white noise and of other spaces.

    <out>/diagnose.json    identity, pictures, seed, versions, numbers with intervals, curves
    <out>/diagnose.png     spectra, channels, layout, noise, for this space and the others
    <out>/interpolations.png, noise.png     where there is a decoder
    <out>/pca.safetensors  its principal components, what latent.name=pca reads; of the train split only
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from umm import assets
from umm.battery import NOISES, QUESTIONS, STEPS, Battery, split
from umm.build import build_space, cache_folder, fit_normalizer, open_source, settings_of
from umm.cache import LatentCache, key_facts
from umm.config import chosen, combine, parse_override, read_yaml
from umm.data.base import DataSource, collate
from umm.diagnose_plot import plot
from umm.diagnostics import covariances
from umm.errors import DataError, UmmError
from umm.features import latent_facts
from umm.latents._adapted import adapter_digest
from umm.latents.base import LatentSpace
from umm.latents.pca import save_basis
from umm.loader import to_device
from umm.metrics._features import FeatureSpace, open_space
from umm.model import UnifiedModel
from umm.pictures import save_grid
from umm.progress import Progress
from umm.responses import lerp, slerp
from umm.rng import PictureRNG, generator
from umm.runs import Run, provenance, reading, write_atomic, writing
from umm.subjects import of_latent

FORMAT = 2  # raised when a number's definition changes
SECTIONS = ("seed", "data", "latent", "cache", "train")  # of a configuration; the rest belongs to tasks
SAME = ("format", "data", "images", "few", "seed", "features")  # facts that comparable results share
SHOWN = 6  # rows of a picture grid
LEAST = 20  # pictures


@dataclass
class Request:
    """What to diagnose, on what."""

    config: str | None = None
    overrides: Sequence[str] = ()
    run: str | None = None
    against: Sequence[str] = ()
    out: str = "runs/diagnose"
    images: int = 1000
    few: int = 64  # pictures for what runs encoder or decoder many times
    split: str = "val"
    features: str = "effnet"
    neighbors: int = 10


def diagnose(request: Request) -> str:
    """Measure, write, and return the table."""
    others = read_results(request.against, Path(request.out).name)
    config = read_config(request)
    accelerator = Accelerator(cpu=config.train.device == "cpu")
    model = open_model(request.run, config, accelerator)
    source = open_source(config, request.split)
    with torch.no_grad():
        result = measure(request, config, model, source, accelerator)
    out = Path(request.out)
    with writing(out, "the results"):
        out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "diagnose.json", json.dumps(result, indent=1))
    lines = [table(out.name, result, others)]
    lines += [f"note: {note}" for note in [*result["notes"], *differences(result, others)]]
    drawn = plot(out / "diagnose.png", {out.name: result, **others, "white noise": result["white_noise"]})
    lines.append(f"wrote {out / 'diagnose.json'} and {drawn}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- opening


def read_config(request: Request) -> DictConfig:
    """Defaults < --config < the run's space < key=value, of the sections that say which latents of which pictures.

    Raises:
        UmmError: a setting of a task, or one that would change the space a run was trained on.
    """
    kept = []
    if request.config is not None:
        sections = SECTIONS if request.run is None else ("seed", "data", "train")
        kept.append((request.config, only(read_yaml(request.config), sections)))
    if request.run is not None:
        run = Run(request.run)
        sections = ("latent", "cache") if request.config is not None else SECTIONS
        kept.append((str(run.config_file), only(run.config, sections)))
    for text in request.overrides:
        if text.partition("=")[0].partition(".")[0] not in SECTIONS:
            raise UmmError(f"'{text}' belongs to a task: umm diagnose takes {', '.join(SECTIONS)}.")
        if request.run is not None and text.startswith("latent."):
            raise UmmError(f"'{text}' would change what {request.run} was trained on: leave out one of them.")
        kept.append(("command line", parse_override(text)))
    name = chosen("latent", kept)
    return combine("und", [(source, of_latent(layer, name) if name else layer) for source, layer in kept])


def only(layer: DictConfig, sections: Sequence[str]) -> DictConfig:
    return OmegaConf.masked_copy(layer, [key for key in layer if key in sections])


def open_model(run: str | None, config: DictConfig, accelerator: Accelerator) -> UnifiedModel:
    """The run's model, or the space of the configuration, standardised by statistics of the training pictures."""
    if run is not None:
        return UnifiedModel.load(run, accelerator.device)
    space = build_space(config.latent).to(accelerator.device)
    if not space.normalizer.fitted:
        source = open_source(config, "train")
        facts = [space.identity(), source.identity(), config.latent.stats_images, config.seed]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        folder = assets.cache_root() / "statistics" / key
        with writing(folder, "the statistics"):
            folder.mkdir(parents=True, exist_ok=True)
        fit_normalizer(space, config, complete_cache(config, space, source) or source, Run(folder), accelerator)
    return UnifiedModel(space, {})


def complete_cache(config: DictConfig, space: LatentSpace, source: DataSource) -> LatentCache | None:
    """The source's latent cache where the configuration has one that is there and whole; none is made."""
    if config.cache.dir is None or not space.per_picture:
        return None
    folder = cache_folder(config, space, source)
    if not (folder / "meta.json").exists():
        return None
    try:
        return LatentCache.open(folder, key_facts(source, space, settings_of(config.cache)))
    except DataError:  # begun and not finished
        return None


def read_results(names: Sequence[str], taken: str) -> dict[str, dict]:
    """{name: content} of diagnose.json files, or of the folders that hold them.

    They are named by their folders, with as many folders before them as tell them apart, also from the name `taken`.

    Raises:
        UmmError: there is none.
    """
    found = {}
    for name in names:
        file = Path(name) / "diagnose.json" if Path(name).is_dir() else Path(name)
        with reading(file, "give a diagnose.json of umm diagnose, or its folder, to --against"):
            result = json.loads(file.read_text())
            result["numbers"], result["curves"]  # what every result has
        place = file.resolve()
        found[(place.parent if place.name == "diagnose.json" else place.with_suffix("")).parts] = result
    for depth in itertools.count(1):
        short = {"/".join(parts[-depth:]): result for parts, result in found.items()}
        if len(short) == len(found) and not short.keys() & {taken, "white noise"}:
            return short


# ------------------------------------------------------------------------------------------------------ measuring


def measure(request: Request, config: DictConfig, model: UnifiedModel, source: DataSource, accelerator) -> dict:
    """All numbers of one space, JSON-able; the picture grids and the basis are written on the way."""
    space, out, batch = model.space, Path(request.out), config.latent.encode_batch
    judge = open_space(request.features, accelerator.device)
    raw, images, labels = encode(request, config, space, source, model.device)
    features = judged(judge, images, batch)
    z = torch.cat([space.normalizer(part) for part in raw.split(batch)])
    battery, null = Battery(config.seed), Battery(config.seed)
    battery.latents(raw, "raw")
    battery.latents(z, "standardised")
    battery.meaning(z, labels, features, request.neighbors)
    white = torch.randn(z.shape, generator=generator(config.seed, "white noise")).to(z)
    null.latents(white, "standardised")
    null.meaning(white, labels, features, request.neighbors)
    few = images[: request.few].to(model.device).float() / 255
    battery.encoder(space, few, batch)
    if model.can_decode:
        decode = split(decoder_of(model), batch)
        battery.decoder(decode, z[: request.few], few, judge)
        draw_grids(out, decode, z[: request.few], few, config.seed)
    else:
        battery.notes.append("no decoder: give --run with a recon run on this space for what depends on one.")
    if set(space.families) & set(judge.families):
        battery.notes.append(f"the features '{judge.name}' are of the encoder's own family: they favour it.")
    facts = {"format": FORMAT, "latent": latent_facts(space), "spec": asdict(space.spec), "data": source.identity()}
    facts |= {"images": len(z), "few": len(few), "seed": config.seed, "features": judge.fingerprint()}
    if request.split == "train" and adapter_digest(space) is not None:
        battery.notes.append("no pca.safetensors: components of adapted latents are none of the space itself.")
    elif request.split == "train":
        known = {"images": len(z), "data": facts["data"]}
        save_basis(out / "pca.safetensors", space, covariances(z)[0], **known)
    facts |= {"neighbors": request.neighbors, "run": request.run, "provenance": provenance(config)}
    facts |= {"numbers": battery.numbers, "curves": battery.curves, "notes": battery.notes}
    return json.loads(json.dumps(facts | {"white_noise": {"numbers": null.numbers, "curves": null.curves}}))


def encode(
    request: Request, config: DictConfig, space: LatentSpace, source: DataSource, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Raw latents (n, C, h, w), pictures uint8 (n, 3, S, S) on the CPU, labels (n,) or None of the first n pictures."""
    cached = complete_cache(config, space, source)
    if cached is not None and "image" in cached.fields:
        rows = cached.select(*(name for name in ("latent", "image", "label") if name in cached.fields))
        found = rows.batch(range(min(request.images, len(cached))))
        return found["latent"].to(device), found["image"], found["label"].to(device) if "label" in found else None
    items, latents, images, labels = itertools.islice(source.stream(), request.images), [], [], []
    with Progress(request.images, what="encoding") as progress:
        while chunk := list(itertools.islice(items, config.latent.encode_batch)):
            found = collate([{key: item[key] for key in ("image", "label") if key in item} for item in chunk])
            latents.append(space.raw(to_device(found["image"], device)).float())
            images.append(found["image"])
            labels.append(found.get("label"))
            progress.advance(len(chunk))
    if (found := sum(map(len, images))) < LEAST:
        raise DataError(f"the {request.split} split has {found} pictures, a diagnosis needs {LEAST}: choose another.")
    return torch.cat(latents), torch.cat(images), torch.cat(labels).to(device) if labels[0] is not None else None


def judged(judge: FeatureSpace, images: Tensor, batch: int) -> Tensor:
    """Features (n, d) of uint8 pictures, on the judge's device."""
    found = []
    with Progress(len(images), what=f"features {judge.name}") as progress:
        for part in images.split(batch):
            found.append(judge.extract(part.to(device_of(judge))))
            progress.advance(len(part))
    return torch.cat(found)


def device_of(judge: FeatureSpace) -> torch.device:
    network = getattr(judge, "network", None)
    return torch.device("cpu") if network is None else next(network.parameters()).device


def decoder_of(model: UnifiedModel):
    """Standardised latents -> pictures, unclamped, with gradients where the decoder has them."""
    if "decoder" in model.heads:
        return lambda z: model.heads["decoder"](model.space.normalizer.undo(z))
    return model.space.decode


def draw_grids(out: Path, decode, z: Tensor, images: Tensor, seed: int) -> None:
    """Interpolations and decoded noisy latents, to be looked at."""
    first, second = z[:SHOWN], z[SHOWN : 2 * SHOWN].roll(1, 0)
    count = min(len(first), len(second))
    times = [step / STEPS for step in range(STEPS + 1)]
    rows, names = [], []
    for name, path in {"line": lerp, "great circle": slerp}.items():
        columns = torch.stack([decode(path(first[:count], second[:count], t)).clamp(0, 1) for t in times], 1)
        rows, names = rows + list(columns[: SHOWN // 2]), names + [name] * min(count, SHOWN // 2)
    if rows:
        save_grid(out / "interpolations.png", rows, rows=names, columns=[f"{t:g}" for t in times])
    noise = PictureRNG(range(len(first)), seed, "diagnose noise", device=z.device).randn(*z.shape[1:])
    columns = torch.stack([images[:SHOWN], *(decode(first + s * noise).clamp(0, 1) for s in NOISES)], 1)
    save_grid(out / "noise.png", list(columns), columns=["picture", *(f"noise {s:g}" for s in NOISES)])


# ---------------------------------------------------------------------------------------------------------- telling


def differences(result: dict, others: dict[str, dict]) -> list[str]:
    """A sentence for each other space that was not measured on the same pictures in the same way."""
    sentences = []
    for name, other in others.items():
        if unlike := [key for key in SAME if other.get(key) != result[key]]:
            sentences.append(f"{name} was measured with other {', '.join(unlike)}: differences may come from that.")
    return sentences


def table(name: str, result: dict, others: dict[str, dict]) -> str:
    """The numbers under their questions: this space with its intervals, white noise, the other spaces."""
    columns = [values_of(other["numbers"]) for other in others.values()]
    white = {row["metric"]: row["value"] for row in result["white_noise"]["numbers"]}
    head = ["", "", name, "95 % interval", "white noise", *others, "n", "better"]
    rows: list[list[str] | str] = [head]
    for question, metrics in QUESTIONS.items():
        found = [row for metric in metrics for row in result["numbers"] if row["metric"] == metric]
        rows += [question] if found else []
        for row in found:
            key = (row["metric"], row["coordinates"])
            cells = [f"  {row['metric']}", row["coordinates"], short(row["value"])]
            cells.append(f"{short(row['low'])} .. {short(row['high'])}" if "low" in row else "")
            cells += [short(white.get(row["metric"])), *(short(column.get(key)) for column in columns)]
            direction = {True: "higher", False: "lower", None: ""}[row["higher_is_better"]]
            rows.append([*cells, str(row["n"]), direction])
    return aligned(rows)


def values_of(numbers: list[dict]) -> dict[tuple[str, str], float]:
    return {(row["metric"], row["coordinates"]): row["value"] for row in numbers}


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str] | str]) -> str:
    """Cells in columns; a plain string is a line of its own."""
    listed = [row for row in rows if not isinstance(row, str)]
    widths = [max(len(row[i]) for row in listed) for i in range(len(listed[0]))]
    return "\n".join(
        row if isinstance(row, str) else "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )
