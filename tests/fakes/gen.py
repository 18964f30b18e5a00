"""Settings of a generation run that trains in a second."""

from __future__ import annotations

from pathlib import Path


def gen_settings(folder: Path) -> list[str]:
    text = f"""
        run={folder / "gen"} data.name=fakes.pictures latent.name=fakes.space cache.dir={folder / "cache"}
        gen.dit.size=custom gen.dit.width=32 gen.dit.depth=2 gen.dit.heads=2 gen.dit.head_depth=1
        gen.dit.head_width=32 gen.dit.head_heads=2 gen.optim.warmup=0 gen.optim.lr=1e-3 gen.ema=0.9
        train.images=96 train.batch_size=8 train.workers=0 train.log_every=2 train.save_every=32
        train.sample_every=96 train.device=cpu eval.sampler.steps=4
        eval.features=[pixels] eval.bootstrap=50 eval.noises=[0,0.5]
    """
    return text.split()
