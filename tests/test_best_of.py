"""Best of N and generated latents as training data: choices with known answers, pairing, cost, and whole commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes.gen import gen_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from umm import augment as augmenting
from umm.augment import ARMS, Examples, probe, repeated, split_rows
from umm.augment import Request as AugmentRequest
from umm.best_of import NEEDS, Request, Stages, as_read, open_contest
from umm.best_of_report import best_of
from umm.choosing import favourites, gap_closed, picks, pool_sizes, spread, spread_change, verdict, worth
from umm.cli import cli
from umm.config import load
from umm.convnet import ConvNetSpace
from umm.data.base import collate
from umm.errors import ConfigError, DataError, UmmError
from umm.flow import evaluations
from umm.model import UnifiedModel
from umm.picture_judges import in_groups
from umm.rng import generator
from umm.seed_stats import no_harm
from umm.stats import bootstrap
from umm.train import train

# ------------------------------------------------------------------------------------------------------------ choosing


def pools(requests: int = 1000, size: int = 8, share: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(0).random((requests, size)) < share).astype(float)


def test_pools_grow_by_doubling_up_to_the_one_asked_for():
    assert pool_sizes(8) == [1, 2, 4, 8]
    assert pool_sizes(6) == [1, 2, 4, 6]


def test_an_oracle_finds_whatever_is_there_and_closes_the_whole_gap():
    right = pools()
    for size in (1, 2, 4, 8):
        oracle = worth(right, right, size)
        assert np.array_equal(oracle, right[:, :size].any(1))
        assert oracle.mean() == pytest.approx(1 - 0.7**size, abs=0.05)
    random = worth(np.zeros_like(right), right, 8)
    closed = gap_closed(worth(right, right, 8), random, worth(right, right, 8))
    assert closed.value == 1 and closed.low == pytest.approx(1) and closed.high == pytest.approx(1)


def test_a_judge_that_says_the_same_of_all_is_random_choice():
    right, ties = pools(50), np.random.default_rng(1).random((50, 8))
    for size in (1, 4, 8):
        assert np.array_equal(worth(np.full((50, 8), 3.5), right, size), worth(np.zeros((50, 8)), right, size))
        assert np.allclose(worth(np.zeros((50, 8)), right, size), right[:, :size].mean(1))
        assert np.array_equal(picks(np.full((50, 8), 3.5), ties, size), picks(np.zeros((50, 8)), ties, size))
    random, oracle = worth(np.zeros((50, 8)), right, 8), worth(right, right, 8)
    assert gap_closed(random, random, oracle).value == 0


def test_no_gap_has_no_share():
    ones = np.ones(10)
    assert gap_closed(ones, ones, ones) is None


def test_a_judge_half_as_good_closes_half_the_gap():
    """It knows the answer for every other request and nothing of the rest."""
    right = pools(2000, 4)
    scores = np.where((np.arange(2000) % 2 == 0)[:, None], right, 0.0)
    found = gap_closed(worth(scores, right, 4), worth(np.zeros_like(right), right, 4), worth(right, right, 4))
    assert found.low < 0.5 < found.high and found.high - found.low < 0.1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_no_judge_beats_the_oracle_and_only_the_order_of_scores_counts(seed, size):
    draw = np.random.default_rng(seed)
    scores, right, ties = draw.integers(5, size=(20, 8)), draw.random((20, 8)), draw.random((20, 8))
    found = worth(scores, right, size)
    assert (found <= worth(right, right, size) + 1e-12).all() and (found >= -worth(-right, -right, size) - 1e-12).all()
    assert np.array_equal(found, worth(np.exp(scores), right, size))
    assert favourites(scores, size)[np.arange(20), picks(scores, ties, size)].all()


def test_the_spread_is_within_classes_only():
    points, labels = np.array([0.0, 2.0, 100.0, 106.0]), np.array([0, 0, 1, 1])
    distances = np.abs(points[:, None] - points)
    assert spread(distances, labels) == 4
    change = spread_change(distances / 2, distances, labels)
    assert change.value == pytest.approx(-0.5)
    with pytest.raises(UmmError, match="--per-class"):
        spread(distances, np.arange(4))


@pytest.mark.parametrize(
    "latent, again, flops, holds",
    [(0.9, 0.9, (1, 9), True), (0.9, 0.9, (9, 1), False), (0.5, 0.9, (1, 9), False), (0.9, 0.5, (1, 9), True)],
)
def test_the_verdict_wants_all_three(latent, again, flops, holds):
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 0.01, (3, 200))
    gain = bootstrap(latent + noise[0] - 0.5 - noise[1], draw)
    assert verdict(gain, latent + noise[0] - again - noise[2], flops, 0.02, draw).holds is holds


def test_few_requests_show_no_equality():
    draw = np.random.default_rng(3)
    coins = draw.integers(2, size=(2, 8)).astype(float)
    found = verdict(bootstrap(np.ones(8), draw), coins[0] - coins[1], (1, 2), 0.02, draw)
    assert found.not_worse > 0.05 and found.equivalent > 0.05 and not found.holds and found.needed > 1000


def test_as_many_requests_as_are_said_to_be_needed_show_it():
    draw, margin = np.random.default_rng(0), 0.05
    differences = draw.normal(0, 0.4, size=(300, 400))
    needed = verdict(bootstrap(np.ones(8), draw), differences[0], (1, 2), margin, draw).needed
    shown = np.mean([no_harm(row[:needed], margin) < 0.05 for row in differences])
    assert needed < 500 and 0.65 < shown < 0.9


# ---------------------------------------------------------------------------------------------------------------- cost


def test_a_stage_costs_its_products_a_picture_and_judges_the_sum_of_theirs():
    stages, weight, x = Stages(torch.device("cpu")), torch.ones(6, 10), torch.ones(16, 6)
    for _ in range(2):
        stages.run("read", 16, lambda: x @ weight)
        stages.run("decode", 16, lambda: x @ weight @ weight.T)
    assert stages.cost(("read",))["flops"] == 2 * 6 * 10
    assert stages.cost(("decode", "read"))["flops"] == 3 * 2 * 6 * 10
    assert stages.cost(())["flops"] == 0 == stages.cost(())["seconds"]
    parts = [stages.cost((name,))["seconds"] for name in ("decode", "read")]
    assert stages.cost(("decode", "read"))["seconds"] == pytest.approx(sum(parts)) and min(parts) > 0


def test_networks_run_on_whole_groups():
    seen = []
    assert in_groups(lambda x: seen.append(len(x)) or x + 1, torch.zeros(11, 2)).shape == (11, 2)
    assert seen == [16]


# ------------------------------------------------------------------------------------------------------ whole commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A generator with a decoder, and a reader that measured statistics of its own."""
    folder = tmp_path_factory.mktemp("best-of")
    data = ["data.name=fakes.shades", "latent.name=fakes.space", "train.workers=0", "train.device=cpu"]
    recon = """recon.decoder.size=custom recon.decoder.width=16 recon.decoder.depth=1 recon.decoder.heads=2
        recon.decoder.mlp=32 recon.perceptual.name=none recon.adversarial.weight=0 train.images=64 train.batch_size=8"""
    train(load("recon", None, [*data, *recon.split(), f"run={folder / 'recon'}"]))
    mine = [*gen_settings(folder), *data, f"gen.decoder={folder / 'recon'}", "eval.images=30", "eval.train_images=60"]
    train(load("gen", None, mine))
    more = [*data, "data.limit=60", f"run={folder / 'und'}", "train.images=512", "train.batch_size=16"]
    train(load("und", None, more))
    return folder


