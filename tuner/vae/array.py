"""Several networks of one shape trained as one array, with their gradients written out; one network is an array of one.

The plain network of `model.py` says what is computed, and its weights are what comes in and goes out. In here they
lie stacked, channels last, in one row a network, and no autograd stands between the products: for networks this small
its bookkeeping costs a fifth of a step.

Axes: M networks, B images of each, Z latents of the widest, P weights of the widest.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam

from tuner.vae.convolution import fold, patches, to_pixels
from tuner.vae.model import VAE
from tuner.vae.parameters import Parameters

HIDDEN = 128
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Kingma & Ba 2015
mask_ = torch.ops.aten.threshold_backward.grad_input  # the backward pass of a ReLU; in place it stays in the cache
convolution_backward = torch.ops.aten.convolution_backward


class Array:
    """`slots` networks of the shape that `parameters` give, of up to `parameters.latent_dim` latents each.

    A network with fewer latents is padded with zeros, whose gradients are zero: it computes what it computes alone.
    """

    def __init__(self, parameters: Parameters, slots: int = 1, device: torch.device | str = "cpu"):
        self.parameters, self.slots, self.latent_dim = parameters, slots, parameters.latent_dim
        self.variational = parameters.model == "vae"
        width, heads = parameters.width, parameters.latent_dim * (2 if self.variational else 1)
        shapes = [
            (width, 3, 3, 1),
            (width,),
            (2 * width, 3, 3, width),
            (2 * width,),
            (HIDDEN, 98 * width),
            (HIDDEN,),
            (heads, HIDDEN),
            (heads,),
            (98 * width, parameters.latent_dim),
            (98 * width,),
            (2 * width, 3, 3, width),
            (width,),
            (width, 3, 3, 1),
            (1,),
        ]
        sizes = [math.prod(shape) for shape in shapes]
        self.flat = torch.zeros(4, slots, sum(sizes), device=device)  # weights, gradients, Adam's two moments
        self.weights, self.gradients = (
            [part.view(slots, *shape) for part, shape in zip(rows.split(sizes, 1), shapes, strict=True)]
            for rows in self.flat[:2]
        )

    def load(self, slot: int, model: VAE, moments: Tensor) -> None:
        """Put a network and its moments (2, P of its own) into a slot."""
        index = self._index(model)
        plain = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach(), *moments])
        padded = F.pad(plain, (0, 1)).to(self.flat.device)
        self.flat[[0, 2, 3], slot] = padded[:, index]

    @torch.no_grad()
    def store(self, slot: int, model: VAE, moments: Tensor) -> None:
        """The inverse of `load`, into a network of the size that was loaded."""
        index = self._index(model)
        plain = torch.empty(3, moments.shape[1] + 1)
        plain[:, index] = self.flat[[0, 2, 3], slot].cpu()
        nn.utils.vector_to_parameters(plain[0, :-1].clone(), model.parameters())
        moments.copy_(plain[1:, :-1])

    def _index(self, model: VAE) -> Tensor:
        """Where in the plain network's weights, end to end and then a zero, each of a row's weights is."""
        weights = list(model.parameters())
        numbers = torch.arange(sum(weight.numel() for weight in weights))
        plain = {
            name: part.view(weight.shape)
            for (name, weight), part in zip(
                model.named_parameters(), numbers.split([weight.numel() for weight in weights]), strict=True
            )
        }
        zero, wide = len(numbers), 2 * self.parameters.width
        spare = self.latent_dim - model.latent_dim
        heads = ["mean", "log_variance"][: 1 + self.variational]

        def pad(part: Tensor, *room: int) -> Tensor:
            return F.pad(part, room, value=zero)

        def channels_last(part: Tensor) -> Tensor:
            return part.permute(0, 2, 3, 1)

        row = [
            channels_last(plain["encoder.0.weight"]),
            plain["encoder.0.bias"],
            channels_last(plain["encoder.2.weight"]),
            plain["encoder.2.bias"],
            plain["encoder.5.weight"].view(HIDDEN, wide, 49).transpose(1, 2),
            plain["encoder.5.bias"],
            *(pad(plain[f"{head}.weight"], 0, 0, 0, spare) for head in heads),
            *(pad(plain[f"{head}.bias"], 0, spare) for head in heads),
            pad(plain["decoder.0.weight"].view(wide, 49, -1).transpose(0, 1), 0, spare),
            plain["decoder.0.bias"].view(wide, 49).t(),
            channels_last(plain["decoder.3.weight"]),
            plain["decoder.3.bias"],
            channels_last(plain["decoder.5.weight"]),
            plain["decoder.5.bias"],
        ]
        return torch.cat([part.reshape(-1) for part in row])

    @torch.no_grad()
    def backward(self, images: Tensor, share: Tensor, noise: Tensor, kl_factor: Tensor) -> Tensor:
        """Gradients of every network's loss -> (M, 3): the loss, its reconstruction and its KL term.

        images (M, B, 28, 28) floats in [0, 1]; share (M, B): what an image counts in its network's mean; noise
        (M, B, Z), zero beyond a network's own latents; kl_factor (M,).
        """
        m, b = share.shape
        weight = self.weights
        pixels = images.view(m * b, 28, 28, 1)
        first = self._down(pixels, 0).relu_()
        second = self._down(first, 2).relu_().view(m, b, -1)
        hidden = torch.baddbmm(weight[5].unsqueeze(1), second, weight[4].mT).relu_()
        heads = torch.baddbmm(weight[7].unsqueeze(1), hidden, weight[6].mT)
        mean, log_variance = heads, heads
        latents = mean
        if self.variational:
            mean, log_variance = heads.split(self.latent_dim, 2)
            noise = noise * torch.exp(0.5 * log_variance)
            latents = mean + noise
        start = torch.baddbmm(weight[9].unsqueeze(1), latents, weight[8].mT).relu_()
        grown = self._up(start.view(m * b, 7, 7, -1), 10).relu_()
        logits = self._up(grown, 12).view(m, b, 784)

        drawn = torch.sigmoid(logits)
        target = images.view(m, b, 784)
        error = drawn - target
        if self.parameters.likelihood == "gaussian":
            reconstruction = error.square().sum(2)
            error.mul_(drawn).mul_(drawn.neg_().add_(1)).mul_(2 * share.unsqueeze(2))
        else:
            reconstruction = (F.softplus(logits) - logits * target).sum(2)
            error.mul_(share.unsqueeze(2))
        g = self._up_backward(error.view(m * b, 28, 28, 1), grown, 12)
        g = self._up_backward(mask_(g, grown, 0, grad_input=g), start.view(m * b, 7, 7, -1), 10).view(m, b, -1)
        g = mask_(g, start, 0, grad_input=g)
        self._dense_backward(g, latents, 8)
        g = g @ weight[8]
        kl = torch.zeros_like(share)
        if self.variational:
            excess = torch.expm1(log_variance)
            kl = 0.5 * (mean.square() + excess - log_variance).sum(2)
            factor = (share * kl_factor.unsqueeze(1)).unsqueeze(2)
            g = torch.cat([g + factor * mean, 0.5 * (g * noise + factor * excess)], 2)
        self._dense_backward(g, hidden, 6)
        g = g @ weight[6]
        g = mask_(g, hidden, 0, grad_input=g)
        self._dense_backward(g, second, 4)
        g = g @ weight[4]
        g = mask_(g, second, 0, grad_input=g)
        g = self._down_backward(g.view(m * b, 7, 7, -1), first, 2)
        self._down_backward(mask_(g, first, 0, grad_input=g), pixels, 0)
        means = (torch.stack([reconstruction, kl], 2) * share.unsqueeze(2)).sum(1)
        return torch.cat([means[:, :1] + kl_factor.unsqueeze(1) * means[:, 1:], means], 1)

    def update(self, slot: int, learning_rate: float, step: int) -> None:
        """Adam's step number `step` (the first is 0) on one network, from the gradients of the last `backward`."""
        weights, gradients, first, second = self.flat[:, slot]
        adam(
            [weights],
            [gradients],
            [first],
            [second],
            [],
            [torch.tensor(float(step), device=weights.device)],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=learning_rate,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )

    def update_all(self, learning_rate: Tensor, step: Tensor, active: Tensor) -> None:
        """Adam on all networks where `active` (M,), each with its own learning_rate (M,) at its own step (M,)."""
        weights, gradients, first, second = self.flat
        count = (step + 1).double().unsqueeze(1)
        rate = torch.where(active, learning_rate, 0).double().unsqueeze(1) / (1 - BETAS[0] ** count)
        moving = active.unsqueeze(1).float()
        first.lerp_(gradients, moving * (1 - BETAS[0]))
        second.lerp_(gradients.square(), moving * (1 - BETAS[1]))
        root = second.sqrt().div_((1 - BETAS[1] ** count).sqrt().float()).add_(EPSILON)
        weights.sub_(root.reciprocal_().mul_(first).mul_(rate.float()))

    def _down(self, images: Tensor, layer: int) -> Tensor:
        """Convolution `layer` of (M B, H, W, C) with its bias -> (M B, H/2, W/2, K)."""
        weight, bias = self.weights[layer], self.weights[layer + 1]
        if self.slots == 1:
            return _last(F.conv2d(_first(images), _first(weight[0]), bias[0], 2, 1))
        rows = patches(images).view(self.slots, -1, weight[0, 0].numel())
        out = torch.baddbmm(bias.unsqueeze(1), rows, weight.flatten(2).mT)
        return out.view(len(images), images.shape[1] // 2, images.shape[2] // 2, -1)

    def _down_backward(self, g: Tensor, images: Tensor, layer: int) -> Tensor:
        """Gradients of convolution `layer` -> that of its images (nothing of use for the first layer's)."""
        weight, kernels = self.weights[layer], g.shape[3]
        torch.sum(g.view(self.slots, -1, kernels), 1, out=self.gradients[layer + 1])
        if self.slots == 1:
            mask = (layer > 0, True, False)
            arguments = (None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, mask)
            of_images, of_weight, _ = convolution_backward(_first(g), _first(images), _first(weight[0]), *arguments)
            self.gradients[layer][0] = _last(of_weight)
            return _last(of_images) if layer else g
        rows, g = patches(images).view(self.slots, -1, weight[0, 0].numel()), g.view(self.slots, -1, kernels)
        self.gradients[layer].copy_((g.mT @ rows).view(weight.shape))
        return fold((g @ weight.flatten(2)).view(-1, rows.shape[2]), *images.shape[:3]) if layer else g

    def _up(self, images: Tensor, layer: int) -> Tensor:
        """Transposed convolution `layer` of (M B, H/2, W/2, C) with its bias -> (M B, H, W, K)."""
        weight, bias = self.weights[layer], self.weights[layer + 1]
        count, height, width, channels = images.shape
        if self.slots == 1 and weight.shape[4] == 1:
            return to_pixels(images, weight.view(channels, 9), bias)
        if self.slots == 1:
            return _last(F.conv_transpose2d(_first(images), _first(weight[0]), bias[0], 2, 1, 1))
        taps = images.view(self.slots, -1, channels) @ weight.flatten(2)
        out = fold(taps.view(-1, taps.shape[2]), count, 2 * height, 2 * width)
        out.view(self.slots, -1, weight.shape[4]).add_(bias.unsqueeze(1))
        return out

    def _up_backward(self, g: Tensor, images: Tensor, layer: int) -> Tensor:
        """Gradients of transposed convolution `layer` -> that of its images."""
        weight, kernels = self.weights[layer], g.shape[3]
        torch.sum(g.view(self.slots, -1, kernels), 1, out=self.gradients[layer + 1])
        if self.slots == 1:
            arguments = (None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1, (True, True, False))
            of_images, of_weight, _ = convolution_backward(_first(g), _first(images), _first(weight[0]), *arguments)
            self.gradients[layer][0] = _last(of_weight)
            return _last(of_images)
        rows = patches(g).view(self.slots, -1, 9 * kernels)
        self.gradients[layer].copy_((images.view(self.slots, -1, weight.shape[1]).mT @ rows).view(weight.shape))
        gradient: Tensor = rows @ weight.flatten(2).mT
        return gradient.view(images.shape)

    def _dense_backward(self, g: Tensor, inputs: Tensor, layer: int) -> None:
        torch.bmm(g.mT, inputs, out=self.gradients[layer])
        torch.sum(g, 1, out=self.gradients[layer + 1])


def _first(images: Tensor) -> Tensor:
    """(N, H, W, C) as PyTorch's convolutions take it, channels first by name and last in memory."""
    return images.permute(0, 3, 1, 2)


def _last(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C) with channels last in memory."""
    turned: Tensor = images.permute(0, 2, 3, 1).contiguous()
    return turned
