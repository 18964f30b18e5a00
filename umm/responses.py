"""How an encoder answers to moved pictures and a decoder to moved latents; both are functions of a batch.

encode: pictures (B, 3, S, S) -> latents z (B, C, h, w). decode: z -> pictures. P numbers in a picture, D in a latent.
Every result is per picture, (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from umm.errors import UmmError
from umm.rng import PictureRNG

Map = Callable[[Tensor], Tensor]

# --------------------------------------------------------------------------------------------------------- encoder


def zoom(x: Tensor) -> Tensor:
    """The middle half of each side at twice the size, bilinear."""
    theta = x.new_tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def quarter_turn(x: Tensor) -> Tensor:
    return x.rot90(1, (-2, -1))


def mirror(x: Tensor) -> Tensor:
    return x.flip(-1)


def moves(patch: int) -> dict[str, tuple[Map, Map]]:
    """{name: (what happens to the picture, what should happen to the latent)}.

    shift: one token to the right and down, around the edge; jitter: one pixel, after which the latent should be what
    it was.
    """
    return {
        "shift": (lambda x: x.roll((patch, patch), (-2, -1)), lambda z: z.roll((1, 1), (-2, -1))),
        "flip": (mirror, mirror),
        "turn": (quarter_turn, quarter_turn),
        "zoom": (zoom, zoom),
        "jitter": (lambda x: x.roll((1, 1), (-2, -1)), lambda z: z),
    }


def equivariance_error(encode: Map, images: Tensor, on_picture: Map, on_latent: Map) -> Tensor:
    """|E(T x) - T E(x)| / sqrt(2 D) with every channel scaled to variance 1; 0 exact, 1 as far as unrelated tokens.

    EQ-VAE (arXiv 2502.09509) divides by |E(x)|, which an offset or one huge channel of the encoder would govern.
    """
    z, moved = encode(images).double(), encode(on_picture(images)).double()
    scale = z.transpose(0, 1).flatten(1).std(1, correction=0).clamp_min(1e-12)  # (C,)
    error = (moved - on_latent(z)) / scale[:, None, None]
    return error.flatten(1).norm(dim=1) / math.sqrt(2 * z[0].numel())


# --------------------------------------------------------------------------------------------------------- decoder


def span_noise(basis: Tensor, draw: PictureRNG, shape: tuple[int, int, int]) -> Tensor:
    """Gaussian directions (B, C, h, w) of which every token lies in the span of orthonormal basis (C, k); RMS 1."""
    noise = draw.randn(basis.shape[1], *shape[1:]).to(basis)
    direction = torch.einsum("ck,bkhw->bchw", basis, noise)
    return (direction / rms(direction)[:, None, None, None]).float()


def rms(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.flatten(1).double().square().mean(1).sqrt()


def gain(decode: Map, z: Tensor, direction: Tensor, step: float = 0.05) -> Tensor:
    """RMS change of the picture per RMS change of the latent along a direction, by central differences.

    rms(D(z + s d) - D(z - s d)) / (2 s rms(d)), picture units per latent unit, 0 or more. In standardised coordinates
    the latent's unit is its standard deviation.
    """
    change = decode(z + step * direction) - decode(z - step * direction)
    return rms(change) / (2 * step * rms(direction))


def lipschitz(decode: Map, z: Tensor, draw: PictureRNG, iterations: int = 10, step: float = 0.01) -> Tensor:
    """Largest singular value of the decoder's Jacobian at z, |dx| / |dz| in Euclidean norms, by power iteration.

    A lower bound that rises to the local Lipschitz constant. J v is a central difference, J^T u a backward pass.

    Raises:
        UmmError: the decoder lets no gradients through.
    """
    v = unit(draw.randn(*z.shape[1:]).to(z))
    size = step * z[0].numel() ** 0.5  # a step of RMS `step`
    for _ in range(iterations):
        with torch.no_grad():
            u = (decode(z + size * v) - decode(z - size * v)) / (2 * size)
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            out = decode(at)
            if not out.requires_grad:
                raise UmmError("the decoder lets no gradients through, so its Lipschitz constant cannot be measured.")
            (v,) = torch.autograd.grad(out, at, u)
        v = unit(v)
    with torch.no_grad():
        return ((decode(z + size * v) - decode(z - size * v)) / (2 * size)).flatten(1).norm(dim=1)


def unit(x: Tensor) -> Tensor:
    """Each of (B, ...) divided by its Euclidean norm."""
    return F.normalize(x.flatten(1), dim=1).view_as(x)


# --------------------------------------------------------------------------------------------------- interpolations


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The straight line."""
    return a + t * (b - a)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The great circle, each latent one vector, its length interpolated linearly; RMS stays that of latents."""
    first, second = unit(a), unit(b)
    angle = (first * second).flatten(1).sum(1).clamp(-1 + 1e-6, 1 - 1e-6).acos().view(-1, 1, 1, 1)
    direction = (((1 - t) * angle).sin() * first + (t * angle).sin() * second) / angle.sin()
    lengths = [x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b)]
    return direction * lerp(*lengths, t)


def path_numbers(features: Tensor) -> dict[str, Tensor]:
    """Of unit-normalised features f_0 .. f_S along interpolations, (B, S + 1, d):

    path_length     S sum |f_{s+1} - f_s|^2, perceptual path length with steps of 1 / S (StyleGAN, 1812.04948, eq. 4)
    path_stretch    sum |f_{s+1} - f_s| / |f_S - f_0|, 1 a straight line
    path_curvature  mean angle between successive steps, degrees, 0 .. 180 (Henaff et al. 2019)
    """
    f = F.normalize(features.double(), dim=-1)
    steps = f.diff(dim=1)  # (B, S, d)
    lengths = steps.norm(dim=2)
    cosine = F.cosine_similarity(steps[:, 1:], steps[:, :-1], dim=2).clamp(-1, 1)
    return {
        "path_length": steps.shape[1] * lengths.square().sum(1),
        "path_stretch": lengths.sum(1) / (f[:, -1] - f[:, 0]).norm(dim=1).clamp_min(1e-12),
        "path_curvature": cosine.acos().rad2deg().mean(1),
    }
