"""Question answering on a frozen latent space: und.kind=vqa or llm.

Two networks learn side by side from the same questions in the same order: one sees the latents, the other, the blind
baseline, sees zeros in their place (a learnt constant, once projected). Only what the first knows beyond the second
was read from pictures.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from umm import cache
from umm.build import cache_folder, open_source, settings_of
from umm.data.base import DataSource, Question, collate
from umm.errors import ConfigError, DataError
from umm.heads._answering import AnsweringHead, require_answers
from umm.heads.llm import LLMHead
from umm.heads.vqa import VQAHead
from umm.judging import Records
from umm.language import all_words, pretrained_tiny
from umm.latents.base import LatentSpace
from umm.loader import first, to_device
from umm.metrics._vqa import common_answers
from umm.model import UnifiedModel
from umm.progress import Progress
from umm.rng import PictureRNG, seeded_init
from umm.runs import write_atomic
from umm.tasks._answering_judging import ask, records
from umm.tasks.base import Phase, Task

BLIND = "blind"


class Answering(Task):
    """Trains a `VQAHead` or an `LLMHead`, and its blind twin where `und.blind` is set."""

    name = "und"
    shown = 8  # pictures whose questions are asked for a sample

    def __init__(self, config: DictConfig, space: LatentSpace, val: DataSource | None):
        super().__init__(config, space, val)
        self.settings, self.kind = settings_of(config.und), config.und.kind
        if self.settings.train == "trunk":
            raise ConfigError(f"und.kind={self.kind} reads latents: only und.kind=classify knows und.train=trunk.")
        self.keys = ("image" if config.cache.dir is None else "latent", "questions")
        texts = list(training_texts(config, space)) if reads_texts(config) else []
        with seeded_init(self.seed, self.name, self.kind):
            head = build_head(config, space, texts)
        self.networks: dict[str, AnsweringHead] = {self.kind: head}
        if self.settings.blind:
            self.networks[BLIND] = twin(head)
        self.phases = [
            Phase(name, network, self.settings.optim, self.settings.ema) for name, network in self.networks.items()
        ]
        self.coverage = coverage(head, texts)
        if self.coverage and PartialState().is_main_process:
            print(self.coverage)

    def view(self, data):
        return first(data, self.settings.limit, "und.limit")

    # ------------------------------------------------------------------------------------------------------ training

    def loss(self, phase: str, batch: dict, rng: PictureRNG, images: int) -> dict[str, Tensor]:
        """Mean over pictures of the mean over their questions: a picture counts once, however much is asked of it."""
        head, latents = self.networks[phase], self.space.normalizer(batch["latent"])
        if isinstance(head, LLMHead):
            head.stage(images)
        if "asked" not in batch:  # the first phase
            batch["asked"] = self.asked(batch.get("questions", ()), latents.device)
        inputs, targets, pictures, weights = batch["asked"]
        forward = next(p.forward for p in self.phases if p.name == phase)
        seen = torch.zeros_like(latents) if phase == BLIND else latents
        return {"loss": (head.losses(forward(seen, **inputs, pictures=pictures), targets) * weights).sum()}

    def asked(self, questions: Sequence[list[Question]], device: torch.device) -> tuple[dict, Tensor, Tensor, Tensor]:
        """Inputs and targets of all questions of B pictures, the picture (Q,) and the weight (Q,) of each."""
        counts = torch.tensor([len(some) for some in questions])
        every = [question for some in questions for question in some]
        if not every:
            raise no_questions(self.config)
        require_answers(every)
        inputs, targets = self.networks[self.kind].examples(every)
        pictures = torch.arange(len(questions)).repeat_interleave(counts)
        weights = 1 / (counts[pictures] * len(questions))
        inputs = {key: value.to(device) for key, value in inputs.items()}
        return inputs, targets.to(device), pictures.to(device), weights.to(device)

    # ------------------------------------------------------------------------------------------------------- results

    @torch.no_grad()
    def sample(self, modules: dict[str, nn.Module], file: Path) -> None:
        """Questions about validation pictures, their answers and the right ones, as a text file."""
        if self.val is None:
            return
        items = [self.val[i] for i in range(min(self.shown, len(self.val)))]
        device = self.space.normalizer.mean.device
        images = to_device(collate([{"image": item["image"]} for item in items])["image"], device)
        latents, lines = self.space.encode(images), []
        for item, latent in zip(items, latents):
            questions = item.get("questions") or []
            texts = [question.text for question in questions]
            where = torch.zeros(len(texts), dtype=torch.long)
            answers = modules[self.kind].answer(latent[None], texts, where) if texts else []
            lines += [f"{item['id']}: {q.text} {found} ({q.answer})" for q, found in zip(questions, answers)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file.with_suffix(".txt"), "\n".join(lines) + "\n")

    def heads(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: modules[name] for name in self.networks}

    def head_settings(self) -> dict[str, dict]:
        settings = OmegaConf.to_container(self.config.und[self.kind])
        return {name: {"settings": settings, "facts": head.facts()} for name, head in self.networks.items()}

    def facts(self) -> dict:
        return {"trained_with": dict.fromkeys(self.space.families, "encoder"), "coverage": self.coverage}

    @staticmethod
    def evaluate(model: UnifiedModel, config: DictConfig, accelerator: Accelerator) -> Records:
        """Answers to the questions of `eval.split`, overall and by kind, beside the blind baseline's."""
        return records(ask(model, config, accelerator), model, config)


