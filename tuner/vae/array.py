"""Several networks of the built-in family trained as one array, with their gradients written out: for networks this
small autograd's bookkeeping costs a fifth of a step.

Weights come in and go out as those of `model.py`, and lie in here stacked, channels last, in one row a network.
Axes: M networks, B images of each, Z latents of the widest, P weights of the widest.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam

from tuner.vae.convolution import fold, patches, transpose_convolve
from tuner.vae.model import HIDDEN, VAE, Model, channels_of, output_padding
from tuner.vae.parameters import TrainingParameters
from tuner.vae.shape import ImageShape

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Kingma & Ba 2015
ADAM: dict[str, Any] = {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPSILON, "weight_decay": 0.0}
ADAM |= {"fused": True, "amsgrad": False, "maximize": False}
mask_ = torch.ops.aten.threshold_backward.grad_input  # the backward pass of a ReLU; in place it stays in the cache
convolution_backward = torch.ops.aten.convolution_backward
ALIGNED = 32  # numbers
FEW = 3  # channels to which a transposed convolution is faster as a product
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MSE_RATE = 0.02  # of the running mean: about fifty steps


class ArrayShape(NamedTuple):
    """What networks must share to be trained as one array; `latent_dim` is that of the widest."""

    images: ImageShape
    variational: bool
    width: int
    latent_dim: int
    likelihood: str
    kl_unit: str
    precision: str
    batch_size: int

    @classmethod
    def of(cls, model: Model, given: TrainingParameters, widest: int | None = None) -> "ArrayShape":
        """For a network and those like it, of up to `widest` latents; without, as many as it has. Raises ValueError on
        a model of another family: there are no arrays of those."""
        if type(model) is not VAE:  # what inherits from it may compute something else
            raise ValueError("only the built-in models are trained as an array: execution process")
        latents, network = widest or model.latent_dim, (model.shape, model.variational, model.width)
        return cls(*network, latents, given.likelihood, given.kl_unit, given.precision, given.batch_size)


@dataclass(frozen=True)
class Layer:
    """One layer of all networks: views (M, ...) of their weights and gradients, in the precision of the products."""

    weight: Tensor
    bias: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor


class Array:
    """`slots` networks of one shape, of up to `shape.latent_dim` latents each.

    A network with fewer latents is padded with zeros, whose gradients are zero: it computes what it computes alone.
    In bfloat16 what is multiplied, and what comes of it, is rounded to 8 bits; weights, Adam's averages, latents and
    losses are float32 (mixed precision, Micikevicius et al. 2018, section 3.1).
    """

    def __init__(self, shape: ArrayShape, slots: int = 1, device: torch.device | str = "cpu"):
        self.shape, self.slots = shape, slots
        hidden, heads = HIDDEN[shape.images.channels], shape.latent_dim * (2 if shape.variational else 1)
        self.sizes, channels = shape.images.maps(), channels_of(shape.images, shape.width)
        flat, stages = channels[-1] * math.prod(self.sizes[-1]), range(len(channels) - 1)
        shapes = {  # of each layer's weight and bias, in the order in which they lie in a row
            **{f"down.{at}": ((channels[at + 1], 3, 3, channels[at]), (channels[at + 1],)) for at in stages},
            "hidden": ((hidden, flat), (hidden,)),
            "heads": ((heads, hidden), (heads,)),
            "start": ((flat, shape.latent_dim), (flat,)),
            **{f"up.{at}": ((channels[at + 1], 3, 3, channels[at]), (channels[at],)) for at in reversed(stages)},
        }
        sizes = [math.prod(part) for pair in shapes.values() for part in pair]
        sizes.append(-sum(sizes) % ALIGNED)  # so that every row begins where a GPU's products are fast
        self.flat = torch.zeros(3, slots, sum(sizes), device=device)  # weights, Adam's two averages
        self.mse = torch.zeros(slots, device=device)  # running means
        self.dtype = PRECISIONS[shape.precision]
        self.gradients = torch.zeros_like(self.flat[0], dtype=self.dtype)
        self.multiplied = self.flat[0].to(self.dtype)  # the weights in that precision; in float32 the same tensor
        weights, gradients = (iter(rows.split(sizes, 1)) for rows in (self.multiplied, self.gradients))
        layers = {
            name: Layer(*(next(parts).view(slots, *shape) for parts in (weights, gradients) for shape in pair))
            for name, pair in shapes.items()
        }
        self.down = [layer for name, layer in layers.items() if name.startswith("down")]
        self.up = [layer for name, layer in layers.items() if name.startswith("up")]
        self.hidden, self.heads, self.start = layers["hidden"], layers["heads"], layers["start"]

    def load(self, slot: int, model: VAE, averages: Tensor, mse: float = 0.0) -> None:
        """Put a network, Adam's averages (2, P of its own) and the running mean of its squared error into a slot."""
        self.mse[slot] = mse
        index = self._index(model)
        plain = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach(), *averages])
        padded = F.pad(plain, (0, 1)).to(self.flat.device)
        self.flat[:, slot] = padded[:, index]

    @torch.no_grad()
    def store(self, slot: int, model: VAE, averages: Tensor) -> float:
        """The inverse of `load`, into a network of the size that was loaded -> the running mean."""
        index = self._index(model)
        plain = torch.empty(3, averages.shape[1] + 1)
        plain[:, index] = self.flat[:, slot].cpu()
        nn.utils.vector_to_parameters(plain[0, :-1].clone(), model.parameters())
        averages.copy_(plain[1:, :-1])
        return self.mse[slot].item()

    def _index(self, model: VAE) -> Tensor:
        """Where in the plain network's weights, end to end and then a zero, each of a row's weights is."""
        sizes = [weight.numel() for weight in model.parameters()]
        zero = sum(sizes)
        numbers = iter(torch.arange(zero).split(sizes))
        plain = {name: next(numbers).view(weight.shape) for name, weight in model.named_parameters()}
        places, spare = math.prod(model.map[1:]), self.shape.latent_dim - model.latent_dim
        heads = ["mean", "log_variance"][: 1 + self.shape.variational]

        def pad(part: Tensor, *room: int) -> Tensor:
            return F.pad(part, room, value=zero)

        def channels_last(layer: str) -> list[Tensor]:
            return [plain[f"{layer}.weight"].permute(0, 2, 3, 1), plain[f"{layer}.bias"]]

        row = [
            *(part for at in range(len(self.down)) for part in channels_last(f"down.{at}")),
            plain["hidden.weight"].unflatten(1, (-1, places)).transpose(1, 2),
            plain["hidden.bias"],
            *(pad(plain[f"{head}.weight"], 0, 0, 0, spare) for head in heads),
            *(pad(plain[f"{head}.bias"], 0, spare) for head in heads),
            pad(plain["start.weight"].view(-1, places, model.latent_dim).transpose(0, 1), 0, spare),
            plain["start.bias"].view(-1, places).t(),
            *(part for at in range(len(self.up)) for part in channels_last(f"up.{at}")),
        ]
        index = torch.cat([part.reshape(-1) for part in row])
        return pad(index, 0, self.flat.shape[2] - len(index))

    @torch.no_grad()
    def backward(self, images: Tensor, share: Tensor, noise: Tensor, kl_factor: Tensor) -> Tensor:
        """Gradients of every network's loss -> (M, 3): the loss, its reconstruction and its KL term.

        images (M, B, H, W, C) floats in [0, 1]; share (M, B): what an image counts in its network's mean; noise
        (M, B, Z), zero beyond a network's own latents; kl_factor (M,), in the unit of `kl_unit`.
        """
        m, b = share.shape
        if self.dtype != torch.float32:
            self.multiplied.copy_(self.flat[0])
        maps = [images.reshape(m * b, *images.shape[2:]).to(self.dtype)]  # from the image to the smallest map
        seen = []  # what each convolution sees of its images
        for layer in self.down:
            seen.append(maps[-1] if m == 1 else patches(maps[-1]).view(m, -1, layer.weight[0, 0].numel()))
            maps.append(_convolve(seen[-1], layer, self.sizes[len(seen)]).relu_())
        flat = maps[-1].view(m, b, -1)
        hidden = _dense(flat, self.hidden).relu_()
        heads = _dense(hidden, self.heads).float()
        mean, log_variance = heads, heads
        latents = mean
        if self.shape.variational:
            mean, log_variance = heads.split(self.shape.latent_dim, 2)
            noise = noise * torch.exp(0.5 * log_variance)
            latents = mean + noise
        latents = latents.to(self.dtype)
        start = _dense(latents, self.start).relu_()
        grown = [start.view(maps[-1].shape)]  # from the smallest map to the image
        for layer, size in zip(self.up, self.sizes[-2::-1], strict=True):
            out = _transpose_convolve(grown[-1], layer, size)
            grown.append(out if layer is self.up[-1] else out.relu_())
        logits = grown.pop().view(m, b, -1).float()

        drawn = torch.sigmoid(logits)
        target = images.reshape(m, b, -1)
        error = drawn - target
        if self.shape.likelihood == "gaussian":
            reconstruction = error.square().sum(2)
            error.mul_(drawn).mul_(drawn.neg_().add_(1)).mul_(2 * share.unsqueeze(2))
        else:
            reconstruction = (F.softplus(logits) - logits * target).sum(2)
            error.mul_(share.unsqueeze(2))
        if self.shape.kl_unit == "calibrated":
            self.mse.copy_(running_mse(self.mse, (reconstruction * share).sum(1), self.shape.images))
            kl_factor = kl_factor * 2 * self.mse
        error = error.view(m * b, *images.shape[2:]).to(self.dtype)
        g = _transpose_convolve_backward(error, grown[-1], self.up[-1])
        for layer, inputs, outputs in zip(self.up[-2::-1], grown[-2::-1], grown[:0:-1], strict=True):
            g = _transpose_convolve_backward(mask_(g, outputs, 0, grad_input=g), inputs, layer)
        g = g.view(m, b, -1)
        g = _dense_backward(mask_(g, start, 0, grad_input=g), latents, self.start)
        kl = torch.zeros_like(share)
        if self.shape.variational:
            excess = torch.expm1(log_variance)
            kl = 0.5 * (mean.square() + excess - log_variance).sum(2)
            factor = (share * kl_factor.unsqueeze(1)).unsqueeze(2)
            g = torch.cat([g + factor * mean, 0.5 * (g * noise + factor * excess)], 2).to(self.dtype)
        g = _dense_backward(g, hidden, self.heads)
        g = _dense_backward(mask_(g, hidden, 0, grad_input=g), flat, self.hidden).view(maps[-1].shape)
        for layer, inputs, outputs, size in zip(
            self.down[::-1], seen[::-1], maps[:0:-1], self.sizes[-2::-1], strict=True
        ):
            g = _convolve_backward(mask_(g, outputs, 0, grad_input=g), inputs, layer, size, layer is not self.down[0])
        means = (torch.stack([reconstruction, kl], 2) * share.unsqueeze(2)).sum(1)
        return torch.cat([means[:, :1] + kl_factor.unsqueeze(1) * means[:, 1:], means], 1)

    def update(self, slot: int, learning_rate: float, step: int) -> None:
        """Adam's step number `step` (the first is 0) on one network, from the gradients of the last `backward`."""
        weights, first, second = ([row] for row in self.flat[:, slot])
        count = [torch.tensor(float(step), device=self.flat.device)]
        adam(weights, [self.gradients[slot].float()], first, second, [], count, lr=learning_rate, **ADAM)

    def update_all(self, learning_rate: Tensor, step: Tensor, active: Tensor) -> None:
        """Adam on all networks, each with its own learning_rate (M,) at its own step (M,).

        The weights of those that are not `active` (M,) stay; their averages don't.
        """
        weights, first, second = self.flat
        moved = torch.zeros_like(weights)  # by Adam at a rate of 1: its kernel takes one rate for all
        count = list(step.to(torch.float32, copy=True))  # Adam moves them on
        adam(list(moved), list(self.gradients.float()), list(first), list(second), [], count, lr=1.0, **ADAM)
        weights.addcmul_(moved, torch.where(active, learning_rate, 0).unsqueeze(1))


