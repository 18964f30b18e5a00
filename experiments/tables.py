"""The README's tables, made of the JSON files in experiments/results.

    python experiments/tables.py            writes them into README.md
    python experiments/tables.py --check    says which one differs

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a function of this file.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def result(name: str) -> dict:
    return json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())


def rows_of(found: dict) -> dict[tuple[str, str], dict]:
    """{(metric, space): row} of an evaluation."""
    return {(row["metric"], row.get("space") or ""): row for row in found["numbers"]}


def interval(row: dict, digits: int = 2, scale: float = 1.0) -> str:
    """Value and interval of a row of an evaluation, or of a mean over seeds."""
    value = row["value"] if "value" in row else row["mean"]
    value, low, high = (f"{scale * number:.{digits}f}" for number in (value, row["low"], row["high"]))
    return f"{value} [{low}, {high}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# --------------------------------------------------------------------------------------------------------------- tables


def recon() -> str:
    rows = []
    for name, what in {"recon": "scenes", "photos": "crops of 2 photographs"}.items():
        file = f"configs/tiny/{name}.yaml"
        numbers = rows_of(result(f"tiny-{name}"))
        psnr, mean, untrained = (
            numbers[metric, ""] for metric in ("psnr", "psnr of the mean picture", "psnr of an untrained decoder")
        )
        seen = f"{OmegaConf.load(ROOT / file).train.images:,}"
        rows.append([f"`{file}`", seen, f"{psnr['n']:,} {what}", interval(psnr)])
        rows[-1] += [f"{mean['value']:.2f}", f"{untrained['value']:.2f}"]
    return table(["run", "pictures seen", "held out", "PSNR", "mean picture", "untrained decoder"], rows)


def planted() -> str:
    pairs = {
        "same": "the same hidden map",
        "apart": "two maps, room for both",
        "rivals": "two maps, room for one",
    }
    rows = []
    for name, what in pairs.items():
        joint = result(f"planted-{name}")["joint"]["J-exposure"]
        low, high = joint["sigma"]["interval"]
        sigma = {"value": joint["sigma"]["value"], "low": low, "high": high}
        directions = [interval(joint["directions"][side]) for side in "ug"]
        rows.append([f"`planted_{name}.yaml`: {what}", *directions, interval(sigma)])
    return table(["pair (`experiments/synergy/`), 8 seeds", "s of u", "s of g", "Sigma"], rows)


def diagnose() -> str:
    columns = {
        "directions in use": ("effective_rank", 0),
        "sparsity": ("hoyer", 2),
        "excess kurtosis": ("kurtosis", 2),
        "fine detail": ("high_frequency", 2),
        "self-similarity": ("self_similarity", 2),
    }
    rows = []
    for name, found in result("tiny-diagnose").items():
        numbers = {row["metric"]: row["value"] for row in found["numbers"] if row["coordinates"] == "standardised"}
        shown = [f"{numbers[metric]:z.{digits}f}" for metric, digits in columns.values()]
        rows.append([name.partition(", with")[0], f"{numbers['channels']:.0f}", *shown])
    return table(["standardised latents", "channels", *columns], rows)


def best_of() -> str:
    found = result("tiny-best-of")
    last = {row["judge"]: row for row in found["rows"] if row["size"] == found["pool"]}
    rows = []
    for judge, row in last.items():
        real = found["accuracy"].get(judge)
        closed = row["gap_closed"]
        rows.append([judge, "" if real is None else f"{real:.2f}", interval(row["agreement"])])
        rows[-1] += ["" if judge == "random" else interval(row["gain"])]
        rows[-1] += ["" if judge in ("random", "oracle") else interval(closed, 0, 100) + " %"]
        rows[-1] += [f"{100 * found['sets'][judge]['spread_change']['value']:+.0f} %" if judge != "random" else ""]
        rows[-1] += [f"{found['costs'][judge]['flops'] / 1e6:,.1f}"]
    head = ["judge", "right on real", f"best of {found['pool']}", "over random", "of the oracle's gain", "spread"]
    return table([*head, "MFLOP a candidate"], rows)


# ------------------------------------------------------------------------------------------------------------- the file


TABLES = {made.__name__: made for made in (recon, planted, best_of, diagnose)}


def rewritten(text: str) -> str:
    """A README with its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


def main() -> None:
    text = README.read_text()
    if "--check" in sys.argv[1:]:
        old, new = ({found[2]: found[3] for found in BLOCK.finditer(t)} for t in (text, rewritten(text)))
        stale = [name for name in old if old[name] != new[name]]
        raise SystemExit(f"README.md: not what the JSON says: {', '.join(stale)}" if stale else 0)
    README.write_text(rewritten(text))


if __name__ == "__main__":
    main()
