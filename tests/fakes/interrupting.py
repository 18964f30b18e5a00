"""A run that stops where nobody planned it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from umm.train import Trainer


@contextlib.contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Training inside the block takes `steps` steps and is interrupted in the next."""
    original, calls = Trainer.train_step, []

    def stop(self, micro_batches):
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return original(self, micro_batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", stop)
        yield