def running_mse(mean: Tensor, squared_error: Tensor, shape: ImageShape) -> Tensor:
    """The running mean, over steps, of the squared error a pixel, where a batch had this one an image; both (M,).

    The first batch gives the mean to begin with, which is zero before.
    """
    found = squared_error / shape.numbers
    return torch.where(mean > 0, mean.lerp(found, MSE_RATE), found)


def _dense(inputs: Tensor, layer: Layer) -> Tensor:
    """(M, B, I) -> (M, B, O)."""
    return torch.baddbmm(layer.bias.unsqueeze(1), inputs, layer.weight.mT)


def _dense_backward(g: Tensor, inputs: Tensor, layer: Layer) -> Tensor:
    """Gradients of a dense layer -> that of its inputs."""
    torch.bmm(g.mT, inputs, out=layer.weight_gradient)
    torch.sum(g, 1, out=layer.bias_gradient)
    return g @ layer.weight


def _convolve(seen: Tensor, layer: Layer, size: tuple[int, int]) -> Tensor:
    """A convolution with its bias -> (M B, h, w, K) of `size` (h, w).

    `seen` are images (B, H, W, C) of a single network, or patches (M, B h w, 9 C) of those of several.
    """
    slots, kernels = layer.bias.shape
    if slots == 1:
        return _last(F.conv2d(_first(seen), _first(layer.weight[0]), layer.bias[0], 2, 1))
    out = torch.baddbmm(layer.bias.unsqueeze(1), seen, layer.weight.flatten(2).mT)
    return out.view(-1, *size, kernels)


