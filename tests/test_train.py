"""The loop: what micro-batches, interruptions and accidents may and may not change."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from fakes.interrupting import interrupted_after
from fakes.launching import environment, launch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import umm
from umm.config import load
from umm.errors import ConfigError, NonFinite, UmmError
from umm.learner import EMA, learning_rate
from umm.loader import Feed, positions
from umm.registry import find
from umm.rng import seeded_init
from umm.runs import Run
from umm.settings import OptimSettings
from umm.train import Trainer, train
from umm.transforms import to_pil

GAN = [
    "recon.adversarial.weight=0.75",
    "recon.adversarial.backbone=fakes",
    "recon.adversarial.start_discriminator=16",
    "recon.adversarial.start_generator=32",
    "recon.adversarial.optim.warmup=0",
]


def run_of(config_overrides, **changes):
    return Run(train(load("recon", None, [*config_overrides, *(f"{k}={v}" for k, v in changes.items())])).parent)


def final_tensors(run: Run) -> dict[str, torch.Tensor]:
    folder = run.latest()
    tensors = {f"model/{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    tensors |= {f"ema/{k}": v for k, v in load_file(folder / "ema.safetensors").items()}
    state = torch.load(folder / "state.pt", weights_only=True)
    for name, optimizer in state["optimizers"].items():
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer/{name}/{index}/{k}": v for k, v in values.items()}
    return tensors


def assert_identical(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[0]}"


def test_training_lowers_the_loss_and_leaves_a_whole_run(fake_overrides):
    run = run_of(fake_overrides, **{"train.images": 800})
    log = run.read_log()
    assert log[-1]["recon.decoder.l1"] < 0.7 * log[0]["recon.decoder.l1"]
    assert log[-1]["images"] == 800 and run.facts["finished"]
    assert (run.folder / "model" / "decoder.safetensors").exists()
    assert (run.folder / "samples" / "000000800.png").stat().st_size > 1000


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(fake_overrides, tmp_path):
    runs = [run_of(fake_overrides, run=tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    a, b, c = map(final_tensors, runs)
    assert_identical(a, b)
    assert not torch.equal(a["model/recon.decoder/pred.weight"], c["model/recon.decoder/pred.weight"])


@pytest.mark.parametrize("adversarial", [False, True])
def test_micro_batches_train_like_one_large_batch(fake_overrides, tmp_path, fake_discriminator, adversarial):
    """Also with the adaptive weight of the GAN and with noise: they belong to the step and the picture."""
    extra = GAN if adversarial else []
    one = run_of([*fake_overrides, *extra], run=tmp_path / "one")
    four = run_of([*fake_overrides, *extra], run=tmp_path / "four", **{"train.accumulate": 4})
    a, b = final_tensors(one), final_tensors(four)
    for key in (k for k in a if k.startswith("model/")):
        torch.testing.assert_close(a[key], b[key], rtol=2e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_the_adversarial_phases_begin_when_they_should(fake_overrides, fake_discriminator):
    log = run_of([*fake_overrides, *GAN], **{"train.log_every": 1}).read_log()
    first_d = next(r["images"] for r in log if "recon.discriminator.loss" in r)
    first_g = next(r["images"] for r in log if "recon.decoder.gan" in r)
    assert (first_d, first_g) == (16 + 8, 32 + 8)
    weights = [r["recon.decoder.adaptive"] for r in log if "recon.decoder.adaptive" in r]
    assert weights[0] == 0 and all(w > 0 for w in weights[1:])


def test_an_interrupted_run_ends_bit_identical(fake_overrides, tmp_path, fake_discriminator):
    """Stopped in the middle of an epoch, between checkpoints' steps and the log's."""
    whole = run_of([*fake_overrides, *GAN], run=tmp_path / "whole")
    stopped = [*fake_overrides, *GAN, f"run={tmp_path / 'stopped'}"]
    with interrupted_after(9):
        train(load("recon", None, stopped))
    again = run_of(stopped)
    assert_identical(final_tensors(whole), final_tensors(again))
    steps = [record["step"] for record in again.read_log()]
    assert steps == sorted(set(steps)), "steps that were taken again are logged once"


def command(overrides) -> list[str]:
    return [sys.executable, "-m", "umm", "train", "--task", "recon", *overrides]


def wait_for_checkpoint(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before its first checkpoint"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_bit_identical(fake_overrides, tmp_path):
    """kill -9 at moments nobody chose, then the same command, with loader processes."""
    settings = [*fake_overrides, "train.images=4000", "train.save_every=200", "train.workers=1"]
    whole = run_of([*settings, "train.workers=0"], run=tmp_path / "whole")
    killed = [*settings, f"run={tmp_path / 'killed'}"]
    for pause in (0.0, 0.15):
        process = subprocess.Popen(command(killed), env=environment(), stdout=-3, stderr=-3, start_new_session=True)
        wait_for_checkpoint(tmp_path / "killed", process)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(killed), env=environment(), check=True, capture_output=True)
    assert_identical(final_tensors(whole), final_tensors(Run(tmp_path / "killed")))


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(fake_overrides, tmp_path):
    run = tmp_path / "run"
    settings = [*fake_overrides, "train.images=400000", "train.save_every=80"]
    process = subprocess.Popen(command(settings), env=environment(), stdout=subprocess.PIPE, stderr=-3, text=True)
    wait_for_checkpoint(run, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    newest = Run(run).latest()
    assert f"goes on from {newest}" in output
    assert torch.load(newest / "state.pt", weights_only=True)["step"] == int(newest.name)


def test_a_signal_in_the_last_step_still_ends_whoever_trains_several_runs(fake_overrides):
    trainer = Trainer(load("recon", None, fake_overrides))
    step, last = trainer.train_step, trainer.steps - 1

    def interrupted(micro_batches):
        if trainer.step == last:
            signal.raise_signal(signal.SIGTERM)
        return step(micro_batches)

    trainer.train_step = interrupted
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + signal.SIGTERM
    assert (trainer.run.folder / "model" / "config.yaml").exists()  # there was nothing left to do


@pytest.mark.slow
def test_two_processes_train_like_one(fake_overrides, tmp_path):
    """With the GAN: the discriminator's gradients and the adaptive weight belong to all processes."""
    backbone = tmp_path / "vit.safetensors"
    with seeded_init("vit"):
        vit = VisionTransformer(16, 8, embed_dim=64, depth=2, num_heads=1, num_classes=0)
    save_file(vit.state_dict(), backbone)
    settings = [*fake_overrides, "recon.l2=0.5", *GAN, f"recon.adversarial.backbone={backbone}"]
    settings += ["recon.adversarial.taps=[0,1]", "recon.adversarial.input_size=16"]
    one = run_of(settings, run=tmp_path / "one")
    done = launch(2, "train", "--task", "recon", *settings, f"run={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = final_tensors(one), final_tensors(Run(tmp_path / "two"))
    for key in (k for k in a if k.startswith("model/")):
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_a_stream_trains_and_goes_on_where_it_stopped(fake_overrides, tmp_path):
    """A streaming source has no length: position n is picture n of the stream."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    source = find("data", "fakes.pictures")
    source = source.from_config(source.Config(), "train")
    pictures = [to_pil(source[i]["image"]) for i in range(20)]
    rows = [{"image": picture, "label": i % 3} for i, picture in enumerate(pictures)]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / "train-0.parquet")
    Dataset.from_list(rows[:8]).cast_column("image", Image()).to_parquet(folder / "validation-0.parquet")
    stream = ["data.name=hub", f"data.path={folder}", "data.streaming=true", "data.image_size=16"]
    settings = [*fake_overrides[:1], *stream, *fake_overrides[2:], "latent.stats_images=20"]
    whole = run_of(settings, run=tmp_path / "whole", **{"train.images": 64})
    parts = [*settings, f"run={tmp_path / 'parts'}", "train.images=64"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "due", lambda self: self.save() or 1 / (self.step < 4))
        with pytest.raises(ZeroDivisionError):
            train(load("recon", None, parts))
    assert_identical(final_tensors(whole), final_tensors(run_of(parts)))


def test_trackers_write_into_the_run_folder(fake_overrides):
    run = run_of(fake_overrides, **{"train.trackers": "[tensorboard]"})
    assert list(run.folder.rglob("events.out.tfevents*"))


def test_a_non_finite_loss_names_step_pictures_and_checkpoint(fake_overrides):
    settings = [*fake_overrides, "latent.break_on_black=true", "data.poison=30", "latent.stats_images=1"]
    config = load("recon", None, settings)
    feed = Feed(range(37), 0, "recon")
    bad = next(n for n in range(10**6) if feed.index(n) == 30) // 8
    expected = f"not finite at step {bad} .*train-30.*checkpoint"
    if bad < 4:
        expected = f"not finite at step {bad} .*train-30.*checkpoint: none"
    with pytest.raises(NonFinite, match=expected):
        train(config)


def test_a_full_disk_is_one_sentence_and_loses_no_checkpoint(fake_overrides, monkeypatch):
    from umm import train as module

    original, calls = module.save_file, []

    def full(tensors, path, *rest):
        calls.append(path)
        if "checkpoints" in str(path) and len([c for c in calls if "checkpoints" in str(c)]) > 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(tensors, path, *rest)

    monkeypatch.setattr(module, "save_file", full)
    config = load("recon", None, fake_overrides)
    with pytest.raises(UmmError, match=r"No space left on device.*What was saved before is untouched"):
        train(config)
    run = Run(config.run)
    assert run.latest().name == "00000004"
    assert load_file(run.latest() / "model.safetensors")
    assert not list((run.folder / "checkpoints").glob(".*partial"))
    monkeypatch.setattr(module, "save_file", original)
    assert Run(train(config).parent).latest().name == "00000012"


def test_an_unwritable_run_folder_is_one_sentence(fake_overrides, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UmmError, match="cannot write the run folder"):
        train(load("recon", None, [*fake_overrides, f"run={tmp_path / 'file' / 'run'}"]))


def test_another_configuration_in_the_same_folder_is_refused(fake_overrides):
    run_of(fake_overrides)
    with pytest.raises(ConfigError, match=r"'recon.optim.lr' was 0.001 and is 0.01 now.*run="):
        run_of(fake_overrides, **{"recon.optim.lr": "1e-2"})


def test_what_does_not_touch_the_numbers_may_change_on_resuming(fake_overrides):
    run_of(fake_overrides)
    run_of(fake_overrides, **{"train.log_every": 1, "train.keep": 5})


def test_a_batch_that_cannot_be_shared_is_refused(fake_overrides):
    with pytest.raises(ConfigError, match="batch_size=8 cannot be shared equally"):
        run_of(fake_overrides, **{"train.accumulate": 3})


@pytest.mark.parametrize("processes,accumulate", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_every_split_of_a_step_covers_the_same_positions(processes, accumulate):
    parts = [p for r in range(processes) for p in positions(3, 16, accumulate, r, processes)]
    assert sorted(n for part in parts for n in part) == list(range(48, 64))


def test_an_epoch_shows_every_picture_once():
    feed = Feed(range(37), seed=0, name="recon")
    epochs = [[feed.index(n) for n in range(e * 37, (e + 1) * 37)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(37)) and epochs[0] != epochs[1]


def test_the_learning_rate_follows_its_schedule():
    optim = OptimSettings(lr=2e-4, final_lr=2e-5, warmup=100, constant=200, decay="linear", decay_images=1300)
    rates = [learning_rate(optim, n, 2000) for n in (0, 50, 100, 300, 800, 1300, 2000)]
    assert rates == pytest.approx([0, 1e-4, 2e-4, 2e-4, 1.1e-4, 2e-5, 2e-5])
    cosine = OptimSettings(lr=1.0, final_lr=0.0, warmup=0, decay="cosine")
    assert [learning_rate(cosine, n, 100) for n in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_the_average_has_its_closed_form():
    module = torch.nn.Linear(2, 2, bias=False)
    start = module.weight.detach().clone()
    ema = EMA(module, decay=0.9)
    ema.steps = 100  # past the ramp
    with torch.no_grad():
        for step in range(1, 6):
            module.weight.fill_(step)
            ema.update(module)
    expected = 0.9**5 * start + sum(0.1 * 0.9 ** (5 - step) * step for step in range(1, 6))
    torch.testing.assert_close(ema.module.weight, expected)


def test_the_average_of_a_short_run_has_forgotten_the_initial_weights():
    """With a constant decay of 0.998, 500 steps would keep 37 % of them."""
    module = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(module, decay=0.998)
    with torch.no_grad():
        module.weight.fill_(0)
        ema.module.weight.fill_(1)
        for _ in range(500):
            ema.update(module)
    assert float(ema.module.weight.detach()) < 1e-6


def test_the_saved_model_holds_the_average_and_not_the_weights(fake_overrides):
    run = run_of(fake_overrides)
    saved = load_file(run.folder / "model" / "decoder.safetensors")
    tensors = final_tensors(run)
    assert torch.equal(saved["pred.weight"], tensors["ema/recon.decoder/pred.weight"])
    assert not torch.equal(saved["pred.weight"], tensors["model/recon.decoder/pred.weight"])


def test_the_run_says_where_its_numbers_come_from(fake_overrides):
    run = run_of(fake_overrides)
    facts = json.loads((run.folder / "run.json").read_text())
    assert {"command", "config_hash", "seed", "commit", "versions", "host", "created", "finished"} <= facts.keys()
    assert all(0 <= record["data_wait"] <= 1 for record in run.read_log())


def test_going_on_with_other_pictures_is_refused(fake_overrides, monkeypatch):
    """A folder that lost pictures between two commands would silently train something that is neither run."""
    run_of(fake_overrides)
    source = find("data", "fakes.pictures")
    monkeypatch.setattr(source, "identity", lambda self: {"data": "ramps", "count": 36})
    with pytest.raises(UmmError, match=r"not those .* began with .*run="):
        run_of(fake_overrides)


def test_a_damaged_checkpoint_is_one_sentence_that_says_what_to_do(fake_overrides):
    run = run_of(fake_overrides)
    (run.latest() / "state.pt").write_bytes(b"cut")
    with pytest.raises(UmmError, match=r"cannot be read .*: write the name of an earlier checkpoint"):
        run_of(fake_overrides)


def test_a_damaged_model_is_one_sentence(fake_overrides):
    run = run_of(fake_overrides)
    (run.folder / "model" / "decoder.safetensors").write_bytes(b"cut")
    with pytest.raises(UmmError, match=r"decoder.safetensors cannot be read .*train command"):
        umm.load(run.folder)


def test_a_tracker_that_is_not_installed_is_named(fake_overrides, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        run_of(fake_overrides, **{"train.trackers": "[wandb]"})
