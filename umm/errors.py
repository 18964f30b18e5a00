"""Errors a user can cause and mend: the command line prints the sentence and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UmmError(ValueError):
    """What is wrong, where it was said, what to do: one or two sentences."""


class ConfigError(UmmError):
    """A setting that does not exist, has the wrong type or contradicts another."""


class UnknownName(UmmError):
    """A name that no file of the registry answers to."""


class MissingWeights(UmmError):
    """Pretrained weights that are neither on this disk nor reachable."""


class MissingHead(UmmError):
    """The model has no head for what was asked of it."""


class DataError(UmmError):
    """A data set that cannot be read, or lacks what the task needs."""


class StaleCache(UmmError):
    """A latent cache made with other weights, transform, layers or dtype than the ones asked for."""


class NonFinite(UmmError):
    """The loss or a gradient became infinite or not a number."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