def _convolve_backward(g: Tensor, seen: Tensor, layer: Layer, size: tuple[int, int], of_images: bool) -> Tensor:
    """Gradients of a convolution -> that of its images, of `size` (H, W), or `g` where nobody needs it."""
    slots, kernels = layer.bias.shape
    torch.sum(g.view(slots, -1, kernels), 1, out=layer.bias_gradient)
    if slots == 1:
        return _backward_of_one(g, seen, layer, of_images=of_images)
    count, g = len(g), g.view(slots, -1, kernels)
    layer.weight_gradient.copy_((g.mT @ seen).view(layer.weight.shape))
    return fold((g @ layer.weight.flatten(2)).view(-1, seen.shape[2]), count, *size) if of_images else g


def _transpose_convolve(images: Tensor, layer: Layer, size: tuple[int, int]) -> Tensor:
    """A transposed convolution of (M B, h, w, C) with its bias -> (M B, H, W, K) of `size` (H, W)."""
    slots, kernels = layer.bias.shape
    if slots == 1 and kernels <= FEW:
        return transpose_convolve(images, layer.weight[0], layer.bias, size)
    if slots == 1:
        weight, bias, padding = _first(layer.weight[0]), layer.bias[0], output_padding(size)
        return _last(F.conv_transpose2d(_first(images), weight, bias, 2, 1, padding))
    taps = images.view(slots, -1, images.shape[3]) @ layer.weight.flatten(2)
    out = fold(taps.view(-1, taps.shape[2]), len(images), *size)
    out.view(slots, -1, kernels).add_(layer.bias.unsqueeze(1))
    return out


