"""What `umm demo` trains, and what it says; `tests/test_readme.py` runs it."""

from __future__ import annotations

import pytest

from umm.demo import ALONE, about_joint, recipes


@pytest.fixture
def recipe(tmp_path):
    return recipes(tmp_path, 10, 4000)


def test_all_runs_read_one_cache_of_latents(recipe, tmp_path):
    assert [config.task for config in recipe.values()] == ["recon", "gen", "gen", "und", "joint"]
    for key in ("data", "latent", "cache", "seed"):
        assert all(config[key] == recipe["recon"][key] for config in recipe.values()), key
    assert recipe["gen"].cache.dir == "auto" and recipe["joint"].gen.decoder == recipe["recon"].run


def test_the_joint_run_differs_from_the_two_it_is_compared_with_in_nothing_else(recipe):
    gen, und, joint = (recipe[name] for name in ("gen-short", "und", "joint"))
    assert gen.train == und.train == joint.train
    assert gen.gen.dit == und.und.dit == joint.gen.dit
    assert gen.gen.flow == joint.gen.flow and gen.eval == joint.eval
    learnt = [(part.optim, part.ema) for part in (gen.gen, und.und, joint.joint)]
    assert learnt[0] == learnt[1] == learnt[2] and learnt[0][0].constant == gen.train.images // 2
    assert (und.und.reader, und.und.block) == (joint.und.reader, joint.und.block)


def test_minutes_scale_every_part(recipe, tmp_path):
    for name, config in recipes(tmp_path, 20, 4000).items():
        assert config.train.images == pytest.approx(2 * recipe[name].train.images, rel=0.01)
        assert config.train.images % config.train.batch_size == 0
    assert all(config.train.images == 128 for config in recipes(tmp_path, 0, 64).values())


def test_what_has_no_pairs_is_not_said_to_differ():
    pair = {"metric": "accuracy", "value": 0.75, "baseline": "und", "baseline_value": 0.5}
    pair |= {"difference": {"value": 0.25, "low": 0.125, "high": 0.375, "p": 0.01, "n": 8}}
    alone = {"metric": "class_agreement", "space": "latents", "value": 1.0}
    lines = about_joint({"rows": [pair, alone, alone | {"baseline_value": 0.5, "difference": {"value": 0.5}}]})
    assert lines == ["names the shape: together 75.0%, alone 50.0%, difference +25.0% (+12.5% .. +37.5%)", ALONE]
