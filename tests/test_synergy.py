"""Experiments in worlds where the answer is known; what is declared, run, resumed, computed and said."""

from __future__ import annotations

import io
import json
import multiprocessing
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes.worlds import world
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from umm import seed_stats
from umm.board import Board
from umm.cli import cli
from umm.config import nest
from umm.declared import configuration
from umm.errors import ConfigError, UmmError
from umm.many_runs import Meter, keep, perform, train_and_judge
from umm.operations import Operations
from umm.runs import Run
from umm.synergy import Declaration, read_declaration
from umm.synergy_analysis import analyse, decisions
from umm.synergy_report import report
from umm.synergy_run import choose, final_jobs, number, perform_arm, run_synergy, tuning_jobs
from umm.synergy_verdict import falsification, size, verdict
from umm.train import Trainer
from umm.workers import in_workers

UND, GEN = {"joint.parts": ["und"]}, {"joint.parts": ["gen"]}


def arm(role: str, measures=(), compute: float = 1, images: int = 1000, seeds: int | None = None, **joint) -> dict:
    overrides = {f"joint.{key}": value for key, value in joint.items()} | {"train.images": images}
    return {"role": role, "measures": list(measures), "compute": compute, "overrides": overrides, "seeds": seeds}


def experiment(**changes) -> dict:
    """A complete declaration."""
    singles = {
        f"{letter}{size}": arm("single", [task], size, int(1000 * size), parts=[task])
        for letter, task in (("U", "und"), ("G", "gen"))
        for size in (0.25, 0.5, 1, 2, 4)
    }
    return {
        "about": "A world",
        "folder": "somewhere",
        "seeds": 8,
        "headline": "J",
        "overrides": {"train": {"batch_size": 10}},
        "endpoints": {
            "und": {"row": {"metric": "accuracy"}, "single": "U1", "error": "1 - value", "margin": 5},
            "gen": {"row": {"metric": "fd", "space": "wavelet"}, "single": "G1", "margin": 5},
        },
        "arms": singles
        | {
            "J": arm("joint", compute=2),
            "J-cheap": arm("joint", images=500),
            "J-stop": arm("stop", ["und"], 2, seeds=3, stop=["gen"]),
            "U+sham": arm("placebo", ["und"], 2, placebo="gaussian"),
            "G+sham": arm("placebo", ["gen"], 2, placebo="permuted_labels"),
        },
        "front": {"key": "joint.weights.und", "values": [0.3, 3], "seeds": 3},
    } | changes


def written(place: Path, **changes) -> Path:
    file = place / "experiment.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(experiment(**changes))))
    return file


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    return read_declaration(written(tmp_path_factory.mktemp("declared")))


def done(folder: Path, declared, judge=world) -> Path:
    """An experiment with all its results, as runs would leave them."""
    declared.seal(folder)
    for job in final_jobs(declared, folder, {}, None):
        keep(job, *judge(quick(job)), {"commit": "c0ffee"})
    return folder


def quick(job):
    """What a world reads of a configuration, without the seconds it takes to put together a complete one."""
    settings = {"joint.parts": ["gen", "und"], "joint.placebo": "none", "joint.stop": []} | job.settings
    return OmegaConf.merge(*(OmegaConf.create(nest(key, value)) for key, value in settings.items()))


# ------------------------------------------------------------------------------------------------------- declarations


def test_common_settings_base_files_and_the_front_are_folded_into_the_arms(tmp_path):
    (tmp_path / "base.yaml").write_text("task: joint\nrun: runs/x\ntrain: {batch_size: 32, images: 7}\n")
    declared = read_declaration(written(tmp_path, config="base.yaml"))
    settings = declared.settings("U2", Path("out"), 3, "test")
    assert settings["train.batch_size"] == 10 and settings["train.images"] == 2000  # file < common < arm
    assert settings["run"] == "out" and settings["seed"] == 3 and settings["eval.split"] == "test"
    assert declared.arms["J@3"].role == "front" and declared.seeds_of("J@3") == [0, 1, 2]
    assert declared.arms["J@0.3"].overrides["joint.weights.und"] == 0.3
    assert declared.curve("und") == ["U0.25", "U0.5", "U1", "U2", "U4"]


