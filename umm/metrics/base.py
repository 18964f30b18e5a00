"""The contract of a metric: streaming, mergeable, and never a number without its fingerprint.

Two kinds share one interface. *Paired* metrics (PSNR, LPIPS) give a value per picture; *set* metrics (Frechet
distance, KID) compare two collections and give one value. Both are fed batches with picture ids, so that a picture
counted twice or dropped by a distributed run is an error and not a wrong number.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Metric:
    """Accumulates pictures and computes numbers; all arithmetic after the features is float64.

    name              what the table prints
    higher_is_better  direction
    version           raised when the definition changes, so that old and new numbers are not mixed
    paired            True: `per_item()` gives {id: value}
    families          networks that judge ("inception", "efficientnet", "dinov2", ...): a judge whose family took part
                      in training has a conflict of interest and stays out of the headline
    """

    name: str = ""
    higher_is_better: bool = True
    version: int = 1
    paired: bool = False
    families: tuple[str, ...] = ()

    def update(self, real: Tensor, fake: Tensor, ids: Sequence[str]) -> None:
        """Add a batch: originals and reconstructions or samples, both float (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def merge(self, other: Metric) -> None:
        """Add all that `other` (another process) has seen; overlapping ids raise."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """Named numbers, e.g. {"psnr": 24.1} or {"fd": 12.3, "kid": 0.004}."""
        raise NotImplementedError

    def per_item(self) -> dict[str, float]:
        """{picture id: value}, paired metrics only."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, object]:
        """Everything that must be equal for two numbers to be comparable (extractor, resize, quantisation, n, ...)."""
        raise NotImplementedError
