"""What the heads that answer questions share.

B pictures, Q questions, L tokens of a question, A answers or answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from umm.data.base import Question
from umm.errors import DataError, UmmError
from umm.heads.base import Head

PAD = -1  # among token ids: no token


class AnsweringHead(Head):
    """Answers questions about standardised latents.

    `pictures` (Q,) tells which of the B latents each question is about; None: one question a picture, in order.
    Pretrained parts are frozen and not saved: `pretrained` names the sub-module, and whoever builds the head again
    checks its weights by their sha256. Everything else is saved and loaded strictly.
    """

    pretrained: str | None = None

    def leave_out_pretrained(self, name: str) -> None:
        """Call at the end of `__init__` of a head with a pretrained sub-module."""
        self.pretrained = name
        self.register_state_dict_post_hook(_drop_pretrained)
        self.register_load_state_dict_post_hook(_forgive_pretrained)

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What `forward` needs of the questions, on the CPU."""
        raise NotImplementedError

    def examples(self, questions: Sequence[Question]) -> tuple[dict[str, Tensor], Tensor]:
        """What `forward` and `losses` need for training, on the CPU."""
        raise NotImplementedError

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(Q,)."""
        raise NotImplementedError

    def answer(self, latents: Tensor, texts: Sequence[str], pictures: Tensor | None = None) -> list[str]:
        """One answer a question."""
        raise NotImplementedError

    def can_answer(self, question: Question) -> bool:
        """Whether any answer that scores could be given at all."""
        return True


def pictures_of(latents: Tensor, count: int, pictures: Tensor | None) -> Tensor:
    """(Q,) numbers of latents, checked."""
    if pictures is None:
        if count != len(latents):
            raise UmmError(f"{count} questions about {len(latents)} pictures: say which is about which.")
        return torch.arange(count, device=latents.device)
    return pictures.to(latents.device)


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """Ragged token ids -> (Q, L), PAD on the right, or on the left."""
    length = max(map(len, rows))
    fill = [[PAD] * (length - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows)])


def require_answers(questions: Sequence[Question]) -> None:
    """Raise for a question that cannot be trained on or scored."""
    for question in questions:
        if not any(answer.strip() for answer in (question.answer, *question.answers)):
            raise DataError(
                f"the question '{question.text}' has no answer: choose a split that has them, or name the column with "
                "data.columns={answer: ...}."
            )


def share_pretrained(heads: Iterable[nn.Module]) -> None:
    """Let heads on the same pretrained network hold its weights once: a seeing head and its blind twin."""
    held: dict[tuple[str, str], nn.Parameter] = {}
    for head in heads:
        if not isinstance(head, AnsweringHead) or head.pretrained is None:
            continue
        for name, parameter in list(head.named_parameters(remove_duplicate=False)):
            if _is_pretrained(head, name):
                module, _, last = name.rpartition(".")
                setattr(head.get_submodule(module), last, held.setdefault((head.facts()["weights"], name), parameter))


def _is_pretrained(module: AnsweringHead, key: str) -> bool:
    return f".{module.pretrained}." in f".{key}" and ".lora_" not in key


def _drop_pretrained(module: AnsweringHead, state: dict, prefix: str, local: dict) -> None:
    for key in [key for key in state if key.startswith(prefix) and _is_pretrained(module, key.removeprefix(prefix))]:
        del state[key]


def _forgive_pretrained(module: AnsweringHead, incompatible) -> None:
    kept = [key for key in incompatible.missing_keys if not _is_pretrained(module, key)]
    incompatible.missing_keys[:] = kept
