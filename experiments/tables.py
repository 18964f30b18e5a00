"""The tables of README.md and docs/results.md, made of the JSON files in experiments/results.

    python experiments/tables.py            writes them
    python experiments/tables.py --check    says which one differs

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a function of this file.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

from omegaconf import OmegaConf

from umm import seed_stats
from umm.flow import dimension_shift

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", ROOT / "docs" / "results.md")
QUESTIONS = ("attribute", "count", "comparison", "existence", "relation")
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


def gen() -> str:
    trained, early = (rows_of(result(name)) for name in ("tiny-gen", "tiny-gen-1-percent"))
    shown = {
        "Frechet distance, pixels": ("fd", "pixels", 2, 1),
        "Frechet distance, effnet": ("fd", "effnet", 1, 1),
        "of the class asked for, by a probe of latents, %": ("class_agreement", "latents", 1, 100),
        "of the class asked for, by a probe of effnet, %": ("class_agreement", "effnet", 1, 100),
    }
    rows = []
    for what, (metric, space, digits, scale) in shown.items():
        values = [scale * numbers[metric, space]["value"] for numbers in (early, trained)]
        rows.append([what, *(f"{value:.{digits}f}" for value in values)])
    decoded = trained["fd at latent noise 0", "effnet"]["value"]
    rows[1][0] += f" ({decoded:.1f} of real latents, decoded)"
    return table(["1,000 samples", "after 560 pictures", "after 56,000"], rows)


def probes() -> str:
    found = {row["task"]: row for row in result("tiny-probe")["rows"]}
    rows = [
        [f"`{source}`", *(interval(found[f"{source}/{method}"], 1, 100) for method in ("linear", "knn"))]
        for source in ("latent", "cls", "patch-mean", "pixels", "random:latent")
    ]
    return table(["1,000 test scenes, 900 to learn from", "linear, %", "kNN, %"], rows)


def answers() -> str:
    rows = []
    for kind, what in (("vqa", "closed head"), ("llm", "language-model adapter")):
        found = rows_of(result(f"tiny-{kind}"))
        seen, blind, gain = (found[f"{who} accuracy", ""] for who in (kind, "blind", f"{kind} - blind"))
        by_type = [found[f"{kind} - blind accuracy on {one}", ""]["value"] for one in QUESTIONS]
        rows.append([what, f"{100 * seen['value']:.1f}", f"{100 * blind['value']:.1f}", interval(gain, 1, 100)])
        rows[-1] += [f"{100 * value:+.0f}" for value in by_type]
    return table(["1,954 questions", "accuracy, %", "blind", "gain", *QUESTIONS], rows)


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


def scenes() -> str:
    found = result("synergy-shapes")
    arms = {
        "alone, half the pictures": ("U-half", "G-half"),
        "alone": ("U", "G"),
        "alone, twice the pictures": ("U-2x", "G-2x"),
        "together": ("J-exposure", "J-exposure"),
        "together, half the pictures of each": ("J-compute", "J-compute"),
        "one after the other": ("seq-GU", "seq-UG"),
        "beside a placebo: shuffled latents, permuted labels": ("U+shuffled", "G+permuted"),
        "beside itself in another order": ("U+U", "G+G"),
        "beside alignment to the clean latents": (None, "G+distill"),
        "on an untrained trunk": ("random-trunk", None),
    }
    rows = []
    for what, pair in arms.items():
        rows.append([what])
        for arm, side, digits, scale in zip(pair, ("und", "gen"), (1, 3), (100, 1)):
            rows[-1] += [interval(found["arms"][arm]["endpoints"][side], digits, scale) if arm else ""]
    return table(["trained", "scenes whose objects are counted right, %", "FD of samples, wavelet space"], rows)


def synergy() -> str:
    said = result("synergy-shapes")["verdict"]
    return f"**{said['title']}**\n\n" + "".join(f"* {sentence}\n" for sentence in said["sentences"])


def diagnose() -> str:
    columns = {
        "directions in use": ("effective_rank", 0),
        "sparsity": ("hoyer", 2),
        "absolute excess kurtosis": ("kurtosis", 2),
        "fine detail": ("high_frequency", 2),
        "self-similarity": ("self_similarity", 2),
    }
    rows = []
    for name, found in result("tiny-diagnose").items():
        numbers = {row["metric"]: row["value"] for row in found["numbers"] if row["coordinates"] == "standardised"}
        shown = [f"{numbers[metric]:z.{digits}f}" for metric, digits in columns.values()]
        rows.append([name, f"{numbers['channels']:.0f}", *shown])
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


def augment() -> str:
    found = result("tiny-augment")
    rows = []
    for arm, values in found["accuracy"].items():
        gain = found["differences"].get(arm)
        rows.append([arm, f"{sum(values) / len(values):.3f}", interval(gain, 3) if gain else ""])
        rows[-1] += [f"{gain['p']:.3f}" if gain else ""]
    asked = found["request"]
    head = f"{asked['shots']} real latents a class and {asked['added']} more that are"
    return table([head, f"accuracy, mean of {asked['seeds']} seeds", "over duplicated", "p"], rows)


def compare() -> str:
    found = result("tiny-compare")
    columns = {"PSNR, dB": 1, "gFD wavelet": 3, "gFD pixels": 2, "accuracy": 2}
    rows = []
    for name, space in found["spaces"].items():
        shown = [found["columns"][column]["spaces"][name] for column in columns]
        cells = [interval(one, digits) for one, digits in zip(shown, columns.values())]
        parameters = space["costs"]["recon"]["parameters"]
        trained = f"{parameters / 1e6:.2f} M" if parameters else "none"
        rows.append([name, " x ".join(map(str, space["shape"])), trained, *cells])
    return table(["space, three seeds", "latent", "trained to draw", *columns], rows)


def dimension() -> str:
    found = result("tiny-dimension")
    psnr, drawn, made = (found["columns"][name]["spaces"] for name in ("PSNR, dB", "rFD pixels", "gFD pixels"))
    rows = []
    for name, space in found["spaces"].items():
        k, changed = space["shape"][0], space["changed"].get("gen", {})
        width = changed.get("gen.dit.width", found["declaration"]["stages"]["gen"]["gen"]["dit"]["width"])
        shift = changed.get("gen.flow.shift", dimension_shift(math.prod(space["shape"])))
        pairs = zip(made[name]["per_seed"].values(), drawn[name]["per_seed"].values())
        added = seed_stats.mean_of([fd - floor for fd, floor in pairs])
        rows.append([f"{k}", f"{width}", f"{shift:.2f}", interval(psnr[name], 1)])
        rows[-1] += [interval(one) for one in (drawn[name], made[name], added)]
    head = ["numbers a token", "width of the DiT", "time shift", "PSNR, dB", "rFD pixels", "gFD pixels", "gFD - rFD"]
    return table(head, rows)


def demo() -> str:
    found = result("tiny-demo")
    return f"{found['minutes']} minutes on {found['cores']} quiet cores:\n\n" + "".join(
        f"* {x}\n" for x in found["came out"]
    )


# ------------------------------------------------------------------------------------------------------------- the file


MADE = (demo, recon, gen, probes, answers, planted, scenes, synergy, best_of, augment, diagnose, dimension, compare)
TABLES = {made.__name__: made for made in MADE}


def rewritten(text: str) -> str:
    """The text with its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


def main() -> None:
    for file in FILES:
        text = file.read_text()
        if "--check" not in sys.argv[1:]:
            file.write_text(rewritten(text))
        elif rewritten(text) != text:
            raise SystemExit(f"{file.name}: its tables are not what the JSON says.")


if __name__ == "__main__":
    main()
