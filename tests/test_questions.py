"""Questions from data to numbers: training with a blind twin, judging, the command, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import umm
from umm import config as configuration
from umm.build import build_space
from umm.data.base import Question
from umm.errors import ConfigError, DataError, MissingHead, UmmError
from umm.evaluate import evaluate_run
from umm.probe import probe
from umm.questions import new_config, probe_vqa
from umm.runs import Run
from umm.tasks._answering import Answering, documents, training_texts, vocabulary
from umm.tasks._answering_judging import Answered, answering_heads, numbers_of
from umm.train import Trainer, train

COMMON = [
    "data.name=shapes",
    "data.image_size=32",
    "data.train=48",
    "data.val=12",
    "data.test=12",
    "latent.name=fakes.space",
    "latent.image_size=32",
    "und.vqa.width=16",
    "und.vqa.heads=2",
    "und.vqa.depth=1",
    "und.llm.model=tiny",
    "und.llm.tiny.width=16",
    "und.llm.tiny.depth=1",
    "und.llm.tiny.heads=2",
    "und.llm.tiny.steps=2",
    "und.llm.lora.rank=2",
    "und.llm.max_answer=3",
    "train.images=64",
    "train.batch_size=16",
    "train.workers=0",
    "train.device=cpu",
    "train.log_every=2",
    "train.save_every=32",
    "train.sample_every=64",
    "eval.bootstrap=50",
]
WITHOUT_SPACE = [text for text in COMMON if not text.startswith("latent.name")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UMM_CACHE", str(tmp_path / "cache"))


def run_config(folder: Path, kind: str, *extra: str, shapes: bool = True):
    own = ("data.name", "data.train", "data.val", "data.test")
    common = [text for text in COMMON if shapes or not text.startswith(own)]
    return configuration.load("und", None, [*common, f"run={folder}", f"und.kind={kind}", *extra])


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["vqa", "llm"])
def test_a_run_trains_answers_and_is_judged_beside_its_blind_twin(kind, tmp_path):
    train(run_config(tmp_path / "run", kind))
    for record in Run(tmp_path / "run").read_log():
        assert np.isfinite([record[f"und.{kind}.loss"], record["und.blind.loss"]]).all()
    table = evaluate_run(tmp_path / "run")
    for line in (f"{kind} accuracy", "blind accuracy", f"{kind} - blind accuracy", f"{kind} accuracy on count"):
        assert line in table
    model = umm.load(tmp_path / "run")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = model.answer(picture, ["Is there a circle?", "How many objects are there?"])
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    assert model.answer(picture.expand(2, -1, -1, -1), ["Is there a circle?", "How many objects are there?"]) == answers
    with pytest.raises(UmmError, match="3 questions about 2 pictures"):
        model.answer(picture.expand(2, -1, -1, -1), ["?"] * 3)
    assert model.answer(picture, []) == []
    for wrong in ("Is it red?", [None]):
        with pytest.raises(UmmError, match="questions are a list of texts"):
            model.answer(picture, wrong)


def test_a_stopped_run_ends_as_one_that_was_not_stopped(tmp_path):
    train(run_config(tmp_path / "whole", "vqa"))
    stopped = Trainer(run_config(tmp_path / "stopped", "vqa"))
    save, stopped.save = stopped.save, lambda: (save(), setattr(stopped, "stop_signal", 15))
    with pytest.raises(SystemExit):
        stopped.train()
    assert stopped.step < stopped.steps
    train(run_config(tmp_path / "stopped", "vqa"))
    whole, other = (umm.load(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], other[key]) for key in whole)


def test_micro_batches_do_not_change_the_loss(tmp_path):
    logs = []
    for accumulate in (1, 4):
        folder = tmp_path / str(accumulate)
        train(run_config(folder, "vqa", f"train.accumulate={accumulate}", "train.images=32", "train.log_every=1"))
        logs.append([record["und.vqa.loss"] for record in Run(folder).read_log()])
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-4)


def test_a_picture_counts_once_however_much_is_asked_of_it(tmp_path):
    task = answering_task(tmp_path)
    questions = [[Question("Is there a circle?", "yes")] * 3, [Question("Is there a circle?", "no")], []]
    _, _, pictures, weights = task.asked(questions, torch.device("cpu"))
    assert pictures.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(weights, torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 3]))
    with pytest.raises(DataError, match="have no questions"):
        task.asked([[], []], torch.device("cpu"))


def test_a_limit_bounds_the_pictures_and_the_words_learned_from(tmp_path):
    config = run_config(tmp_path / "run", "vqa", "und.limit=5", "train.images=32")
    space = build_space(config.latent)
    assert [len(texts["questions"]) for texts in training_texts(config, space)] == [
        len(texts["questions"]) for texts, _ in zip(training_texts(run_config(tmp_path, "vqa"), space), range(5))
    ]
    assert len(Trainer(config).task.view(range(48))) == 5


def test_questions_have_no_trunk_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match=r"only und\.kind=classify knows und\.train=trunk"):
        train(run_config(tmp_path / "run", "vqa", "und.train=trunk"))


def test_a_question_without_an_answer_is_refused_in_training(tmp_path):
    task = answering_task(tmp_path)
    with pytest.raises(DataError, match="'Is it red\\?' has no answer"):
        task.asked([[Question("Is it red?", "")]], torch.device("cpu"))


def test_the_blind_twin_sees_no_picture(tmp_path):
    task = answering_task(tmp_path)
    questions = [[Question("Is there a circle?", "yes")], [Question("How many objects are there?", "3")]]
    losses = []
    for seed in (0, 1):
        latent = torch.randn(2, *task.space.spec.shape, generator=torch.Generator().manual_seed(seed))
        batch = {"latent": latent, "questions": questions}
        losses.append({phase: task.loss(phase, batch, None, 0)["loss"].item() for phase in ("vqa", "blind")})
    assert losses[0]["blind"] == losses[1]["blind"] and losses[0]["vqa"] != losses[1]["vqa"]


def answering_task(folder: Path) -> Answering:
    config = run_config(folder / "task", "vqa")
    space = build_space(config.latent)
    space.normalizer.fitted.fill_(True)
    return Answering(config, space, None)


# -------------------------------------------------------------------------------------------------------- numbers


def test_numbers_are_means_over_questions_by_kind_and_the_gap_to_the_blind_twin():
    def answered(number: int, kind: str, seeing: str, blind: str) -> Answered:
        image, answers = f"p{number // 2}", {"vqa": seeing, "blind": blind}
        return Answered(f"{image}#{number % 2}", image, Question("?", "yes", kind), answers, True)

    rows = [answered(0, "count", "yes", "no"), answered(1, "count", "Yes.", "no"), answered(2, "size", "no", "yes")]
    values = {(number.head, number.kind): np.mean(number.values) for number in numbers_of(rows)}
    assert values[("vqa", "")] == pytest.approx(2 / 3) and values[("blind", "")] == pytest.approx(1 / 3)
    assert values[("vqa - blind", "count")] == 1 and values[("vqa - blind", "size")] == -1
    assert len(values) == 9


def test_the_vocabulary_is_the_training_sets_own():
    questions = [Question("Is it red?", "yes"), Question("Is it?", "no"), Question("Is it red?", "yes")]
    found = json.loads(vocabulary(questions, 1 + 1))
    assert found == {"words": ["?", "is", "it", "red"], "answers": ["yes", "no"], "soft": False}
    with pytest.raises(DataError, match="nothing to learn"):
        vocabulary(questions, 1)


def test_a_small_language_model_reads_captions_and_answered_questions():
    texts = [{"caption": "A red circle.", "questions": [Question("Is it red?", "yes")]}, {"questions": []}]
    assert documents(texts, "{image} q: {question} a: {answer}") == ["A red circle.", "q: Is it red? a: yes"]


def test_questions_that_cannot_be_scored_are_refused_or_counted(tmp_path, monkeypatch):
    train(run_config(tmp_path / "run", "vqa", "und.blind=false"))
    zebra, yes = Question("Is it?", "zebra"), Question("Is it?", "yes")
    for asked, error in (([zebra], "not one of the 12 questions"), ([Question("Is it?", "")], "has no answer")):
        monkeypatch.setattr("umm.data.shapes.questions", lambda *_, asked=asked: asked)
        with pytest.raises(DataError, match=error):
            evaluate_run(tmp_path / "run")
    monkeypatch.setattr("umm.data.shapes.questions", lambda *_: [zebra, yes])
    table = evaluate_run(tmp_path / "run")
    assert "12 of 24 questions have no answer among the known ones" in table and "no blind baseline" in table


# -------------------------------------------------------------------------------------------------------- command


def test_the_command_trains_asks_writes_and_repeats_its_numbers(tmp_path):
    rows = []
    for name in ("first", "second"):
        table = probe_vqa("fakes.space", None, WITHOUT_SPACE, str(tmp_path / name), limit=24)
        results = json.loads((tmp_path / name / "results.json").read_text())
        rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in results["rows"]])
    assert rows[0] == rows[1]
    assert "vqa - blind" in table and {row["task"] for row in rows[0]} >= {"vqa", "blind", "vqa - blind", "vqa/count"}
    whole = next(row for row in rows[0] if row["task"] == "vqa")
    assert whole["flops"] > 0 and whole["low"] <= whole["value"] <= whole["high"]
    samples = [json.loads(line) for line in (tmp_path / "first" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * whole["n"] and {"doc_id", "doc", "target", "resps", "doc_hash"} <= set(samples[0])
    assert {"question", "kind", "image"} <= set(samples[0]["doc"])
    mine = [sample["score"] for sample in samples if sample["task"] == "vqa"]
    assert np.mean(mine) == pytest.approx(whole["value"])
    asked = probe_vqa(str(tmp_path / "first" / "run"), None, ["eval.bootstrap=50"], str(tmp_path / "again"))
    assert f"{whole['value']:.4f}" in asked
    with pytest.raises(ConfigError, match=r"--config und\.yaml says how to train"):
        probe_vqa(str(tmp_path / "first" / "run"), "und.yaml", [], str(tmp_path / "again"))


def test_a_table_that_a_kill_cut_off_is_not_taken_for_whole(tmp_path, monkeypatch):
    """The score without the blind baseline's beside it would be worse than none."""
    arguments = ("fakes.space", None, WITHOUT_SPACE, str(tmp_path / "out"), 24)
    with monkeypatch.context() as patch:
        patch.setattr("umm.questions.sample_lines", lambda answered, head: killed() if head == "blind" else ())
        with pytest.raises(KeyboardInterrupt):
            probe_vqa(*arguments)
    assert "blind" in probe_vqa(*arguments)
    assert probe_vqa(*arguments, dry_run=False).count("vqa - blind") > 1