@pytest.fixture(scope="module")
def contest(runs):
    return open_contest(str(runs / "gen"), request(runs))[0]


def request(runs, **changes) -> Request:
    facts = {"judge": str(runs / "und"), "pool": 4, "per_class": 3, "external": "wavelet", "metric": "pixels"}
    return Request(**facts | changes)


def test_a_smaller_pool_is_the_first_part_of_a_larger_one(contest):
    small, large = contest.draw(4, 6), contest.draw(8, 6)
    for judge in NEEDS:
        assert np.array_equal(small.scores[judge], large.scores[judge][:, :4]), judge
    assert np.array_equal(small.ties, large.ties[:, :4]) and np.array_equal(small.right, large.right[:, :4])
    assert not np.array_equal(large.scores["latent"][:, :4], large.scores["latent"][:, 4:])
    more = contest.draw(4, 9)
    assert np.array_equal(more.scores["latent"][:6], small.scores["latent"])
    assert more.labels.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("batch", [8, 7])
def test_the_batch_changes_no_choice(contest, batch):
    """Networks are bit-identical over batches; the probe's float64 products are up to their last digits."""
    one, other = contest.draw(4, 6), contest.draw(4, 6, batch=batch)
    for judge in NEEDS:
        np.testing.assert_allclose(one.scores[judge], other.scores[judge], rtol=1e-12, atol=1e-12)
        assert np.array_equal(picks(one.scores[judge], one.ties, 4), picks(other.scores[judge], other.ties, 4)), judge
    for judge in ("latent", "re-encoded", "oracle"):
        assert np.array_equal(one.scores[judge], other.scores[judge]), judge
    assert torch.equal(one.features, other.features)


