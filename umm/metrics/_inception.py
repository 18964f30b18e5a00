"""FID's Inception: the 2015 TensorFlow graph on torchvision's blocks, and TensorFlow 1's bilinear resize.

It is not torchvision's `inception_v3`: other weights, average pools that do not count the padding, a max-pool in the
last block, 1008 classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import Inception3

from umm.rng import seeded_init

IMAGE_SIZE = 299


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size) as `tf.image.resize_bilinear` of TensorFlow 1 did it.

    Output pixel i lies at i * H / size (corners of pixels, not centres), nothing is smoothed when shrinking.
    """
    for axis in (-2, -1):
        last = images.shape[axis] - 1
        position = torch.arange(size, device=images.device) * (images.shape[axis] / size)
        low = position.floor().long()
        share = (position - low).to(images.dtype).view((size, 1) if axis == -2 else (size,))
        below, above = images.index_select(axis, low), images.index_select(axis, (low + 1).clamp_max(last))
        images = below + (above - below) * share
    return images


class InceptionFID(Inception3):
    """(B, 3, 299, 299) in [-1, 1] -> pool3 features (B, 2048). Parameter names are those of the published weights."""

    def __init__(self) -> None:
        with seeded_init("inception"):
            super().__init__(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d):
            block.branch_pool.register_forward_pre_hook(_without_padding)
        for block in (self.Mixed_6e, self.Mixed_7b):
            block.branch_pool.register_forward_pre_hook(_without_padding)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self._last_block(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean((2, 3))

    def _last_block(self, x: Tensor) -> Tensor:
        """Mixed_7c with a max-pool where torchvision averages."""
        block = self.Mixed_7c
        middle, deep = block.branch3x3_1(x), block.branch3x3dbl_2(block.branch3x3dbl_1(x))
        parts = [
            block.branch1x1(x),
            block.branch3x3_2a(middle),
            block.branch3x3_2b(middle),
            block.branch3x3dbl_3a(deep),
            block.branch3x3dbl_3b(deep),
            block.branch_pool(F.max_pool2d(x, kernel_size=3, stride=1, padding=1)),
        ]
        return torch.cat(parts, dim=1)


def _without_padding(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """What torchvision averaged over 3 x 3 places, zeros beyond the border included, averaged over the real ones."""
    (x,) = inputs
    return (x / F.avg_pool2d(torch.ones_like(x[:1, :1]), kernel_size=3, stride=1, padding=1),)
