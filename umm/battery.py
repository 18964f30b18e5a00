"""The diagnostics of a latent space as one set of numbers: each with its coordinates, interval, count and direction.

n pictures, z (n, C, h, w). Coordinates: `raw`, the encoder's own units, or `standardised`, what a generator sees.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umm import diagnostics as cloud
from umm import neighbourhoods as near
from umm import responses
from umm.latents.base import LatentSpace
from umm.metrics._features import FeatureSpace
from umm.metrics.psnr import psnr
from umm.rng import PictureRNG, derive_seed
from umm.stats import bootstrap
from umm.transforms import to_uint8

GROUPS = 10  # parts left out in turn by the jackknife
NOISES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)  # latent standard deviations
STEPS = 8  # of an interpolation
SMALL = 384  # width of DiT-S
STEEP = 8  # pictures whose Lipschitz constant is found
# question -> {number: is a higher value reported to go with better generation? None: not known, or a matter of taste}
QUESTIONS = {
    "How many dimensions carry the pictures?": {
        "channels": None,
        "effective_rank": True,
        "participation_ratio": True,
        "r90": True,
        "decay_exponent": False,
        "path_condition": False,
        f"width_floor@{SMALL}": False,
        "intrinsic_dimension": None,
    },
    "Is it sparse or heavy-tailed?": {
        "hoyer": False,
        "kurtosis": False,
        "kurtosis_95th": False,
        "outlier_channels": False,
        "top6_share": False,
        "mean_power": False,
        "norm_spread": False,
        "token_outliers": False,
    },
    "Is it rough?": {
        "high_frequency": False,
        "spectral_slope": None,
        "self_similarity": True,
        "jitter": False,
        "shift": False,
        "flip": False,
        "turn": False,
        "zoom": False,
    },
    "Does it keep meaning?": {
        "label_purity": True,
        "mutual_neighbours": True,
        "uniformity": False,
        "alignment": False,
    },
    "What does the decoder make of errors?": {
        "psnr": None,
        "psnr_loss@0.1": False,
        "psnr_loss@0.4": False,
        "feature_change@0.1": False,
        "feature_change@0.4": False,
        "gain_random": False,
        "gain_principal": None,
        "gain_tail": False,
        "lipschitz": False,
        "lerp_length": False,
        "lerp_stretch": False,
        "lerp_curvature": False,
        "slerp_length": False,
        "slerp_stretch": False,
        "slerp_curvature": False,
        "crossfade_curvature": None,
    },
}
BETTER = {name: better for rows in QUESTIONS.values() for name, better in rows.items()}


class Battery:
    """Collects `numbers` (dictionaries), `curves` for plots (lists by name) and `notes` (sentences).

    Args:
        seed: of bootstrap, noise and directions.
        resamples: of the bootstrap.
    """

    def __init__(self, seed: int, resamples: int = 1000):
        self.seed, self.resamples = seed, resamples
        self.numbers: list[dict] = []
        self.curves: dict[str, list[float]] = {}
        self.notes: list[str] = []

    # ------------------------------------------------------------------------------------------------- collecting

    def plain(self, metric: str, coordinates: str, value: float, n: int) -> None:
        row = {"metric": metric, "coordinates": coordinates, "value": float(value), "n": n}
        self.numbers.append(row | {"higher_is_better": BETTER[metric]})

    def each(self, metric: str, coordinates: str, values: Tensor) -> None:
        """The mean of values per picture with its bootstrap interval; NaN is left out."""
        found = values[~values.isnan()].cpu().numpy()
        if len(found) < 2:
            self.notes.append(f"{metric} is left out: {len(found)} of {len(values)} pictures have it.")
            return
        draw = np.random.default_rng(derive_seed(self.seed, "bootstrap", metric, coordinates))
        interval = bootstrap(found, draw, self.resamples)
        self.plain(metric, coordinates, interval.value, len(found))
        self.numbers[-1] |= {"low": interval.low, "high": interval.high}

    def whole(self, metric: str, coordinates: str, values: Tensor, n: int) -> None:
        """A statistic of the set, (G,), with its jackknife interval."""
        interval = cloud.jackknife(values.cpu(), n)
        self.plain(metric, coordinates, interval.value, n)
        self.numbers[-1] |= {"low": interval.low, "high": interval.high}

    # ------------------------------------------------------------------------------------------------ latents alone

    def latents(self, z: Tensor, coordinates: str) -> None:
        """Spectrum, channels and layout in space."""
        self.spectrum(z, coordinates)
        self.channels(z, coordinates)
        self.space(z, coordinates)

    def spectrum(self, z: Tensor, coordinates: str) -> None:
        lam = cloud.eigenvalues(cloud.covariances(z, GROUPS))  # (G, C)
        self.plain("channels", coordinates, z.shape[1], len(z))
        self.whole("effective_rank", coordinates, cloud.effective_rank(lam), len(z))
        self.whole("participation_ratio", coordinates, cloud.participation_ratio(lam), len(z))
        self.whole("r90", coordinates, cloud.components_for(lam), len(z))
        self.whole("decay_exponent", coordinates, cloud.decay_exponent(lam), len(z))
        if coordinates == "standardised":
            self.whole(f"width_floor@{SMALL}", coordinates, cloud.width_floor(lam, SMALL), len(z))
            self.whole("path_condition", coordinates, cloud.path_condition(lam), len(z))
        self.curves[f"eigenvalues {coordinates}"] = (lam[0] / lam[0].sum()).tolist()

    def channels(self, z: Tensor, coordinates: str) -> None:
        mean, var, fourth = cloud.moments(z, GROUPS)  # (G, C)
        kurtosis = cloud.excess_kurtosis(var, fourth)
        norms = cloud.token_norms(z)
        self.each("hoyer", coordinates, cloud.hoyer(z))
        self.whole("kurtosis", coordinates, kurtosis.abs().nanmedian(-1).values, len(z))
        self.whole("kurtosis_95th", coordinates, kurtosis.nanquantile(0.95, -1), len(z))
        self.whole("outlier_channels", coordinates, cloud.outlier_channels(var), len(z))
        self.whole("top6_share", coordinates, cloud.top_share(var), len(z))
        self.whole("mean_power", coordinates, cloud.mean_power(mean, var), len(z))
        self.plain("norm_spread", coordinates, norms.std() / norms.mean(), len(z))
        self.each("token_outliers", coordinates, cloud.token_outliers(norms))
        relative = var[0] / var[0].median()
        self.curves[f"channel variance {coordinates}"] = relative.sort(descending=True).values.tolist()
        self.curves[f"kurtosis {coordinates}"] = kurtosis[0].nan_to_num().sort(descending=True).values.tolist()

    def space(self, z: Tensor, coordinates: str) -> None:
        power = cloud.power_spectrum(z)  # (n, h, w)
        profile, pairs = cloud.cosine_by_distance(z)
        self.each("high_frequency", coordinates, cloud.high_frequency(power))
        self.each("spectral_slope", coordinates, cloud.spectral_slope(power))
        self.each("self_similarity", coordinates, cloud.self_similarity(profile, pairs))
        self.curves[f"cosine {coordinates}"] = profile.mean(0).tolist()
        diagonal = power.mean(0).diagonal()
        self.curves[f"power {coordinates}"] = (diagonal / power.mean()).tolist()

    # ------------------------------------------------------------------------------------------------------ meaning

    def meaning(self, z: Tensor, labels: Tensor | None, features: Tensor, k: int) -> None:
        """Mean tokens of standardised z: labels (n,), neighbours in another feature space (n, d), evenness.

        The intrinsic dimension is that of whole latents.
        """
        pooled = z.double().mean((2, 3))  # (n, C)
        ours = near.neighbours(pooled, k)
        if labels is not None:
            self.each("label_purity", "standardised", near.label_purity(ours, labels))
            self.each("alignment", "standardised", near.alignment(pooled, labels))
        self.each("mutual_neighbours", "standardised", near.mutual_neighbours(ours, near.neighbours(features, k)))
        self.each("uniformity", "standardised", near.closeness(pooled))
        row = self.numbers[-1]  # the logarithm of a mean: its interval follows
        row |= {key: float(np.log(max(row[key], 1e-300))) for key in ("value", "low", "high")}
        self.plain("intrinsic_dimension", "standardised", near.two_nn(z.flatten(1)), len(z))

    # --------------------------------------------------------------------------------------------- encoder, decoder

    def encoder(self, space: LatentSpace, images: Tensor, batch: int) -> None:
        """What moving a picture (B, 3, S, S) does to its latent."""
        encode = split(space.raw, batch)
        for name, (on_picture, on_latent) in responses.moves(space.spec.patch).items():
            error = responses.equivariance_error(encode, images, on_picture, on_latent)
            self.each(name, "raw, channels scaled", error)

    def decoder(self, decode: Callable[[Tensor], Tensor], z: Tensor, images: Tensor, judge: FeatureSpace) -> None:
        """What errors in standardised latents (B, C, h, w) do to their pictures; `judge` is a space of its own."""
        self.noise(decode, z, images, judge)
        self.gains(decode, z)
        self.interpolations(decode, z, images, judge)

    def draw(self, what: str, z: Tensor) -> PictureRNG:
        return PictureRNG(range(len(z)), self.seed, what, device=z.device)

    def noise(self, decode: Callable[[Tensor], Tensor], z: Tensor, images: Tensor, judge: FeatureSpace) -> None:
        noise = self.draw("diagnose noise", z).randn(*z.shape[1:])
        pictures = [decode(z + sigma * noise).clamp(0, 1) for sigma in NOISES]
        quality = [psnr(to_uint8(images), to_uint8(picture)) for picture in pictures]
        seen = [F.normalize(judge.extract(picture).double(), dim=1) for picture in pictures]
        self.each("psnr", "standardised", quality[0])
        for sigma in (0.1, 0.4):
            at = NOISES.index(sigma)
            self.each(f"psnr_loss@{sigma}", "standardised", quality[0] - quality[at])
            self.each(f"feature_change@{sigma}", "standardised", (seen[at] - seen[0]).square().sum(1))
        self.curves["noise"] = list(NOISES)
        self.curves["psnr"] = [float(values.mean()) for values in quality]

    def gains(self, decode: Callable[[Tensor], Tensor], z: Tensor) -> None:
        lam, vectors = torch.linalg.eigh(cloud.covariances(z)[0])
        lam, vectors = lam.flip(0).clamp_min(0), vectors.flip(1)  # (C,), (C, C)
        half, most = (int(cloud.components_for(lam, share)) for share in (0.5, 0.9))
        spans = {"gain_random": vectors, "gain_principal": vectors[:, :half], "gain_tail": vectors[:, most:]}
        for name, basis in spans.items():
            if basis.shape[1]:
                direction = responses.span_noise(basis, self.draw(name, z), z.shape[1:])
                self.each(name, "standardised", responses.gain(decode, z, direction))
        few = z[:STEEP]
        self.each("lipschitz", "standardised", responses.lipschitz(decode, few, self.draw("lipschitz", few)))

    def interpolations(self, decode, z: Tensor, images: Tensor, judge: FeatureSpace) -> None:
        half = len(z) // 2
        first, second = z[:half], z[half : 2 * half]
        times = [step / STEPS for step in range(STEPS + 1)]
        paths = {
            "lerp": [decode(responses.lerp(first, second, t)) for t in times],
            "slerp": [decode(responses.slerp(first, second, t)) for t in times],
            "crossfade": [responses.lerp(images[:half], images[half : 2 * half], t) for t in times],
        }
        for name, pictures in paths.items():
            features = torch.stack([judge.extract(picture.clamp(0, 1)) for picture in pictures], 1)  # (B, S + 1, d)
            for number, values in responses.path_numbers(features).items():
                metric = number.replace("path", name)
                if metric in BETTER:
                    self.each(metric, "standardised", values)


def split(function: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    """The same function, so many rows at a time."""
    return lambda x: torch.cat([function(part) for part in x.split(size)])