# ------------------------------------------------------------------------------------------------------------ building


def reads_texts(config: DictConfig) -> bool:
    """Whether the head is made from the training set's words; a pretrained language model has its own."""
    return config.und.kind == "vqa" or config.und.llm.model == "tiny"


def no_questions(config: DictConfig) -> DataError:
    return DataError(
        f"pictures of '{config.data.name}' have no questions: use shapes or easy_vqa, or name the columns of a hub "
        "data set with data.columns={question: ..., answer: ...}."
    )


def training_texts(config: DictConfig, space: LatentSpace) -> Iterator[dict]:
    """{"questions", "caption" where there is one} of the pictures trained on, from the latent cache where there is one.

    Raises:
        DataError: there are no questions, or one has no answer.
    """
    source, limit = open_source(config, "train"), config.und.limit
    if config.cache.dir is None:
        items = source.stream()
    else:
        made = cache.LatentCache.open(cache_folder(config, space, source))
        made = made.select(*[name for name in made.fields if name in ("id", "caption", "questions")])
        items = (made[i] for i in range(len(made)))
    total = None if source.streaming else min(len(source), limit or len(source))
    items = itertools.islice(items, config.train.images if total is None else total)
    with Progress(total, enabled=PartialState().is_main_process, what="reading questions") as progress:
        for item in items:
            if "questions" not in item:
                raise no_questions(config)
            require_answers(item["questions"])
            yield {key: item[key] for key in ("caption", "questions") if item.get(key) is not None}
            progress.advance(1)


def build_head(config: DictConfig, space: LatentSpace, texts: list[dict]) -> AnsweringHead:
    """The head for a training set: its words and answers, or its language model."""
    questions = [question for item in texts for question in item["questions"]]
    if config.und.kind == "vqa":
        settings = settings_of(config.und.vqa)
        return VQAHead.from_config(settings, space.spec, vocabulary(questions, settings.answers))
    settings = settings_of(config.und.llm)
    if settings.model != "tiny":
        return LLMHead.from_config(settings, space.spec)
    with PartialState().main_process_first():
        tokenizer, model = pretrained_tiny(settings.tiny, documents(texts, settings.template), config.seed)
    return LLMHead.on_tiny(settings, space.spec, tokenizer, model)


def vocabulary(questions: list[Question], limit: int | None) -> str:
    """JSON of the words of the questions, the most frequent answers, and whether several raters gave them.

    Raises:
        DataError: fewer than two answers are left, so there is nothing to choose.
    """
    answers = common_answers(questions, limit)
    if len(answers) < 2:
        raise DataError(f"{len(questions)} training questions have {len(answers)} different answers: nothing to learn.")
    soft = any(len(question.answers) > 1 for question in questions)
    return json.dumps({"words": all_words(q.text for q in questions), "answers": answers, "soft": soft})


def documents(texts: list[dict], template: str) -> list[str]:
    """What a small language model reads first: captions, and questions with their answers, without pictures."""
    found = []
    for item in texts:
        found += [item["caption"]] if "caption" in item else []
        for question in item["questions"]:
            text = template.replace("{image}", "").replace("{question}", question.text)
            found.append(text.replace("{answer}", question.answer).strip())
    return found


def twin(head: AnsweringHead) -> AnsweringHead:
    """A copy that shares the frozen weights and has its own of what is trained."""
    return copy.deepcopy(head, {id(p): p for p in head.parameters() if not p.requires_grad})


def coverage(head: AnsweringHead, texts: list[dict]) -> str:
    """How many of the training questions a closed head could answer at all; nothing where answers are free."""
    if not isinstance(head, VQAHead):
        return ""
    questions = [question for item in texts for question in item["questions"]]
    known = sum(map(head.can_answer, questions))
    share = f"{known} of {len(questions)} training questions ({known / len(questions):.2%})"
    return f"the {len(head.answers)} known answers fit {share}"