def test_an_arm_may_stand_on_a_file_of_its_own(tmp_path):
    (tmp_path / "other.yaml").write_text("gen: {ema: 0.5}\n")
    changes = experiment()["arms"]
    changes["J"]["base"] = "other.yaml"
    declared = read_declaration(written(tmp_path, arms=changes))
    assert declared.arms["J"].overrides["gen.ema"] == 0.5 and "gen.ema" not in declared.arms["U1"].overrides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headlin": "J"}, "unknown setting 'headlin'.*Did you mean 'headline'"),
        ({"headline": "U1"}, "no arm of role joint is called 'U1'"),
        ({"seeds": 1}, "seeds=.* must be a number from 2 on"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"overrides": {"seed": 3}}, "sets 'seed', which the experiment gives"),
        ({"overrides": {"train": {"imges": 3}}}, "unknown setting 'train.imges' .*arm 'U0.25'"),
        ({"comparisons": [{"arm": "J", "reference": "nobody", "endpoint": "und"}]}, "no arm is called 'nobody'"),
        ({"comparisons": [{"arm": "J", "reference": "U1", "endpoint": "gen"}]}, "no endpoint of arm U1"),
        ({"tuning": {"arms": ["J"], "seeds": [3], "grid": {"joint.optim.lr": [1]}}}, "none of the experiment's"),
        ({"endpoints": {"und": {"eror": 1}}}, "unknown setting 'eror' .*endpoint 'und'.*Did you mean 'error'"),
        ({"alpha": 5}, "alpha=5.* between 0 and 1"),
        ({"seeds": 24}, "takes up to 20 seeds, not 24: set test: t"),
    ],
)
def test_a_wrong_declaration_is_a_sentence_before_anything_runs(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        read_declaration(written(tmp_path, **change))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("J", {"role": "jont"}, "no role is called 'jont'.*Did you mean 'joint'"),
        ("J", {"measures": ["und2"]}, "no endpoint is called 'und2'.*Did you mean 'und'"),
        ("U+sham", {"measures": []}, "say what it measures"),
        ("U2", {"compute": 1}, "must differ in compute"),
        ("U+sham", {"seeds": 9}, "seeds=9 is not from 2 to the 8"),
        ("U+sham", {"tuned_as": "U1"}, "no tuned arm is called 'U1'"),
    ],
)
def test_a_wrong_arm_is_a_sentence(tmp_path, name, change, message):
    arms = experiment()["arms"]
    arms[name] |= change
    with pytest.raises(ConfigError, match=message):
        read_declaration(written(tmp_path, arms=arms))


def test_a_name_that_is_no_folder_is_refused(tmp_path):
    for name in ("../x", "report"):
        with pytest.raises(ConfigError, match="names a folder"):
            read_declaration(written(tmp_path, arms=experiment()["arms"] | {name: arm("joint")}))


