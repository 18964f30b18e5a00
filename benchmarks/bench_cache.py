"""Reading latents from the cache against encoding them: pictures per second of each, and how many times faster.

    python benchmarks/bench_cache.py            about a minute on two CPU cores, no network but one pip wheel

Latents are (384, 8, 8): DINOv2-S on pictures of 64 px brought to 112 px. The cache is read in random order, batches of
64, with a warm page cache; once latents alone (generation), once with the pictures (reconstruction).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from _bench import measure, report

from umm.cache import LatentCache, build
from umm.data.base import DataSource
from umm.latents.base import LatentSpace, LatentSpec, Normalizer
from umm.latents.dinov2 import DINOv2
from umm.rng import generator
from umm.settings import CacheSettings, DINOv2Settings

SIDE, BATCH = 64, 64


class Noise(DataSource):
    """Random pictures: neither reading nor encoding depends on what they show."""

    split, image_size = "train", SIDE

    def __init__(self, count: int):
        self.images = torch.randint(256, (64, 3, SIDE, SIDE), generator=generator("noise"), dtype=torch.uint8)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index, generator=None):
        return {"image": self.images[index % 64], "id": str(index), "label": index % 10}

    def identity(self):
        return {"name": "noise", "count": self.count}


class Filler(LatentSpace):
    """Latents of the right shape at no cost: fills a cache that is only to be read."""

    def __init__(self, spec: LatentSpec):
        super().__init__()
        self.spec, self.normalizer = spec, Normalizer(spec.shape)
        self.register_buffer("latents", torch.randn(BATCH, *spec.shape, generator=generator("filler")))

    def raw(self, images):
        return self.latents[: len(images)]

    def identity(self):
        return {"name": "filler"}


def reading(cache: LatentCache, fields: tuple[str, ...]) -> dict:
    """Random batches of some fields."""
    part, rng = cache.select(*fields), generator("order")
    return measure(
        lambda: part.batch(torch.randperm(len(cache), generator=rng)[:BATCH].tolist()), BATCH, repetitions=20, steps=10
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=8192, help="pictures in the cache that is read")
    parser.add_argument("--weights", default="asset:dinov2-small-saliency", help="of the encoder")
    pictures = parser.parse_args().pictures
    latent = DINOv2Settings(weights=parser.parse_args().weights, image_size=SIDE, encoder_size=112)
    space = DINOv2.from_config(latent)
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator("images"))
    with torch.inference_mode():
        encode = measure(lambda: space.raw(images), BATCH, warmup=2, repetitions=10)
    settings = CacheSettings(shard_size=1024)
    with tempfile.TemporaryDirectory() as folder:
        cache = build(Noise(pictures), Filler(space.spec), settings, Path(folder))
        latents = reading(cache, ("latent", "label"))
        everything = reading(cache, ("latent", "image", "label", "id"))
    times = {
        "latents": latents["per_second"]["median"] / encode["per_second"]["median"],
        "latents_and_pictures": everything["per_second"]["median"] / encode["per_second"]["median"],
    }
    report(
        "cache",
        {"latent": asdict(latent), "shape": space.spec.shape, "cache": asdict(settings), "pictures": pictures},
        {"encode": encode, "read_latents": latents, "read_latents_and_pictures": everything, "times_faster": times},
    )


if __name__ == "__main__":
    main()
