"""Question answering on cached latents: training steps and greedy answers per second, closed head and LLM adapter.

    python benchmarks/bench_llm.py              about two minutes on two CPU cores, no network

Latents and questions are held in memory: shapes' own questions, random numbers for latents of the tiny configurations.
On a GPU choose --llm with a hub id or folder, and latents of --shape 768,16,16.
"""

from __future__ import annotations

import argparse

import torch
from _bench import measure, report
from accelerate import Accelerator

from umm.config import load
from umm.data.shapes import ShapesSource
from umm.latents.base import LatentSpec
from umm.learner import Learner
from umm.rng import generator
from umm.settings import ShapesSettings
from umm.tasks._answering import Answering, build_head
from umm.tasks.base import Phase


class Timed(Answering):
    """The task on latents that are standardised already, without a data set."""

    def __init__(self, config, space, texts):
        self.space, self.seed, self.kind = space, 0, config.und.kind
        self.networks = {self.kind: build_head(config, space, texts)}
        self.phases = [Phase(self.kind, self.networks[self.kind], config.und.optim)]


class Space:
    """Only what a task reads of a latent space."""

    def __init__(self, spec: LatentSpec):
        self.spec, self.normalizer, self.families = spec, torch.nn.Identity(), ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--shape", default="384,6,6", help="of the latents")
    parser.add_argument("--llm", default="tiny")
    arguments = parser.parse_args()
    accelerator, batch = Accelerator(), arguments.batch
    space = Space(LatentSpec(*map(int, arguments.shape.split(",")), 48))
    source = ShapesSource(ShapesSettings(image_size=48, train=200), "train")
    texts = [source[i] for i in range(len(source))]
    questions = [item["questions"] for item in texts[:batch]]
    latents = torch.randn(batch, *space.spec.shape, generator=generator("latents")).to(accelerator.device)
    numbers, asked = {}, sum(map(len, questions))
    for name, overrides in {"vqa": [], "llm": [f"und.llm.model={arguments.llm}", "und.llm.tiny.steps=5"]}.items():
        task = Timed(load("und", f"configs/tiny/und_{name}.yaml", overrides), space, texts)
        learner = Learner(task.groups()[0], accelerator, 10**9, compiled=False)

        def step(learner=learner):
            micro_batches = {"und": [{"latent": latents, "questions": questions}]}
            learner.step(micro_batches, {"und": [list(range(batch))]}, images=10**6)

        def answer(head=task.networks[name]):
            where = torch.arange(batch).repeat_interleave(torch.tensor([len(some) for some in questions]))
            head.answer(latents, [question.text for some in questions for question in some], where)

        for what, call in {"train": step, "answer": answer}.items():
            numbers[f"{name}_{what}"] = measure(call, asked, warmup=2, repetitions=7)
            print(f"{name}, {what}: {numbers[f'{name}_{what}']['per_second']['median']:.1f} questions/s", flush=True)
        numbers[f"{name}_weights"] = task.networks[name].parameter_count()
    report("llm", {"batch": batch, "questions": asked, "shape": arguments.shape, "llm": arguments.llm}, numbers)


if __name__ == "__main__":
    main()
