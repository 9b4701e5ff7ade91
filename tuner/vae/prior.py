"""Where sampled latents come from: N(0, I), or a density fitted on encoded training images.

Fitting it after training is ex-post density estimation (Ghosh et al. 2020, section 4). It is a Gaussian mixture, or one
that a flow bends.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.quasirandom import SobolEngine

from tuner.vae.flow import Flow

ROUNDS, TOLERANCE = 50, 1e-3  # of EM at most; nats a point, below which a round gains too little
CHUNK = 4_000_000  # numbers at a time
FLOW = "flow."
FLOW_STEPS, FLOW_BATCH, FLOW_RATE = 4_000, 500, 1e-3


@dataclass(frozen=True)
class Prior:
    """A mixture of K Gaussians over Z latents: weights (K,), means (K, Z), covariances (K, Z, Z), float32.

    With a flow, samples of the mixture pass through it.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    flow: Flow | None = None

    def to(self, device: torch.device) -> "Prior":
        """A copy there."""
        flow = copy.deepcopy(self.flow).to(device) if self.flow else None
        return Prior(self.weights.to(device), self.means.to(device), self.covariances.to(device), flow)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, Z), each drawn independently: no sorting by component."""
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.place(noise, torch.rand(count, generator=generator))

    def sample_quasi_random(self, count: int, seed: int) -> Tensor:
        """(count, Z): each is a sample, and together they cover the prior evenly.

        A statistic of these varies far less from seed to seed than one of independent samples.
        """
        return self.place(*quasi_random_noise(count, self.means.shape[1], seed))

    def place(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """Turn standard normal noise (B, >= Z) and uniform numbers (B,) in [0, 1) into samples (B, Z).

        The uniform number picks the component, the first Z columns of noise the place in it: models of
        different latent sizes that are given the same draw can be compared image by image.
        """
        device = self.means.device
        with torch.no_grad():
            placed: Tensor = Sampler(self)(noise[:, : self.means.shape[1]].to(device), uniform.to(device))
        return placed

    @torch.no_grad()
    def log_density(self, latents: Tensor) -> Tensor:
        """log p(z) in nats: (B, Z) -> (B,), float64."""
        points, logdet = (latents, latents.new_zeros(1)) if self.flow is None else self.flow.inverse(latents)
        weights = Categorical(self.weights.double())
        gaussians = MultivariateNormal(self.means.double(), self.covariances.double(), validate_args=False)
        mixture = MixtureSameFamily(weights, gaussians, validate_args=False)  # a latent of NaN has that density, too
        density: Tensor = mixture.log_prob(points.double())
        return density + logdet.double()

    def state_dict(self) -> dict[str, Tensor]:
        flow = {} if self.flow is None else self.flow.state_dict(prefix=FLOW)
        return {"weights": self.weights, "means": self.means, "covariances": self.covariances} | flow

    @classmethod
    def from_state_dict(cls, saved: dict[str, Tensor]) -> "Prior":
        """Raises KeyError, TypeError or RuntimeError on what is no such mapping."""
        bent = {name.removeprefix(FLOW): tensor for name, tensor in saved.items() if name.startswith(FLOW)}
        flow = None
        if bent:
            flow = Flow(saved["means"].shape[1], len(bent["kept"]), bent["weights.0"].shape[2])
            flow.load_state_dict(bent)
        return cls(**{name: tensor for name, tensor in saved.items() if not name.startswith(FLOW)}, flow=flow)


def quasi_random_noise(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Standard normal noise (count, size) and uniform numbers (count,) from a scrambled Sobol sequence. Owen 1997."""
    points = SobolEngine(1 + size, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    tiny = torch.finfo(torch.float32).eps
    return torch.special.ndtri(points[:, 1:].clamp(tiny, 1 - tiny)).float(), points[:, 0]


class Sampler(nn.Module):
    """A prior as a program: standard normal noise (B, Z) and uniform numbers (B,) in [0, 1) -> latents (B, Z)."""

    edges: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, prior: Prior):
        super().__init__()
        edges = prior.weights.double().cumsum(0)
        self.register_buffer("edges", edges / edges[-1])
        self.register_buffer("means", prior.means)
        self.register_buffer("factors", torch.linalg.cholesky(prior.covariances.double()).float())
        self.flow = prior.flow

    def component(self, uniform: Tensor) -> Tensor:
        """Which Gaussian each of the uniform numbers (B,) in [0, 1) picks: (B,) int64."""
        return (uniform.double().unsqueeze(1) >= self.edges).sum(1).clamp(max=len(self.edges) - 1)

    def forward(self, noise: Tensor, uniform: Tensor) -> Tensor:
        component = self.component(uniform)
        points = self.means[component] + (self.factors[component] @ noise.unsqueeze(2)).squeeze(2)
        latents: Tensor = points if self.flow is None else self.flow(points)
        return latents


def standard_normal(latent_dim: int) -> Prior:
    """N(0, I) as a mixture of one."""
    return Prior(torch.ones(1), torch.zeros(1, latent_dim), torch.eye(latent_dim).unsqueeze(0))


