"""Does more latent dimension make generation harder? The same pictures with k principal components a token.

    umm diagnose --config configs/tiny/gen.yaml --split train --images 4000 --out runs/dimension/base
    python experiments/dimension.py plan runs/dimension --components 8 32 128 384
    python experiments/dimension.py run runs/dimension --seeds 3          goes on where it was interrupted
    python experiments/dimension.py report runs/dimension

For each k a decoder, trained as configs/tiny/recon.yaml says, and generators trained as configs/tiny/gen.yaml says but
for two factors, crossed. Width: `fixed`, that of the file for every k; `scaled`, in proportion to k (at least 64),
that of the file for the largest k. Shift: `own`, sqrt(k N / 4096); `fixed`, that of the largest k. All see as many
pictures. What the decoder of a k loses is measured beside (fd of reconstructions): judge a generator by what it adds.
At the largest k, if that is all of them, the latents are those of the base space but for a rotation.

On two CPU cores a decoder takes 14 minutes and a generator 13, so the plan above with 3 seeds (4 decoders and 39
generators) takes ten hours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from umm import config as configuration
from umm.build import build_space
from umm.diagnostics import width_floor
from umm.flow import dimension_shift
from umm.pretrained import read_tensors
from umm.runs import write_atomic

FOLLOWS = ("image_size", "stats", "stats_images", "encode_batch")  # not part of the base's own settings
LEAST_WIDTH = 64
SPLIT = "val"


def plan(out: Path, components: list[int], recon: str, gen: str, basis: Path) -> None:
    """Write <out>/configs/*.yaml and plan.json, and say what there is to run."""
    config = configuration.load("gen", gen)
    tokens = build_space(config.latent).spec.tokens
    top, width, heads = max(components), config.gen.dit.width, config.gen.dit.heads
    if width is None:
        raise SystemExit("the generator needs gen.dit.size=custom with a width: it is one of the two factors.")
    lam = read_tensors(basis)["variances"]
    base = {key: value for key, value in OmegaConf.to_container(config.latent).items() if key not in FOLLOWS}
    arms = []
    for k in sorted(components):
        latent = {"name": "pca", "image_size": config.latent.image_size, "components": k, "base": base}
        latent["basis"] = str(basis)
        name = f"k{k:04d}"
        decoder = write(out, f"{name}-decoder", recon, {"latent": latent})
        shifts = {"own": None, "fixed": dimension_shift(top * tokens)}
        widths = {"fixed": width, "scaled": max(LEAST_WIDTH, round(width * k / top / (4 * heads)) * 4 * heads)}
        seen = set()
        for (how, wide), (moved, shift) in itertools.product(widths.items(), shifts.items()):
            real = shift or dimension_shift(k * tokens)
            if (wide, real) in seen:  # at the largest k the arms are one
                continue
            seen.add((wide, real))
            arm = f"{name}-width-{how}-shift-{moved}"
            changed = {"dit": {"width": wide}, "flow": {"shift": shift}, "decoder": str(decoder)}
            write(out, arm, gen, {"latent": latent, "gen": changed})
            floor = float(width_floor(lam[:k] / lam[:k].mean(), wide))
            row = {"arm": arm, "k": k, "width": wide, "shift": round(real, 3), "width_floor": floor}
            arms.append(row | {"variance_kept": float(lam[:k].sum() / lam.sum()), "decoder": decoder.name})
    write_atomic(out / "plan.json", json.dumps({"basis": str(basis), "arms": arms}, indent=1))
    print(table(arms))


def write(out: Path, name: str, file: str, changes: dict) -> Path:
    """The file's settings with other ones; returns the folder of the run."""
    layer = configuration.read_yaml(file)
    layer.pop("latent", None)
    layer = OmegaConf.merge(layer, changes, {"run": str(out / "runs" / name)})
    target = out / "configs" / f"{name}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, OmegaConf.to_yaml(layer))
    configuration.load("recon" if name.endswith("-decoder") else "gen", target)  # an error now, not after hours
    return out / "runs" / name


def run(out: Path, seeds: int) -> None:
    """Decoders first, then every generator with every seed; what is finished is left as it is."""
    arms = json.loads((out / "plan.json").read_text())["arms"]
    for decoder in dict.fromkeys(row["decoder"] for row in arms):
        train("recon", out, decoder, out / "runs" / decoder, 0)
    for seed, row in itertools.product(range(seeds), arms):
        train("gen", out, row["arm"], out / "runs" / f"{row['arm']}-seed{seed}", seed)


def train(task: str, out: Path, name: str, folder: Path, seed: int) -> None:
    if (folder / "eval" / f"{SPLIT}.json").exists():
        return
    umm = [sys.executable, "-m", "umm"]
    file = out / "configs" / f"{name}.yaml"
    subprocess.run([*umm, "train", "--task", task, "--config", file, f"run={folder}", f"seed={seed}"], check=True)
    subprocess.run([*umm, "eval", folder, "--split", SPLIT], check=True)


def report(out: Path, space: str) -> None:
    """Frechet distances in one space: of reconstructions, and of samples, mean and range over seeds."""
    rows = []
    for row in json.loads((out / "plan.json").read_text())["arms"]:
        folders = sorted((out / "runs").glob(f"{row['arm']}-seed*/eval/{SPLIT}.json"))
        values = [found for file in folders if (found := distance(file, space)) is not None]
        floor = distance(out / "runs" / row["decoder"] / "eval" / f"{SPLIT}.json", space)
        rows.append({key: row[key] for key in ("arm", "k", "width", "shift")})
        rows[-1] |= {"seeds": len(values), "recon_fd": floor}
        if values:
            rows[-1] |= {"fd": sum(values) / len(values), "fd_min": min(values), "fd_max": max(values)}
    write_atomic(out / "report.json", json.dumps({"space": space, "rows": rows}, indent=1))
    print(table(rows))


def distance(file: Path, space: str) -> float | None:
    numbers = json.loads(file.read_text())["numbers"] if file.exists() else []
    return next((row["value"] for row in numbers if row["metric"] == "fd" and row.get("space") == space), None)


def table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    told = [[f"{row.get(key, ''):.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns]
            for row in rows]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(columns, *told)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in [columns, *told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["plan", "run", "report"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--components", type=int, nargs="+", default=[8, 32, 128, 384])
    parser.add_argument("--recon", default="configs/tiny/recon.yaml")
    parser.add_argument("--gen", default="configs/tiny/gen.yaml")
    parser.add_argument("--basis", type=Path, help="default: OUT/base/pca.safetensors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--space", default="effnet", help="feature space of the report")
    asked = parser.parse_args()
    if asked.action == "plan":
        basis = asked.basis or asked.out / "base" / "pca.safetensors"
        plan(asked.out, asked.components, asked.recon, asked.gen, basis)
    elif asked.action == "run":
        run(asked.out, asked.seeds)
    else:
        report(asked.out, asked.space)


if __name__ == "__main__":
    main()
