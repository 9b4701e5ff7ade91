"""A normalizing flow: an invertible map that bends a Gaussian mixture to where a model's latents really are."""

from itertools import pairwise

import torch
from torch import Tensor, nn

COUPLINGS, HIDDEN = 6, 64
STEEPEST = 1.5  # most that a coupling scales by, as a logarithm: keeps the inverse tame


class Flow(nn.Module):
    """L affine couplings of Z latents: RealNVP, Dinh et al. 2017, eq. 7 and 8.

    A coupling keeps a fixed random half of the numbers; what a network with two hidden layers of H makes of that half
    scales and shifts the rest. Fresh, the map is the identity but for `scale` and `shift` (Z,), which come last.
    """

    kept: Tensor  # (L, Z) of ones and zeros
    scale: Tensor
    shift: Tensor

    def __init__(self, latent_dim: int, couplings: int = COUPLINGS, hidden: int = HIDDEN):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kept = torch.zeros(couplings, latent_dim)
        for first, second in zip(kept[::2], kept[1::2], strict=True):
            first[torch.randperm(latent_dim, generator=generator)[: latent_dim // 2]] = 1
            second.copy_(1 - first)
        sizes = (latent_dim, hidden, hidden, 2 * latent_dim)
        self.register_buffer("kept", kept)
        self.register_buffer("scale", torch.ones(latent_dim))
        self.register_buffer("shift", torch.zeros(latent_dim))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            noise = torch.randn(couplings, inputs, outputs, generator=generator) / inputs**0.5
            self.weights.append(noise if outputs == hidden else torch.zeros_like(noise))
            self.biases.append(torch.zeros(couplings, outputs))

    def _coupling(self, number: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the scales, and the shifts, each (B, Z) and zero for what is kept."""
        hidden = points * self.kept[number]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = hidden @ weight[number] + bias[number]
            if layer < len(self.weights) - 1:
                hidden = nn.functional.silu(hidden)
        logs, shifts = hidden.chunk(2, 1)
        moved = 1 - self.kept[number]
        return STEEPEST * torch.tanh(logs) * moved, shifts * moved

    def forward(self, points: Tensor) -> Tensor:
        """From the mixture to latents: (B, Z) -> (B, Z)."""
        for number in range(len(self.kept)):
            logs, shifts = self._coupling(number, points)
            points = points * logs.exp() + shifts
        return points * self.scale + self.shift

    def inverse(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """From latents (B, Z) to the mixture's points (B, Z), with the log-determinant (B,) of that map."""
        points = (latents - self.shift) / self.scale
        logdet = -self.scale.log().sum().expand(len(latents))
        for number in reversed(range(len(self.kept))):
            logs, shifts = self._coupling(number, points)
            points = (points - shifts) * (-logs).exp()
            logdet = logdet - logs.sum(1)
        return points, logdet
