"""The scores: what a fitted model is measured by, none of which contains a parameter that is searched.

Axes: N images, D features, Z latent.
"""

import math
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from tuner.vae.data import Split, as_floats, spread
from tuner.vae.distance import Moments, frechet_distance, kernel_distance, moments
from tuner.vae.extractor import FeatureExtractor
from tuner.vae.fitted import BATCH, FittedModel, as_seen, encode, shuffled, tempered
from tuner.vae.iwae import importance_weighted_bound
from tuner.vae.losses import Diverged, bernoulli_nll, calibrated_distortion, kl_divergence, squared_error
from tuner.vae.prior import standard_normal
from tuner.vae.resampling import distances, resampled
from tuner.vae.seeds import Scoring, Stream, derive_seed, generator

NLL_IMAGES, NLL_SAMPLES = 500, 64
KERNEL_IMAGES = 1_000  # the kernel distance is unbiased: fewer images cost noise, not truth
FLOOR_IMAGES = 10_000  # real images beside 2,500 quasi-random samples: either stands for about as many independent ones
ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, section 5.2


def laplacian_variance(images: Tensor) -> float:
    """High-frequency energy of images (N, C, H, W): the variance of their Laplacian, Pech-Pacheco et al. 2000.

    It rises with sharpness. Borders, where neighbours are missing, are left out.
    """
    middle, rows, columns = images[..., 1:-1, 1:-1], images[..., 1:-1], images[..., 1:-1, :]
    around = rows[..., :-2, :] + rows[..., 2:, :] + columns[..., :-2] + columns[..., 2:]
    return (around - 4 * middle).double().var(correction=0).item()


