"""The wheel and the editable install, in environments of their own, in a folder with a hostile tasks.py."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The tracked files alone, as a clone has them."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    archive = subprocess.Popen(["tar", "c", "--null", "-T", "-"], cwd=ROOT, stdin=-1, stdout=-1)
    unpack = subprocess.Popen(["tar", "x"], cwd=folder, stdin=archive.stdout)
    archive.stdin.write(names)
    archive.stdin.close()
    assert unpack.wait() == 0 and archive.wait() == 0
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, checkout)
    return next(folder.glob("umm-*.whl"))


def pip(*arguments: object, python: object = sys.executable) -> None:
    done = subprocess.run([str(python), "-m", "pip", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def environment(folder: Path) -> Path:
    """A Python that sees this one's libraries, but not its umm."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run([python, *arguments], cwd=folder, env=clean, capture_output=True, text=True)


def check_installed(python: Path, folder: Path) -> None:
    """The commands work from a folder whose own tasks.py would break them if it were imported."""
    (folder / "tasks.py").write_text("raise RuntimeError('the wrong tasks')")
    imports = "import umm.tasks.recon, umm.latents.dinov2, umm.demo; umm.demo.recipes(umm.demo.Path('runs'), 1, 64)"
    for arguments in (["-m", "umm", "--help"], ["-m", "umm", "list"], ["-c", imports]):
        done = run(python, folder, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "recon" in run(python, folder, "-m", "umm", "list").stdout


def test_the_wheel_holds_umm_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"umm"}
    assert "umm/tasks/recon.py" in names and "umm/latents/dinov2.py" in names
    assert "umm/configs/gen.yaml" in names, "umm demo reads it"


def test_the_wheel_works_far_from_the_checkout(wheel, tmp_path):
    python = environment(tmp_path / "venv")
    pip("install", "--no-deps", wheel, python=python)
    (tmp_path / "elsewhere").mkdir()
    check_installed(python, tmp_path / "elsewhere")


def test_the_editable_install_works(checkout, tmp_path):
    python = environment(tmp_path / "venv")
    pip("install", "setuptools>=77", python=python) if not has_setuptools(python) else None
    pip("install", "--no-deps", "--no-build-isolation", "-e", checkout, python=python)
    (tmp_path / "elsewhere").mkdir()
    check_installed(python, tmp_path / "elsewhere")
    where = run(python, tmp_path, "-c", "import umm.tasks.recon as m; print(m.__file__)").stdout
    assert str(checkout) in where


def has_setuptools(python: Path) -> bool:
    code = "import setuptools; assert int(setuptools.__version__.split('.')[0]) >= 77"
    return run(python, ROOT.parent, "-c", code).returncode == 0


def test_the_bare_checkout_works(checkout, tmp_path):
    """Nothing installed: the link umm/tasks -> ../tasks makes the checkout whole."""
    python = environment(tmp_path / "venv")
    done = run(python, checkout, "-c", "import umm.tasks.recon as m; print(m.__file__)")
    assert done.returncode == 0 and str(checkout) in done.stdout, done.stderr
