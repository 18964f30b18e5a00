"""The LLM adapter: latents through a projector into a causal language model, as LLaVA-1.5 does (arXiv 2310.03744).

A question becomes one row of tokens, the picture in the place of `{image}`:

    [PAD ..] text before | N picture tokens | question, rest of the prompt || answer, end token | [PAD ..]

Only what stands after || is trained on. B pictures, Q questions, L prompt tokens, A answer tokens, N picture tokens,
D width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm.data.base import Question
from umm.errors import ConfigError, MissingWeights, UmmError
from umm.heads._answering import PAD, AnsweringHead, padded, pictures_of
from umm.language import check_weights, load, tiny_model, word_tokenizer, wrapped_tokenizer
from umm.latents.base import LatentSpec
from umm.layers import patchify
from umm.settings import LLMSettings, LoRASettings, TinyLanguageSettings

IMAGE = -2  # among token ids: the place of one picture token
ADAPTER = "default"  # peft's name of the only set of low-rank updates
FIELDS = ("{image}", "{question}", "{answer}")


class Template:
    """A prompt as token ids, with `tokens` times IMAGE where the picture stands.

    Args:
        text: has {image}, {question} and, at its end, {answer}. Spaces before {answer} belong to the answer, as most
            tokenizers have them.
    """

    def __init__(self, text: str, tokenizer, tokens: int):
        if any(text.count(field) != 1 for field in FIELDS) or not text.endswith("{answer}"):
            raise ConfigError(
                f"llm.template must have {', '.join(FIELDS)} once each, and {{answer}} at its end, is '{text}'."
            )
        prompt = text.removesuffix("{answer}")
        self.lead = prompt[len(prompt.rstrip(" ")) :]
        self.before, self.after = prompt.rstrip(" ").split("{image}")
        self.tokenizer, self.tokens = tokenizer, tokens

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str) -> list[int]:
        """All before the answer; a beginning token where the tokenizer has one."""
        before, after = (part.replace("{question}", question) for part in (self.before, self.after))
        return self.tokenizer(before)["input_ids"] + [IMAGE] * self.tokens + self.ids(after)

    def answer(self, answer: str, limit: int) -> list[int]:
        """The answer, cut to `limit` tokens, the end token the last of them."""
        return self.ids(self.lead + answer.strip())[: limit - 1] + [self.tokenizer.eos_token_id]


def with_lora(model: nn.Module, settings: LoRASettings) -> nn.Module:
    """The model with low-rank updates in all its linear layers but the last; they start as zero."""
    if not settings.rank:
        return model
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("llm.lora needs the package peft: pip install peft, or set llm.lora.rank=0.") from error
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear")
    return inject_adapter_in_model(config, model, adapter_name=ADAPTER)


class LLMHead(AnsweringHead):
    """Standardised latents and a question -> logits of the answer's tokens.

    The language model is frozen but for its low-rank updates. One made here (`llm.model=tiny`) is saved with the head;
    a pretrained one is not, and is checked by its sha256 when the head is loaded.

    Args:
        spec: shape of the latents.
        settings: see `LLMSettings`.
        language_model: a causal language model of transformers.
        tokenizer: its tokenizer.
    """

    Config = LLMSettings

    def __init__(self, spec: LatentSpec, settings: LLMSettings, language_model: nn.Module, tokenizer):
        super().__init__()
        if spec.height % settings.merge or spec.width % settings.merge:
            raise ConfigError(f"llm.merge={settings.merge} does not divide the {spec.height} x {spec.width} latent.")
        if tokenizer.eos_token_id is None:
            raise MissingWeights(f"the tokenizer of '{settings.model}' has no eos_token: its answers would never end.")
        self.spec, self.settings, self.tokenizer = spec, settings, tokenizer
        self.tokens = spec.tokens // settings.merge**2
        self.template = Template(settings.template, tokenizer, self.tokens)
        dim = language_model.get_input_embeddings().embedding_dim
        width = spec.channels * settings.merge**2
        self.projector = nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))
        self.places = nn.Parameter(torch.zeros(self.tokens, dim))  # the language model itself sees one row of tokens
        self.language_model = with_lora(language_model.requires_grad_(False), settings.lora)
        self.tokenizer_json: str | None = None  # of a language model made here
        self.weights: str | None = None  # sha256 of a pretrained one
        self.train()

    @classmethod
    def from_config(
        cls, config: LLMSettings, spec: LatentSpec, tokenizer: str | None = None, weights: str | None = None
    ) -> LLMHead:
        """Build on a language model.

        Args:
            tokenizer: for `llm.model=tiny`, the JSON its tokenizer was saved as. Its weights come with the head's.
            weights: sha256 of the pretrained model the head was trained with; None: whatever is found.
        """
        if config.model == "tiny":
            wrapped = wrapped_tokenizer(tokenizer)
            return cls.on_tiny(config, spec, tokenizer, tiny_model(config.tiny, len(wrapped)))
        from transformers import AutoModelForCausalLM

        found, model = load(config.model, config.revision, AutoModelForCausalLM)
        weights = check_weights(config.model, model, weights)
        head = cls(spec, config, model, found)
        head.weights = weights
        head.leave_out_pretrained("language_model")
        return head

    @classmethod
    def on_tiny(cls, config: LLMSettings, spec: LatentSpec, tokenizer: str, language_model: nn.Module) -> LLMHead:
        """On a language model made here."""
        head = cls(spec, config, language_model, wrapped_tokenizer(tokenizer))
        head.tokenizer_json = tokenizer
        return head

    @classmethod
    def tiny(cls, spec: LatentSpec) -> LLMHead:
        small = TinyLanguageSettings(width=16, depth=1, heads=2)
        config = LLMSettings(model="tiny", max_answer=4, lora=LoRASettings(rank=2, alpha=4), tiny=small)
        texts = [config.template, "Is there a red circle? yes no"]
        tokenizer = word_tokenizer(texts)
        return cls.on_tiny(config, spec, tokenizer, tiny_model(small, len(wrapped_tokenizer(tokenizer))))

    def facts(self) -> dict[str, str]:
        """What `from_config` needs to build this head again."""
        return {"tokenizer": self.tokenizer_json} if self.tokenizer_json else {"weights": self.weights}

    def train(self, mode: bool = True) -> LLMHead:
        super().train(mode)
        self.language_model.eval()  # its own dropout stays off: numbers must not depend on a global generator
        return self

    def stage(self, images: int) -> None:
        """Before `lora.start` images the updates count for nothing and get gradients of zero: the projector learns."""
        for layer in self.lora_layers:
            layer.set_scale(ADAPTER, float(images >= self.settings.lora.start))

    @property
    def lora_layers(self) -> list[nn.Module]:
        return [module for module in self.language_model.modules() if ADAPTER in getattr(module, "lora_A", ())]

    # ---------------------------------------------------------------------------------------------------- the text

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{"words": (Q, L)}, padded on the left, so that the answer follows the prompt at once."""
        return {"words": padded([self.template.prompt(text) for text in texts], left=True)}

    def examples(self, questions: Sequence[Question]) -> tuple[dict[str, Tensor], Tensor]:
        """The answers are input and target: (Q, A), padded on the right, end token included."""
        answers = padded([self.template.answer(q.answer, self.settings.max_answer) for q in questions])
        return self.inputs([question.text for question in questions]) | {"answers": answers}, answers

    # ------------------------------------------------------------------------------------------------- the network

    def embed(self, latents: Tensor, ids: Tensor, pictures: Tensor) -> Tensor:
        """Token ids (Q, L) -> embeddings (Q, L, D): picture tokens at IMAGE, in order; zeros at PAD."""
        limit = getattr(self.language_model.config, "max_position_embeddings", None) or ids.shape[1]
        if ids.shape[1] > limit:
            raise UmmError(
                f"a picture and its question take {ids.shape[1]} tokens, '{self.settings.model}' reads {limit}: "
                "raise llm.merge, or shorten llm.template."
            )
        prefix = self.projector(patchify(latents, self.settings.merge)) + self.places  # (B, N, D)
        embedded = self.language_model.get_input_embeddings()(ids.clamp_min(0))
        embedded = embedded.masked_fill((ids < 0)[..., None], 0.0)
        row, column = (ids == IMAGE).nonzero(as_tuple=True)
        return embedded.index_put((row, column), prefix[pictures].flatten(0, 1).to(embedded.dtype))

    def forward(
        self, latents: Tensor, words: Tensor, answers: Tensor | None = None, pictures: Tensor | None = None
    ) -> Tensor:
        """Logits (Q, A, V): [:, i] predicts answers[:, i] from the prompt and the answer before it.

        Args:
            latents: standardised, (B, C, h, w).
            words: prompts (Q, L). Padding may stand on either side, as long as none stands before an answer.
            answers: (Q, A); None: only the token after the prompt is predicted, A = 1.
        """
        pictures = pictures_of(latents, len(words), pictures)
        ids = words if answers is None else torch.cat([words, answers], dim=1)
        mask = ids != PAD
        keep = 1 if answers is None else answers.shape[1] + 1
        logits = self.language_model(
            inputs_embeds=self.embed(latents, ids, pictures),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            logits_to_keep=keep,
            use_cache=False,
        ).logits
        return logits if answers is None else logits[:, :-1]

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of each answer's tokens, (Q,)."""
        each = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="none")  # (Q, A)
        return each.sum(1) / (targets != PAD).sum(1)

    @torch.no_grad()
    def answer(self, latents: Tensor, texts: Sequence[str], pictures: Tensor | None = None) -> list[str]:
        """Greedy decoding, whatever the model's own generation settings are."""
        from transformers import GenerationConfig

        pictures = pictures_of(latents, len(texts), pictures)
        words = self.inputs(texts)["words"].to(latents.device)
        end = self.tokenizer.eos_token_id
        found = self.language_model.generate(
            inputs_embeds=self.embed(latents, words, pictures),
            attention_mask=(words != PAD).long(),
            generation_config=GenerationConfig(
                max_new_tokens=self.settings.max_answer, do_sample=False, eos_token_id=end, pad_token_id=end
            ),
        )
        return [text.strip() for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]
