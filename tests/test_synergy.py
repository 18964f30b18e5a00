"""Experiments in worlds where the answer is known; what is declared, run, resumed, computed and said."""

from __future__ import annotations

import io
import json
import multiprocessing
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fakes.worlds import world
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from umm.board import Board
from umm.cli import cli
from umm.config import nest
from umm.declared import configuration
from umm.errors import ConfigError, UmmError
from umm.many_runs import Meter, keep, perform, train_and_judge
from umm.synergy import Declaration, read_declaration
from umm.synergy_analysis import analyse
from umm.synergy_report import report
from umm.synergy_run import choose, final_jobs, number, run_synergy, tuning_jobs
from umm.synergy_verdict import falsification, verdict
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
    tuning = {"arms": ["J", "U1"], "seeds": [100, 101], "grid": {"train.images": [500, 3000, 800]}}
    arms = experiment()["arms"]
    arms["U2"]["tuned_as"] = "U1"
    declared = read_declaration(written(tmp_path, arms=arms, tuning=tuning))
    jobs = tuning_jobs(declared, tmp_path)
    assert len(jobs) == 2 * 3 * 2 and {job.settings["eval.split"] for job in jobs} == {"val"}
    for job in jobs:
        keep(job, *world(quick(job)), {})
    chosen = choose(declared, tmp_path)
    assert chosen == {"J": {"train.images": 3000}, "U1": {"train.images": 3000}}
    images = {job.group: job.settings["train.images"] for job in final_jobs(declared, tmp_path, chosen, None)}
    assert (images["J"], images["U2"], images["J@3"], images["G1"]) == (3000, 3000, 3000, 1000)


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
    assert "shown to be equal within the margin of 5%" in " ".join(said["sentences"])


def test_one_direction_is_called_one(tmp_path, declared):
    found = analyse(done(tmp_path, declared, partial(world, gain={"und": 0.3, "gen": -0.3})))
    said = verdict(found)
    assert said["key"] == "one" and found["joint"]["J"]["decisions"]["shown"] == ["und"]
    assert found["joint"]["J"]["decisions"]["harmed"] == ["gen"]
    assert "the partner harms" in " ".join(said["sentences"])


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
    assert verdict(found)["key"] == "unfinished" and "no logarithm" in " ".join(verdict(found)["sentences"])
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
    assert all(cost["images"] == 96 and cost["seconds"] > 0 for cost in costs.values())
    assert costs["U"]["flops"] < costs["G"]["flops"] < costs["J"]["flops"] == costs["U"]["flops"] + costs["G"]["flops"]
    run = folder / "J" / "seed1"
    assert (run / "model").is_dir() and (run / "eval" / "val.json").exists() and not (run / "checkpoints").exists()


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
