"""What would pay inside the training step on MNIST that the tuner does not have: one change at a time.

    python -m benchmarks.training [--data-dir data] [--epochs 5] [--seed 0]

The point and the scores of `ablation.py`, trained by a plain PyTorch loop that sees the same images in the same order,
with the same noise and the same initial weights as the product's, so that the loop can do what the product can't.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.setting import SHOWN, shipped_point
from tuner.vae.data import pixels
from tuner.vae.losses import PIXELS, kl_divergence, squared_error
from tuner.vae.model import VAE
from tuner.vae.parameters import Parameters
from tuner.vae.train import State, StepInputs, Stream, derive_seed

CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "weights averaged, decay 0.999": {"decay": 0.999},
    "constant learning rate": {"schedule": "constant"},
    "constant learning rate, weights averaged, decay 0.999": {"schedule": "constant", "decay": 0.999},
    "one-cycle": {"schedule": "one-cycle"},
    "free bits, 0.5 nats a latent": {"free_bits": 0.5},
    "importance-weighted bound of 5 draws": {"draws": 5},
    "decoder's variance calibrated": {"calibrated": True},
    "shifted by up to a pixel": {"shift": 1},
    "batch normalization": {"normalized": True},
    "SiLU": {"activation": nn.SiLU},
    "Adam's second decay 0.99": {"second_decay": 0.99},
    "weight decay 0.01": {"weight_decay": 0.01},
}


def changed(model: VAE, normalized: bool, activation: type[nn.Module]) -> VAE:
    """The network with other activations, or normalized before each of them, its weights unchanged."""
    for name in ("encoder", "decoder"):
        layers: list[nn.Module] = []
        for layer in getattr(model, name):
            if isinstance(layer, nn.ReLU):
                previous = layers[-1]
                if normalized and isinstance(previous, nn.Linear):
                    layers.append(nn.BatchNorm1d(previous.out_features))
                elif normalized and isinstance(previous, nn.Conv2d | nn.ConvTranspose2d):
                    layers.append(nn.BatchNorm2d(previous.out_channels))
                layer = activation()
            layers.append(layer)
        setattr(model, name, nn.Sequential(*layers))
    return model


def shifted(batch: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Images (B, 1, 28, 28), each moved by up to `most` pixels in either direction."""
    padded = F.pad(batch, [most] * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, len(batch)), generator=generator)
    rows = (down[:, None] + torch.arange(28)).view(-1, 1, 28, 1)
    columns = (right[:, None] + torch.arange(28)).view(-1, 1, 1, 28)
    return padded[torch.arange(len(batch)).view(-1, 1, 1, 1), 0, rows, columns]


def weighted_bound(model: VAE, batch: Tensor, noise: Tensor, factor: float) -> Tensor:
    """The bound of Burda et al. 2016, eq. 8 of draws by noise (K, B, Z), negative and in units of the squared error.

    The decoder is a Gaussian for which the squared error over `factor` is -log p(x|z), so that one draw is the loss.
    """
    mean, log_variance = model.encode(batch)
    assert log_variance is not None
    latents = mean + torch.exp(0.5 * log_variance) * noise
    errors = squared_error(model.decode(latents.flatten(0, 1)), batch.repeat(len(noise), 1, 1, 1)).view(len(noise), -1)
    log_prior = -0.5 * latents.square().sum(2)
    log_posterior = -0.5 * (noise.square() + log_variance).sum(2)
    log_weights = -errors / factor + log_prior - log_posterior
    return -factor * (torch.logsumexp(log_weights, 0) - math.log(len(noise))).mean()


def trained(
    parameters: Parameters,
    images: Tensor,
    epochs: int,
    seed: int,
    *,
    decay: float = 0.0,
    schedule: str = "cosine",
    free_bits: float = 0.0,
    draws: int = 1,
    calibrated: bool = False,
    shift: int = 0,
    normalized: bool = False,
    activation: type[nn.Module] = nn.ReLU,
    second_decay: float = 0.999,
    weight_decay: float = 0.0,
) -> VAE:
    """The network after `epochs`; the defaults are the product's training."""
    plan = parameters if schedule == "one-cycle" else parameters.model_copy(update={"schedule": schedule})
    model = changed(State.fresh(parameters, seed, 1).model, normalized, activation)
    feed = StepInputs(plan, len(images), seed=seed, trial=1, total_epochs=epochs)
    betas = (0.9, second_decay)
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, betas, weight_decay=weight_decay)
    cycle = None
    if schedule == "one-cycle":
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, plan.learning_rate, total_steps=feed.total_steps + 1, cycle_momentum=False
        )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.PIXELS))
    model.train()
    for step in range(feed.total_steps):
        order, noise = feed.batch(step)
        batch = pixels(images[order])
        if shift:
            batch = shifted(batch, shift, generator)
        if draws > 1:
            more = torch.randn(draws - 1, *noise.shape, generator=generator)
            loss = weighted_bound(model, batch, torch.cat([noise[None], more]), feed.kl_factor(step))
        else:
            mean, log_variance = model.encode(batch)
            assert log_variance is not None
            error = squared_error(model.decode(mean + torch.exp(0.5 * log_variance) * noise), batch).mean()
            if calibrated:  # Rybkin et al. 2021, eq. 6, per batch
                loss = PIXELS / 2 * error.log() + kl_divergence(mean, log_variance).mean()
            elif free_bits:  # Kingma et al. 2016, eq. 16, with each latent a group
                each = kl_divergence(mean.T, log_variance.T) / len(mean)  # (Z,): summed over images, not latents
                loss = error + feed.kl_factor(step) * each.clamp(min=free_bits).sum()
            else:
                loss = error + feed.kl_factor(step) * kl_divergence(mean, log_variance).mean()
        for group in optimizer.param_groups if cycle is None else ():
            group["lr"] = feed.learning_rate(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if cycle is not None:
            cycle.step()
        if average is not None:
            average.update_parameters(model)
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base, data, scorer = shipped_point(arguments.data_dir)
    for name, change in CHANGES.items():
        model = trained(base, data.train.images, arguments.epochs, arguments.seed, **change)
        scores = scorer(model, base, scorer.fit(model, base))
        print(json.dumps({"change": name, **{name: round(scores[name], 4) for name in SHOWN}}), flush=True)


if __name__ == "__main__":
    main()