def test_the_reader_sees_latents_in_its_own_units(contest, runs):
    model, reader = contest.model, contest.reader
    assert not torch.equal(model.space.normalizer.mean, reader.space.normalizer.mean)
    images = torch.rand(3, 3, 16, 16, generator=generator("images"))
    torch.testing.assert_close(as_read(reader, model, model.encode(images)), reader.encode(images))
    z = torch.zeros(2, *model.spec.shape)
    assert as_read(model, model, z) is z


def test_every_judge_is_said_to_cost_what_it_needs(contest):
    contest.draw(4, 3)
    costs, stages = contest.costs(), contest.stages.flops
    assert costs["random"]["flops"] == 0 and costs["latent"]["flops"] == stages["read"] > 0
    assert costs["re-encoded"]["flops"] == stages["decode"] + stages["encode"] + stages["read"]
    assert costs["draw"]["evaluations"] == evaluations(contest.drawer.sampler) == 4


def test_the_command_writes_numbers_a_plot_and_pictures(runs, tmp_path):
    line = ["best-of", str(runs / "gen"), "--judge", str(runs / "und"), "--pool", "4", "--per-class", "3"]
    line += ["--external", "wavelet", "--metric", "pixels", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "best_of.json").read_text())
    assert [row["size"] for row in result["rows"]] == [1] * 5 + [2] * 5 + [4] * 5
    alone = [row["agreement"]["value"] for row in result["rows"][:5]]
    assert alone == [alone[0]] * 5  # of one candidate there is no choice
    best = {row["judge"]: row for row in result["rows"] if row["size"] == 4}
    assert best["random"]["gain"]["value"] == 0 and best["oracle"]["cost"]["evaluations"] == 16
    assert best["latent"]["cost"]["judge_flops"] == 4 * result["costs"]["latent"]["flops"]
    assert result["sets"]["random"]["spread_change"]["value"] == 0
    assert "latent judging" in done.output and "MFLOP a candidate" in done.output
    assert (tmp_path / "best_of.png").exists() and (tmp_path / "pictures.png").exists()


def test_related_or_missing_judges_are_refused(runs):
    with pytest.raises(UmmError, match="--judge"):
        open_contest(str(runs / "gen"), request(runs, judge=None))
    with pytest.raises(ConfigError, match="relatives"):
        open_contest(str(runs / "gen"), request(runs, metric="wavelet"))
    with pytest.raises(UmmError, match="--pool"):
        best_of(str(runs / "gen"), request(runs, pool=1))
    with pytest.raises(UmmError, match="umm eval takes"):
        open_contest(str(runs / "gen"), request(runs, overrides=["seed=1"]))


def test_a_judge_of_the_encoders_family_is_refused(runs, monkeypatch):
    original = UnifiedModel.load.__func__

    def relative(cls, *arguments):
        model = original(cls, *arguments)
        model.facts["trained_with"] = {"resnet": "encoder"}
        return model

    monkeypatch.setattr(UnifiedModel, "load", classmethod(relative))
    network = type("Network", (), {"name": "network", "families": ("vit",)})
    monkeypatch.setattr("umm.picture_judges.open_space", lambda name, device: network)
    with pytest.raises(ConfigError, match="no independent judge"):
        open_contest(str(runs / "gen"), request(runs))


