"""One representation latent space for reconstruction, generation and understanding.

    import umm
    model = umm.load("runs/recon-shapes")   # a run folder or its model/ folder
    latents = model.encode(images)          # images (B, 3, H, W) in [0, 1]
    pictures = model.decode(latents)

Nothing heavy is imported here: `import umm` does not load torch.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__", "find", "load", "names"]

from umm.registry import find, names


def load(path: str, device: str = "cpu"):
    """The `UnifiedModel` saved in a run folder or model folder. See `umm.model.UnifiedModel.load`."""
    from umm.model import UnifiedModel

    return UnifiedModel.load(path, device=device)
