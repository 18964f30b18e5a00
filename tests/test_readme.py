"""The README is run: a README that is not run is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.launching import environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# what makes a documented command small enough for a test; everything else stays as it is written
SCENES = "data.train=96 data.val=32 data.test=32".split()
SMALL = {
    "train": [*SCENES, *"train.images=256 train.batch_size=32 train.log_every=2".split()],
    "eval": "eval.bootstrap=20 eval.images=32 eval.batch_size=32".split(),
    "sample": ["--steps", "4"],
    "classify": [*SCENES, "probe.steps=20"],
    "diagnose": ["data.train=96"],
}


def blocks(language: str) -> list[str]:
    """Code blocks, without those marked as not run."""
    pattern = rf"(<!-- not run: [^>]+ -->\n)?```{language}\n(.*?)```"
    return [code for skipped, code in re.findall(pattern, README, flags=re.DOTALL) if not skipped]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow
def test_every_command_of_the_readme_does_what_it_says(tmp_path):
    """In an empty folder with the configs and a few pictures; then the Python blocks, on the run that was made."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    make = "import skimage.data, PIL.Image as I; I.fromarray(skimage.data.astronaut()).save('pictures/a.png')"
    run(tmp_path, [sys.executable, "-c", make])
    done = [run(tmp_path, shorten(command)) for command in commands()]
    assert len(done) >= 12
    folder = tmp_path / "runs" / "shapes"
    assert (folder / "model" / "decoder.safetensors").exists() and (folder / "eval" / "test.json").exists()
    assert (tmp_path / "side_by_side.png").stat().st_size > 1000 and (tmp_path / "mine.yaml").exists()
    assert (tmp_path / "samples.png").stat().st_size > 1000
    for block in blocks("python"):
        check = "\nassert latents.shape == (1, 384, 6, 6) and pictures.shape == (1, 3, 48, 48)"
        run(tmp_path, [sys.executable, "-c", block + check])


def shorten(command: list[str]) -> list[str]:
    """The command with the settings of SMALL, run by this Python."""
    where = command.index(">") if ">" in command else len(command)
    words = command[3:where] if command[0] == "python" else command[1:where]
    module = command[2] if command[0] == "python" else "umm"
    small = SMALL.get(words[0], []) if "--dry-run" not in command else []
    short = [sys.executable, "-m", module, *words, *small]
    return ["sh", "-c", f"{shlex.join(short)} > {command[where + 1]}"] if where < len(command) else short


def run(folder: Path, command: list[str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_readme_is_short():
    assert len(README.splitlines()) < 250


def test_every_file_the_readme_names_exists():
    named = re.findall(r"`((?:configs|umm|tests|docs|experiments|benchmarks)/[\w./]+\.(?:py|yaml|md|json))`", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_tables_are_made_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import tables

    texts = [file.read_text() for file in tables.FILES]
    assert {name for text in texts for _, name, *_ in tables.BLOCK.findall(text)} == set(tables.TABLES)
    assert [tables.rewritten(text) for text in texts] == texts, "python experiments/tables.py writes them anew"


def test_the_demo_is_said_to_take_what_it_took():
    found = json.loads((ROOT / "experiments" / "results" / "tiny-demo.json").read_text())
    said = re.search(
        r"It takes ([\d.]+) minutes on two quiet CPU cores and reconstructs unseen scenes at ([\d.]+) dB", README
    )
    assert float(said[1]) == found["minutes"] <= 15 and found["came out"][0].startswith(f"{said[2]} dB ")


def test_the_folders_of_the_tree_exist():
    tree = README[README.index("## The tree") :]
    for folder in re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir()


@pytest.mark.slow
def test_the_demo_tells_its_story(tmp_path):
    """The whole of it, with seconds of training: what the README's first command runs after installing."""
    command = [sys.executable, "-m", "umm", "demo", "--minutes", "0.2", "--scenes", "128"]
    output = run(tmp_path, command)
    psnr = re.search(r"=> ([\d.]+) dB .*the mean picture ([\d.]+), an untrained decoder ([\d.]+)", output)
    assert psnr and float(psnr[1]) > float(psnr[3])
    for words in ("samples for the shape asked for", "a linear map of the latents", "names the shape: together"):
        assert words in output
    files = re.findall(r"^   (\S+\.(?:png|html)) ", output, flags=re.MULTILINE)
    assert len(files) == 3 and all(os.path.getsize(tmp_path / file) > 1000 for file in files)
    models = sorted(tmp_path.glob("runs/demo/*/model/*.safetensors"))
    before = [file.stat().st_mtime_ns for file in models]
    again = run(tmp_path, command)  # nothing is trained twice
    assert re.findall("^=> .*", again, flags=re.MULTILINE) == re.findall("^=> .*", output, flags=re.MULTILINE)
    assert len(models) >= 8 and before == [file.stat().st_mtime_ns for file in models]
