"""Worlds in which it is known whether two tasks help each other: errors by a law instead of a training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

NOISE = {"und": 0.01, "gen": 0.02}


def world(config, gain=0.0, placebo=0.0, leak=0.0, crash="", die="", marks=""):
    """Rows of an evaluation: error = (images)^-0.3, times exp(-gain) where the partner moves the shared part.

    Args:
        gain: of both tasks or {task: gain}, by a true partner; `placebo`: from a sham one; `leak`: from a stopped one.
        crash, die: runs whose folder contains this raise, or end their process.
        marks: folder that gets a file for every call.
    """
    joint, name = config.joint, str(config.run)
    if marks:
        (Path(marks) / name.replace("/", "_")).touch()
    if crash and crash in name:
        raise RuntimeError("the disk is full of shapes")
    if die and die in name:
        os._exit(7)
    rows = []
    for task, metric in (("und", "accuracy"), ("gen", "fd")):
        if task not in joint.parts:
            continue
        draw = np.random.default_rng([config.seed, task == "gen", *map(ord, "".join(joint.parts)), config.train.images])
        shared = np.random.default_rng(config.seed).normal() * 0.05  # what paired arms have in common
        partner = len(joint.parts) > 1
        effect = (gain if isinstance(gain, float) else gain[task]) if partner else 0.0
        if joint.placebo != "none":
            effect = placebo
        stopped = [part for part in joint.stop if part != task]
        noise = shared + draw.normal() * NOISE[task]
        if stopped:
            draw = np.random.default_rng([config.seed, task == "gen", *map(ord, task), config.train.images])
            effect, noise = leak, shared + draw.normal() * NOISE[task]
        error = (config.train.images / 1000) ** -0.3 * np.exp(noise - effect) / 3
        value = 1 - error if metric == "accuracy" else error
        row = {"metric": metric, "value": float(value), "higher_is_better": metric == "accuracy", "conflict": None}
        rows.append(row | ({"space": "wavelet"} if metric == "fd" else {}))
    return rows, {"images": int(config.train.images), "flops": 1000 * int(config.train.images) * len(joint.parts)}
