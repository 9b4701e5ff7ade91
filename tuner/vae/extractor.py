"""The extractor: a small classifier trained on the training split and frozen; its features measure samples."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tuner.vae.data import Data, as_floats

FEATURES = 64
BATCH = 100
MOST_STEPS, MOST_EPOCHS = 2_000, 50  # 4 epochs of MNIST: 98 % right


class FeatureExtractor(nn.Module):
    """conv 1 -> width -> 2 width (3x3, stride 2), fully connected 64 (the features), 10 classes.

    A deep one has three convolutions, 1 -> width (5x5) -> 2 width -> 4 width (3x3), the largest of 2x2 after each.
    """

    def __init__(self, width: int = 16, deep: bool = False):
        super().__init__()
        self.width, self.deep = width, deep
        if deep:
            layers = [
                *(nn.Conv2d(1, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            ]
        else:
            layers = [
                *(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU()),
                *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()),
            ]
        flat = 4 * width * 3 * 3 if deep else 2 * width * 7 * 7
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, FEATURES), nn.ReLU())
        self.classes = nn.Linear(FEATURES, 10)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) in [0, 1] -> (B, 64), the penultimate layer."""
        return torch.cat([self.trunk(batch) for batch in images.split(500)])

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images (B, 1, 28, 28) whose class is right."""
        return float((self.classes(self.features(images)).argmax(1) == labels).double().mean())


def train_extractor(data: Data, seed: int, width: int = 16, deep: bool = False) -> FeatureExtractor:
    """Train and freeze an extractor: the same `seed` gives the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fit(FeatureExtractor(width, deep), data)


def fit(extractor: FeatureExtractor, data: Data) -> FeatureExtractor:
    """Train and freeze in place: Adam 4e-3 with cosine decay on the training split, no augmentation."""
    steps = min(MOST_STEPS, MOST_EPOCHS * len(data.train) // BATCH)
    optimizer = torch.optim.Adam(extractor.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(data.train))])
        index, order = order[:BATCH], order[BATCH:]
        logits = extractor.classes(extractor.trunk(as_floats(data.train.images[index])))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, data.train.labels[index]).backward()
        optimizer.step()
        schedule.step()
    return extractor.eval().requires_grad_(False)


def to_bytes(extractor: FeatureExtractor) -> bytes:
    """The frozen extractor as a safetensors file."""
    return save(extractor.state_dict())


def from_bytes(content: bytes) -> FeatureExtractor:
    """What `to_bytes` wrote. Raises SafetensorError, KeyError or RuntimeError on anything else."""
    weights = load(content)
    convolutions = sum(weight.dim() == 4 for weight in weights.values())
    extractor = FeatureExtractor(len(weights["trunk.0.weight"]), deep=convolutions == 3)
    extractor.load_state_dict(weights)
    return extractor.eval().requires_grad_(False)


def load_extractor(path: Path, sha256: str) -> FeatureExtractor:
    """Read an extractor back. Raises ValueError when the file is not the one that was frozen."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path}: not the extractor this run was scored with (its SHA-256 differs)")
    try:
        return from_bytes(content)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not readable as an extractor: {' '.join(str(error).split())[:200]}") from error
