"""Stage-1 training steps: pictures per second for each choice of losses, and the cost of encoding in every step.

    python benchmarks/bench_recon.py            about three minutes on two CPU cores, no network but two pip wheels

Decoder and pictures are those of configs/tiny/recon.yaml (48 px, 6 x 6 tokens), batches of 64 held in memory; on a GPU
choose --config configs/dinov2_b/recon.yaml. How long a real run waits for its data is in its log (data_wait).
"""

from __future__ import annotations

import argparse

import torch
from _bench import measure, report
from accelerate import Accelerator
from omegaconf import OmegaConf

from umm.build import build_space
from umm.config import load
from umm.learner import Learner
from umm.rng import generator
from umm.tasks.recon import Recon

GAN = [
    "recon.adversarial.weight=0.75",
    "recon.adversarial.backbone=asset:dinov2-small-saliency",
    "recon.adversarial.input_size=56",
    "recon.adversarial.start_discriminator=0",
    "recon.adversarial.start_generator=0",
]
LOSSES = {
    "l1": [],
    "l1_judge": ["recon.perceptual.name=judge"],
    "l1_encoder": ["recon.perceptual.name=encoder"],
    "l1_judge_gan": ["recon.perceptual.name=judge", *GAN],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/tiny/recon.yaml")
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    accelerator = Accelerator()
    base = load("recon", arguments.config)
    space = build_space(base.latent).to(accelerator.device)
    size, batch = base.latent.image_size, arguments.batch
    images = torch.rand(batch, 3, size, size, generator=generator("images")).to(accelerator.device)
    with torch.inference_mode():
        numbers = {"encode": measure(lambda: space.raw(images), batch, warmup=2, repetitions=5)}
        latents = space.raw(images)
    latents = latents.clone()
    for name, overrides in LOSSES.items():
        task = Recon(load("recon", arguments.config, overrides), space, None)
        learners = [Learner(group, accelerator, 10**9, compiled=False) for group in task.groups()]

        def step(learners=learners):
            for learner in learners:
                micro_batches = {"recon": [{"image": images, "latent": latents}]}
                learner.step(micro_batches, {"recon": [list(range(batch))]}, images=1)

        numbers[name] = measure(step, batch, warmup=2, repetitions=5)
        print(f"{name}: {numbers[name]['per_second']['median']:.1f} pictures/s", flush=True)
    configuration = {"config": arguments.config, "batch": batch, "latent": OmegaConf.to_container(base.latent)}
    report("recon", configuration, numbers)


if __name__ == "__main__":
    main()
