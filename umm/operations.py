"""Floating-point operations of what is computed, counted without changing a bit of it."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Counts matrix products, convolutions and attention inside its block, by torch's own formulas.

    `FlopCounterMode` also takes apart what has a kernel of its own, e.g. the gradient of SiLU, whose last bits change.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out
