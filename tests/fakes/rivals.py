"""Latent spaces whose numbers follow a law, with a little noise a seed: what a comparison would have measured."""

from __future__ import annotations

import numpy as np

LAW = {  # metric, value of each space, spread over seeds
    "recon": ("psnr", {"patches": 20.0, "pixels": 30.0, "vae": 25.0}, 0.1),
    "gen": ("fd", {"patches": 5.0, "pixels": 9.0, "vae": 7.0}, 0.1),
    "und": ("accuracy", {"patches": 0.5, "pixels": 0.6, "vae": 0.6}, 0.05),
}


def rival(space: str, stage: str, seed: int) -> list[dict]:
    """Rows of one run's evaluation."""
    metric, means, spread = LAW[stage]
    draw = np.random.default_rng([seed, *map(ord, space + stage)])
    value = means.get(space, 1.0) + spread * draw.normal()
    row = {"metric": metric, "value": float(value), "higher_is_better": metric != "fd", "conflict": None}
    return [row | ({"space": "wavelet"} if metric == "fd" else {})]
