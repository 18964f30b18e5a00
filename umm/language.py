"""Text: words as tokens, pretrained text encoders, causal language models, and a small one made on the spot.

Q texts, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm import assets
from umm.errors import ConfigError, MissingWeights
from umm.layers import sincos_2d
from umm.pretrained import first_line, quiet, sha256_of
from umm.progress import Progress
from umm.rng import generator, seeded_init
from umm.settings import TinyLanguageSettings

WORD = re.compile(r"[a-z0-9]+|[^a-z0-9\s]")
TINY_CONTEXT = 1024  # tokens the small model is made for
IGNORED = -100  # a label without a loss
FORMAT = 2  # of the kept small models; raised when they are made in another way


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return WORD.findall(text.lower())


def all_words(texts: Iterable[str]) -> list[str]:
    """Every word of the texts by falling frequency, equally frequent ones by spelling."""
    counts = Counter(word for text in texts for word in words_of(text))
    return sorted(counts, key=lambda word: (-counts[word], word))


# ---------------------------------------------------------------------------------------------- reading questions


class Words(nn.Module):
    """A table of a training set's own words; 0 is any other word."""

    def __init__(self, words: list[str], dim: int):
        super().__init__()
        self.words = words
        self.index = {word: number for number, word in enumerate(words, start=1)}
        self.embed = nn.Embedding(len(words) + 1, dim)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.index.get(word, 0) for word in words_of(text)] or [0] for text in texts]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(Q, L) -> (Q, L, D), with positions."""
        x = self.embed(ids)
        return x + sincos_2d(x.shape[-1], 1, x.shape[1]).to(x)


class PretrainedText(nn.Module):
    """A frozen text encoder of transformers and a trained map to D channels.

    Args:
        name: asset:<name>, a hub id, or a local folder.
        weights: sha256 it must have; None: any.
    """

    def __init__(self, name: str, dim: int, weights: str | None = None):
        from transformers import AutoModel

        super().__init__()
        self.tokenizer, self.encoder = load(name, None, AutoModel)
        self.weights = check_weights(name, self.encoder, weights)
        self.project = nn.Linear(self.encoder.config.hidden_size, dim)
        self.train()

    def train(self, mode: bool = True) -> PretrainedText:
        super().train(mode)
        self.encoder.eval()  # its dropout stays off
        return self

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), truncation=True)["input_ids"]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(Q, L), mask (Q, L) True at tokens -> (Q, L, D)."""
        with torch.no_grad():
            hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return self.project(hidden)


# ------------------------------------------------------------------------------------------------ pretrained models


def load(name: str, revision: str | None, kind: type) -> tuple[object, nn.Module]:
    """(tokenizer, frozen float32 model) of a transformers folder, a hub id, or asset:<name>.

    Raises:
        MissingWeights: not to be had, no tokenizer, or weights that do not fit.
    """
    from transformers import AutoTokenizer

    place = str(assets.path(name.removeprefix("asset:"))) if name.startswith("asset:") else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
            raise OSError("its vocabulary is empty")
    except Exception as error:  # offline, no such repository, no tokenizer files: a dozen kinds
        raise MissingWeights(
            f"no tokenizer of '{name}' can be had ({first_line(error)}): give a local folder in transformers layout "
            "that has its tokenizer files, or a hub id that can be reached."
        ) from error
    try:
        with quiet():
            model, report = kind.from_pretrained(
                place, revision=revision, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:
        raise MissingWeights(f"the weights of '{name}' cannot be read ({first_line(error)}).") from error
    if report["missing_keys"]:
        raise MissingWeights(f"the weights of '{name}' lack {sorted(report['missing_keys'])[:3]}.")
    return tokenizer, model.requires_grad_(False).eval()


def check_weights(name: str, model: nn.Module, expected: str | None) -> str:
    """sha256 of a model's weights, refused where another is expected."""
    found = sha256_of(model.state_dict())
    if expected not in (None, found):
        raise MissingWeights(
            f"this head was trained with weights of '{name}' whose sha256 begins {expected[:12]}; those found here "
            f"begin {found[:12]}. Give the original ones."
        )
    return found


# ------------------------------------------------------------------------------------------- a language model made here


def word_tokenizer(texts: Iterable[str]) -> str:
    """JSON of a fast tokenizer with one token a word, after <unk> (0) and <end> (1)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *all_words(texts)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^a-z0-9]"), "isolated")]
    )
    tokenizer.add_special_tokens(["<unk>", "<end>"])
    return tokenizer.to_str()


def wrapped_tokenizer(text: str):
    """The JSON of `word_tokenizer` as transformers uses it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), unk_token="<unk>", eos_token="<end>")


def tiny_model(settings: TinyLanguageSettings, vocabulary: int) -> nn.Module:
    """A Llama with random weights.

    transformers' deviation of 0.02 suits widths of thousands. Here it leaves attention flat, and words that occur in
    the same places (red, blue) alike after a short training: questions about them could not be told apart. So maps
    start with 1 / sqrt(width), and words with 1.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if settings.width % (2 * settings.heads):
        raise ConfigError(
            f"llm.tiny.width={settings.width} must be a multiple of 2 llm.tiny.heads={2 * settings.heads}: positions "
            "turn pairs of channels of each head."
        )
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.heads,
        max_position_embeddings=TINY_CONTEXT,
        initializer_range=settings.width**-0.5,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(settings.width**0.5)
    return model


def pretrained_tiny(settings: TinyLanguageSettings, texts: Sequence[str], seed: int) -> tuple[str, nn.Module]:
    """(tokenizer JSON, model) that has learnt `texts`; kept in the cache, so that a resumed run finds the same."""
    from safetensors.torch import load_file, save_file

    facts = [FORMAT, vars(settings), seed, hashlib.sha256("\n".join(texts).encode()).hexdigest()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    file = assets.cache_root() / "language" / f"{key}.safetensors"
    tokenizer = word_tokenizer(texts)
    wrapped = wrapped_tokenizer(tokenizer)
    with seeded_init(seed, "language"):
        model = tiny_model(settings, len(wrapped))
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        pretrain(model, [[*ids, wrapped.eos_token_id] for ids in wrapped(list(texts))["input_ids"]], settings, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{key}.{os.getpid()}")
        save_file(model.state_dict(), partial)
        partial.replace(file)
    return tokenizer, model.requires_grad_(False).eval()


def pretrain(model: nn.Module, texts: Sequence[Sequence[int]], settings: TinyLanguageSettings, seed: int) -> float:
    """Next-token training on token ids for `settings.steps` steps, rate falling linearly to 0; the last loss."""
    draw, loss = generator(seed, "language", "texts"), torch.tensor(torch.nan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    with Progress(settings.steps * settings.batch_size, what="language model") as progress:
        for step in range(settings.steps):
            chosen = torch.randint(len(texts), (settings.batch_size,), generator=draw).tolist()
            ids = nn.utils.rnn.pad_sequence([torch.tensor(texts[i]) for i in chosen], True, IGNORED)  # (Q, L)
            logits = model(input_ids=ids.clamp_min(0), attention_mask=(ids != IGNORED).long()).logits  # (Q, L, V)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORED)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (1 - step / settings.steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.advance(settings.batch_size)
    return float(loss.detach())