def test_a_changed_declaration_is_refused_with_the_first_difference(tmp_path, declared):
    declared.seal(tmp_path)
    replace(declared, about="Other words", folder="elsewhere").seal(tmp_path)
    joint = declared.arms["J"]
    arms = declared.arms | {"J": replace(joint, overrides=joint.overrides | {"train.images": 7})}
    for change, message in (
        ({"seeds": list(range(9))}, r"'seeds' was \[0, .* and is \[0, .* 8\] now"),
        ({"alpha": 0.1}, "'alpha' was 0.05 and is 0.1"),
        ({"arms": arms}, "'arms.J.overrides.train.images' was 1000 and is 7"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(declared, **change).seal(tmp_path)


def test_a_declaration_changed_by_hand_is_refused(tmp_path, declared):
    declared.seal(tmp_path / "out")
    file = tmp_path / "out" / "declaration.json"
    assert Declaration.sealed(tmp_path / "out").sha256 == json.loads(file.read_text())["sha256"]
    file.write_text(file.read_text().replace('"margin": 5', '"margin": 50'))
    with pytest.raises(ConfigError, match="changed after it was sealed"):
        Declaration.sealed(tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- runs


def small(**changes) -> dict:
    """Three arms, two seeds."""
    arms = {"U": arm("single", ["und"], parts=["und"]), "G": arm("single", ["gen"], parts=["gen"]), "J": arm("joint")}
    ends = experiment()["endpoints"]
    ends["und"]["single"], ends["gen"]["single"] = "U", "G"
    return {"seeds": 2, "arms": arms, "endpoints": ends, "front": None, "folder": "out"} | changes


def test_crashes_are_reported_the_others_go_on_and_the_same_command_mends_it(tmp_path, monkeypatch, capfd):
    """One run raises, one ends its whole process; the second call runs only what is missing."""
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, **small())
    with pytest.raises(UmmError, match="2 runs failed") as caught:
        run_synergy(file, jobs=2, judge=partial(world, crash="G/seed1", die="J/seed0"))
    assert "G seed 1: RuntimeError: the disk is full of shapes" in str(caught.value)
    assert "J seed 0: its process ended with status 7" in str(caught.value)
    assert "Traceback" in Path("out/G/seed1/output.log").read_text()
    first = Path("out/U/seed0/result.json").read_text()
    (tmp_path / "calls").mkdir()
    assert "all 6 runs are in" in run_synergy(file, jobs=1, judge=partial(world, marks=tmp_path / "calls"))
    assert sorted(p.name for p in (tmp_path / "calls").iterdir()) == ["out_G_seed1", "out_J_seed0"]
    assert Path("out/U/seed0/result.json").read_text() == first
    assert "G seed 1 failed" in capfd.readouterr().err


def test_workers_are_ended_when_nobody_asks_any_more(tmp_path):
    events = in_workers(time.sleep, [(600, tmp_path / "log")], workers=1)
    assert next(events)[:2] == ("started", 600) and len(multiprocessing.active_children()) == 1
    events.close()
    assert multiprocessing.active_children() == []


def test_seed_i_is_the_seed_of_every_arm_and_seeds_come_one_after_another(tmp_path, declared):
    jobs = final_jobs(declared, tmp_path, {}, limit_seeds=2)
    assert {(job.seed, job.settings["seed"], job.folder.name) for job in jobs} == {(0, 0, "seed0"), (1, 1, "seed1")}
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert len(jobs) == 2 * len(declared.arms)


def test_the_board_shows_every_arm_and_seed(tmp_path, declared):
    jobs = final_jobs(declared, tmp_path, {}, limit_seeds=1)
    board = Board(jobs, "A world", workers=2)
    board.note("started", jobs[0], None)
    board.note("done", jobs[0], None)
    board.note("started", jobs[1], None)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(board.table())
    title, *lines = console.export_text().splitlines()
    assert f"A world: 1 of {len(jobs)}" in title
    marks = {line.split()[1]: line for line in lines if len(line.split()) > 3}
    assert "✓" in marks["U0.25"] and "▸" in marks["U0.5"] and "·" in marks["J"]


def test_tuning_takes_the_best_trial_on_its_own_seeds_and_the_validation_split(tmp_path):
    declared = read_declaration(written(tmp_path, **tuned({"joint.optim.lr": [1e-4, 3e-4, 1e-3]})))
    jobs = tuning_jobs(declared, tmp_path)
    assert len(jobs) == 2 * 3 * 2 and {job.settings["eval.split"] for job in jobs} == {"val"}
    for job in jobs:
        keep(job, *tunable("joint.optim.lr", 3e-4, job), {})
    chosen = choose(declared, tmp_path)
    assert chosen == {"J": {"joint.optim.lr": 3e-4}, "U1": {"joint.optim.lr": 3e-4}}
    jobs = final_jobs(declared, tmp_path, chosen, None)
    rates = {job.group: job.settings.get("joint.optim.lr") for job in jobs}
    assert (rates["J"], rates["U2"], rates["J@3"], rates["G1"]) == (3e-4, 3e-4, 3e-4, None)
    assert {job.settings["train.images"] for job in jobs if job.group == "U2"} == {2000}


def tuned(grid: dict, **arms: dict) -> dict:
    """Changes that tune J and U1, whose settings U2 takes."""
    changed = experiment()["arms"]
    for name, change in ({"U2": {"tuned_as": "U1"}} | arms).items():
        changed[name] |= change
    return {"arms": changed, "tuning": {"arms": ["J", "U1"], "seeds": [100, 101], "grid": grid}}


def tunable(key: str, best: float, job) -> tuple[list[dict], dict]:
    """A world in which a setting is best at one value."""
    rows, costs = world(quick(job))
    if job.settings.get(key) != best:
        rows = [row | {"value": row["value"] * (0.9 if row["higher_is_better"] else 1.1)} for row in rows]
    return rows, costs


def test_a_tuned_loss_weight_leaves_the_front_its_weights_and_moves_the_headlines_own_point(tmp_path):
    declared = read_declaration(written(tmp_path, **tuned({"joint.weights.und": [0.5, 2]})))
    declared.seal(tmp_path)
    for job in tuning_jobs(declared, tmp_path):
        keep(job, *tunable("joint.weights.und", 2, job), {})
    jobs = final_jobs(declared, tmp_path, choose(declared, tmp_path), None)
    weights = {job.group: job.settings.get("joint.weights.und") for job in jobs}
    assert (weights["J"], weights["J@0.3"], weights["J@3"]) == (2, 0.3, 3)
    for job in jobs:
        keep(job, *world(quick(job)), {"commit": "c0ffee"})
    found = analyse(tmp_path)
    assert [(point["arm"], point["value"]) for point in found["front"]] == [("J", 2), ("J@0.3", 0.3), ("J@3", 3)]
    report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Tuning on seeds 100, 101 chose for J: joint.weights.und=2." in text


U2_TURNED = {"U2": {"tuned_as": "U1", "overrides": {"joint.ema": 0.5}}}


@pytest.mark.parametrize(
    ("grid", "arms", "message"),
    [
        ({"train.images": [500, 3000]}, {}, "train.images is the compute that arms declare"),
        ({"joint.optim.lrr": [1e-3]}, {}, "unknown setting 'joint.optim.lrr' .*tuning.grid"),
        ({"seed": [1, 2]}, {}, "tuning.grid sets 'seed', which the experiment gives"),
        ({"eval": [{"split": "val"}]}, {}, "tuning.grid sets 'eval.split'"),
        ({"joint.optim.lr": []}, {}, "tuning needs arms, a grid"),
        ({"joint.optim.lr": [1e-3]}, {"U1": {"measures": ["other"]}}, "'U1' measures no primary endpoint"),
        ({"joint.ema": [0.9, 0.99]}, U2_TURNED, "sets 'joint.ema' to 0.5"),
    ],
)
def test_a_grid_that_would_mislead_or_fail_later_is_refused(tmp_path, grid, arms, message):
    changes = tuned(grid, **arms)
    if "U1" in arms:  # an exploratory endpoint of its own
        ends = experiment()["endpoints"]
        ends["other"] = {"row": {"metric": "kid"}, "single": "U1", "margin": 5, "primary": False}
        ends["und"]["single"] = "U0.5"
        changes["endpoints"] = ends
    with pytest.raises(ConfigError, match=message):
        read_declaration(written(tmp_path, **changes))


def test_an_endpoint_speaks_of_exactly_one_row(declared):
    endpoint = declared.endpoints["gen"]
    row = {"metric": "fd", "space": "wavelet", "value": 1.0, "higher_is_better": False}
    assert number([row, row | {"space": "pixels"}], endpoint, "gen") is row
    with pytest.raises(UmmError, match=r"0 rows have .* There are: fd \(pixels\)"):
        number([row | {"space": "pixels"}], endpoint, "gen")
    with pytest.raises(UmmError, match="better higher, which contradicts error=value"):
        number([row | {"higher_is_better": True}], endpoint, "gen")


# ----------------------------------------------------------------------------------------------------------- verdicts


def test_synergy_that_is_there_is_found_in_both_directions(tmp_path, declared):
    found = analyse(done(tmp_path, declared, partial(world, gain=0.3)))
    said, headline = verdict(found), found["joint"]["J"]
    assert said["key"] == "both" and headline["decisions"]["p_both"] == 2 / 2**8
    assert said["title"] == "Both directions are shown"
    for row in headline["directions"].values():
        assert row["low"] < 0.3 < row["high"] and row["better"]
    worth = headline["sigma"]  # each error is that of exp(0.3 / 0.3) = e times the images, with twice the compute
    assert worth["sign"] == "" and worth["value"] == pytest.approx(2.72, rel=0.1) and worth["mutual"]
    assert worth["interval"][0] < worth["value"] < worth["interval"][1]
    states = {row["what would refute it"]: row["state"] for row in falsification(found)}
    assert states["a placebo arm reaches the joint arm's gain"] == "withstood"
    assert states["the stop-gradient arm shows a gain"] == "withstood"
    assert states["distillation from the encoder reaches it"] == "not tested"


def test_no_synergy_is_not_called_one_and_equality_is_shown(tmp_path, declared):
    found = analyse(done(tmp_path, declared))
    said = verdict(found)
    assert said["key"] == "neither"
    assert found["joint"]["J"]["decisions"]["equivalent"] == ["und", "gen"]
    text = " ".join(said["sentences"])
    assert "shown to be equal within the margin of 5%" in text and "evidence of no effect" not in text
    assert "as good as the specialists, within the margins" in text


def test_one_direction_is_called_one(tmp_path, declared):
    found = analyse(done(tmp_path, declared, partial(world, gain={"und": 0.3, "gen": -0.3})))
    said = verdict(found)
    assert said["title"] == "One direction is shown, and harm in the other"
    decided = found["joint"]["J"]["decisions"]
    assert decided["shown"] == ["und"] and decided["harmed"] == ["gen"]
    text = " ".join(said["sentences"])
    assert "the partner harms" in text and "is better in one direction and worse in the other" in text


def directions(s: dict[str, tuple[float, float]], n: int = 8) -> dict[str, dict]:
    """{endpoint: (mean, p)} as `decisions` reads it."""
    return {name: {"mean": mean, "p": p, "n": n, "p_harm": 1.0, "p_different": 1.0} for name, (mean, p) in s.items()}


@pytest.mark.parametrize(
    ("p", "both", "alone"), [((0.047, 0.039), True, False), ((0.02, 0.3), False, True), ((0.06, 0.01), False, True)]
)
def test_harm_is_shown_by_the_rule_that_shows_gain(declared, p, both, alone):
    """Two directions of p = 0.047 and 0.039 are both shown, up or down, though neither is alone."""
    up, down = (
        decisions(directions({name: (sign, value) for name, value in zip(("und", "gen"), p)}), declared)
        for sign in (0.1, -0.1)
    )
    assert (up["both"], up["both_harmed"]) == (both, False) and (down["both"], down["both_harmed"]) == (False, both)
    assert up["shown"] == down["harmed"] and up["harmed"] == down["shown"] == []
    assert len(up["shown"]) == 2 * both + alone


def test_harm_in_both_directions_is_the_verdict(tmp_path, declared):
    said = verdict(analyse(done(tmp_path, declared, partial(world, gain=-1.5))))
    text = " ".join(said["sentences"])
    assert said["title"] == "Harm is shown in both directions" and "is worse in both directions" in text
    assert "the error is 4.5 times that of U1" in text and "e+0" not in text
    assert "more harm than what any second loss does" in text and "evidence of no effect" not in text


@pytest.mark.parametrize(
    ("score", "words"),
    [(-0.0798, "8.3 % higher than"), (0.2, "18 % lower than"), (-2.35, "10 times"), (1.0, "2.7 times smaller than")],
)
def test_large_changes_are_factors(score, words):
    assert size(score) == words


def with_seeds(declared: Declaration, n: int) -> Declaration:
    return replace(declared, seeds=list(range(n)))


def test_power_is_said_only_where_one_direction_alone_can_be_shown(tmp_path, declared):
    """Six seeds: the exact test's smallest p is 0.031, which Holm doubles; eight: a t test at half of alpha."""
    six = analyse(done(tmp_path / "six", with_seeds(declared, 6), partial(world, gain=0.01)))
    text = " ".join(verdict(six)["sentences"])
    assert "6 seeds cannot show one direction alone" in text and "four times in five" not in text
    assert all(row["detectable"] is None for row in six["joint"]["J"]["directions"].values())
    report(tmp_path / "six")
    eight = analyse(done(tmp_path / "eight", declared, partial(world, gain=0.01)))
    row = eight["joint"]["J"]["directions"]["und"]
    spread = np.std(list(row["per_seed"].values()), ddof=1)
    assert row["detectable"] == pytest.approx(seed_stats.detectable(8, alpha=0.025) * spread)


def test_more_seeds_than_the_exact_test_takes_are_tested_by_t(tmp_path, declared):
    many = replace(with_seeds(declared, 24), test="t")
    row = analyse(done(tmp_path, many, partial(world, gain=0.3)))["joint"]["J"]["directions"]["und"]
    assert row["p"] == row["p_t"] and row["p_sign_flip"] is None and row["n"] == 24


def test_a_number_that_is_not_finite_stops_its_endpoint_and_not_the_report(tmp_path, declared):
    def broken(config):
        rows, costs = world(config)
        bad = "G2/seed1" in str(config.run)
        return [row | ({"value": float("nan")} if bad else {}) for row in rows], costs

    folder = done(tmp_path, declared, broken)
    said = report(folder)
    assert "An endpoint has no scores" in said and "the error of G2 seed 1 is nan" in said
    assert "The mean of G2 leaves out seed 1, whose gen is not a finite number." in said
    found = json.loads((folder / "report" / "report.json").read_text())
    assert found["arms"]["G2"]["endpoints"]["gen"]["n"] == 7 and found["joint"]["J"]["directions"]["und"]["n"] == 8


def test_a_mistyped_row_fails_the_first_run_and_not_the_report(tmp_path, declared):
    ends = declared.endpoints | {"gen": replace(declared.endpoints["gen"], row={"metric": "fdd"})}
    job = next(job for job in final_jobs(declared, tmp_path, {}, 1) if job.group == "G1")
    with pytest.raises(UmmError, match=r"endpoint 'gen': 0 rows have \{'metric': 'fdd'\}"):
        perform_arm(world, replace(declared, endpoints=ends), job)
    assert not job.done
    perform_arm(world, declared, job)
    assert job.done


def test_a_control_with_too_few_seeds_is_no_refutation(tmp_path, declared):
    arms = declared.arms | {name: replace(declared.arms[name], seeds=3) for name in ("U+sham", "G+sham")}
    arms["more"] = replace(arms["U+sham"], role="more", seeds=3)
    found = analyse(done(tmp_path, replace(declared, arms=arms), partial(world, gain=0.3)))
    states = {row["what would refute it"]: row for row in falsification(found)}
    assert states["a placebo arm reaches the joint arm's gain"]["state"] == "not tested"
    assert "3 seeds cannot tell" in states["a placebo arm reaches the joint arm's gain"]["evidence"]
    said = verdict(found)
    assert "3 seeds cannot tell it from what any second loss does" in " ".join(said["sentences"])
    assert said["title"] == "Both directions are shown, with reservations"  # no placebo that could have failed


def test_a_control_with_too_few_seeds_does_not_take_the_claim_away(tmp_path, declared):
    arms = declared.arms | {"U+more": replace(declared.arms["U+sham"], role="more", seeds=3)}
    found = analyse(done(tmp_path, replace(declared, arms=arms), partial(world, gain=0.3, placebo=0.01)))
    assert verdict(found)["title"] == "Both directions are shown"


def test_equal_compute_is_measured_where_operations_are_counted(tmp_path, declared):
    def dear(config):
        rows, costs = world(config)
        return rows, costs | {"flops": costs["flops"] * (1.2 if "J-cheap" in str(config.run) else 1)}

    found = analyse(done(tmp_path / "dear", declared, partial(world, gain=0.3)))
    assert "measured" not in " ".join(verdict(found)["sentences"])
    found = analyse(done(tmp_path / "declared", declared, dear))
    found["joint"]["J"]["decisions"]["shown"] = ["und"]
    assert "J-cheap (measured: 1.2 x the operations of U1)" in " ".join(verdict(found)["sentences"])
    evidence = {row["what would refute it"]: row["evidence"] for row in falsification(found)}
    assert "1.2 x the operations of G1" in evidence["the gain vanishes at equal compute"]


def test_costs_are_those_of_the_whole_run_though_a_first_attempt_failed_before_its_first_step(tmp_path, declared):
    job = next(job for job in final_jobs(declared, tmp_path, {}, 1) if job.group == "J")

    def no_decoder(config):
        Run.create(config)
        raise UmmError("there is no decoder.")

    with pytest.raises(UmmError, match="no decoder"):
        perform(no_decoder, job)
    assert (job.folder / "config.yaml").exists()
    perform(world, job)
    assert json.loads((job.folder / "result.json").read_text())["costs"]["flops"] == 2_000_000


def test_a_gain_that_a_placebo_has_too_is_not_the_partners(tmp_path, declared):
    found = analyse(done(tmp_path, declared, partial(world, gain=0.3, placebo=0.3)))
    said = verdict(found)
    assert "does not set it apart from what any second loss does" in " ".join(said["sentences"])
    assert said["title"] == "Both directions are shown, with reservations"
    states = {row["what would refute it"]: row["state"] for row in falsification(found)}
    assert states["a placebo arm reaches the joint arm's gain"] == "not withstood"


def test_a_leak_comes_before_everything_else(tmp_path, declared):
    said = verdict(analyse(done(tmp_path, declared, partial(world, gain=0.3, leak=0.01))))
    assert said["key"] == "leak" and "J-stop must equal U1 on und" in said["sentences"][0]


def test_what_is_half_run_is_called_preliminary(tmp_path, declared):
    folder = done(tmp_path, declared, partial(world, gain=0.3))
    for file in folder.glob("*/seed[3-7]/result.json"):
        file.unlink()
    said = verdict(analyse(folder))
    assert said["key"] == "neither" and "the exact test's smallest p is 0.25" in " ".join(said["sentences"])
    assert "Preliminary" in said["sentences"][-1]
    for file in folder.glob("J/seed*/result.json"):
        file.unlink()
    assert verdict(analyse(folder))["key"] == "unfinished"


def test_an_endpoint_at_its_ceiling_is_said_and_a_floor_lifts_it(tmp_path, declared):
    def perfect(config):
        rows, costs = world(config)
        return [row | ({"value": 1.0} if row["metric"] == "accuracy" else {}) for row in rows], costs

    found = analyse(done(tmp_path / "a", declared, perfect))
    assert verdict(found)["title"] == "An endpoint has no scores"
    assert "no finite logarithm" in " ".join(verdict(found)["sentences"])
    ends = declared.endpoints | {"und": replace(declared.endpoints["und"], floor=0.01)}
    found = analyse(done(tmp_path / "b", replace(declared, endpoints=ends), perfect))
    assert found["joint"]["J"]["directions"]["und"]["mean"] == 0


def test_joint_errors_beyond_the_specialists_are_not_extrapolated(tmp_path, declared):
    found = analyse(done(tmp_path, declared, partial(world, gain=1.5)))
    sigma = found["joint"]["J"]["sigma"]
    assert sigma["sign"] == ">" and sigma["value"] == pytest.approx(4.0) and sigma["interval"] is None
    assert "Nothing is extrapolated" in " ".join(verdict(found)["sentences"])


def test_the_front_says_which_weights_nothing_beats(tmp_path, declared):
    points = analyse(done(tmp_path, declared, partial(world, gain=0.3)))["front"]
    assert [(point["arm"], point["value"]) for point in points] == [("J", 1.0), ("J@0.3", 0.3), ("J@3", 3.0)]
    assert all(point["best"] and point["errors"]["und"]["n"] == 3 for point in points)  # equal, on common seeds


def test_results_of_another_declaration_are_refused(tmp_path, declared):
    folder = done(tmp_path, declared)
    file = folder / "J" / "seed0" / "result.json"
    file.write_text(file.read_text().replace(Declaration.sealed(folder).sha256, "0" * 64))
    with pytest.raises(UmmError, match="belongs to another declaration"):
        analyse(folder)


# ------------------------------------------------------------------------------------------------------------- reports


def test_the_report_is_whole(tmp_path, declared):
    folder = done(tmp_path, declared, partial(world, gain=0.3))
    said = report(folder)
    assert said.startswith("Both directions are shown.")
    found = json.loads((folder / "report" / "report.json").read_text())
    joint = found["arms"]["J"]
    assert joint["costs"]["flops"] == 2_000_000 and len(joint["endpoints"]["und"]["per_seed"]) == 8
    text = (folder / "report" / "report.md").read_text()
    for title in ("The two directions", "Worth in compute", "What would refute it", "All loss weights", "Per seed"):
        assert f"## {title}" in text
    names = {"curve-und.png", "curve-gen.png", "seeds-und.png", "seeds-gen.png", "front.png"}
    assert names <= {file.name for file in (folder / "report").iterdir()} and all(f"({name})" in text for name in names)
    page = (folder / "report" / "report.html").read_text()
    assert page.count("<svg") == 5 and "Both directions are shown" in page


def test_the_report_shows_what_the_arms_drew(tmp_path, declared):
    folder = done(tmp_path, declared)
    for images, colour in ((32, "white"), (64, "teal")):
        file = folder / "J" / "seed0" / "samples" / f"{images:09d}-gen.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(file)
    report(folder)
    assert Image.open(folder / "report" / "grid-J.png").getpixel((0, 0)) == (0, 128, 128)
    assert "J with seed 0, after 64 pictures." in (folder / "report" / "report.html").read_text()


def test_a_folder_that_is_no_experiment_is_one_sentence(tmp_path):
    result = CliRunner().invoke(cli, ["synergy", "report", str(tmp_path)])
    assert result.exit_code == 2 and "is no synergy experiment" in result.output


def test_the_declarations_that_are_shipped_are_valid(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # as PYTHONPATH=. does, for experiments.planted
    folder = Path(__file__).parents[1] / "experiments" / "synergy"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        read_declaration(file)


# ---------------------------------------------------------------------------------------------------- real trainings


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Two specialists, the joint arm and the two stop arms, on pictures and latents of the tests."""
    dit = {"size": "custom", "width": 32, "depth": 2, "heads": 2, "head_depth": 0}
    train = {"images": 96, "batch_size": 16, "workers": 0, "device": "cpu", "log_every": 2, "sample_every": 0}
    common = {
        "data": {"name": "fakes.shades"},
        "latent": {"name": "fakes.space"},
        "cache": {"dir": str(tmp_path / "cache")},
        "train": train,
        "und": {"block": 0},
        "gen": {"dit": dit, "conditional": False},
        "eval": {"metrics": ["fd"], "images": 40, "noises": [], "sampler": {"steps": 2}},
    }
    names = {"U": UND, "G": GEN, "J": {}, "J-stop-gen": {"joint.stop": ["gen"]}, "J-stop-und": {"joint.stop": ["und"]}}
    roles = dict(zip(names, (["und"], ["gen"], [], ["und"], ["gen"])))
    kinds = {"U": "single", "G": "single", "J": "joint"}
    arms = {
        name: {"role": kinds.get(name, "stop"), "measures": roles[name], "overrides": settings}
        for name, settings in names.items()
    }
    ends = {
        "und": {"row": {"metric": "accuracy"}, "single": "U", "error": "1 - value", "floor": 0.01, "margin": 5},
        "gen": {"row": {"metric": "fd", "space": "latents"}, "single": "G", "margin": 5},
    }
    changes = {"overrides": common, "arms": arms, "endpoints": ends, "split": "val", "seeds": 2, "front": None}
    return written(tmp_path, **changes, folder=str(tmp_path / "out"))


def test_real_runs_are_trained_judged_and_counted_and_the_stop_arms_equal_the_specialists(tiny):
    """The whole instrument on the real task: paired seeds, bit-equal controls, work that adds up."""
    declared = read_declaration(tiny)
    folder = Path(declared.folder)
    declared.seal(folder)
    for job in final_jobs(declared, folder, {}, None):
        perform(train_and_judge, job)
    found = analyse(folder)
    assert [row["gap"] for row in found["stop"]] == [0.0, 0.0] and all(row["n"] == 2 for row in found["stop"])
    assert verdict(found)["key"] == "neither"
    costs = {name: arm["costs"] for name, arm in found["arms"].items()}
    assert all(cost["seconds"] > 0 for cost in costs.values())
    assert costs["U"]["images"] == costs["G"]["images"] == 96 and costs["J"]["images"] == 192  # of all parts
    assert costs["U"]["flops"] < costs["G"]["flops"] < costs["J"]["flops"] == costs["U"]["flops"] + costs["G"]["flops"]
    run = folder / "J" / "seed1"
    assert (run / "model").is_dir() and (run / "eval" / "val.json").exists() and not (run / "checkpoints").exists()


def test_operations_are_those_that_torch_counts():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Flatten(2), torch.nn.TransformerEncoderLayer(36, 4, 16, 0.0)
    )
    totals = []
    for counter in (Operations(), FlopCounterMode(display=False)):
        with counter:
            network(torch.ones(2, 3, 8, 8)).square().sum().backward()
        totals.append(counter.total if isinstance(counter, Operations) else counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_counting_operations_changes_no_bit_of_a_run(tiny, tmp_path):
    declared = read_declaration(tiny)
    weights = []
    for name, counted in (("counted", True), ("plain", False)):
        config = configuration("joint", declared.settings("J", tmp_path / name, 0, "val"), "the test")
        trainer = Trainer(config)
        meter = Meter(trainer) if counted else None
        trainer.train()
        weights.append(load_file(trainer.run.latest() / "model.safetensors"))
        assert meter is None or meter.total > 0
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