# ------------------------------------------------------------------------------------------------------------- convnet


def test_the_convnet_learns_from_pictures_and_from_its_seed_alone():
    from fakes.shades import Config, Shades

    source = Shades(Config(count=90), "train")
    batch = collate([{key: source[i][key] for key in ("image", "label")} for i in range(90)])
    spaces = [ConvNetSpace.train([batch], 3, seed, images=640) for seed in (0, 0, 1)]
    assert spaces[0].weights == spaces[1].weights != spaces[2].weights
    x = spaces[0].extract(batch["image"])
    assert x.shape == (90, spaces[0].dim)
    centres = torch.stack([x[batch["label"] == k].mean(0) for k in range(3)])
    assert (torch.cdist(x, centres).argmin(1) == batch["label"]).float().mean() > 0.8


# -------------------------------------------------------------------------------------------- generated latents as data


def clouds(count: int, seed: int, classes: int = 3, width: int = 6) -> Examples:
    y = torch.arange(classes).repeat_interleave(count)
    noise = torch.randn(len(y), width, generator=generator("clouds", seed))
    return Examples(1.2 * torch.nn.functional.one_hot(y, width) + noise, y)


def test_rows_are_disjoint_and_stand_class_by_class():
    y = torch.arange(60) % 3
    few, others, held = split_rows(y, 3, 2, 5, seed=0)
    assert y[few].tolist() == [0, 0, 1, 1, 2, 2] and y[others].tolist() == [k for k in range(3) for _ in range(5)]
    assert len(set(few.tolist() + others.tolist() + held.tolist())) == 60
    again = repeated(few, 2, 5)
    assert y[again].tolist() == y[others].tolist() and set(again.tolist()) == set(few.tolist())
    with pytest.raises(DataError, match="--added"):
        split_rows(y, 3, 10, 10, seed=0)


def arms(monkeypatch, drawn) -> dict:
    monkeypatch.setattr(augmenting, "drawn", drawn)
    drawer = type("Drawer", (), {"dit": type("DiT", (), {"num_classes": 3})})
    asked = AugmentRequest(shots=2, added=30, seeds=5, steps=100)
    return augmenting.compare(drawer, clouds(400, 0), clouds(300, 1), asked)


def test_samples_as_good_as_real_bring_what_real_ones_bring(monkeypatch):
    found = augmenting.differences(arms(monkeypatch, lambda drawer, count, seed: clouds(count, seed)))
    assert found["generated"]["low"] > 0 and found["generated"]["p"] == found["generated"]["smallest_p"] == 2 / 32
    assert found["share"]["low"] < 1 < found["share"]["high"]


def test_samples_of_the_wrong_class_harm(monkeypatch):
    def wrong(drawer, count, seed):
        found = clouds(count, seed)
        return Examples(found.x.roll(count, 0), found.y)

    assert augmenting.differences(arms(monkeypatch, wrong))["generated"]["high"] < 0


def test_samples_that_are_the_few_again_are_the_control(monkeypatch):
    def copies(drawer, count, seed):
        train = clouds(400, 0)
        return train.rows(repeated(split_rows(train.y, 3, 2, count, seed)[0], 2, count))

    scores = arms(monkeypatch, copies)
    assert scores["generated"] == scores["duplicated"] and set(scores) == set(ARMS)


def test_a_probe_is_a_function_of_its_seed():
    known, held, test = clouds(20, 0), clouds(50, 1), clouds(50, 2)
    one, again, other = (probe(known, held, test, 3, 40, seed) for seed in (0, 0, 1))
    assert one == again and 0.5 < one <= 1 and 0.5 < other <= 1


def test_the_augment_command_says_whose_labels_the_generator_knew(runs, tmp_path):
    line = ["augment", str(runs / "gen"), "--shots", "2", "--added", "4", "--seeds", "2", "--steps", "20"]
    done = CliRunner().invoke(cli, [*line, "--out", str(tmp_path), "eval.cached=true"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "augment.json").read_text())
    assert result["labels of the generator"] == 90 and result["labels of the probe"] == 6
    assert "90 labelled pictures" in done.output and "never seen" in done.output
    assert all(len(values) == 2 for values in result["accuracy"].values())
