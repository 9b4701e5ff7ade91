"""A spec file of every section, for tests of what reads it."""

from pathlib import Path

SEARCH = """
data: {name: digits}
space:
  latent_dim: {type: int, low: 4, high: 32, log: true}
  learning_rate: {type: float, low: 0.0003, high: 0.01, log: true}
  kl_weight: {type: float, low: 0.01, high: 3, log: true}
fixed: {batch_size: 32, prior: gaussian_mixture, prior_components: 10}
objective: frechet_distance
budget: {trials: 24, max_epochs: 18, grace_epochs: 2, reduction_factor: 3}
retrain: {epochs: 50, priors: [{prior: gaussian_mixture, prior_components: 5}]}
seed: 0
"""


def written(directory: Path, text: str, name: str = "some.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path
