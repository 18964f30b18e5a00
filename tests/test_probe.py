"""Probes and comparisons against definitions and libraries, and the whole command on pictures that can be read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from umm.config import load
from umm.errors import ConfigError, DataError, UmmError, UnknownName
from umm.fitting import batches, count_overlaps, mean_iou
from umm.heads.attentive import AttentiveReader
from umm.heads.linear import LinearGrid
from umm.knn import knn_votes
from umm.latents.base import LatentSpec
from umm.paired import clustered_bootstrap, clustered_error, compare, equivalence_p, mcnemar, wilson
from umm.probe import probe
from umm.probing import anchor_notes, choose_subset, probe_classes
from umm.samples import compare_runs
from umm.train import train

DRAW = torch.Generator().manual_seed(0)
QUICK = """
    data.name=fakes.shades train.workers=0 train.device=cpu probe.steps=150 probe.token_steps=60 probe.batch_size=32
    probe.token_rates=[3e-3,1e-2]
""".split()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("UMM_CACHE", str(tmp_path / "cache"))


def run(out, *overrides, targets=("fakes.space",), addresses="latent", methods="linear,knn", **more):
    return probe_classes(list(targets), addresses, methods, None, [*QUICK, *overrides], str(out), **more)


def rows(out) -> dict[str, dict]:
    return {row["task"]: row for row in json.loads((Path(out) / "results.json").read_text())["rows"]}


# ------------------------------------------------------------------------------------------------------- linear probe


def features(n=60, d=10, k=4):
    y = torch.arange(n) % k
    return torch.randn(n, d, generator=DRAW) + torch.randn(k, d, generator=DRAW)[y], y


def test_a_grid_of_rates_trains_each_classifier_as_if_alone():
    x, y = features()
    rates = [1e-3, 0.05, 0.5]
    together = LinearGrid(10, 4, rates, 30, seed=1)
    alone = [LinearGrid(10, 4, [rate], 30, seed=1) for rate in rates]
    for part in batches(torch.arange(60), 16, 30, seed=1):
        for grid in (together, *alone):
            grid.step(x[part], y[part])
    logits = together.logits(x)
    for number, grid in enumerate(alone):
        torch.testing.assert_close(logits[:, number], grid.logits(x)[:, 0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits[:, 0], logits[:, 1])


def test_a_classifier_of_the_grid_is_torchs_sgd_with_a_cosine():
    x, y = features()
    grid = LinearGrid(10, 4, [0.3], 25, seed=2)
    layer = torch.nn.Linear(10, 4)
    with torch.no_grad():
        layer.weight.copy_(grid.weight)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3 * 16 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25)
    for part in batches(torch.arange(60), 16, 25, seed=2):
        grid.step(x[part], y[part])
        torch.nn.functional.cross_entropy(layer(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.testing.assert_close(grid.weight, layer.weight.data, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grid.logits(x)[:, 0], layer(x), rtol=1e-4, atol=1e-5)


def test_batches_show_every_picture_equally_often_and_repeat_by_seed():
    drawn = torch.cat(list(batches(torch.arange(5, 35), 7, 30, seed=0)))
    assert drawn.bincount()[5:].tolist() == [7] * 30
    assert torch.equal(drawn, torch.cat(list(batches(torch.arange(5, 35), 7, 30, seed=0))))
    assert not torch.equal(drawn, torch.cat(list(batches(torch.arange(5, 35), 7, 30, seed=1))))
    assert [len(part) for part in batches(torch.arange(3), 7, 2, seed=0)] == [3, 3]


# ---------------------------------------------------------------------------------------------------------------- kNN


@pytest.mark.parametrize("k,block", [(1, 1000), (20, 1000), (20, 17)])
def test_knn_is_scikit_learns_with_the_same_weights(k, block, monkeypatch):
    neighbors = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr("umm.knn.TRAIN_BLOCK", block)
    x, y = features(200, 8, 5)
    test = features(50, 8, 5)[0]
    votes = knn_votes(x, y, test, 5, k, 0.07)
    test = test.double().numpy()
    theirs = neighbors.KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(x.double().numpy(), y.numpy())
    assert votes.argmax(1).tolist() == theirs.predict(test).tolist()
    np.testing.assert_allclose(votes / votes.sum(1, keepdim=True), theirs.predict_proba(test), atol=1e-4)


def test_more_neighbours_than_pictures_are_refused():
    x, y = features(8)
    with pytest.raises(UmmError, match=r"probe\.neighbors to 1\.\.8"):
        knn_votes(x, y, x, 4, k=9)


# ---------------------------------------------------------------------------------------------------------- attentive


def test_the_attentive_probe_is_cross_attention_of_one_query():
    head = AttentiveReader.tiny(LatentSpec(128, 3, 4, 32)).double()
    assert head.heads == 2
    latents = torch.randn(5, 128, 3, 4, generator=DRAW, dtype=torch.float64)
    tokens = head.norm(latents.flatten(2).transpose(1, 2))
    k, v = (part(tokens).unflatten(2, (2, 64)).transpose(1, 2) for part in (head.key, head.value))
    q = head.query.view(1, 2, 1, 64).expand(5, -1, -1, -1)
    gathered = torch.nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)
    torch.testing.assert_close(head(latents), head.linear(head.proj(gathered)))


# ------------------------------------------------------------------------------------------------------- segmentation


def test_mean_iou_sums_over_pictures_before_it_divides():
    truth = torch.tensor([[[0, 0], [1, 1]], [[0, 0], [0, 2]]])
    guess = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 0]]])
    counts = count_overlaps(guess, truth, 4)
    # background: 1 + 3 of 2 + 4; one: 2 of 3; two: 0 of 1; three occurs nowhere
    assert mean_iou(counts) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert mean_iou(counts[:1]) == pytest.approx((1 / 2 + 2 / 3) / 2)


# ------------------------------------------------------------------------------------------------------------- subsets


def test_subsets_are_seeded_balanced_and_drawn_from_the_given_rows():
    labels, given = torch.arange(90) % 3, torch.arange(10, 90)
    few = choose_subset("4-shot", given, labels, ["a", "b", "c"], seed=0)
    assert labels[few].bincount().tolist() == [4, 4, 4] and int(few.min()) >= 10
    assert torch.equal(few, choose_subset("4-shot", given.flip(0), labels, ["a", "b", "c"], seed=0))
    assert not torch.equal(few, choose_subset("4-shot", given, labels, ["a", "b", "c"], seed=1))
    assert len(choose_subset("25%", given, labels, ["a", "b", "c"], seed=0)) == 20
    assert torch.equal(choose_subset("all", given.flip(0), labels, ["a"], 0), given)


@pytest.mark.parametrize("text", ["0-shot", "five", "120%", "0%", "-3-shot"])
def test_what_is_no_subset_is_refused(text):
    with pytest.raises(ConfigError, match="write all, 5-shot or 10%"):
        choose_subset(text, torch.arange(9), torch.arange(9) % 3, ["a", "b", "c"], 0)


@pytest.mark.parametrize("text", ["40-shot", "2%"])
def test_a_subset_without_enough_of_a_class_names_it(text):
    with pytest.raises(DataError, match=r"too few pictures of the class '[abc]'"):
        choose_subset(text, torch.arange(90), torch.arange(90) % 3, ["a", "b", "c"], 0)


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("correct,n", [(0, 10), (10, 10), (3, 17), (900, 1000)])
def test_wilsons_interval_is_scipys(correct, n):
    from scipy.stats import binomtest

    theirs = binomtest(correct, n).proportion_ci(method="wilson")
    assert (wilson(correct, n).low, wilson(correct, n).high) == pytest.approx((theirs.low, theirs.high))


def test_mcnemar_counts_the_discordant_items_only():
    first = [1, 1, 1, 1, 1, 1, 1, 0, 1, 0]
    second = [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    alone = [str(i) for i in range(10)]
    assert mcnemar(first, second, alone) == (7, 1, pytest.approx(2 * (1 + 8) / 2**8))
    assert mcnemar([1, 0], [1, 0], ["a", "b"]) == (0, 0, 1.0)


def test_mcnemar_of_several_questions_a_picture_counts_pictures():
    """Answers of one picture that agree are one observation: asking everything twice makes nothing more certain."""
    from scipy.stats import chi2

    draw = np.random.default_rng(0)
    first, second = (draw.random((2, 60)) < 0.7).astype(float)
    pictures = [str(i) for i in range(60)]
    only_first, only_second, p = mcnemar(np.tile(first, 2), np.tile(second, 2), pictures * 2)
    b, c = only_first // 2, only_second // 2
    assert b + c > 10 and p == pytest.approx(chi2.sf((b - c) ** 2 / (b + c), 1)), "the test without its correction"
    assert mcnemar([1, 0], [0, 1], ["a", "a"]) == (1, 1, 1.0)


def test_questions_of_one_picture_count_as_one():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=50)
    pictures = [str(i) for i in range(50)]
    once = clustered_error(scores, pictures)
    assert once == pytest.approx(scores.std(ddof=1) / 50**0.5)
    assert clustered_error(np.tile(scores, 4), pictures * 4) == pytest.approx(once)
    interval = clustered_bootstrap(np.tile(scores, 4), pictures * 4, rng, 4000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * once, rel=0.1)
    assert interval.n == 200 and interval.value == pytest.approx(scores.mean())


def test_equivalence_is_two_one_sided_t_tests():
    from scipy.stats import ttest_1samp

    x = np.random.default_rng(1).normal(0.002, 0.05, 80)
    sides = ttest_1samp(x, -0.02, alternative="greater").pvalue, ttest_1samp(x, 0.02, alternative="less").pvalue
    assert equivalence_p(x.mean(), x.std(ddof=1) / 80**0.5, 80, 0.02) == pytest.approx(max(sides))


def test_equal_results_are_equivalent_and_better_ones_are_found():
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.6).astype(float)
    better = np.where(rng.random(400) < 0.3, 1.0, base)
    pictures = [str(i // 2) for i in range(400)]
    same = compare(base, base, pictures, rng, 0.01, 500)
    assert (same.difference.value, same.p, same.equivalence, same.clusters) == (0, 1, 0, 200)
    found = compare(better, base, pictures, rng, 0.01, 500)
    assert found.difference.low > 0 and found.p < 1e-6 and found.mcnemar[2] < 1e-6 and found.equivalence > 0.9
    assert compare(base * 0.3, base, pictures, rng, 0.01, 500).mcnemar is None


# ---------------------------------------------------------------------------------------------------- the whole command


def test_probes_read_what_can_be_read_and_the_table_has_both_baselines(tmp_path):
    table = run(tmp_path / "out", "data.count=240", methods="linear,knn,attentive,segmentation")
    found = rows(tmp_path / "out")
    assert found["latent/linear"]["low"] > 0.45 and found["latent/knn"]["low"] > 0.4
    assert found["latent/attentive"]["low"] > 0.4, "chance is a third"
    assert found["latent/segmentation"]["metric"] == "mIoU" and found["latent/segmentation"]["value"] > 0.3
    assert {"pixels/linear", "random:latent/knn"} <= found.keys()
    assert all(task in table for task in ("latent", "pixels", "random:latent", "95 % interval"))
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 240 for row in found.values())
    assert found["latent/linear"]["held_out"] == 24 and found["latent/linear"]["train"] == 216


def test_results_and_samples_say_everything(tmp_path):
    run(tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = {"config_hash", "versions", "seed", "seconds", "flops", "command", "rows", "notes", "config"}
    assert expected <= results.keys()
    assert results["command"].startswith("python -m umm.probe")
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    one = next(s for s in samples if s["task"] == "latent/knn" and s["doc_id"] == 4)
    assert one["doc"]["id"] == "test-4" and one["target"] == "middle" and one["resps"] == [one["filtered_resps"]]
    for task, row in rows(tmp_path / "out").items():
        mine = [s["score"] for s in samples if s["task"] == task]
        assert len(mine) == row["n"] and sum(mine) / len(mine) == pytest.approx(row["value"])


def test_the_same_seed_gives_the_same_numbers_whatever_else_is_asked(tmp_path):
    run(tmp_path / "a", methods="linear,attentive", addresses="latent")
    run(tmp_path / "b", methods="linear", addresses="patch-mean,latent")
    a, b = rows(tmp_path / "a"), rows(tmp_path / "b")
    for key in ("value", "chosen", "validation"):
        assert a["latent/linear"][key] == b["latent/linear"][key]


def test_an_interrupted_command_goes_on_and_ends_equal(tmp_path, monkeypatch):
    from umm import probing

    run(tmp_path / "whole")
    original, calls = probing.run_probe, []

    def stop(task, *rest):
        calls.append(task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(task, *rest)

    monkeypatch.setattr(probing, "run_probe", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    with (tmp_path / "stopped" / "samples.jsonl").open("a") as file:
        file.write('{"task": "pixels/linear", "doc_id": 0}\n{"task": "p", "doc": {"id": 1}')  # of a probe cut off
    run(tmp_path / "stopped")
    assert calls[3:] == calls[2:3] + calls[4:], "finished probes are not repeated"
    notes = [json.loads((tmp_path / name / "results.json").read_text())["notes"] for name in ("whole", "stopped")]
    assert notes[0] == notes[1]
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (tmp_path / "stopped" / "samples.jsonl").read_text()


def test_another_command_in_the_same_folder_is_refused(tmp_path):
    run(tmp_path / "out", methods="knn")
    with pytest.raises(ConfigError, match=r"another command or configuration.*--out"):
        run(tmp_path / "out", "probe.neighbors=3", methods="knn")


def test_few_shots_and_shares_are_lines_of_their_own(tmp_path):
    run(tmp_path / "out", "probe.subsets=[all,3-shot,50%]", "probe.baselines=false", methods="linear")
    found = rows(tmp_path / "out")
    assert {task: row["train"] for task, row in found.items()} == {
        "latent/linear": 81,
        "latent/linear/3-shot": 9,
        "latent/linear/50%": 40,
    }


def test_a_dry_run_shows_shapes_cost_and_a_row_and_writes_nothing(tmp_path):
    text = run(tmp_path / "out", dry_run=True, methods="attentive")
    assert "90 train, 90 test" in text and "label: 0 (dark)" in text and "latent: (16, 12)" in text
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_limit_takes_fewer_pictures_and_says_what_that_means(tmp_path):
    table = run(tmp_path / "out", limit=12, methods="knn")
    assert rows(tmp_path / "out")["latent/knn"]["n"] == 12 and "k = 12" in table


@pytest.mark.parametrize(
    "settings,match",
    [
        (["data.bad_label=3"], r"'train-3' of the train split has the label 7, outside the 3 classes"),
        (["data.empty=true"], r"class 'nobody' has no training picture \(1 of 4 classes\)"),
        (["data.labels=false"], r"have no labels.*data\.columns"),
        (["probe.holdout=0"], r"probe\.holdout=0"),
        (["probe.rates=[]"], r"probe\.rates is empty"),
        (["probe.batch_size=0"], r"'probe\.batch_size' .* must be at least 1"),
        (["und.reader=attentive"], r"'und\.reader=attentive' would be ignored: classify reads seed, data"),
        (["data.image_size=20"], r"data.image_size=20 but latent.image_size=16"),
    ],
)
def test_bad_data_is_one_sentence(tmp_path, settings, match):
    with pytest.raises(UmmError, match=match):
        run(tmp_path / "out", *settings)


def test_unknown_targets_and_methods_are_refused_by_name(tmp_path):
    with pytest.raises(UnknownName, match="Did you mean 'linear'"):
        run(tmp_path / "out", methods="linaer")
    with pytest.raises(UnknownName, match="nothing in umm/latents is called 'dinov3x'"):
        run(tmp_path / "out", targets=["dinov3x"])
    with pytest.raises(UmmError, match="runs/nothing does not exist"):
        run(tmp_path / "out", targets=["runs/nothing"])


def test_vectors_have_no_tokens_to_attend_to(tmp_path):
    table = run(tmp_path / "out", "probe.baselines=false", addresses="patch-mean", methods="knn,attentive")
    assert "patch-mean is one vector a picture" in table and list(rows(tmp_path / "out")) == ["patch-mean/knn"]


# ------------------------------------------------------------------------------------------------------------- trunks


@pytest.fixture(scope="module")
def generator_run(tmp_path_factory):
    """A class-conditional trunk, hardly trained."""
    folder = tmp_path_factory.mktemp("probed") / "gen"
    settings = f"""
        run={folder} data.name=fakes.shades latent.name=fakes.space gen.dit.size=custom gen.dit.width=24 gen.dit.depth=2
        gen.dit.heads=2 gen.dit.head_depth=0 train.images=64 train.batch_size=16 train.workers=0 train.device=cpu
        train.sample_every=0 cache.dir={folder.parent}/latents
    """
    return train(load("gen", None, settings.split())).parent


def test_a_runs_trunk_is_probed_and_a_fed_label_is_flagged_everywhere(tmp_path, generator_run):
    table = run(
        tmp_path / "out", "probe.baselines=false", targets=[generator_run], methods="knn",
        addresses="trunk:1@0.1,trunk:1@0.1+label,random:trunk:1@0.1",
    )  # fmt: skip
    found = rows(tmp_path / "out")
    assert found["trunk:1@0.1+label/knn"]["label_fed"] and not found["trunk:1@0.1/knn"]["label_fed"]
    assert "WARNING, the true class is fed" in table and "learned from class labels" in table
    assert "WARNING" in (tmp_path / "out" / "results.json").read_text()
    assert "random:trunk:1@0.1/knn" in found


def test_a_runs_latent_space_cannot_be_replaced(tmp_path, generator_run):
    with pytest.raises(UmmError, match=r"would change what .* was trained on"):
        run(tmp_path / "out", "latent.channels=13", targets=[generator_run])


def test_a_run_of_another_encoder_is_refused(tmp_path, generator_run):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(generator_run, copy)
    for file in (copy / "model" / "config.yaml", copy / "config.yaml"):
        file.write_text(file.read_text().replace("channels: 12", "channels: 13"))
    with pytest.raises(UmmError, match="trained on a latent space whose 'channels' is 12"):
        run(tmp_path / "out", targets=[copy])


def test_several_targets_share_one_table(tmp_path, generator_run):
    table = run(tmp_path / "out", "probe.baselines=false", targets=["fakes.space", generator_run], methods="knn")
    found = rows(tmp_path / "out")
    assert list(found) == ["fakes.space/latent/knn", f"{generator_run}/latent/knn"] and "of" in table.splitlines()[0]
    assert len({row["value"] for row in found.values()}) == 1, "one latent space, one number"


# ---------------------------------------------------------------------------------------------------------- comparing


def test_compare_pairs_the_items_of_two_tasks(tmp_path):
    run(tmp_path / "out")
    place = f"{tmp_path / 'out'}#"
    words = compare_runs(f"{place}latent/linear", f"{place}random:latent/linear", 0.01, 500)
    assert "(90 items of 90 pictures)" in words and "McNemar exact p" in words and "equivalence" in words
    assert compare_runs(str(tmp_path / "out"), str(tmp_path / "out"), 0.01, 200).count("difference +0.0000") == 6


def test_compare_refuses_other_items_and_unknown_tasks(tmp_path):
    run(tmp_path / "a", methods="knn")
    run(tmp_path / "b", methods="knn", limit=60)
    with pytest.raises(UmmError, match=r"same items.*30 are on one only, e\.g\. 'test-60'"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(UmmError, match=r"no task 'latent/kn'.*Did you mean 'latent/knn'"):
        compare_runs(f"{tmp_path / 'a'}#latent/kn", str(tmp_path / "b"))
    with pytest.raises(UmmError, match="give the --out folder"):
        compare_runs(str(tmp_path / "c"), str(tmp_path / "a"))
    with (tmp_path / "b" / "samples.jsonl").open("a") as file:
        file.write('{"task": "late')
    with pytest.raises(UmmError, match="was cut off: give the command"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    for text, match in (("", "is empty: give the command"), ('{"score": 1}\n', "are no samples of")):
        (tmp_path / "b" / "samples.jsonl").write_text(text)
        with pytest.raises(UmmError, match=match):
            compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    (tmp_path / "b" / "results.json").write_text("{")
    with pytest.raises(UmmError, match=r"results.json cannot be read .*--out another folder"):
        run(tmp_path / "b", methods="knn", limit=60)


def test_the_command_line_prints_one_line_for_an_error(tmp_path):
    done = CliRunner().invoke(probe, ["classify", "fakes.space", "--features", "latnt", "--out", str(tmp_path / "o")])
    assert done.exit_code == 2 and done.output.startswith("error: no feature is called 'latnt'")
    assert len(done.output.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------ anchors


class Counted:
    def __init__(self, count, classes=1000):
        self.count, self.classes = count, [""] * classes

    def __len__(self):
        return self.count


def test_published_numbers_are_shown_only_for_their_weights_and_data():
    subject = SimpleNamespace(config=load("und", None, ["latent.weights=facebook/dinov2-base"]))
    row = {"task": "published/linear", "address": "published", "method": "linear", "subset": "all", "value": 0.838}
    imagenet = Counted(1_281_167), Counted(50_000)
    assert list(anchor_notes(subject, row, *imagenet)) == [
        "published/linear: 83.8, published 84.5 (-0.7; WARNING: off by more than 0.5)."
    ]
    near = row | {"value": 0.8431}
    assert "within 0.5" in next(anchor_notes(subject, near, *imagenet))
    assert not list(anchor_notes(subject, row | {"address": "latent"}, *imagenet))
    assert not list(anchor_notes(subject, row, Counted(90), Counted(90)))
    other = SimpleNamespace(config=load("und", None, ["latent.weights=somebody/else"]))
    assert not list(anchor_notes(other, row, *imagenet))