def _transpose_convolve_backward(g: Tensor, images: Tensor, layer: Layer) -> Tensor:
    """Gradients of a transposed convolution -> that of its images."""
    slots, kernels = layer.bias.shape
    torch.sum(g.view(slots, -1, kernels), 1, out=layer.bias_gradient)
    if slots == 1:
        return _backward_of_one(g, images, layer, output_padding(g.shape[1:3]))
    rows = patches(g).view(slots, -1, 9 * kernels)
    layer.weight_gradient.copy_((images.view(slots, -1, layer.weight.shape[1]).mT @ rows).view(layer.weight.shape))
    gradient: Tensor = rows @ layer.weight.flatten(2).mT
    return gradient.view(images.shape)


def _backward_of_one(
    g: Tensor, images: Tensor, layer: Layer, transposed: tuple[int, int] | None = None, of_images: bool = True
) -> Tensor:
    """Gradients of either convolution of a single network, by PyTorch's own kernel, but for the bias's.

    A transposed one is told by its output padding.
    """
    which = (transposed is not None, list(transposed or (0, 0)), 1, (of_images, True, False))
    arguments = (None, [2, 2], [1, 1], [1, 1], *which)
    for_images, for_weight, _ = convolution_backward(_first(g), _first(images), _first(layer.weight[0]), *arguments)
    layer.weight_gradient[0] = _last(for_weight)
    return _last(for_images) if of_images else g


def _first(images: Tensor) -> Tensor:
    """(N, H, W, C) as PyTorch's convolutions take it, channels first by name and last in memory."""
    return images.permute(0, 3, 1, 2)


def _last(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C) with channels last in memory."""
    turned: Tensor = images.permute(0, 2, 3, 1).contiguous()
    return turned