def fit_mixture(latents: Tensor, components: int, seed: int) -> Prior:
    """Fit a full-covariance mixture by EM on latents (N, Z); at most one component for every Z + 1 latents.

    Begins at k-means++ centres (Arthur & Vassilvitskii 2007) with the covariance of all latents. Raises ValueError
    where the latents are not finite or collapse onto a point.
    """
    points = latents.double()
    spread = points.std(0, correction=0).max().item() if bool(torch.isfinite(points).all()) else 0.0
    if not spread > 0:
        raise ValueError("the encoded training images are not finite or all the same")
    components = max(1, min(components, len(points) // (points.shape[1] + 1)))
    centre = points.mean(0)
    points = points - centre  # second moments about the centre lose no digits
    least = least_covariance(points)
    start = Prior(
        points.new_full((components,), 1 / components),
        points[_spread_out(points, components, torch.Generator().manual_seed(seed))],
        (points.T @ points / len(points) + least).expand(components, -1, -1),
    )
    fitted, likelihood = start, -math.inf
    for _ in range(ROUNDS):
        before = likelihood
        fitted, likelihood = expectation_maximization(points, fitted, least)
        if likelihood - before < TOLERANCE:
            break
    return Prior(fitted.weights.float(), (fitted.means + centre).float(), fitted.covariances.float())


def least_covariance(latents: Tensor) -> Tensor:
    """The least covariance (Z, Z) of a component, float64: a millionth of the largest variance of latents (N, Z)."""
    spread = latents.double().std(0, correction=0).max().item()
    return (1e-6 * spread**2 + 1e-12) * torch.eye(latents.shape[1], dtype=torch.float64, device=latents.device)


def expectation_maximization(points: Tensor, mixture: Prior, least: Tensor) -> tuple[Prior, float]:
    """One round of EM on points (N, Z), float64 -> the new mixture, and the mean log-likelihood under the old one.

    Both halves are one matrix product each: a Gaussian's log-density is linear in the point's products (N, Z^2), the
    point and 1, and the new mixture's moments are sums of these, weighted by responsibilities. `least` (Z, Z) is added
    to every covariance.
    """
    size = points.shape[1]
    factors = torch.linalg.cholesky(mixture.covariances)
    precisions = torch.cholesky_inverse(factors)
    slopes = torch.einsum("kij,kj->ki", precisions, mixture.means)
    logdet = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(1)
    constants = mixture.weights.log() - 0.5 * (size * math.log(2 * math.pi) + logdet)
    constants -= 0.5 * (slopes * mixture.means).sum(1)
    densities = torch.cat([-0.5 * precisions.flatten(1), slopes, constants.unsqueeze(1)], 1)
    sums, likelihood = torch.zeros_like(densities), 0.0
    for part in points.split(max(1, CHUNK // densities.shape[1])):
        products = (part.unsqueeze(2) * part.unsqueeze(1)).flatten(1)
        terms = torch.cat([products, part, part.new_ones(len(part), 1)], 1)
        logits = terms @ densities.T
        likelihood += logits.logsumexp(1).sum().item()
        sums += logits.softmax(1).T @ terms
    counts = sums[:, -1:] + 10 * torch.finfo(sums.dtype).eps  # of a component that has lost all its points, too
    means = sums[:, -1 - size : -1] / counts
    second = (sums[:, : size * size] / counts).unflatten(1, (size, size))
    covariances = second - means.unsqueeze(2) * means.unsqueeze(1) + least
    return Prior(counts[:, 0] / counts.sum(), means, covariances), likelihood / len(points)


def fit_flow(means: Tensor, deviations: Tensor, components: int, seed: int, steps: int = FLOW_STEPS) -> Prior:
    """Fit a mixture and the flow that bends it, by maximum likelihood on draws from N(means, deviations^2).

    Means and deviations are those of the encoded images, (N, Z) each; every step draws anew, so that the few thousand
    weights see more than N points. Begins at the mixture that EM fits. Raises ValueError as `fit_mixture` does.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(means.shape, generator=generator).to(means.device)
    start = fit_mixture(means + deviations * noise, components, seed)
    flow = Flow(means.shape[1]).to(means.device)
    flow.shift.copy_(means.mean(0))
    flow.scale.copy_((means.var(0, correction=0) + deviations.square().mean(0)).sqrt().clamp(min=1e-6))
    factors = torch.linalg.cholesky(torch.linalg.inv(start.covariances.double()))
    mixture = [
        start.weights.log(),
        (start.means - flow.shift) / flow.scale,
        factors.float() * flow.scale.unsqueeze(1),
    ]
    logits, centres, factors = mixture = [part.requires_grad_() for part in mixture]
    optimizer = torch.optim.Adam([*flow.parameters(), *mixture], lr=FLOW_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FLOW_RATE, total_steps=steps, pct_start=0.1)
    constant = 0.5 * means.shape[1] * math.log(2 * math.pi)
    for _ in range(steps):
        index = torch.randint(len(means), (FLOW_BATCH,), generator=generator).to(means.device)
        noise = torch.randn(FLOW_BATCH, means.shape[1], generator=generator).to(means.device)
        points, logdet = flow.inverse(means[index] + deviations[index] * noise)
        whitened = torch.einsum("bkn,knj->bkj", points.unsqueeze(1) - centres, factors.tril())
        height = factors.diagonal(dim1=1, dim2=2).abs().log().sum(1) + logits.log_softmax(0)
        density = (height - 0.5 * whitened.square().sum(2)).logsumexp(1) - constant
        optimizer.zero_grad()
        (-(density + logdet).mean()).backward()
        optimizer.step()
        schedule.step()
    precisions = factors.detach().double().tril()
    covariances = torch.cholesky_inverse(precisions).float()
    return Prior(logits.detach().softmax(0), centres.detach(), covariances, flow.requires_grad_(False))


def _spread_out(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` points, each drawn by its squared distance to those drawn before."""
    chosen = torch.randint(len(points), (1,), generator=generator)
    nearest = (points - points[chosen]).square().sum(1)
    for _ in range(count - 1):
        if not bool(nearest.any()):
            nearest = torch.ones_like(nearest)  # fewer different points than components
        following = torch.multinomial(nearest.cpu(), 1, generator=generator)
        nearest = torch.minimum(nearest, (points - points[following]).square().sum(1))
        chosen = torch.cat([chosen, following])
    return chosen
