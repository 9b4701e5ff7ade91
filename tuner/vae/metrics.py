"""What models are scored by. Imports nothing, so that whoever only reads names and numbers waits for nothing."""

from dataclasses import dataclass


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
    "distortion": Metric("minimize", "nats/image", "-log p(x|z); a Gaussian decoder's variance is fitted"),
    "nll": Metric(
        "minimize", "nats/image", "importance-weighted bound on -log p(x), Bernoulli decoder, the trial's prior", True
    ),
    "mse": Metric("minimize", "per pixel", "mean squared error of reconstructions of held-out images"),
    "active_units": Metric("maximize", "units", "latents whose mean varies by more than 0.01 over images"),
    "sharpness": Metric(
        "maximize", "ratio", "variance of the Laplacian, samples over real images; 1 is as sharp, less is blurred"
    ),
    "loss": Metric("minimize", "mixed", "the training loss; refused while a weight inside it is searched"),
}
# Of a finished model alone, on the test split.
FINAL_METRICS = {
    "recall": Metric("maximize", "ratio", "share of test images near a sample, over that of as many training images"),
    "coverage": Metric("maximize", "ratio", "share of test images with a sample near, over that of training images"),
    "copied": Metric("minimize", "share", "samples closer to a training image than its own nearest; less test's share"),
    "knn_accuracy": Metric(
        "maximize", "share", "test images whose 5 nearest training latents vote for their class, where there are labels"
    ),
}
# All that the test split is told by.
TEST_METRICS = {
    "gap_closed": Metric("maximize", "share", "1 is as good as real images, 0 as the classic settings"),
    **METRICS,
    **FINAL_METRICS,
}


def gap_closed(distance: float, floor: float, baseline: float) -> float:
    """1 - (distance - floor) / (baseline - floor): 0 is the baseline, 1 is as good as real images."""
    return 1 - (distance - floor) / (baseline - floor)
