"""`umm compare run`: every space with every seed, in parallel, resumable; what it finds lies in files.

<folder>/declaration.json              sealed before the first run
<folder>/<space>/seed<i>/<stage>/      an ordinary run folder, and result.json once it is judged
<folder>/<space>/seed<i>/result.json   all of its stages
<folder>/<space>/seed<i>/cache/        latents of a space that was trained here, until they are no longer needed
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from umm.compare import STAGES, Declaration, read_declaration
from umm.declared import configuration
from umm.many_runs import RESULT, Job, Judge, Timer, keep, perform, results, sigterm_raises, train_and_judge, work
from umm.runs import Run, commit, lock, now
from umm.workers import cores

if TYPE_CHECKING:
    from umm.latents.base import LatentSpace

Settings = dict[str, Any]
ENCODING, CACHE = "encode", "cache"  # folders beside those of the stages
FEW = 8  # pictures whose encoding is counted


def run_compare(
    file: str | Path,
    jobs: int | None = None,
    limit_seeds: int | None = None,
    out: str | None = None,
    judge: Judge | None = None,
) -> str:
    """Run what is not finished of a comparison; returns what came of it.

    Args:
        file: the declaration, YAML.
        jobs: spaces at work at a time; None: one a core.
        limit_seeds: only the first so many seeds, for a first look; the rest can follow.
        out: folder; None: the declaration's.
        judge: what makes rows of a configuration; None: train the run and evaluate it.

    Raises:
        UmmError: some runs failed; all others were done before.
    """
    declared = read_declaration(file)
    folder = Path(out or declared.folder)
    declared.seal(folder)
    lock(folder)
    todo = all_jobs(declared, folder, limit_seeds)
    with sigterm_raises():
        work(todo, declared.about or folder.name, jobs or cores(), partial(perform_space, judge))
    done = {name: results(folder / name, declared.sha256) for name in declared.spaces}
    lines = [f"all {len(todo)} of {len(done)} spaces and their seeds are in: umm compare report {folder}"]
    return "\n".join(lines + [f"warning: {name}: {text}" for name, text in warnings_of(done).items()])


def all_jobs(declared: Declaration, folder: Path, limit_seeds: int | None) -> list[Job]:
    """Seed by seed, so that a comparison cut short is one with fewer seeds."""
    return [
        Job(name, seed, folder / name / f"seed{seed}", "compare",
            {stage: declared.settings(name, stage) for stage in STAGES if stage in declared.stages}, declared.sha256)
        for seed in declared.seeds[:limit_seeds]
        for name in declared.spaces
    ]  # fmt: skip


def warnings_of(done: dict[str, dict[int, dict]]) -> dict[str, str]:
    """{space: what its generator warns of}."""
    said = {name: next((one["space"]["warning"] for one in found.values()), None) for name, found in done.items()}
    return {name: text for name, text in said.items() if text}


# ------------------------------------------------------------------------------------------- one space, one seed


def perform_space(judge: Judge | None, job: Job) -> None:
    """Do the stages that are not done, in order, and write their results together, last of all."""
    from umm.build import build_space

    configs = {stage: configuration(stage, given, f"'{job.group}'") for stage, given in job.settings.items()}
    space = build_space(configs[STAGES[0]].latent)
    kind, facts = kind_of(space), facts_of(space, configs.get("gen"))
    stages = chained(job, kind)
    order = [STAGES[0], ENCODING] if kind == "trained" else [ENCODING, STAGES[0]]
    for stage in [*order, *(stage for stage in stages if stage != STAGES[0])]:
        one = Job(job.group, job.seed, job.folder / stage, stage, stages.get(stage, {}), job.sha256)
        if one.done:
            continue
        if stage == ENCODING:
            encode(one, stages, facts["flops"])
        else:
            own = as_it_is if kind == "complete" and stage == STAGES[0] else train_and_judge
            perform(judge or own, one)
    found = {stage: json.loads((job.folder / stage / RESULT).read_text()) for stage in [*order, *stages]}
    rows = [row | {"part": stage} for stage in stages for row in found[stage]["rows"]]
    costs = {stage: one["costs"] for stage, one in found.items()}
    keep(job, rows, costs, {"kind": kind, "space": facts, "commit": commit(), "finished": now()})
    shutil.rmtree(job.folder / CACHE, ignore_errors=True)


def kind_of(space: LatentSpace) -> str:
    """trained: has networks to train. complete: has a decoder of its own. frozen: needs a decoder."""
    from umm.latents.base import LatentSpace

    if space.stages:
        return "trained"
    return "frozen" if type(space).decode is LatentSpace.decode else "complete"


def chained(job: Job, kind: str) -> dict[str, Settings]:
    """{stage: settings} of the runs: later ones read what the recon run has made."""
    recon, stages = job.folder / STAGES[0], {}
    for stage, given in job.settings.items():
        mine = given | {"run": str(job.folder / stage), "seed": job.seed}
        if given.get("cache.dir") not in (None, "auto"):
            mine["cache.dir"] = str(Path(given["cache.dir"]) / job.group)
        if stage == STAGES[0] and kind != "frozen":  # the space's own decoder is what is trained or judged
            mine = {key: value for key, value in mine.items() if not key.startswith("recon.decoder.")}
        if stage == STAGES[0] and kind == "trained":
            mine["cache.dir"] = None
        elif kind == "trained":
            mine["latent.weights"] = str(recon)
            mine["cache.dir"] = given.get("cache.dir") and str(job.folder / CACHE)
        elif stage == "gen" and kind == "frozen":
            mine["gen.decoder"] = str(recon)
        stages[stage] = mine
    return stages


def encode(job: Job, stages: dict[str, Settings], flops: int) -> None:
    """Fill the caches that the stages read, and write down what it cost: where nothing of them was there before.

    All seeds of a space that is not trained here share theirs. `flops`: of a picture.
    """
    from accelerate import Accelerator

    from umm.build import build_space, cache_folder, open_cache, open_source

    timer, caches = Timer(), {}
    for stage, given in stages.items():
        config = configuration(stage, given, f"'{job.group}'")
        if config.cache.dir is None:
            continue
        accelerator = Accelerator(cpu=config.train.device == "cpu")
        space = build_space(config.latent).to(accelerator.device)
        read = ["train", *([config.eval.split] if config.eval.cached else [])]
        for source in (open_source(config, split) for split in read):
            folder = cache_folder(config, space, source)
            if folder not in caches:
                begun = folder.exists()
                made = open_cache(config, space, source, accelerator)
                caches[folder] = 0 if begun else len(made)
    costs, images = {}, sum(caches.values())
    if caches and all(caches.values()):
        costs = timer.costs() | {"images": images, "flops": images * flops}
    keep(job, [], costs, {"finished": now()})


def facts_of(space: LatentSpace, gen: DictConfig | None) -> dict[str, Any]:
    """Shape, parameters, operations to encode a picture, and what a generator that is too narrow for it warns of."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from umm.heads.dit import too_narrow

    spec = space.spec
    images = torch.zeros(FEW, 3, spec.image_size, spec.image_size, device=space.normalizer.mean.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        space.raw(images)
    found = {"shape": list(spec.shape), "parameters": sum(p.numel() for p in space.parameters())}
    found |= {"flops": counter.get_total_flops() // FEW}
    return found | {"warning": too_narrow(gen.gen.dit, spec) if gen is not None else None}


def as_it_is(config: DictConfig) -> tuple[list[dict], dict[str, float]]:
    """Judge the reconstructions of a space that comes with a decoder: nothing is trained."""
    from accelerate import Accelerator

    from umm.build import build_space, fit_normalizer, training_data
    from umm.evaluate import evaluate, write
    from umm.model import UnifiedModel

    run, accelerator = Run.create(config), Accelerator(cpu=config.train.device == "cpu")
    space = build_space(config.latent).to(accelerator.device)
    fit_normalizer(space, config, training_data(config, space, accelerator), run, accelerator)
    facts = {"trained_with": dict.fromkeys(space.families, "training of the latent space")}
    records = evaluate(UnifiedModel(space, {}, facts), config, accelerator)
    write(run, records, config)
    return records.numbers, {"images": 0, "flops": 0, "parameters": 0}
