"""The adapter of causal language models: what is trained on, padding, stages, what is saved, the small model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

import umm
from umm.config import load
from umm.data.base import Question
from umm.errors import ConfigError, MissingWeights, UmmError
from umm.heads._answering import PAD, share_pretrained
from umm.heads.llm import IMAGE, LLMHead, Template
from umm.language import pretrained_tiny, tiny_model, word_tokenizer, wrapped_tokenizer
from umm.latents.base import LatentSpec
from umm.rng import seeded_init
from umm.settings import LLMSettings, LoRASettings, TinyLanguageSettings
from umm.tasks._answering import twin
from umm.train import train

SPEC = LatentSpec(8, 4, 4, 32)
TEXTS = ["question : is there a red circle or a blue square ? answer : yes", "how many are there ? 2 no circle"]
TEMPLATE = "{image} question : {question} answer : {answer}"
QUESTIONS = [
    Question("Is there a red circle?", "yes"),
    Question("How many are there?", "2"),
    Question("Is there a circle or a square or a blue circle?", "blue square"),
]
SMALL = TinyLanguageSettings(width=16, depth=2, heads=2, steps=4, batch_size=2)
CONFIG = LLMSettings(model="tiny", template=TEMPLATE, max_answer=4, lora=LoRASettings(rank=2, alpha=4), tiny=SMALL)


def llama(**changes) -> LLMHead:
    """On a small Llama with random weights; random low-rank updates too, so that they count."""
    tokenizer = word_tokenizer(TEXTS)
    config = dataclasses.replace(CONFIG, **changes)
    with seeded_init("llm"):
        head = LLMHead.on_tiny(config, SPEC, tokenizer, tiny_model(SMALL, len(wrapped_tokenizer(tokenizer))))
        for name, parameter in head.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return head.double().eval()


@pytest.fixture
def gpt_folder(tmp_path):
    """A small GPT-2, whose positions are learnt and absolute, as a local folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = wrapped_tokenizer(word_tokenizer(TEXTS))
    with seeded_init("gpt"):
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    return tmp_path / "gpt"


def gpt(folder, **changes) -> LLMHead:
    with seeded_init("llm"):
        return LLMHead.from_config(dataclasses.replace(CONFIG, model=str(folder), **changes), SPEC).double().eval()


@pytest.fixture(params=["llama", "gpt"])
def head(request, gpt_folder):
    return llama() if request.param == "llama" else gpt(gpt_folder)