def killed():
    raise KeyboardInterrupt


def test_the_split_asked_about_is_that_of_probes_unless_evaluation_names_one():
    for extra, split in ([], "test"), (["probe.split=val"], "val"), (["eval.split=val"], "val"):
        assert new_config("fakes.space", None, None, [*WITHOUT_SPACE, *extra], "out", None).eval.split == split


def test_a_dry_run_says_shapes_and_cost_and_writes_nothing(tmp_path):
    text = probe_vqa("fakes.space", None, [*WITHOUT_SPACE, "und.kind=llm"], str(tmp_path / "out"), dry_run=True)
    assert "TFLOP" in text and "latents (12, 4, 4)" in text and "questions" in text and "first row" in text
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(DataError, match="have no questions"):
        train(run_config(tmp_path / "run", "vqa", "data.name=fakes.pictures", shapes=False))
    with pytest.raises(UmmError, match="runs/nothing does not exist"):
        probe_vqa("runs/nothing", None, [], str(tmp_path / "x"))
    with pytest.raises(ConfigError, match=r"run=\.\.\. would be ignored.*--out"):
        probe_vqa("fakes.space", None, [*WITHOUT_SPACE, "run=elsewhere"], str(tmp_path / "x"))
    result = CliRunner().invoke(probe, ["vqa", "no_such_space", "--out", str(tmp_path / "x")])
    assert result.exit_code == 2 and result.output.count("\n") == 1 and "no_such_space" in result.output