class Scorer:
    """Scores fitted models against one held-out split in the features of one extractor.

    `count` samples are drawn for a score, and as many real training images make the floor, or all of them where there
    are fewer. A model has the noise of the images that it learned from, as the floor has that of the images that it is
    made of; only as many samples as these would add their own to it, and images drawn anew from 997 training images
    would be no nearer than 0.97 of the gap closed. Noise depends on `seed` alone: all models face the same draw.

    To compare models with each other, `quasi_random` draws samples that vary a fifth as much (`sample_quasi_random`),
    as many as there are training images at most. They have less of the bias, too, so that `FLOOR_IMAGES` images make
    the floor; to compare a model with real images, samples have to be independent as these are.

    All is done where these images are; models to score and replicates are on the CPU.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        train: Split,
        held_out: Split,
        *,
        seed: int,
        count: int,
        quasi_random: bool = False,
    ):
        self.train, self.device, self.seed, self.quasi_random = train, train.images.device, seed, quasi_random
        self.extractor, self.count = extractor.on(self.device), min(count, len(train)) if quasi_random else count
        self.images = as_floats(held_out.images[: self.count])
        everything = as_floats(held_out.images)
        features = self.features = self.extractor.features(everything)
        self.moments = moments(features)
        self.kernel_scale = features.square().mean().sqrt()  # the cubic kernel is not free of scale
        self.kernel_features = spread(features, KERNEL_IMAGES) / self.kernel_scale
        self.sharpness = laplacian_variance(everything)

    @cached_property
    def floor_features(self) -> Tensor:
        """Of real training images."""
        real = max(self.count, FLOOR_IMAGES) if self.quasi_random else self.count
        return self.extractor.features(as_floats(self.train.images[shuffled(len(self.train), self.seed)[-real:]]))

    @cached_property
    def floor(self) -> float:
        """The Frechet distance of real training images."""
        return frechet_distance(self.moments, moments(self.floor_features)).item()

    @cached_property
    def floor_replicates(self) -> Tensor:
        """The floor of parts of both sets of images (R,), for its standard error."""
        return distances(self._resampled, resampled(self.floor_features.cpu(), self._seed(Scoring.TRAINING_PARTS)))

    @cached_property
    def _resampled(self) -> Moments:
        return resampled(self.features.cpu(), self._seed(Scoring.HELD_OUT_PARTS))

    def _seed(self, purpose: Scoring) -> int:
        return derive_seed(self.seed, Stream.SCORE, purpose)

    def _generator(self, purpose: Scoring) -> torch.Generator:
        return generator(self.seed, Stream.SCORE, purpose)

    def distance(self, images: Tensor) -> float:
        """Frechet distance between images (N, C, H, W) in [0, 1] and the held-out split."""
        return frechet_distance(self.moments, moments(self.extractor.features(images))).item()

    def measure(self, fitted: FittedModel) -> tuple[dict[str, float], Tensor]:
        """What a call gives, and the Frechet distances of parts (R,), for its standard error.

        Parts are of the held-out images, the same for all models, and of independent samples; quasi-random ones vary
        too little to count. Raises Diverged.
        """
        scores, features = self._score(fitted)
        features = features.cpu()  # halves are many small matrices
        drawn = moments(features) if self.quasi_random else resampled(features, self._seed(Scoring.SAMPLE_PARTS))
        return scores, distances(self._resampled, drawn)

    def samples(self, fitted: FittedModel, count: int) -> Tensor:
        """`count` images (count, C, H, W) drawn from the fitted prior."""
        if self.quasi_random:
            seed = derive_seed(self.seed, Stream.SCORE, Scoring.SAMPLES)
            return fitted.draw(fitted.prior.sample_quasi_random(count, seed))
        return fitted.draw(fitted.prior.sample(count, self._generator(Scoring.SAMPLES)))

    def __call__(self, fitted: FittedModel) -> dict[str, float]:
        """Every metric of `METRICS` but the training loss. Raises Diverged when one is not finite."""
        return self._score(fitted)[0]

    @torch.no_grad()
    def _score(self, fitted: FittedModel) -> tuple[dict[str, float], Tensor]:
        """The scores, and the features of the samples."""
        fitted = fitted.to(self.device)
        model, parameters = fitted.model.eval(), fitted.parameters
        scores: dict[str, float] = {}

        images = as_seen(self.images, parameters, self.seed)
        latents, log_variance = means, _ = encode(model, images)
        if log_variance is not None:
            noise = torch.randn(latents.shape, generator=self._generator(Scoring.RECONSTRUCTION)).to(latents.device)
            latents = latents + torch.exp(0.5 * log_variance) * noise
        logits = torch.cat([model.decode(batch) for batch in latents.split(BATCH)])
        pixels = images[0].numel()
        scores["mse"] = squared_error(logits, images).double().mean().item() / pixels
        if parameters.likelihood == "gaussian":
            scores["distortion"] = calibrated_distortion(scores["mse"], pixels)
        else:
            scores["distortion"] = bernoulli_nll(logits, images).double().mean().item()
        if log_variance is not None:
            scores["rate"] = kl_divergence(means, log_variance).double().mean().item()
            scores["calibrated_nll"] = scores["rate"] + scores["distortion"]
            if parameters.likelihood == "bernoulli":
                few, noise_source = spread(images, NLL_IMAGES), self._generator(Scoring.LIKELIHOOD)
                bounds = importance_weighted_bound(model, fitted.prior, few, NLL_SAMPLES, noise_source)
                scores["nll"] = -bounds.mean().item()
        scores["active_units"] = float((means.var(0) > ACTIVE_VARIANCE).sum())
        require_finite(scores)
        scores["frechet_distance_reconstruction"] = self.distance(tempered(logits, fitted.temperature))

        drawn = self.samples(fitted, self.count)
        found = features = self.extractor.features(drawn)
        scores["frechet_distance"] = frechet_distance(self.moments, moments(features)).item()
        scores["kernel_distance"] = kernel_distance(features[:KERNEL_IMAGES] / self.kernel_scale, self.kernel_features)
        scores["sharpness"] = laplacian_variance(drawn) / self.sharpness
        if parameters.prior != "standard_normal":
            plain = replace(fitted, prior=standard_normal(model.latent_dim).to(self.device))
            features = self.extractor.features(self.samples(plain, self.count))
        scores["frechet_distance_standard_normal"] = frechet_distance(self.moments, moments(features)).item()
        require_finite(scores)
        return scores, found


def require_finite(scores: dict[str, float]) -> None:
    """Raises Diverged, naming a score that is not finite."""
    for name, value in scores.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is not finite")