@pytest.fixture
def latents():
    return torch.randn(3, *SPEC.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ prompt and labels


def test_a_prompt_has_the_picture_and_the_question_in_their_places():
    head = llama()
    ids = head.inputs(["Is there a square?"])["words"][0].tolist()
    assert ids.count(IMAGE) == SPEC.tokens and ids[: SPEC.tokens] == [IMAGE] * SPEC.tokens
    assert head.tokenizer.decode(ids[SPEC.tokens :]) == "question : is there a square ? answer :"


def test_only_the_answer_and_its_end_are_trained_on(latents):
    head = llama()
    inputs, targets = head.examples(QUESTIONS)
    end = head.tokenizer.eos_token_id
    assert (targets != PAD).sum(1).tolist() == [2, 2, 3] and all(end in row for row in targets.tolist())
    words = head.tokenizer.convert_ids_to_tokens(targets[2].tolist())
    assert words == ["blue", "square", "<end>"]
    logits = head(latents, **inputs)
    changed = logits.clone()
    changed[0, 2] += 100.0  # after the end token of a shorter answer
    torch.testing.assert_close(head.losses(changed, targets), head.losses(logits, targets))


def test_the_loss_is_that_of_the_language_model_on_the_answer_alone(latents):
    """The same row given to transformers with its own -100 labels."""
    head = llama()
    inputs, targets = head.examples(QUESTIONS[2:])
    ours = head.losses(head(latents[:1], **inputs), targets)
    ids = torch.cat([inputs["words"], inputs["answers"]], dim=1)
    labels = torch.cat([torch.full_like(inputs["words"], -100), inputs["answers"]], dim=1)
    embedded = head.embed(latents[:1], ids, torch.tensor([0]))
    theirs = head.language_model(inputs_embeds=embedded, labels=labels).loss  # in float32
    torch.testing.assert_close(theirs, ours[0].float())


def test_a_long_answer_is_cut_and_still_ends():
    head = llama(max_answer=3)
    _, targets = head.examples([Question("?", "yes yes yes yes yes")])
    assert targets.shape == (1, 3) and targets[0, -1] == head.tokenizer.eos_token_id


def test_more_tokens_than_the_model_reads_are_refused(gpt_folder, latents):
    head = gpt(gpt_folder)
    with pytest.raises(UmmError, match=r"reads 64: raise llm\.merge"):
        head(latents[:1], **head.inputs(["red " * 80]))


@pytest.mark.parametrize("text", ["{question} {answer}", "{image} {answer} {question}", "{image}{question}"])
def test_a_template_that_cannot_work_is_refused(text):
    with pytest.raises(ConfigError, match="once each"):
        Template(text, wrapped_tokenizer(word_tokenizer(TEXTS)), 4)


# ---------------------------------------------------------------------------------------------------------- padding


def test_padding_on_either_side_gives_the_same_logits(head, latents):
    inputs, _ = head.examples(QUESTIONS)
    expected = head(latents, **inputs)
    pad = torch.full((3, 5), PAD)
    left = head(latents, torch.cat([pad, inputs["words"]], dim=1), inputs["answers"])
    right = head(latents, inputs["words"], torch.cat([inputs["answers"], pad], dim=1))
    real = inputs["answers"] != PAD
    torch.testing.assert_close(left[real], expected[real])
    torch.testing.assert_close(right[:, : real.shape[1]][real], expected[real])


def test_a_ragged_batch_answers_as_each_question_alone(head, latents):
    texts = [question.text for question in QUESTIONS]
    alone = [head.answer(latents[i : i + 1], [text])[0] for i, text in enumerate(texts)]
    assert head.answer(latents, texts) == alone
    pictures = torch.tensor([2, 1, 2])
    assert head.answer(latents, texts, pictures)[2] == alone[2]


def test_decoding_is_greedy_and_agrees_with_training(head, latents):
    """The tokens decoded are the most likely ones of the forward pass that training uses, given those before."""
    words = head.inputs([QUESTIONS[0].text])["words"]
    answer = head.answer(latents[:1], [QUESTIONS[0].text])[0]
    tokens: list[int] = []
    for _ in range(CONFIG.max_answer):
        given = torch.tensor([[*tokens, 0]])  # the last is only a place
        following = int(head(latents[:1], words, given)[0, -1].argmax())
        if following == head.tokenizer.eos_token_id:
            break
        tokens.append(following)
    assert answer == head.tokenizer.decode(tokens, skip_special_tokens=True).strip()


# --------------------------------------------------------------------------------------------------- stages, saving


def test_before_its_start_the_low_rank_updates_count_for_nothing_and_do_not_learn(latents):
    head = llama(lora=LoRASettings(rank=2, alpha=4, start=100)).train()
    inputs, targets = head.examples(QUESTIONS)
    head.stage(99)
    before = head(latents, **inputs)
    head.losses(before, targets).sum().backward()
    updates = {name: p.grad for name, p in head.named_parameters() if "lora_" in name}
    assert updates and not any(gradient.any() for gradient in updates.values())
    assert head.projector[0].weight.grad.any()
    head.stage(100)
    assert not torch.allclose(head(latents, **inputs), before)


def test_only_projector_places_and_updates_are_trained():
    head = llama()
    names = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    trained = {"lora" if "lora_" in name else name.split(".")[0] for name in names}
    assert trained == {"projector", "places", "lora"}
    assert not [n for n, p in llama(lora=LoRASettings(rank=0)).named_parameters() if p.requires_grad and "model" in n]


def test_projector_and_updates_are_saved_together_and_loaded_strictly(gpt_folder, tmp_path, latents):
    head = gpt(gpt_folder)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    state = head.state_dict()
    assert {"projector.0.weight", "places"} < set(state)
    assert all("lora_" in key for key in state if key.startswith("language_model"))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "head.safetensors")
    again = LLMHead.from_config(head.settings, SPEC, **head.facts()).double().eval()
    again.load_state_dict(load_file(tmp_path / "head.safetensors"))
    inputs, _ = head.examples(QUESTIONS)
    assert torch.equal(head(latents, **inputs), again(latents, **inputs))
    for missing in ("places", next(key for key in state if "lora_" in key)):
        with pytest.raises(RuntimeError, match="Missing key"):
            again.load_state_dict({key: value for key, value in state.items() if key != missing})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other = LatentSpec(4, 4, 4, 32)
        LLMHead.from_config(dataclasses.replace(CONFIG, model=str(gpt_folder)), other).load_state_dict(state)


def test_an_adapter_of_another_language_model_is_refused(gpt_folder):
    with pytest.raises(MissingWeights, match="was trained with weights"):
        LLMHead.from_config(dataclasses.replace(CONFIG, model=str(gpt_folder)), SPEC, weights="0" * 64)


