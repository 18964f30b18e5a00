"""Who imports whom: an arrow points down this list, never up."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

# lowest first; a module may import modules of its own line and of lines above it in this list
ORDER = [
    ["umm.errors", "umm.__version__"],
    ["umm.registry", "umm.settings", "umm.rng"],
    ["umm.config", "umm.assets"],
    ["umm.runs", "umm.progress", "umm.board", "umm.stats", "umm.paired", "umm.seed_stats", "umm.workers"],
    ["umm.declared", "umm.many_runs"],
    ["umm.choosing"],
    ["umm.plots", "umm.run_facts"],
    ["umm.pages", "umm.sections"],
    ["umm.run_curves"],
    ["umm.transforms", "umm.layers", "umm.pretrained", "umm.losses", "umm.knn", "umm.language"],
    ["umm.diagnostics", "umm.neighbourhoods", "umm.responses", "umm.diagnose_plot"],
    ["umm.data", "umm.flow", "umm.pictures"],
    ["umm.latents.base", "umm.metrics"],
    ["umm.run_tables"],
    ["umm.report"],
    ["umm.latents"],
    ["umm.discriminator", "umm.shards"],
    ["umm.cache"],
    ["umm.loader", "umm.heads", "umm.features", "umm.sampling", "umm.battery"],
    ["umm.model", "umm.judging", "umm.build", "umm.interop_dit", "umm.feature_cache", "umm.fitting", "umm.samples"],
    ["umm.convnet"],
    ["umm.interop"],
    ["umm.tasks.base"],
    ["umm.tasks"],
    ["umm.learner"],
    ["umm.train"],
    ["umm.evaluate", "umm.sample_run"],
    ["umm.joint_eval"],
    ["umm.subjects", "umm.probing", "umm.questions"],
    ["umm.diagnose"],
    ["umm.picture_judges"],
    ["umm.best_of", "umm.augment"],
    ["umm.best_of_report"],
    ["umm.synergy", "umm.synergy_run"],
    ["umm.synergy_analysis", "umm.synergy_verdict"],
    ["umm.synergy_plots"],
    ["umm.synergy_report"],
    ["umm.compare", "umm.compare_run"],
    ["umm.compare_plots"],
    ["umm.compare_report"],
    ["umm.listing", "umm.demo"],
    ["umm.cli"],
    ["umm.probe"],
    ["umm.__main__", "umm"],
]


def rank(module: str) -> int:
    """Place in ORDER of the longest prefix that is listed."""
    listed = {name: i for i, names in enumerate(ORDER) for name in names}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in listed:
            return listed[".".join(parts[:length])]
    raise AssertionError(f"{module} has no place in ORDER")


def modules() -> dict[str, Path]:
    files = [*(ROOT / "umm").rglob("*.py"), *(ROOT / "tasks").glob("*.py")]
    found = {}
    for file in files:
        relative = file.relative_to(ROOT)
        if relative.parts[:2] == ("umm", "tasks"):  # the link; the real files are in tasks/
            continue
        parts = relative.with_suffix("").parts
        parts = ("umm", *parts) if parts[0] == "tasks" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, at_top: bool) -> list[tuple[str, bool]]:
    """(module, relative?) of every import; `at_top`: those that run when the module is imported."""
    tree = ast.parse(file.read_text())
    typing_only = [
        n for b in ast.walk(tree) if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.dump(b.test) for n in ast.walk(b)
    ]
    nodes = tree.body if at_top else ast.walk(tree)
    found = []
    for node in nodes:
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" if node.module in ("umm", "umm.latents", "umm.metrics") else node.module
                     for a in node.names]  # fmt: skip
            found += [(name or "", node.level > 0) for name in names]
    return found


def test_nothing_imports_what_stands_above_it():
    wrong = []
    for module, file in modules().items():
        for target, _ in imports(file, at_top=True):
            if target.split(".")[0] == "umm" and rank(target) > rank(module):
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_there_is_one_spelling_of_imports():
    for module, file in modules().items():
        for target, relative in imports(file, at_top=False):
            assert not relative, f"{module} uses a relative import"
            assert target.split(".")[0] != "tasks", f"{module} imports tasks: that would load umm.tasks a second time"


def test_what_answers_fast_never_imports_torch_at_the_top():
    for part in ("", ".errors", ".registry", ".settings", ".config", ".cli", ".assets", ".listing"):
        name = f"umm{part}"
        heavy = {target.split(".")[0] for target, _ in imports(modules()[name], at_top=True)}
        assert not heavy & {"torch", "transformers", "timm", "accelerate", "datasets"}, name


def test_every_package_is_declared():
    """A sub-package that is not declared is silently left out of the wheel."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"umm"} | {f"umm.{file.parent.name}" for file in (ROOT / "umm").glob("*/__init__.py")}
    assert declared - {"umm.configs"} == found, "settings alone need no __init__"


def test_nobody_seeds_the_global_generator():
    for module, file in modules().items():
        assert "torch.manual_seed(" not in file.read_text(), f"{module}: randomness is an argument"
