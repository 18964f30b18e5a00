"""umm report: the numbers of the run folders, all of them and no others, whatever state the folders are in."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from fakes.html import read
from omegaconf import OmegaConf
from PIL import Image

from umm.cli import cli
from umm.config import load
from umm.errors import UmmError
from umm.report import differences, from_defaults, report
from umm.run_curves import averaged, thinned
from umm.run_facts import look_at, short_names, training_seconds


def number(metric: str, value: float, space: str = "", better: bool | None = True, **more) -> dict:
    row = {"metric": metric, "value": value, "higher_is_better": better, "n": 50, "headline": True, "conflict": None}
    return row | ({"space": space} if space else {}) | more


def make(folder, task: str = "recon", settings: tuple[str, ...] = (), numbers: tuple[dict, ...] = (), logged=()):
    """A run folder written by hand."""
    (folder / "samples").mkdir(parents=True)
    (folder / "eval").mkdir()
    config = load(task, None, [f"run={folder}", "train.images=96", *settings])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    facts = {"command": "umm train", "commit": "0123456789abcdef+", "created": "2026-01-02T03:04:05+0000"}
    (folder / "run.json").write_text(json.dumps(facts | {"finished": "2026-01-02T04:04:05+0000", "images": 96}))
    key = {"recon": "recon.decoder", "gen": "gen.dit", "und": "und.probe", "joint": "gen.dit"}[task]
    rows = logged or [
        {"step": i, "images": 16 * i, f"{key}.loss": 1 / i, f"{key}.lr": 0.1, "images_per_second": 8.0}
        for i in range(1, 7)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = io.BytesIO()
    Image.new("RGB", (20, 10), "blue").save(out, format="PNG")
    (folder / "samples" / "000000096.png").write_bytes(out.getvalue())
    if numbers:
        result = {"settings": {"images": None}, "numbers": numbers, "notes": ["a remark on the numbers"]}
        (folder / "eval" / "val.json").write_text(json.dumps(result))
    return folder


def page_of(*folders):
    return read(report(look_at(folders)).html())


def test_the_numbers_of_the_page_are_those_of_the_folder(tmp_path):
    psnr = number("psnr", 31.476771132556525, low=31.33695121954174, high=31.64149063522654)
    marked = number("fd", 0.123456789, "dinov2", False, headline=False, conflict="dinov2 took part in training")
    small = number("kid", -0.0005824008962722615, "pixels", False)
    page = page_of(make(tmp_path / "run", numbers=[psnr, marked, small]))
    for value in (psnr["value"], psnr["low"], psnr["high"], marked["value"], small["value"], 50, 96, 8.0):
        assert value in page.numbers, value
    assert "fd †" in page.text and "dinov2 took part in training" in page.text
    assert "a remark on the numbers" in page.text and "012345678+" in page.text
    assert "0:12" in page.text, "96 pictures at 8 a second"


def test_runs_of_several_tasks_share_plots_where_they_share_terms(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", settings=("recon.noise=0.5",))
    bins = [{"step": i, "images": 16 * i, "gen.dit.loss": 1.0, "gen.dit.t0.0-0.2": 3.0 / i, "gen.dit.t0.8-1.0": 1.0}
            for i in (1, 2)]  # fmt: skip
    page = page_of(one, two, make(tmp_path / "three", "gen", logged=bins))
    plots = [attributes["aria-label"] for attributes in page.all("svg")]
    shared = next(label for label in plots if label.startswith("recon.decoder loss"))
    assert "one from 1 at 16 images to 0.1667 at 96" in shared and "two from" in shared
    assert any("three: gen.dit" in label and "t 0.0 to 0.2 from 3 at 16" in label for label in plots)
    assert sum("gen.dit loss" in label for label in plots) == 1
    assert len(page.all("img")) == 3


def test_the_samples_of_a_joint_run_are_shown_and_many_settings_folded(tmp_path):
    joint = make(tmp_path / "both", "joint")
    (joint / "samples" / "000000096.png").rename(joint / "samples" / "000000096-gen.png")
    page = page_of(joint, make(tmp_path / "alone", "recon", settings=("recon.optim.lr=1e-3",)))
    assert "both (gen) after 96 images." in page.text and "Settings: " not in page.text
    texts = [f"recon.decoder.{key}=2" for key in ("width", "depth", "heads", "mlp")]
    texts += [f"recon.optim.{key}=1" for key in ("lr", "final_lr", "warmup", "constant", "weight_decay", "clip")]
    texts += [f"train.{key}=7" for key in ("batch_size", "workers", "keep", "log_every", "save_every", "accumulate")]
    page = page_of(make(tmp_path / "one"), make(tmp_path / "other", settings=tuple(texts)))
    assert "Settings: 16 differ" in page.text


def test_only_settings_that_differ_are_listed(tmp_path):
    one = make(tmp_path / "one", settings=("recon.noise=0.5", "recon.optim.lr=1e-3"))
    other = make(tmp_path / "other", settings=("recon.noise=0.25", "recon.optim.lr=1e-3"))
    third = make(tmp_path / "third", "gen", settings=("seed=3",))
    rows = differences(look_at([one, other]))
    assert rows == [{"setting": "recon.noise", "one": "0.5", "other": "0.25"}]
    rows = {row["setting"]: row for row in differences(look_at([one, third]))}
    assert rows["seed"] == {"setting": "seed", "one": "0", "third": "3"}
    assert not any(key.startswith(("recon.", "gen.")) for key in rows), "what one run has alone is no difference"
    changed = {row["setting"] for row in from_defaults(look_at([one])[0])}
    assert changed == {"train.images", "recon.noise", "recon.optim.lr"}


def test_seeds_of_one_configuration_become_mean_and_spread(tmp_path):
    values = [0.5, 0.7, 0.9]
    folders = [make(tmp_path / f"arm-s{i}", settings=(f"seed={i}",), numbers=[number("psnr", value)])
               for i, value in enumerate(values)]  # fmt: skip
    page = page_of(*folders, make(tmp_path / "other", settings=("recon.noise=0.5",), numbers=[number("psnr", 0.6)]))
    assert "arm-s (3 seeds)" in page.text
    assert np.isclose(page.numbers, np.mean(values), atol=1e-12).any()
    assert np.isclose(page.numbers, np.std(values, ddof=1), atol=1e-12).any()
    assert "arm-s (3 seeds), 2" in page.text, "each seed by itself too"


def test_arms_with_names_alike_stay_apart(tmp_path):
    folders = [make(tmp_path / f"s{i}", settings=(f"seed={i}", f"recon.noise={i // 2}"), numbers=[number("psnr", i)])
               for i in range(4)]  # fmt: skip
    page = page_of(*folders)
    assert "s0, s1" in page.text and "s2, s3" in page.text and {0.5, 2.5} <= set(page.numbers)


def test_the_same_seed_twice_is_no_repetition(tmp_path):
    page = page_of(make(tmp_path / "a1"), make(tmp_path / "a2"))
    assert "seeds)" not in page.text


def test_an_unfinished_run_is_said_and_shown(tmp_path):
    run = make(tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"created": "2026-01-02T03:04:05+0000"}))
    rows = (run / "log.jsonl").read_text().splitlines()[:3]
    (run / "log.jsonl").write_text("\n".join(rows) + '\n{"step": 4, "ima')
    page = page_of(run)
    assert "training has not finished, its log ends at 48 of 96 images" in page.text
    assert "1 of 4 lines of log.jsonl are damaged" in page.text and page.all("svg")


def damage_config(run):
    (run / "config.yaml").write_text("a: [1")


def damage_evaluation(run):
    (run / "eval" / "val.json").write_text('{"numbers": [{"metric": "psnr"}, 3]}')


def damage_json(run):
    (run / "eval" / "val.json").write_text("{")


def damage_picture(run):
    (run / "samples" / "000000096.png").write_bytes(b"\x89PNG junk")


def lose_log(run):
    (run / "log.jsonl").unlink()


def lose_facts(run):
    (run / "run.json").unlink()


def empty_log(run):
    (run / "log.jsonl").write_text('[]\n"x"\n{"step": 1, "images": 16, "recon.decoder.loss": null}\n')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_config, "config.yaml cannot be read"),
        (damage_evaluation, "2 evaluated numbers are damaged and left out"),
        (damage_json, "eval/val.json cannot be read"),
        (damage_picture, "is not a whole PNG"),
        (lose_log, "nothing was logged"),
        (lose_facts, "run.json is missing"),
        (empty_log, "2 of 3 lines of log.jsonl are damaged"),
    ],
)
def test_whatever_is_damaged_is_one_sentence_and_the_rest_is_there(tmp_path, damage, words):
    run = make(tmp_path / "run", numbers=[number("psnr", 3.25)])
    damage(run)
    page = page_of(run, make(tmp_path / "whole", settings=("seed=1",), numbers=[number("psnr", 4.5)]))
    assert page.text.count(words) == 1 and 4.5 in page.numbers


def test_hostile_names_are_text(tmp_path):
    name = "<script>alert(1)<" + "b>&$x$"
    run = make(tmp_path / name, settings=("data.name=folder", 'data.root="</pre><script>x"'))
    page = page_of(run, make(tmp_path / "plain"))
    assert name in page.text


def test_runs_judged_differently_are_said(tmp_path):
    one, two = (make(tmp_path / name, settings=(f"recon.noise={i}",), numbers=[number("psnr", 1.0)])
                for i, name in enumerate(("one", "two")))  # fmt: skip
    result = json.loads((two / "eval" / "val.json").read_text())
    (two / "eval" / "val.json").write_text(json.dumps(result | {"settings": {"images": 20}}))
    assert "judged with different eval.images: null in one, 20 in two" in page_of(one, two).text


def test_results_of_a_probe_and_of_a_joint_evaluation_are_tables(tmp_path):
    row = {"task": "latent/linear", "address": "latent", "method": "linear", "metric": "accuracy", "value": 0.875}
    (tmp_path / "probe").mkdir()
    probe = {"rows": [row | {"low": 0.8, "high": 0.9, "n": 40}], "notes": ["a note of the probe"], "config": {}}
    (tmp_path / "probe" / "results.json").write_text(json.dumps(probe))
    run = make(tmp_path / "run", "joint")
    row = number("psnr", 30.5, part="recon", baseline="alone", baseline_value=30.25)
    row["difference"] = {"value": 0.25, "low": 0.125, "high": 0.375, "p": 0.03125, "n": 50}
    found = {"rows": [row], "compute": [{"run": "run", "images": 96}], "notes": ["a note of the comparison"]}
    (run / "eval" / "val-joint.json").write_text(json.dumps(found))
    page = page_of(tmp_path / "probe", run)
    assert {0.875, 0.8, 0.9, 40, 30.5, 30.25, 0.25, 0.125, 0.375, 0.03125} <= set(page.numbers)
    assert "a note of the probe" in page.text and "a note of the comparison" in page.text


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(UmmError, match=r"is not a run: it has neither a config.yaml .* nor a results.json"):
        look_at([tmp_path])


def test_the_command_writes_one_file_and_says_its_size(tmp_path):
    run = make(tmp_path / "run")
    done = CliRunner().invoke(cli, ["report", str(run), str(run), "--out", str(tmp_path / "deep" / "page.html")])
    assert done.exit_code == 0 and "kB" in done.output
    assert read((tmp_path / "deep" / "page.html").read_text()).text.count("A run of task recon") == 1
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "page.html"]


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert short_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_training_time_leaves_pauses_out():
    assert training_seconds([{"images": 10, "images_per_second": 5.0}, {"images": 40, "images_per_second": 10.0}]) == 5
    assert training_seconds([{"images": 10}]) is None


def test_long_lines_are_thinned_to_means_and_seeds_are_compared_where_all_have_values():
    x = np.arange(1000.0)
    thin, values = thinned((x, 2 * x), 100)
    assert len(thin) == 100 and thin[0] == 4.5 and np.array_equal(values, 2 * thin)
    one, other = (np.array([1.0, 2, 3]), np.array([1.0, 2, 3])), (np.array([2.0, 3, 4]), np.array([4.0, 5, 6]))
    x, mean, spread = averaged([one, other])
    assert x.tolist() == [2, 3] and mean.tolist() == [3, 4] and spread == pytest.approx([2**0.5, 2**0.5])