def test_a_missing_language_model_or_tokenizer_is_one_sentence(gpt_folder):
    with pytest.raises(MissingWeights, match="no tokenizer of 'no/such-model'"):
        LLMHead.from_config(dataclasses.replace(CONFIG, model="no/such-model"), SPEC)
    for file in gpt_folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(MissingWeights, match="no tokenizer"):
        gpt(gpt_folder)


def test_a_tokenizer_without_an_end_token_is_refused(gpt_folder):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(gpt_folder / "tokenizer.json")).save_pretrained(gpt_folder)
    with pytest.raises(MissingWeights, match="eos_token"):
        gpt(gpt_folder)


def test_the_blind_twin_shares_what_is_frozen_and_nothing_that_learns():
    head = llama()
    other = twin(head)
    for (name, mine), theirs in zip(head.named_parameters(), other.parameters(), strict=True):
        assert (mine is theirs) == (not mine.requires_grad), name
        assert torch.equal(mine, theirs)


def test_adapters_of_one_language_model_can_hold_it_once(gpt_folder, latents):
    first, second = gpt(gpt_folder), gpt(gpt_folder)
    alone = second(latents, **second.inputs(["Is there a red circle?"] * 3))
    share_pretrained([first, second])
    for (name, mine), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert (mine is theirs) == (not mine.requires_grad), name
    model = second.language_model
    assert model.lm_head.weight is model.get_input_embeddings().weight, "tied as before"
    assert torch.equal(second(latents, **second.inputs(["Is there a red circle?"] * 3)), alone)


def test_a_loaded_run_holds_its_language_model_once(gpt_folder, tmp_path):
    settings = f"""
        run={tmp_path / "run"} data.name=fakes.riddles data.image_size=16 latent.name=fakes.space latent.image_size=16
        und.kind=llm und.llm.model={gpt_folder} und.llm.lora.rank=2 und.llm.max_answer=3 train.images=16
        train.batch_size=8 train.workers=0 train.device=cpu train.sample_every=0
    """
    model = umm.load(train(load("und", None, settings.split())).parent)
    seeing, blind = model.head("llm").language_model, model.head("blind").language_model
    assert seeing.lm_head.weight is blind.lm_head.weight
    lora = [next(p for name, p in each.named_parameters() if "lora_A" in name) for each in (seeing, blind)]
    assert lora[0] is not lora[1]
    assert len(model.answer(torch.rand(2, 3, 16, 16), ["Is it red?", "What colour is it?"])) == 2


# ------------------------------------------------------------------------------------------------- the small model


def test_the_small_language_model_learns_its_text_and_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("UMM_CACHE", str(tmp_path))
    settings = dataclasses.replace(SMALL, steps=60, lr=1e-2)
    state = torch.random.get_rng_state()
    tokenizer, model = pretrained_tiny(settings, TEXTS, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    wrapped = wrapped_tokenizer(tokenizer)
    ids = wrapped("how many are there", return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[0]
    assert wrapped.decode(logits.argmax(-1)[1:]) == "are there ?"
    again = pretrained_tiny(settings, TEXTS, seed=0)[1]
    assert len(list(tmp_path.glob("language/*.safetensors"))) == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_words_that_stand_in_the_same_places_stay_apart(tmp_path, monkeypatch):
    """What the language model takes for one word no adapter can tell apart; it is frozen."""
    monkeypatch.setenv("UMM_CACHE", str(tmp_path))
    colours = "red green blue white black".split()
    texts = [f"is there a {colour} circle ? {answer}" for colour in colours for answer in ("yes", "no")]
    tokenizer, model = pretrained_tiny(dataclasses.replace(SMALL, width=32, steps=60, batch_size=8), texts, seed=0)
    ids = wrapped_tokenizer(tokenizer).convert_tokens_to_ids(colours)
    words = torch.nn.functional.normalize(model.get_input_embeddings().weight[ids], dim=1)
    assert (words @ words.T).fill_diagonal_(0).max() < 0.5


def test_a_width_its_heads_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"llm\.tiny\.width=16 must be a multiple of 2 llm\.tiny\.heads=6"):
        tiny_model(dataclasses.replace(SMALL, heads=3), 10)


def test_words_come_back_from_the_small_tokenizer():
    wrapped = wrapped_tokenizer(word_tokenizer(TEXTS))
    assert wrapped.decode(wrapped("Is there a RED circle?")["input_ids"]) == "is there a red circle ?"
    assert wrapped("zebra")["input_ids"] == [wrapped.unk_token_id] == [0]
