"""The score of an answer, and the head that chooses answers from a closed set."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from umm.data.base import Question
from umm.errors import ConfigError, DataError, MissingWeights
from umm.heads._answering import padded, require_answers
from umm.heads.vqa import VQAHead
from umm.language import all_words
from umm.latents.base import LatentSpec
from umm.metrics._vqa import accuracy, common_answers, normalise, score, soft_scores
from umm.rng import seeded_init
from umm.settings import VQASettings

SPEC = LatentSpec(8, 4, 4, 32)


def rated(answer: str, count: int, other: str = "blue") -> tuple[str, ...]:
    """Ten raters, `count` of whom agree."""
    return (answer,) * count + (other,) * (10 - count)


# -------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_accuracy_is_the_mean_over_nine_of_ten_raters(agree, expected):
    assert accuracy("red", rated("red", agree)) == pytest.approx(expected, abs=1e-12)


def test_one_answer_is_matched_exactly_after_normalisation():
    assert score("The Red.", Question("?", "red")) == 1
    assert score("reddish", Question("?", "red")) == 0
    assert score("", Question("?", "red")) == 0


def test_soft_scores_are_what_each_answer_would_get():
    question = Question("how many?", "2", answers=("two",) * 2 + ("2",) + ("3",) * 2 + ("many",) * 5)
    assert soft_scores(question) == pytest.approx({"2": 0.9, "3": 0.6, "many": 1.0})


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("A Red Circle", "red circle"),
        ("Two dogs!", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("it's", "it's"),
        ("somebody'd", "somebodyd"),  # an oddity of the official table
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("end.", "end"),
        ("10:30", "10:30"),
        ("t-shirt", "t shirt"),  # joined words come apart
        ("red , blue", "red blue"),
        ("left/right", "left right"),
        ("  yes\n", "yes"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_by_the_official_rules(said, compared):
    assert normalise(said) == compared


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["yes", "no", "two", "a cat"]), min_size=2, max_size=10), st.permutations(range(10)))
def test_accuracy_ignores_the_order_of_raters_and_spelling_of_the_answer(answers, order):
    mixed = [answers[i] for i in order if i < len(answers)]
    assert accuracy("two", answers) == pytest.approx(accuracy("2.", mixed))
    assert 0 <= accuracy("two", answers) <= 1


def test_common_answers_come_by_frequency_and_ties_by_spelling():
    questions = [Question("?", answer) for answer in ("no", "Yes", "yes.", "blue", "a")]
    assert common_answers(questions, None) == ["yes", "blue", "no"]
    assert common_answers(questions, 2) == ["yes", "blue"]


def test_a_question_without_an_answer_is_named():
    with pytest.raises(DataError, match="'Is it red\\?' has no answer"):
        require_answers([Question("Is it red?", " ")])


# ------------------------------------------------------------------------------------------------------------ head


def head_for(questions: list[Question], soft: bool = False, **changes) -> VQAHead:
    words = all_words(question.text for question in questions)
    vocabulary = {"words": words, "answers": common_answers(questions, None), "soft": soft}
    config = VQASettings(**{"width": 32, "heads": 2, "depth": 1} | changes)
    with seeded_init("vqa"):
        return VQAHead.from_config(config, SPEC, json.dumps(vocabulary))


QUESTIONS = [
    Question("Is it red?", "yes"),
    Question("What colour is the big circle?", "blue"),
    Question("What shape?", "circle"),
]


def test_padding_does_not_change_an_answer():
    head, latents = head_for(QUESTIONS).eval(), torch.randn(3, *SPEC.shape)
    together = head(latents, **head.inputs([q.text for q in QUESTIONS]))
    for i, question in enumerate(QUESTIONS):
        torch.testing.assert_close(head(latents[i : i + 1], **head.inputs([question.text]))[0], together[i])


def test_many_questions_about_one_picture_equal_one_question_each():
    head, latents = head_for(QUESTIONS).eval(), torch.randn(2, *SPEC.shape)
    inputs, pictures = head.inputs([q.text for q in QUESTIONS]), torch.tensor([1, 0, 1])
    torch.testing.assert_close(head(latents, **inputs, pictures=pictures), head(latents[pictures], **inputs))


def test_the_picture_and_its_places_matter():
    head, latents = head_for(QUESTIONS).eval(), torch.randn(1, *SPEC.shape)
    inputs = head.inputs(["Is it red?"])
    assert not torch.allclose(head(latents, **inputs), head(latents.flip(-1), **inputs))


def test_unknown_words_are_read_and_unknown_answers_counted_as_wrong():
    head = head_for(QUESTIONS)
    assert head.inputs(["zebra"])["words"].tolist() == [[0]]
    assert head.inputs([""])["words"].tolist() == [[0]]
    assert not head.can_answer(Question("?", "zebra"))
    logits, targets = torch.zeros(1, 3), head.examples([Question("?", "zebra")])[1]
    assert head.losses(logits, targets).item() == 0


def test_soft_targets_are_the_scores_and_trained_with_binary_cross_entropy():
    questions = [Question("Is it red?", "yes", answers=("yes",) * 8 + ("no",) * 2), Question("It?", "no")]
    head = head_for(questions, soft=True)
    _, targets = head.examples(questions[:1])
    assert dict(zip(head.answers, targets[0].tolist())) == pytest.approx({"yes": 1.0, "no": 0.6})
    assert head.losses(torch.zeros(1, 2), targets).item() == pytest.approx(2 * 0.6931, abs=1e-3)


def test_a_head_learns_what_only_the_picture_tells():
    """Same words, opposite answers: the sign of the latent decides."""
    head = head_for([Question("Is it red?", "yes"), Question("Is it red?", "no")])
    latents = torch.stack([torch.ones(SPEC.shape), -torch.ones(SPEC.shape)])
    inputs, targets = head.examples([Question("Is it red?", "yes"), Question("Is it red?", "no")])
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        head.losses(head(latents, **inputs), targets).mean().backward()
        optimizer.step()
    assert head.answer(latents, ["Is it red?"] * 2) == ["yes", "no"]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="multiple of 4"):
        head_for(QUESTIONS, width=30)
    with pytest.raises(ConfigError, match="never sees the picture"):
        head_for(QUESTIONS, depth=0)


# ---------------------------------------------------------------------------------------- pretrained text encoders


@pytest.fixture
def text_encoder(tmp_path):
    """A small BERT with a tokenizer, as a folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "what", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with seeded_init("bert"):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_pretrained_text_encoder_stays_frozen_unsaved_and_checked(text_encoder, tmp_path):
    head = head_for(QUESTIONS, text=str(text_encoder))
    assert not any(p.requires_grad for p in head.text.encoder.parameters())
    state = head.state_dict()
    assert not [key for key in state if "encoder" in key] and "text.project.weight" in state
    save_file(state, tmp_path / "head.safetensors")
    again = VQAHead.from_config(VQASettings(text=str(text_encoder), width=32, heads=2, depth=1), SPEC, **head.facts())
    again.load_state_dict(load_file(tmp_path / "head.safetensors"))
    latents, inputs = torch.randn(1, *SPEC.shape), head.inputs(["Is it red?"])
    assert torch.equal(head.eval()(latents, **inputs), again.eval()(latents, **inputs))
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({key: value for key, value in state.items() if key != "summary"})
    with pytest.raises(MissingWeights, match="sha256 begins abc"):
        VQAHead.from_config(head_settings(text_encoder), SPEC, head.facts()["vocabulary"], "abc")


def head_settings(folder) -> VQASettings:
    return VQASettings(text=str(folder), width=32, heads=2, depth=1)


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(MissingWeights, match="no tokenizer"):
        head_for(QUESTIONS, text=str(tmp_path))


def test_minilm_reads_questions_offline():
    head = head_for(QUESTIONS, text="asset:minilm").eval()
    texts = ["Is it red?", "What colour is the big circle on the left?"]
    together = head(torch.zeros(2, *SPEC.shape), **head.inputs(texts))
    torch.testing.assert_close(head(torch.zeros(1, *SPEC.shape), **head.inputs(texts[:1]))[0], together[0])
    assert head.parameter_count() > 20e6 and len(head.state_dict()) < 60


def test_ragged_rows_are_padded_on_either_side():
    assert padded([[1], [2, 3]]).tolist() == [[1, -1], [2, 3]]
    assert padded([[1], [2, 3]], left=True).tolist() == [[-1, 1], [2, 3]]