def test_a_model_without_such_a_head_says_how_to_train_one(tmp_path):
    space = umm.find("latents", "fakes.space").tiny()
    model = umm.model.UnifiedModel(space, {})
    with pytest.raises(MissingHead, match=r"und\.kind=vqa"):
        model.answer(torch.rand(1, 3, 16, 16), ["?"])
    with pytest.raises(MissingHead, match="answers no questions"):
        answering_heads(model)


# ------------------------------------------------------------------------------------------------ what is learnt


@pytest.mark.parametrize("kind", ["vqa", "llm"])
def test_pictures_answer_what_words_alone_cannot(kind, tmp_path):
    """Which of four colours a picture has: known to the one that sees it, a guess to its blind twin."""
    extra = ["data.name=fakes.riddles", "data.image_size=16", "latent.image_size=16", "latent.normalizer=channel"]
    extra += ["train.images=2000", "und.optim.lr=5e-3", "und.llm.lora.rank=8", "train.log_every=50"]
    extra += ["und.llm.tiny.width=32", "und.llm.tiny.steps=200", "und.llm.tiny.batch_size=16", "und.llm.tiny.lr=1e-2"]
    train(run_config(tmp_path / "run", kind, *extra, shapes=False))
    evaluate_run(tmp_path / "run")
    numbers = json.loads((tmp_path / "run/eval/val.json").read_text())["numbers"]
    values = {row["metric"]: row["value"] for row in numbers}
    assert values[f"{kind} accuracy"] > 0.8
    assert values["blind accuracy on colour"] == 0.25 and values["blind accuracy on yes/no"] == 0.75
