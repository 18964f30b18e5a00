"""A comparison of latent spaces: what is declared, how spaces are chained and gone on with, what is said in the end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes.rivals import rival
from omegaconf import OmegaConf

from umm.cli import cli
from umm.compare import Declaration, read_declaration
from umm.compare_plots import limits
from umm.compare_report import analyse, apart, budget, report
from umm.compare_run import all_jobs, as_it_is, chained, kind_of, perform_space, run_compare, warnings_of
from umm.config import read_yaml
from umm.declared import configuration
from umm.errors import ConfigError, UmmError
from umm.judging import Records
from umm.latents.pixels import Pixels
from umm.latents.svg import SVG
from umm.latents.vae import VAE
from umm.many_runs import Counted, Job, Meter, keep, results
from umm.registry import find
from umm.runs import Run
from umm.stats import t_interval

COLUMNS = {
    "PSNR": {"part": "recon", "metric": "psnr"},
    "gFD": {"part": "gen", "metric": "fd", "space": "wavelet"},
    "accuracy": {"part": "und", "metric": "accuracy"},
}
VAE_LATENT = {"name": "vae", "image_size": 16, "widths": [8, 8, 8], "channels": 3, "stats_images": 16}


def comparison(place: Path, **changes) -> dict:
    """A complete declaration of three kinds of spaces, small enough to be trained in a test."""
    train = {"images": 32, "batch_size": 8, "workers": 0, "device": "cpu", "sample_every": 0, "log_every": 2}
    decoder = {"size": "custom", "width": 16, "depth": 1, "heads": 2, "mlp": 32}
    optim = {"lr": 1e-3, "warmup": 0}
    recon = {"decoder": decoder, "perceptual": {"name": "none"}, "adversarial": {"weight": 0}, "optim": optim}
    dit = {"size": "custom", "width": 16, "depth": 1, "heads": 2, "head_depth": 0}
    judged = {"cached": True, "metrics": ["fd"], "features": ["wavelet"], "noises": [], "sampler": {"steps": 2}}
    return {
        "about": "Three rivals",
        "folder": str(place / "out"),
        "split": "val",
        "seeds": 2,
        "overrides": {"data": {"name": "fakes.shades", "count": 24}, "cache": {"dir": str(place / "cache")}}
        | {"train": train},
        "stages": {
            "recon": {"recon": recon, "eval": {"metrics": ["psnr"], "features": [], "baselines": False}},
            "gen": {"gen": {"dit": dit, "conditional": False, "optim": optim}, "eval": judged},
            "und": {"und": {"limit": 16}, "eval": {"cached": True}},
        },
        "spaces": {
            "patches": {"latent": {"name": "fakes.space"}},
            "pixels": {
                "about": "as they are",
                "latent": {"name": "pixels", "image_size": 16, "patch": 4},
                "stages": {"und": {"und": {"limit": 15}}},
            },
            "vae": {"latent": VAE_LATENT},
        },
        "columns": COLUMNS,
    } | changes


def gen_column(**changes) -> dict:
    return {"columns": {"FD": {"part": "gen", "metric": "fd", "space": "wavelet"} | changes}}


def written(place: Path, **changes) -> Path:
    file = place / "comparison.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(comparison(place, **changes))))
    return file


@pytest.fixture
def declared(tmp_path) -> Declaration:
    return read_declaration(written(tmp_path))


def done(folder: Path, declared: Declaration, seeds: int | None = None) -> Path:
    """A comparison with its results, as runs would leave them."""
    declared.seal(folder)
    for job in all_jobs(declared, folder, seeds):
        rows = [row | {"part": stage} for stage in job.settings for row in rival(job.group, stage, job.seed)]
        costs = {stage: {"seconds": 2.0, "flops": 3e12, "parameters": 7} for stage in ("encode", *job.settings)}
        warning = "this DiT is 4 wide" if job.group == "pixels" else None
        space = {"shape": [3, 4, 4], "parameters": 5, "flops": 1e9, "warning": warning}
        keep(job, rows, costs, {"kind": "frozen", "space": space, "commit": "c0ffee"})
    return folder


# ------------------------------------------------------------------------------------------------------- declarations


def test_a_space_s_own_settings_go_before_a_stage_s_and_those_before_all_runs(tmp_path):
    spaces = {"a": {"latent": {"name": "fakes.space"}, "stages": {"gen": {"train": {"images": 5}}}}}
    spaces["b"] = {"latent": {"name": "fakes.space", "channels": 3}}
    made = comparison(tmp_path)
    made["stages"]["gen"]["train"] = {"images": 7}
    declared = read_declaration(written(tmp_path, spaces=spaces, stages=made["stages"]))
    images = {
        (name, stage): declared.settings(name, stage)["train.images"] for name in "ab" for stage in ("gen", "und")
    }
    assert images == {("a", "gen"): 5, ("b", "gen"): 7, ("a", "und"): 32, ("b", "und"): 32}
    assert (
        declared.settings("b", "und")["latent.channels"] == 3 and declared.settings("b", "und")["eval.split"] == "val"
    )
    assert declared.changed("a") == {"gen": {"train.images": 5}} and declared.changed("b") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": ""}, "folder is not given"),
        ({"spaces": {}}, "needs spaces, stages and columns"),
        ({"seeds": 1}, "seeds=1 must be a number from 2 on"),
        ({"spaces": {"a": {"latent": {"channels": 3}}}}, "space 'a': say which"),
        ({"spaces": {"a": {"latent": {"name": "pixls"}}}}, "nothing in umm/latents is called 'pixls'"),
        ({"spaces": {"a/b": {"latent": {"name": "pixels"}}}}, "names a folder"),
        ({"spaces": {"report": {"latent": {"name": "pixels"}}}}, "names a folder"),
        ({"spaces": {"a": {"latnt": {}}}}, "unknown setting 'latnt' .*space 'a'.*Did you mean 'latent'"),
        ({"spaces": {"a": {"latent": {"name": "pixels"}, "stages": {"joint": {}}}}}, "no stage is called 'joint'"),
        ({"stages": {"und": {}}}, "stages needs recon"),
        ({"stages": {"recon": {"gen": {}}}}, "unknown setting 'gen'"),
        ({"stages": {"recon": {}, "gen": {"gen": {"decoder": "x"}}}}, "sets 'gen.decoder', which belongs to a space"),
        ({"overrides": {"seed": 3}}, "sets 'seed', which the experiment gives"),
        ({"columns": {"FD": {"metric": "fd"}}}, "column 'FD' must name a part"),
        ({"columns": {"FD": {"part": "joint", "metric": "fd"}}}, "column 'FD': no stage is called 'joint'"),
        ({"columns": {"FD": {"part": ["gen"], "metric": "fd"}}}, "column 'FD' must name a part and a metric"),
        (gen_column(metric="fdd"), "column 'FD': no metric of these runs is called 'fdd'. Did you mean 'fd'"),
        (gen_column(metric="psnr"), "column 'FD': no metric of these runs is called 'psnr'"),
        (gen_column(space="wavlet"), "no feature space of these runs is called 'wavlet'. Did you mean 'wavelet'"),
        ({"columns": {"FD": {"part": "gen", "metric": "fd"}}}, "fd is measured in wavelet, latents: say which"),
        (gen_column(spce="wavelet"), "column 'FD': no field is called 'spce'. Did you mean 'space'"),
        ({"columns": {"x": {"part": "und", "metric": "acuracy"}}}, "is called 'acuracy'. Did you mean 'accuracy'"),
        ({"columns": {"x": {"part": "recon", "metric": "psnr", "space": "wavelet"}}}, "psnr is measured in no feature"),
        ({"columns": ["psnr"]}, "'columns' .*comparison.yaml.* is a section, not a value: set e.g. columns: {name: "),
        ({"spaces": ["pixels"]}, "'spaces' .*comparison.yaml.* is a section, not a value"),
        ({"spaces": {"a": {"latent": "dinov2"}}}, "space 'a'.* is a section, not a value: set e.g. latent: {name: "),
        ({"spaces": {"a": {"latent": {"name": "pixls"}}}}, "yaml: space 'a', recon: .*Did you mean 'pixels'"),
        ({"spaces": {"a": {"latent": {"name": "svg", "scalars": "batch"}}}}, "space 'a', gen: latents of svg .* batch"),
        ({"overrides": {"data": {"name": "fakes.shades"}}}, "gen: eval.cached=true needs a place for latents"),
    ],
)
def test_a_wrong_declaration_is_a_sentence_before_anything_runs(tmp_path, change, message):
    with pytest.raises(UmmError, match=message):
        read_declaration(written(tmp_path, **change))


def test_a_changed_comparison_is_refused_with_the_first_difference(tmp_path, declared):
    declared.seal(tmp_path / "x")
    declared.stages["und"]["und"]["limit"] = 17
    with pytest.raises(ConfigError, match=r"'stages\.und\.und\.limit' was 16 and is 17 now"):
        declared.seal(tmp_path / "x")


def test_the_comparisons_that_are_shipped_are_valid(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root)  # as PYTHONPATH=. does, for experiments.untrained
    files = sorted((root / "experiments" / "compare").glob("*.yaml"))
    files = [file for file in files if "spaces" in read_yaml(file)]  # beside them lie configurations that they read
    assert files
    for file in files:
        assert len(read_declaration(file).seeds) >= 3


# ------------------------------------------------------------------------------------------------------------- chains


def test_who_trains_what_is_seen_in_the_space_itself():
    assert kind_of(find("latents", "fakes.space").tiny()) == "frozen"
    assert kind_of(Pixels.tiny()) == "complete"
    assert kind_of(VAE.tiny()) == kind_of(SVG.tiny()) == "trained"
    trained = VAE.tiny()
    trained.stages = ()  # as of a finished run
    assert kind_of(trained) == "complete"


def test_later_stages_read_what_the_first_has_made(tmp_path, declared):
    job = all_jobs(declared, tmp_path, None)[0]
    recon, cache = str(job.folder / "recon"), str(job.folder / "cache")
    frozen, trained, complete = (chained(job, kind) for kind in ("frozen", "trained", "complete"))
    assert frozen["gen"]["gen.decoder"] == recon and frozen["recon"]["recon.decoder.width"] == 16
    assert "latent.weights" not in frozen["und"] and frozen["und"]["cache.dir"] == str(tmp_path / "cache" / "patches")
    assert trained["gen"]["latent.weights"] == trained["und"]["latent.weights"] == recon
    assert trained["recon"]["cache.dir"] is None and trained["gen"]["cache.dir"] == cache
    assert "gen.decoder" not in trained["gen"] and "gen.decoder" not in complete["gen"]
    for stages in (trained, complete):
        assert not [key for key in stages["recon"] if key.startswith("recon.decoder.")]
    assert {given["seed"] for given in frozen.values()} == {0} and frozen["und"]["run"] == str(job.folder / "und")


def test_seeds_come_one_after_another(tmp_path, declared):
    jobs = all_jobs(declared, tmp_path, None)
    assert [(job.seed, job.group) for job in jobs] == [(s, g) for s in (0, 1) for g in ("patches", "pixels", "vae")]
    assert len(all_jobs(declared, tmp_path, 1)) == 3


# --------------------------------------------------------------------------------------------------------------- runs


def test_spaces_are_trained_judged_and_gone_on_with_after_a_crash(tmp_path, declared):
    """All three kinds for real: one fails in its last stage, and going on repeats nothing that is done."""
    folder = Path(declared.folder)
    declared.seal(folder)
    first = {job.group: job for job in all_jobs(declared, folder, 1)}
    for job in first.values():
        perform_space(None, job)
    found = {name: results(folder / name)[0] for name in first}
    assert {name: one["kind"] for name, one in found.items()} == {
        "patches": "frozen", "pixels": "complete", "vae": "trained"}  # fmt: skip
    assert {name: one["space"]["shape"] for name, one in found.items()} == {
        "patches": [12, 4, 4], "pixels": [48, 4, 4], "vae": [3, 4, 4]}  # fmt: skip
    for name, one in found.items():
        assert {"psnr", "fd", "accuracy"} <= {row["metric"] for row in one["rows"]}, name
        assert one["costs"]["encode"]["images"] == 48 and one["costs"]["gen"]["images"] == 32
        runs = {stage: Run(first[name].folder / stage).config for stage in ("recon", "gen", "und")}
        assert {config.train.images for config in runs.values()} == {32} and {c.seed for c in runs.values()} == {0}
    assert found["pixels"]["costs"]["recon"]["parameters"] == 0 < found["vae"]["costs"]["recon"]["parameters"]
    psnr = next(row["value"] for row in found["pixels"]["rows"] if row["metric"] == "psnr")
    assert psnr == 100 and warnings_of({"pixels": {0: found["pixels"]}})["pixels"].startswith("this DiT is 16 wide")
    assert not (first["vae"].folder / "cache").exists()

    second = next(job for job in all_jobs(declared, folder, None) if job.seed == 1)

    def failing(config):
        if config.task == "und":
            raise RuntimeError("out of memory")
        return [{"metric": config.task, "value": 1.0}], {"images": 1}

    with pytest.raises(RuntimeError):
        perform_space(failing, second)
    assert not second.done and results(second.folder.parent).keys() == {0}
    before = (second.folder / "gen" / "result.json").read_text()
    perform_space(lambda config: ([{"metric": config.task, "value": 2.0}], {}), second)
    rows = results(second.folder.parent)[1]["rows"]
    assert [(row["part"], row["value"]) for row in rows] == [("recon", 1.0), ("gen", 1.0), ("und", 2.0)]
    assert (second.folder / "gen" / "result.json").read_text() == before
    assert results(second.folder.parent)[1]["costs"]["encode"] == {}  # the first seed has encoded for both


def test_a_trained_space_is_the_same_for_generator_and_probe(tmp_path, declared):
    folder = Path(declared.folder)
    job = next(job for job in all_jobs(declared, folder, 1) if job.group == "vae")
    perform_space(None, job)
    import umm

    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = [umm.load(job.folder / stage).encode(images) for stage in ("recon", "gen", "und")]
    raw = [umm.load(job.folder / stage).space.raw(images) for stage in ("recon", "gen", "und")]
    assert torch.equal(raw[0], raw[1]) and torch.equal(raw[0], raw[2])
    assert torch.equal(latents[1], latents[2])


def test_the_same_command_mends_what_failed(tmp_path, capfd):
    file = written(
        tmp_path, spaces={"a": {"latent": {"name": "fakes.space"}}, "b": {"latent": {"name": "fakes.space"}}}
    )
    with pytest.raises(UmmError, match="1 runs failed") as caught:
        run_compare(file, jobs=1, judge=partial(judged, crash="b/seed1/gen"))
    assert "b seed 1: RuntimeError: the disk is full" in str(caught.value)
    calls = tmp_path / "calls"
    calls.mkdir()
    said = run_compare(file, jobs=1, judge=partial(judged, marks=str(calls)))
    assert "all 4 of 2 spaces" in said
    assert sorted(call.name for call in calls.iterdir()) == ["b_seed1_gen", "b_seed1_und"]


def judged(config, crash: str = "", marks: str = "") -> tuple[list[dict], dict]:
    run = str(config.run)
    if marks:
        (Path(marks) / "_".join(run.split("/")[-3:])).touch()
    if crash and run.endswith(crash):
        raise RuntimeError("the disk is full")
    return rival(run.split("/")[-3], config.task, config.seed), {"images": 1}


def test_networks_of_a_space_that_is_judged_as_it_is_have_a_conflict_of_interest(tmp_path, declared, monkeypatch):
    job = next(job for job in all_jobs(declared, tmp_path, 1) if job.group == "pixels")
    config = configuration("recon", chained(job, "complete")["recon"], "the test")
    monkeypatch.setattr(Pixels, "families", ("vgg",))
    monkeypatch.setattr("umm.evaluate.evaluate", lambda model, *_: Records([{"conflict": dict(model.facts)}]))
    monkeypatch.setattr("umm.evaluate.write", lambda *_: "")
    rows, _ = as_it_is(config)
    assert list(rows[0]["conflict"]["trained_with"]) == ["vgg"]


# -------------------------------------------------------------------------------------------------------- operations


class Products:
    """A trainer whose n-th step is one matrix product of sizes[n] rows, 128 operations each, and of as many more in
    an optimiser that starts late."""

    def __init__(self, sizes: list[int], late: int | None = None):
        module = torch.nn.Linear(1, 1)
        phases = {"early": SimpleNamespace(start=0, module=module)}
        phases |= {} if late is None else {"late": SimpleNamespace(start=late, module=module)}
        self.learners = [SimpleNamespace(key=key, phase=phase) for key, phase in phases.items()]
        self.sizes, self.step = sizes, 0

    def images_at(self, step: int) -> int:
        return step

    def train_step(self, micro_batches: dict) -> dict:
        times = sum(self.step >= one.phase.start for one in self.learners)
        for _ in range(times):
            torch.ones(self.sizes[self.step], 8) @ torch.ones(8, 8)
        self.step += 1
        return {}

    def metered(self) -> int:
        meter = Meter(self)
        for _ in self.sizes:
            self.train_step({"recon": []})
        return meter.total


def test_an_optimiser_that_starts_late_is_counted():
    assert Products([3] * 60, late=50).metered() == 128 * 3 * (60 + 10)


def test_steps_of_random_cost_are_counted_by_their_mean():
    sizes = np.random.default_rng(0).integers(1, 17, 800).tolist()
    assert Products(sizes).metered() == pytest.approx(128 * sum(sizes), rel=0.05)


def test_a_cost_that_changes_within_a_run_is_noticed():
    total = 128 * (100 * 2 + 100 * 6)
    assert Products([2] * 100 + [6] * 100).metered() == pytest.approx(total, abs=128 * 4 * Meter.SELDOM)


def test_steps_that_cost_the_same_are_seldom_counted(monkeypatch):
    counted = []
    monkeypatch.setattr("umm.many_runs.Counted.count", lambda kind, flops, plain=Counted.count: (
        counted.append(flops), plain(kind, flops)))  # fmt: skip
    assert Products([3] * 320).metered() == 128 * 3 * 320
    assert len(counted) == 8 + 9, "eight to be sure, then every 32nd"


# ------------------------------------------------------------------------------------------------------------ reports


def test_the_table_has_means_and_intervals_over_seeds(tmp_path):
    declared = read_declaration(written(tmp_path, seeds=4))
    found = analyse(done(tmp_path / "out", declared))
    column = found["columns"]["PSNR"]
    values = [rival("vae", "recon", seed)[0]["value"] for seed in range(4)]
    interval = t_interval(values)
    one = column["spaces"]["vae"]
    assert list(one["per_seed"].values()) == values
    assert (one["mean"], one["low"], one["high"]) == pytest.approx((interval.value, interval.low, interval.high))
    assert column["best"] == "pixels" and found["columns"]["gFD"]["best"] == "patches"  # more dB, less distance
    assert column["p"]["patches"] < 0.05 < found["columns"]["accuracy"]["p"]["vae"]
    assert found["spaces"]["vae"]["costs"]["gen"] == {"seconds": 2.0, "flops": 3e12, "parameters": 7}


def test_the_report_is_whole_and_says_what_it_does_not_show(tmp_path, declared):
    folder = done(tmp_path / "out", declared)
    said = report(folder)
    assert "| vae | 3 x 4 x 4 |" in said and "gFD: patches is best" in said
    assert "pixels: this DiT is 4 wide" in said and "not other pictures to judge by" in said
    assert "pixels (see below)" in said and "Preliminary" not in said
    text = (folder / "report" / "report.md").read_text()
    for title in ("The table", "What it shows, and what not", "What it cost", "Settings of single spaces", "Per seed"):
        assert f"## {title}" in text
    assert "| pixels | und | und.limit | 15 |" in text
    names = {"columns.png", "trade-off.png", "report.json", "report.html"}
    assert names <= {file.name for file in (folder / "report").iterdir()}
    assert json.loads((folder / "report" / "report.json").read_text())["runs"] == {
        "wanted": 6, "done": 6, "commits": ["c0ffee"]}  # fmt: skip
    assert (folder / "report" / "report.html").read_text().count("<svg") == 2


def test_half_a_comparison_is_called_preliminary_and_one_seed_has_no_interval(tmp_path, declared):
    folder = done(tmp_path / "out", declared, seeds=1)
    said = report(folder)
    assert "Preliminary: 3 of 6 are in." in said and "one seed tells nothing apart" in said
    assert analyse(folder)["columns"]["PSNR"]["spaces"]["vae"]["low"] is None


def test_a_judge_with_a_conflict_of_interest_is_named(tmp_path, declared):
    folder = done(tmp_path / "out", declared)
    file = folder / "vae" / "seed0" / "result.json"
    result = json.loads(file.read_text())
    result["rows"][1]["conflict"] = "wavelet: took part"
    file.write_text(json.dumps(result))
    assert "Conflict of interest in gFD: wavelet: took part." in analyse(folder)["said"]


def test_a_column_that_no_row_has_is_one_sentence(tmp_path):
    made = comparison(tmp_path, columns={"SSIM": {"part": "recon", "metric": "ssim"}})
    made["stages"]["recon"]["eval"]["metrics"].append("ssim")
    declared = read_declaration(written(tmp_path, columns=made["columns"], stages=made["stages"]))
    with pytest.raises(UmmError, match=r"column 'SSIM': 0 rows have .* There are: accuracy, fd \(wavelet\), psnr"):
        analyse(done(tmp_path / "out", declared))


def test_a_report_before_anything_is_finished_is_one_sentence(tmp_path, declared):
    declared.seal(tmp_path / "out")
    with pytest.raises(UmmError, match="nothing is finished yet"):
        report(tmp_path / "out")


def test_what_is_not_finite_is_named_and_left_out(tmp_path, declared):
    folder = done(tmp_path / "out", declared)
    for name, seeds in (("vae", [0]), ("pixels", [0, 1])):
        for seed in seeds:
            file = folder / name / f"seed{seed}" / "result.json"
            result = json.loads(file.read_text())
            result["rows"][1]["value"] = float("inf")
            file.write_text(json.dumps(result))
    found = analyse(folder)
    assert "Not finite and left out of gFD: pixels seed 0, pixels seed 1, vae seed 0." in found["said"]
    spaces = found["columns"]["gFD"]["spaces"]
    assert list(spaces["vae"]["per_seed"]) == [1] and spaces["pixels"]["mean"] is None
    assert "| pixels | 3 x 4 x 4 |" in report(folder), "plots too"


def test_a_space_with_too_few_seeds_is_not_said_to_be_told_apart(tmp_path, declared):
    folder = done(tmp_path / "out", declared)
    (folder / "vae" / "seed1" / "result.json").unlink()
    said = next(text for text in analyse(folder)["said"] if text.startswith("gFD"))
    assert said.endswith("not tested, for want of two seeds in common: vae.") and "all others" not in said


def test_a_budget_of_its_own_is_not_called_the_same(tmp_path):
    made = comparison(tmp_path)
    del made["overrides"]["train"]["images"]
    made["stages"]["gen"]["train"] = {"images": 7}
    made["spaces"]["patches"]["stages"] = {"gen": {"train": {"images": 5}}}
    said = budget(read_declaration(written(tmp_path, **{key: made[key] for key in ("overrides", "stages", "spaces")})))
    assert said.startswith("Every space but patches (see below) has the same budget")
    assert f"a decoder {16 * 1_281_167} pictures, a generator 7 pictures" in said


def test_equal_spaces_are_seldom_told_apart():
    """The best is chosen by the values it is tested with: corrected for the others alone, one in ten has a 'winner'."""
    draw, wrong, runs = np.random.default_rng(0), 0, 300
    for _ in range(runs):
        values = {str(i): dict(enumerate(row)) for i, row in enumerate(draw.normal(size=(6, 4)))}
        spaces = {name: {"per_seed": seeds, "mean": np.mean(list(seeds.values()))} for name, seeds in values.items()}
        wrong += any(p < 0.05 for p in apart(spaces, higher=True)["p"].values())
    assert wrong / runs <= 0.05, wrong / runs


def test_a_folder_that_is_no_comparison_is_one_sentence(tmp_path):
    result = CliRunner().invoke(cli, ["compare", "report", str(tmp_path)])
    assert result.exit_code == 2 and "is no comparison" in result.output


def test_a_value_far_from_the_others_does_not_flatten_the_plot():
    assert limits([20.0, 21.0, 100.0]) == (20.0, 21.0) and limits([0.0, 20.0, 21.0]) == (20.0, 21.0)
    assert limits([20.0, 21.0, 23.0]) == (20.0, 23.0) and limits([3.0]) == (3.0, 3.0)


def test_a_job_of_another_declaration_is_refused(tmp_path, declared):
    folder = done(tmp_path / "out", declared)
    keep(Job("vae", 0, folder / "vae" / "seed0", "compare", {}, "another"), [], {}, {})
    with pytest.raises(UmmError, match="belongs to another declaration"):
        analyse(folder)
