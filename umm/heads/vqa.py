"""Closed-vocabulary question answering: the words of a question look at the latent's tokens, one answer is chosen.

B pictures, Q questions, L words, N = h * w latent tokens, D width, H heads, A answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.data.base import Question
from umm.errors import ConfigError
from umm.heads._answering import PAD, AnsweringHead, padded, pictures_of
from umm.language import PretrainedText, Words
from umm.latents.base import LatentSpec
from umm.layers import Mlp, sincos_2d, tokens_of
from umm.metrics._vqa import soft_scores
from umm.settings import VQASettings


class Attention(nn.Module):
    """x (Q, L, D) attends to context (B, N, D), the one of its picture; `mask` (Q, N) is True where it may look."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, pictures: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (Q, H, L, D/H)
        key, value = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D/H)
        if pictures is not None:
            key, value = key[pictures], value[pictures]
        mask = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # (Q, L, D)


class Block(nn.Module):
    """Pre-norm: words look at each other, then (if `looks`) at the picture, then an MLP."""

    def __init__(self, dim: int, heads: int, looks: bool):
        super().__init__()
        self.norm1, self.among = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.at_picture = (nn.LayerNorm(dim), Attention(dim, heads)) if looks else (None, None)
        self.norm3, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, mask: Tensor, tokens: Tensor, pictures: Tensor) -> Tensor:
        words = self.norm1(x)
        x = x + self.among(words, words, mask=mask)
        if self.at_picture is not None:
            x = x + self.at_picture(self.norm2(x), tokens, pictures)
        return x + self.mlp(self.norm3(x))


class VQAHead(AnsweringHead):
    """Logits of A known answers (Bottom-Up Attention's targets, arXiv 1707.07998; a transformer instead of its GRU).

    Args:
        spec: shape of the latents.
        settings: sizes.
        text: reads the questions, (Q, L) ids -> (Q, L, D).
        answers: the known answers, normalised.
        soft: several raters a question: each answer has its own score, trained with binary cross-entropy. Else one
            answer is right, trained with cross-entropy.
    """

    Config = VQASettings

    def __init__(
        self, spec: LatentSpec, settings: VQASettings, text: Words | PretrainedText, answers: list[str], soft: bool
    ):
        super().__init__()
        dim = settings.width
        if settings.depth < 1:
            raise ConfigError("vqa.depth must be at least 1: without such a block the head never sees the picture.")
        self.spec, self.text, self.answers, self.soft = spec, text, answers, soft
        self.answer_index = {answer: index for index, answer in enumerate(answers)}
        self.summary = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.project = nn.Sequential(nn.Linear(spec.channels, dim), nn.LayerNorm(dim))
        self.register_buffer("places", sincos_2d(dim, spec.height, spec.width), persistent=False)  # (N, D)
        looks = [False] * settings.text_depth + [True] * settings.depth
        self.blocks = nn.ModuleList(Block(dim, settings.heads, look) for look in looks)
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, len(answers))
        if isinstance(text, PretrainedText):
            self.leave_out_pretrained("text.encoder")

    @classmethod
    def from_config(cls, config: VQASettings, spec: LatentSpec, vocabulary: str, weights: str | None = None) -> VQAHead:
        """Build for a training set.

        Args:
            vocabulary: JSON of {"words", "answers", "soft"}, see `umm.tasks._answering.vocabulary`.
            weights: sha256 of the pretrained text encoder the head was trained with; None: whatever is found.
        """
        if config.width % config.heads or config.width % 4:
            raise ConfigError(f"vqa.width={config.width} must be a multiple of 4 and of vqa.heads={config.heads}.")
        known = json.loads(vocabulary)
        scratch = config.text == "words"
        text = Words(known["words"], config.width) if scratch else PretrainedText(config.text, config.width, weights)
        return cls(spec, config, text, known["answers"], known["soft"])

    @classmethod
    def tiny(cls, spec: LatentSpec) -> VQAHead:
        text = Words(["is", "there", "a", "circle", "red", "?"], 16)
        return cls(spec, VQASettings(width=16, heads=2, depth=1), text, ["yes", "no", "red"], soft=False)

    def facts(self) -> dict[str, str]:
        """What `from_config` needs to build this head again."""
        words = self.text.words if isinstance(self.text, Words) else []
        found = {"vocabulary": json.dumps({"words": words, "answers": self.answers, "soft": self.soft})}
        return found if isinstance(self.text, Words) else found | {"weights": self.text.weights}

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{"words": (Q, L)}."""
        return {"words": padded(self.text.ids(texts))}

    def examples(self, questions: Sequence[Question]) -> tuple[dict[str, Tensor], Tensor]:
        """Targets (Q, A) are the accuracy each answer would get; unknown answers have no column."""
        scores = torch.zeros(len(questions), len(self.answers))
        for row, question in zip(scores, questions):
            for answer, value in soft_scores(question).items():
                if answer in self.answer_index:
                    row[self.answer_index[answer]] = value
        return self.inputs([question.text for question in questions]), scores

    def forward(self, latents: Tensor, words: Tensor, pictures: Tensor | None = None) -> Tensor:
        """Standardised latents (B, C, h, w), word ids (Q, L) padded with PAD -> logits (Q, A)."""
        pictures = pictures_of(latents, len(words), pictures)
        tokens = self.project(tokens_of(latents)) + self.places  # (B, N, D)
        mask = words != PAD
        text = self.text(words.clamp_min(0), mask)  # (Q, L, D)
        x = torch.cat([self.summary.expand(len(text), -1, -1), text], dim=1)  # (Q, 1 + L, D)
        mask = F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, mask, tokens, pictures)
        return self.classify(self.norm(x[:, 0]))

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(Q,); where one answer is right, a question whose answer is unknown adds nothing."""
        if self.soft:
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        return F.cross_entropy(logits, targets, reduction="none")

    @torch.no_grad()
    def answer(self, latents: Tensor, texts: Sequence[str], pictures: Tensor | None = None) -> list[str]:
        words = self.inputs(texts)["words"].to(latents.device)
        return [self.answers[i] for i in self(latents, words, pictures).argmax(1).tolist()]

    def can_answer(self, question: Question) -> bool:
        return any(answer in self.answer_index for answer, value in soft_scores(question).items() if value > 0)
