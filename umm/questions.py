"""`python -m umm.probe vqa`: train what answers questions on a latent space, ask it, and say what the pictures added.

The training is an ordinary run (`<out>/run`, which umm eval and umm.load read as well); a run that answers questions
already is only asked.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from umm.build import build_space, open_source
from umm.data.base import Question
from umm.errors import ConfigError
from umm.evaluate import run_config
from umm.heads._answering import AnsweringHead
from umm.metrics._vqa import raters
from umm.model import UnifiedModel
from umm.probing import first_row
from umm.runs import Run
from umm.samples import Results, sample
from umm.subjects import subject_config
from umm.tasks._answering import build_head, coverage, no_questions
from umm.tasks._answering_judging import Answered, answering_heads, ask, measured, notes, numbers_of
from umm.train import train

LOOKED_AT = 200  # pictures whose questions a dry run reads


def probe_vqa(
    target: str, file: str | None, overrides: Sequence[str], out: str, limit: int | None = None, dry_run: bool = False
) -> str:
    """What `vqa` does; returns the table, or with `dry_run` the plan.

    Args:
        target: a latent space as NAME or NAME:WEIGHTS, or a run folder: asked as it is where it answers questions,
            else its latent space is taken.
        limit: pictures of each split; of a trained run only those asked about.
    """
    run = Run(target) if Path(target).is_dir() else None
    trained = run is not None and run.config.task == "und" and run.config.und.kind != "classify"
    if trained and file:
        raise ConfigError(f"--config {file} says how to train, and {target} is trained: leave it out.")
    if any(text.startswith("run=") for text in overrides):
        raise ConfigError(f"run=... would be ignored: this command trains in {Path(out) / 'run'}, give --out.")
    config = trained_config(run, overrides, limit) if trained else new_config(target, run, file, overrides, out, limit)
    if dry_run:
        return plan(config)
    results = Results(out, config)
    if not results.has(config.und.kind):
        started = time.perf_counter()
        folder = run.folder if trained else train(config).parent
        accelerator = Accelerator(cpu=config.train.device == "cpu")
        model = UnifiedModel.load(folder, accelerator.device)
        answered = ask(model, config, accelerator)
        if not accelerator.is_main_process:
            return ""
        trained_on = 0 if trained else config.train.images
        write(results, answered, model, config, time.perf_counter() - started, trained_on)
    return results.table()


def new_config(
    target: str, run: Run | None, file: str | None, overrides: Sequence[str], out: str, limit: int | None
) -> DictConfig:
    """Of the run to train. Questions are answered in closed form unless und.kind says otherwise."""
    limited = [f"data.limit={limit}"] if limit else []
    config = subject_config(target, run, file, [*overrides, *limited])
    config.und.kind = "vqa" if config.und.kind == "classify" else config.und.kind
    config.run = str(Path(out) / "run")
    return asked_on(config, overrides)


def trained_config(run: Run, overrides: Sequence[str], limit: int | None) -> DictConfig:
    """Of a run that answers questions already."""
    return asked_on(run_config(run, [*overrides, *([f"eval.images={limit}"] if limit else [])]), overrides)


def asked_on(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The split of probes, unless the command line names one for evaluation."""
    if not any(text.startswith("eval.split=") for text in overrides):
        config.eval.split = config.probe.split
    return config


def write(
    results: Results, answered: list[Answered], model: UnifiedModel, config: DictConfig, seconds: float, trained_on: int
) -> None:
    """A line for each head with its samples, one for the gap between them, and the same for each kind of question."""
    heads, pictures = answering_heads(model), len({one.image for one in answered})
    for note in notes(answered, model):
        results.note(note)
    numbers = numbers_of(answered)
    for place, number in enumerate(numbers, start=1):
        task = f"{number.head}/{number.kind}" if number.kind else number.head
        row = {"task": task, "method": number.head, "metric": number.metric}
        row |= measured(number, config.seed, config.eval.bootstrap)
        whole = number.head in heads and not number.kind
        if whole:
            flops = cost(heads[number.head], [one.question for one in answered[:64]])  # of one question
            asked = 3 * trained_on * len(answered) / pictures + len(answered)  # a backward pass costs two forward ones
            row |= {"seconds": round(seconds / len(heads), 3), "flops": flops * asked, "images": trained_on}
        results.add(row, sample_lines(answered, number.head) if whole else (), more=place < len(numbers))


def sample_lines(answered: list[Answered], head: str) -> Iterator[dict]:
    for number, one in enumerate(answered):
        asked = {"question": one.question.text, "kind": one.question.kind, "answers": list(raters(one.question))}
        yield sample(
            head, number, one.item, one.question.answer, one.answers[head], one.score(head), one.image, **asked
        )


def cost(head: AnsweringHead, questions: list[Question]) -> float:
    """FLOPs of one question, forward."""
    inputs, _ = head.examples(questions)
    device = next(head.parameters()).device
    latents = torch.zeros(1, *head.spec.shape, device=device)
    where = torch.zeros(len(questions), dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(latents, **{key: value.to(device) for key, value in inputs.items()}, pictures=where)
    return counter.get_total_flops() / len(questions)


def plan(config: DictConfig) -> str:
    """Shapes, cost, and the first row as it is read; writes nothing."""
    config = config.copy()
    config.und.llm.tiny.steps, config.cache.dir = 0, None  # nothing is trained, no cache is made
    source, space = open_source(config, "train"), build_space(config.latent)
    items = list(itertools.islice(source.stream(), LOOKED_AT))
    texts = [item for item in items if item.get("questions")]
    if not texts:
        raise no_questions(config)
    head = build_head(config, space, texts)
    questions = [question for item in texts for question in item["questions"]]
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    each = cost(head, questions[:64]) * len(questions) / len(items)
    kinds = Counter(question.kind for question in questions)
    lines = [f"{len(source)} train, {len(open_source(config, config.eval.split))} {config.eval.split} pictures"]
    lines += first_row(items[0], source.classes)
    weights = f"{trained:,} trained of {head.parameter_count():,} weights"
    lines += [f"latents {space.spec.shape}, {config.und.kind}: {weights}"]
    lines += [f"first {len(items)} pictures: {len(questions)} questions; {coverage(head, texts) or 'free answers'}"]
    lines += ["  " + ", ".join(f"{count} {kind or 'of no kind'}" for kind, count in sorted(kinds.items()))]
    twins = 2 if config.und.blind else 1
    total = 3 * twins * each * config.train.images / 1e12
    lines += [f"training: {config.train.images:,} pictures, about {total:,.2f} TFLOP in the heads"]
    return "\n".join(lines)
