"""The commands, as a shell sees them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner
from fakes.launching import environment

from umm.cli import cli


def umm(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "umm", *arguments], env=environment(), capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [("--help",), ("list",), ("config", "--task", "recon"), ("assets", "list")])
def test_what_only_talks_does_not_import_torch(arguments):
    """Half a second of waiting for a help text is what torch costs; time itself is measured in benchmarks/."""
    talk = "import sys; from umm.cli import cli; cli(sys.argv[1:], standalone_mode=False)"
    code = f"{talk}; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_importing_umm_does_not_import_torch():
    code = "import umm, sys; assert 'torch' not in sys.modules; assert umm.names('latents')"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_a_user_error_is_one_line_and_exit_status_2():
    done = umm("train", "--task", "recon", "data.nme=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "error: unknown setting 'data.nme' (command line). Did you mean 'data.name'?"


def test_debug_shows_the_trace():
    done = umm("--debug", "train", "--task", "recon", "data.nme=3")
    assert "Traceback" in done.stderr and done.returncode != 0


def test_every_command_explains_itself_with_an_example():
    runner = CliRunner()
    for name, command in cli.commands.items():
        for path in [[name]] if not hasattr(command, "commands") else [[name, sub] for sub in command.commands]:
            result = runner.invoke(cli, [*path, "--help"])
            assert result.exit_code == 0
            assert f"umm {' '.join(path)}" in result.output.replace("Usage: cli", "umm"), f"{path} shows no example"


def test_list_names_every_choice():
    import umm as package

    output = CliRunner().invoke(cli, ["list"]).output
    for folder in ("data", "latents", "heads", "metrics", "tasks"):
        assert all(f"  {name} " in output for name in package.names(folder))
    assert "dinov2-small-saliency" in output


def test_dry_run_prints_the_configuration_and_makes_nothing(tmp_path):
    result = CliRunner().invoke(cli, ["train", "--task", "recon", "--dry-run", f"run={tmp_path / 'run'}"])
    assert result.exit_code == 0 and "image_size: 64" in result.output and not (tmp_path / "run").exists()


def test_a_run_that_does_not_exist_is_one_sentence(tmp_path):
    result = CliRunner().invoke(cli, ["eval", str(tmp_path / "none")])
    assert result.exit_code == 2 and "is not a run" in result.output


def test_missing_weights_offline_say_what_to_do(tmp_path):
    """No network: an answer at once, not after a minute of retries."""
    done = umm("train", "--task", "recon", f"run={tmp_path / 'run'}", "data.image_size=256")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "latent.weights" in done.stderr


def test_a_damaged_run_folder_is_one_sentence(tmp_path):
    for text in ("", "a: [1", "train: {images: 3}"):
        (tmp_path / "config.yaml").write_text(text)
        result = CliRunner().invoke(cli, ["eval", str(tmp_path)])
        assert result.exit_code == 2 and "config.yaml cannot be read" in result.output
        assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments,labels",
    [([], "balanced"), (["--labels", "random"], "random"), (["--labels", "0,heart"], ["0", "heart"]),
     (["--labels", "balanced,0"], ["balanced", "0"]), (["--class", "random"], ["random"]), (["--class", ""], [""])],
)  # fmt: skip
def test_classes_to_sample_are_taken_as_they_are_said(arguments, labels, monkeypatch):
    asked = []
    monkeypatch.setattr("umm.sample_run.sample_run", lambda run, request: asked.append(request.labels) or "")
    assert CliRunner().invoke(cli, ["sample", "runs/x", *arguments]).exit_code == 0
    assert asked == [labels]


@pytest.mark.parametrize("arguments", [["--num", "0"], ["--steps", "0"], ["--labels", "0", "--class", "1"]])
def test_nothing_to_sample_is_refused(arguments):
    result = CliRunner().invoke(cli, ["sample", "runs/x", *arguments])
    assert result.exit_code == 2 and "Error:" in result.output
