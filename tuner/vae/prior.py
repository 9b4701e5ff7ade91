"""Where sampled latents come from: N(0, I), or a Gaussian mixture fitted on encoded training images.

Fitting a density to the codes after training is ex-post density estimation (Ghosh et al. 2020, section 4).
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prior:
    """A mixture of K Gaussians over Z latents: weights (K,), means (K, Z), covariances (K, Z, Z), float32."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, Z), each drawn independently: no sorting by component."""
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.place(noise, torch.rand(count, generator=generator))

    def place(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """Turn standard normal noise (B, >= Z) and uniform numbers (B,) in [0, 1) into samples (B, Z).

        The uniform number picks the component, the first Z columns of noise the place in it: models of
        different latent sizes that are given the same draw can be compared image by image.
        """
        edges = self.weights.double().cumsum(0)
        component = torch.searchsorted(edges / edges[-1], uniform.double(), right=True).clamp(max=len(edges) - 1)
        factors = torch.linalg.cholesky(self.covariances.double()).float()
        noise = noise[:, : self.means.shape[1]]
        return self.means[component] + torch.einsum("bij,bj->bi", factors[component], noise)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weights": self.weights, "means": self.means, "covariances": self.covariances}


def standard_normal(latent_dim: int) -> Prior:
    """N(0, I) as a mixture of one."""
    return Prior(torch.ones(1), torch.zeros(1, latent_dim), torch.eye(latent_dim).unsqueeze(0))


def fit_mixture(latents: Tensor, components: int, seed: int) -> Prior:
    """Fit a full-covariance mixture by EM on latents (N, Z); at most one component for every Z + 1 latents.

    Raises ValueError where the latents are not finite or collapse onto a point.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    points = latents.double().numpy()
    spread = float(points.std(0).max()) if np.isfinite(points).all() else 0.0
    if not spread > 0:
        raise ValueError("the encoded training images are not finite or all the same")
    components = max(1, min(components, len(points) // (points.shape[1] + 1)))
    mixture = GaussianMixture(
        components,
        reg_covar=1e-6 * spread**2 + 1e-12,
        tol=1e-2,
        max_iter=50,
        init_params="k-means++",
        random_state=seed % 2**32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 50 rounds of EM are the method, not an accident
        mixture.fit(points)
    weights, means, covariances = mixture.weights_, mixture.means_, mixture.covariances_
    return Prior(*(torch.from_numpy(np.asarray(a)).float() for a in (weights, means, covariances)))
