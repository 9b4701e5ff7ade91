"""The yardsticks: what a model is scored by, none of which contains a parameter that is searched.

Axes: N images, D features of the extractor, Z latent.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tuner.vae.data import Split, binarize, pixels
from tuner.vae.distance import frechet_distance, kernel_distance, moments
from tuner.vae.extractor import FeatureExtractor
from tuner.vae.iwae import importance_weighted_bound
from tuner.vae.losses import PIXELS, bernoulli_nll, calibrated_distortion, kl_divergence, squared_error
from tuner.vae.model import VAE
from tuner.vae.moment_matching import match
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior, fit_flow, fit_mixture, standard_normal
from tuner.vae.train import Diverged, Stream, derive_seed

BATCH = 100  # a decoder's activations at this size stay in the cache
NLL_IMAGES, NLL_SAMPLES = 500, 64
KERNEL_IMAGES = 1_000  # the kernel distance is unbiased: fewer images cost noise, not truth
FLOOR_IMAGES = 10_000  # real images beside 2,500 samples drawn evenly: either stands for about as many independent ones
GREY = 0.1  # pixels above this and below 1 minus it
CONTRAST_IMAGES = 1_000
ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, section 5.2


@dataclass(frozen=True)
class Metric:
    """One score: which way is better, its unit and what it says."""

    direction: str  # minimize | maximize
    unit: str
    meaning: str
    needs_vae: bool = False  # a plain autoencoder has no rate


METRICS = {
    "frechet_distance": Metric("minimize", "feature units", "samples from the trial's prior against held-out images"),
    "frechet_distance_standard_normal": Metric("minimize", "feature units", "the same for samples from N(0, I)"),
    "frechet_distance_reconstruction": Metric("minimize", "feature units", "reconstructions against held-out images"),
    "kernel_distance": Metric("minimize", "unitless", "unbiased squared MMD, cubic kernel, samples against held-out"),
    "calibrated_nll": Metric("minimize", "nats/image", "rate + distortion, the decoder's variance fitted", True),
    "rate": Metric("minimize", "nats/image", "KL to N(0, I)", True),
    "distortion": Metric("minimize", "nats/image", "-log p(x|z), the decoder's variance fitted"),
    "nll": Metric(
        "minimize", "nats/image", "importance-weighted bound on -log p(x), Bernoulli decoder, the trial's prior", True
    ),
    "mse": Metric("minimize", "1/pixel", "mean squared error of reconstructions of held-out images"),
    "active_units": Metric("maximize", "units", "latents whose mean varies by more than 0.01 over images"),
    "sharpness": Metric("minimize", "ratio", "share of grey pixels (0.1 to 0.9), samples over real; 1 is as sharp"),
    "loss": Metric("minimize", "mixed", "the training loss; refused while a weight inside it is searched"),
}


# Of a finished model alone, on the test split.
FINAL_METRICS = {
    "recall": Metric("maximize", "ratio", "share of test images near a sample, over that of as many training images"),
    "coverage": Metric("maximize", "ratio", "share of test images with a sample near, over that of training images"),
    "copied": Metric("minimize", "share", "samples closer to a training image than its own nearest; less test's share"),
    "knn_accuracy": Metric("maximize", "share", "test images whose 5 nearest training latents vote for their class"),
}


def gap_closed(distance: float, floor: float, baseline: float) -> float:
    """1 - (distance - floor) / (baseline - floor): 0 is the baseline, 1 is as good as real data."""
    return 1 - (distance - floor) / (baseline - floor)


def grey_share(images: Tensor) -> float:
    """Share of pixels in (0.1, 0.9) of images in [0, 1]."""
    return ((images > GREY) & (images < 1 - GREY)).double().mean().item()


def matching_contrast(logits: Tensor, share: float) -> float:
    """The factor on logits at which a `share` of their pixels is grey; infinite where none may be.

    sigmoid(factor * logit) is grey where |factor * logit| < ln 9, so the factor is ln 9 over a quantile of |logit|.
    """
    edge = float(np.quantile(logits.abs().numpy(), share))
    return math.log((1 - GREY) / GREY) / edge if edge else math.inf


class Scorer:
    """Scores models against one held-out split with one extractor.

    `count` samples are drawn for a score, and as many real training images make the floor, so that both
    carry the same small-sample bias; a mixture is fitted on the codes of `prior_count` training images.
    Noise depends on `seed` alone: all models face the same draw.

    To compare models with each other, `quasi_random` draws samples that vary a fifth as much (`sample_quasi_random`).
    They have less of the bias, too, so that `FLOOR_IMAGES` images make the floor; to compare a model with real
    images, samples have to be independent as these are.

    A `guide` is an extractor that matched mixtures are fitted by, beside the model's own encoder; it must not be the
    one that scores them.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        train: Split,
        held_out: Split,
        *,
        seed: int,
        count: int,
        prior_count: int,
        quasi_random: bool = False,
        guide: FeatureExtractor | None = None,
    ):
        self.extractor = extractor
        self.guide = guide
        self.seed = seed
        self.quasi_random = quasi_random
        self.count = min(count, len(train))
        order = torch.randperm(len(train), generator=self._generator(0))
        self.prior_images = pixels(train.images[order[:prior_count]])
        self.images = pixels(held_out.images[: self.count])
        features = extractor.features(pixels(held_out.images))
        self.moments = moments(features)
        self.kernel_scale = features.square().mean().sqrt()  # the cubic kernel is not free of scale
        apart = max(1, len(features) // KERNEL_IMAGES)  # MNIST's test images are in an order: the first are the easiest
        self.kernel_features = features[::apart][:KERNEL_IMAGES] / self.kernel_scale
        self.grey = grey_share(pixels(held_out.images))
        real = max(self.count, FLOOR_IMAGES) if quasi_random else self.count
        self.floor = self.distance(pixels(train.images[order[-real:]]))

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, Stream.SCORE, purpose))

    @cached_property
    def training_grey(self) -> float:
        return grey_share(self.prior_images)

    def _seen(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Images as the model takes them: binary ones are one draw, the same for all models."""
        if parameters.pixels == "grey":
            return images
        return pixels(binarize((255 * images).round().to(torch.uint8), self._generator(7)))

    def distance(self, images: Tensor) -> float:
        """Frechet distance between images (N, 1, 28, 28) in [0, 1] and the held-out split."""
        return frechet_distance(self.moments, moments(self.extractor.features(images))).item()

    @torch.no_grad()
    def fit(self, model: VAE, parameters: Parameters) -> Prior:
        """Fit what `parameters` want fitted after training: the prior, which is returned, and the model's contrast.

        Raises Diverged where codes or contrast are not finite or all codes the same.
        """
        model.eval()
        model.contrast.fill_(1)
        prior = standard_normal(parameters.latent_dim)
        if parameters.prior != "standard_normal":
            means, log_variance = encode(model, self._seen(self.prior_images, parameters))
            deviations = torch.zeros_like(means) if log_variance is None else torch.exp(0.5 * log_variance)
            latents = means + deviations * torch.randn(means.shape, generator=self._generator(1))
            seed, components = derive_seed(self.seed, Stream.SCORE, 2), parameters.prior_components
            try:
                with torch.enable_grad():
                    if parameters.prior == "flow":
                        prior = fit_flow(means, deviations, components, seed)
                    else:
                        prior = fit_mixture(latents, components, seed)
            except ValueError as error:
                raise Diverged(str(error)) from error
        self._fit_contrast(model, parameters, prior)
        if parameters.prior == "matched_mixture":
            observers = [model.encoder] + ([self.guide.trunk] if self.guide else [])
            with torch.enable_grad():
                prior = match(
                    prior, model, self.prior_images, observers, self.count // 5, derive_seed(self.seed, Stream.SCORE, 8)
                )
            self._fit_contrast(model, parameters, prior)
        return prior

    def _fit_contrast(self, model: VAE, parameters: Parameters, prior: Prior) -> None:
        if parameters.contrast == "matched":
            latents = prior.sample(CONTRAST_IMAGES, self._generator(5))
            logits = torch.cat([model.decode(batch) for batch in latents.split(BATCH)])
            model.contrast.fill_(matching_contrast(logits, self.training_grey))
            _require_finite({"contrast": model.contrast.item()})

    @torch.no_grad()
    def samples(self, model: VAE, prior: Prior, count: int) -> Tensor:
        """`count` images (count, 1, 28, 28) drawn from `prior`."""
        model.eval()
        if self.quasi_random:
            latents = prior.sample_quasi_random(count, derive_seed(self.seed, Stream.SCORE, 3))
        else:
            latents = prior.sample(count, self._generator(3))
        return torch.cat([model.draw(batch) for batch in latents.split(BATCH)])

    @torch.no_grad()
    def __call__(self, model: VAE, parameters: Parameters, prior: Prior) -> dict[str, float]:
        """Every metric of `METRICS` but the training loss. Raises Diverged when one is not finite."""
        model.eval()
        scores: dict[str, float] = {}

        images = self._seen(self.images, parameters)
        latents, log_variance = means, _ = encode(model, images)
        if log_variance is not None:
            noise = torch.randn(latents.shape, generator=self._generator(4))
            latents = latents + torch.exp(0.5 * log_variance) * noise
        logits = torch.cat([model.decode(batch) for batch in latents.split(BATCH)])
        scores["mse"] = squared_error(logits, images).double().mean().item() / PIXELS
        if parameters.likelihood == "gaussian":
            scores["distortion"] = calibrated_distortion(scores["mse"])
        else:
            scores["distortion"] = bernoulli_nll(logits, images).double().mean().item()
        if log_variance is not None:
            scores["rate"] = kl_divergence(means, log_variance).double().mean().item()
            scores["calibrated_nll"] = scores["rate"] + scores["distortion"]
            if parameters.likelihood == "bernoulli":
                few, generator = images[:NLL_IMAGES], self._generator(6)
                bounds = importance_weighted_bound(model, prior, few, NLL_SAMPLES, generator)
                scores["nll"] = -bounds.mean().item()
        scores["active_units"] = float((means.var(0) > ACTIVE_VARIANCE).sum())
        _require_finite(scores)
        scores["frechet_distance_reconstruction"] = self.distance(torch.sigmoid(model.contrast * logits))

        images = self.samples(model, prior, self.count)
        features = self.extractor.features(images)
        scores["frechet_distance"] = frechet_distance(self.moments, moments(features)).item()
        scores["kernel_distance"] = kernel_distance(features[:KERNEL_IMAGES] / self.kernel_scale, self.kernel_features)
        scores["sharpness"] = grey_share(images) / self.grey
        if parameters.prior != "standard_normal":
            images = self.samples(model, standard_normal(parameters.latent_dim), self.count)
            features = self.extractor.features(images)
        scores["frechet_distance_standard_normal"] = frechet_distance(self.moments, moments(features)).item()
        _require_finite(scores)
        return scores


@torch.no_grad()
def encode(model: VAE, images: Tensor) -> tuple[Tensor, Tensor | None]:
    parts = [model.encode(batch) for batch in images.split(BATCH)]
    means = torch.cat([mean for mean, _ in parts])
    if not model.variational:
        return means, None
    return means, torch.cat([log_variance for _, log_variance in parts if log_variance is not None])


def _require_finite(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is not finite")
