"""Ask a model the questions of a split, and make numbers of its answers: overall and by kind, beside the blind ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import DictConfig
from torch import Tensor

from umm.build import open_cache, open_source
from umm.data.base import Question, collate
from umm.errors import DataError, MissingHead
from umm.heads._answering import AnsweringHead, require_answers
from umm.judging import Records, share_of
from umm.loader import to_device
from umm.metrics._vqa import VERSION, score
from umm.model import UnifiedModel
from umm.paired import clustered_bootstrap
from umm.progress import Progress
from umm.rng import derive_seed


@dataclass(frozen=True)
class Answered:
    """One question and what was answered, with and without the picture."""

    item: str  # <picture>#<number of the question>
    image: str
    question: Question
    answers: dict[str, str]  # head -> its answer
    known: bool  # whether a right answer is among those the head can give

    def score(self, head: str) -> float:
        return score(self.answers[head], self.question)


class Number(NamedTuple):
    """A mean over questions."""

    head: str  # or "<head> - blind", the difference
    kind: str  # of the questions; empty: all
    values: list[float]
    images: list[str]  # the picture of each question

    @property
    def metric(self) -> str:
        return f"accuracy on {self.kind}" if self.kind else "accuracy"


def answering_heads(model: UnifiedModel) -> dict[str, AnsweringHead]:
    """{name: head} of the heads that answer questions, the blind one last.

    Raises:
        MissingHead: there is none.
    """
    found = {name: head for name, head in model.heads.items() if isinstance(head, AnsweringHead)}
    if not found:
        raise MissingHead(
            "this model answers no questions: train it to with umm train --task und und.kind=vqa, or und.kind=llm."
        )
    return dict(sorted(found.items(), key=lambda pair: pair[0] == "blind"))


@torch.no_grad()
def ask(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> list[Answered]:
    """Every question of `eval.split` to every head that answers; whole and in order on every process.

    Raises:
        DataError: there are no questions, they have no answers to compare with, or the model knows none of them.
    """
    heads, found = answering_heads(model), []
    pictures = Pictures(model, config, accelerator)
    with Progress(len(pictures), enabled=accelerator.is_main_process, what="asking") as progress:
        for indices in share_of(len(pictures), accelerator, config.eval.batch_size):
            latents, ids, questions = pictures.batch(indices)
            every = [question for some in questions for question in some]
            require_answers(every)
            where = torch.tensor([i for i, some in enumerate(questions) for _ in some], dtype=torch.long)
            texts = [question.text for question in every]
            answers = {
                name: head.answer(torch.zeros_like(latents) if name == "blind" else latents, texts, where)
                for name, head in (heads.items() if every else ())
            }
            numbers = [number for some in questions for number in range(len(some))]
            first = next(iter(heads.values()))
            for n, question in enumerate(every):
                image = ids[where[n]]
                given = {name: some[n] for name, some in answers.items()}
                known = first.can_answer(question)
                found.append((indices[where[n]], Answered(f"{image}#{numbers[n]}", image, question, given, known)))
            progress.advance(len(indices) * accelerator.num_processes)
    found = gather_object(found)
    if not found:
        raise DataError(f"the {config.eval.split} split of '{config.data.name}' has no questions to ask.")
    if not any(answered.known for _, answered in found):
        raise DataError(
            f"not one of the {len(found)} questions of the {config.eval.split} split has an answer this model knows: "
            "ask about the data set it was trained on."
        )
    return [answered for _, answered in sorted(found, key=lambda pair: pair[0])]


class Pictures:
    """Standardised latents, ids and questions of `eval.split`: from the latent cache where the run has one."""

    def __init__(self, model: UnifiedModel, config: DictConfig, accelerator: Accelerator):
        source = open_source(config, config.eval.split)
        if source.streaming:
            raise DataError("an evaluation needs to count its pictures: set data.streaming=false, or use a local copy.")
        self.model, self.device, self.cached = model, accelerator.device, config.cache.dir is not None
        self.data = open_cache(config, model.space, source, accelerator) if self.cached else source
        self.count = min(len(source), config.eval.images or len(source))

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: list[int]) -> tuple[Tensor, list[str], list[list[Question]]]:
        items = self.data.batch(indices) if self.cached else collate([self.data[i] for i in indices])
        if self.cached:
            latents = self.model.space.normalizer(items["latent"].to(self.device))
        else:
            latents = self.model.encode(to_device(items["image"], self.device))
        return latents, items["id"], [some or [] for some in items.get("questions", [])]


def numbers_of(answered: list[Answered]) -> list[Number]:
    """Accuracies of all heads and what the pictures add, overall and by kind."""
    heads, found = list(answered[0].answers), []
    kinds = sorted({one.question.kind for one in answered} - {""})
    for kind in ["", *kinds]:
        some = [one for one in answered if kind in ("", one.question.kind)]
        images = [one.image for one in some]
        scores = {head: [one.score(head) for one in some] for head in heads}
        if len(heads) > 1:
            seeing, blind = scores.values()
            scores[" - ".join(heads)] = [one - other for one, other in zip(seeing, blind)]
        found += [Number(head, kind, values, images) for head, values in scores.items()]
    return found


def measured(number: Number, seed: int, resamples: int) -> dict:
    """{"value", "low", "high", "n"}; the interval resamples pictures, which bring all their questions."""
    draw = np.random.default_rng(derive_seed(seed, "bootstrap", number.head, number.kind))
    interval = clustered_bootstrap(number.values, number.images, draw, resamples)
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}


def records(answered: list[Answered], model: UnifiedModel, config: DictConfig) -> Records:
    """The table of an evaluation."""
    found = Records(notes=notes(answered, model))
    fixed = {"higher_is_better": True, "version": VERSION, "headline": True, "conflict": None}
    for number in numbers_of(answered):
        values = measured(number, config.seed, config.eval.bootstrap)
        found.numbers.append({"metric": f"{number.head} {number.metric}", **values, **fixed})
    for head in answered[0].answers:
        found.items[f"{head} accuracy"] = {one.item: one.score(head) for one in answered}
    return found


def notes(answered: list[Answered], model: UnifiedModel) -> list[str]:
    """What a reader of the numbers must know: how much could not be answered at all."""
    unknown = sum(not one.known for one in answered)
    said = [model.facts["coverage"]] if model.facts.get("coverage") else []
    if unknown:
        said.append(f"{unknown} of {len(answered)} questions have no answer among the known ones: always wrong")
    if len(answered[0].answers) < 2:
        said.append("no blind baseline was trained (und.blind=false): how much these answers owe to pictures is open")
    return said
