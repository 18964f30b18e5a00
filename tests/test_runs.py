"""The run folder: which checkpoint is gone on from, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fakes.launching import environment
from omegaconf import OmegaConf

from umm.build import build_space, check_data, fit_normalizer, open_source
from umm.config import load
from umm.errors import ConfigError, DataError, UmmError
from umm.loader import Feed, batches
from umm.registry import find
from umm.runs import Run
from umm.train import start_accelerator, train


def write(folder: Path) -> None:
    (folder / "state.pt").write_text("state")


def saved(folder: Path, *steps: int, keep: int = 2) -> Run:
    run = Run(folder)
    for step in steps:
        run.save(step, write, keep)
    return run


def names(run: Run) -> list[int]:
    return [int(folder.name) for folder in run.checkpoints()]


def test_the_newest_checkpoints_are_kept(tmp_path):
    run = saved(tmp_path, 2, 4, 6)
    assert names(run) == [4, 6] and run.latest().name == "00000006"


def test_a_run_taken_back_to_an_earlier_checkpoint_keeps_what_it_saves_next(tmp_path):
    """Later checkpoints, of the run as it was, must not push the new one out."""
    run = saved(tmp_path, 2, 4, 6, keep=3)
    (tmp_path / "checkpoints" / "latest").write_text("00000002")
    run.save(3, write, 1)
    assert names(run) == [3] and run.latest().name == "00000003"


def test_a_run_older_than_a_setting_goes_on_with_its_default(tmp_path):
    config = load("joint", None, [f"run={tmp_path}", "data.name=fakes.shades", "latent.name=fakes.space"])
    older = OmegaConf.create(OmegaConf.to_container(config))
    del older.joint["adapter"], older.recon["l1"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(older))
    Run(tmp_path).check_same(config)
    config.recon.l1 = 2.0
    with pytest.raises(ConfigError, match=r"'recon.l1' was 1.0 and is 2.0"):
        Run(tmp_path).check_same(config)


def test_a_run_that_failed_before_its_first_step_leaves_its_folder_to_mended_settings(tmp_path):
    def config(block: int):
        settings = ["data.name=fakes.shades", "latent.name=fakes.space", f"und.block={block}"]
        return load("und", None, [f"run={tmp_path / 'run'}", *settings])

    for block in (9, 1):  # the first one is refused once its folder is made: there is no such block
        run = Run.create(config(block))
        (run.folder / "stats.safetensors").write_text(f"of {block}")
    assert Run.create(config(1)).config.und.block == 1
    assert (tmp_path / "run" / "stats.safetensors").read_text() == "of 1" and "resumed" in run.facts
    run.log({"step": 1})
    with pytest.raises(ConfigError, match=r"'und.block' was 1 and is 2"):
        Run.create(config(2))


def test_without_a_pointer_the_newest_checkpoint_counts(tmp_path):
    """A kill between the first checkpoint and the pointer to it loses nothing."""
    run = saved(tmp_path, 2, 4)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert run.latest().name == "00000004"
    assert Run(tmp_path / "none").latest() is None


@pytest.mark.parametrize("pointer", ["", "00000009", "../.."])
def test_a_pointer_to_nothing_names_the_checkpoints_there_are(tmp_path, pointer):
    run = saved(tmp_path, 2, 4)
    (tmp_path / "checkpoints" / "latest").write_text(pointer)
    with pytest.raises(UmmError, match=r"is missing: write one of 00000002, 00000004 into it"):
        run.latest()


def test_a_second_process_is_kept_out_of_a_run_folder_until_the_first_has_ended(tmp_path):
    config = load("recon", None, [f"run={tmp_path}"])
    code = f"from umm.runs import Run; from umm.config import load; Run.create(load('recon', None, ['run={tmp_path}']))"
    hold = [sys.executable, "-c", f"{code}; print('in', flush=True); input()"]
    other = subprocess.Popen(hold, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UmmError, match="another process is training in"):
        Run.create(config)
    other.kill()
    other.wait()
    Run.create(config)
    assert Run.create(config).facts["resumed"], "this process may open its own run again"


def test_damaged_facts_are_one_sentence(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UmmError, match=r"run.json cannot be read .* delete it"):
        Run(tmp_path).note(seed=1)


def test_going_on_with_other_pictures_is_refused(tmp_path):
    run, source = Run(tmp_path), find("data", "fakes.pictures")
    check_data(run, source.from_config(source.Config(), "train"))
    check_data(run, source.from_config(source.Config(), "train"))
    with pytest.raises(DataError, match=r"'count' was 37 and is 36\): give them back, or .*run="):
        check_data(run, source.from_config(source.Config(count=36), "train"))


def test_half_written_statistics_leave_nothing_behind(fake_overrides, tmp_path, monkeypatch):
    """A run killed while they are written measures them again."""
    from umm import build

    def killed(tensors, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    config = load("recon", None, fake_overrides)
    run, space, accelerator = Run.create(config), build_space(config.latent), start_accelerator(config)
    data = open_source(config, "train")
    with monkeypatch.context() as patch:
        patch.setattr(build, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_normalizer(space, config, data, run, accelerator)
    fit_normalizer(space, config, data, run, accelerator)
    assert space.normalizer.fitted
    (run.folder / "stats.safetensors").write_bytes(b"x")
    with pytest.raises(UmmError, match=r"stats.safetensors cannot be read .*delete it"):
        fit_normalizer(build_space(config.latent), config, data, run, accelerator)


class Unreadable:
    """A source whose pictures cannot be read."""

    def __len__(self) -> int:
        return 8

    def load(self, index, generator=None):
        raise DataError(f"picture {index} cannot be read.")


def test_an_error_in_a_loader_process_is_the_sentence_it_was():
    import torch

    loaded = batches(Feed(Unreadable(), 0, "recon"), [[0, 1]], 1, workers=1, device=torch.device("cpu"))
    with pytest.raises(DataError, match=r"^picture \d cannot be read.$"):
        next(loaded)


def test_a_decoder_that_draws_another_size_than_it_learns_from_is_refused(fake_overrides):
    with pytest.raises(UmmError, match=r"recon.decoder.output_size=32 is not the size .*data.image_size=16"):
        train(load("recon", None, [*fake_overrides, "recon.decoder.output_size=32"]))


def test_a_data_set_without_pictures_is_refused(fake_overrides):
    with pytest.raises(DataError, match="train split has no pictures"):
        train(load("recon", None, [*fake_overrides, "data.count=0"]))
