"""Feature extractors: frozen networks whose outputs are the space in which images are compared.

Which ones serve depends on what there is: classifiers where images have labels; else untrained networks, wavelet
packets and a network that tells rotations, which need none; or a program of the user's own. Axes: B images,
D features, G groups of features, each of which is compared by itself.
"""

import copy
import hashlib
import io
import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from tuner.vae.data import Data, Split, as_floats
from tuner.vae.errors import Refused, refusing
from tuner.vae.model import MOST_CHANNELS, channels_of
from tuner.vae.process import CPU
from tuner.vae.shape import ImageShape

FEATURES = 64
BATCH = 100
MOST_STEPS, MOST_EPOCHS = 2_000, 50  # 4 epochs of MNIST: 98 % right
CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}
CHANNELS_LAST: dict[str, Any] = {"memory_format": torch.channels_last}
AT_ONCE = 500 * 28 * 28  # numbers in a batch of images whose features are taken


class FeatureExtractor(nn.Module):
    """A `trunk` that makes features (B, D) or (B, G, D) of images, and can be differentiated."""

    kind: ClassVar[str]
    trunk: nn.Module
    shape: ImageShape
    options: dict[str, Any]  # what makes another one of the same layers, beside the shape
    layout = CONTIGUOUS  # of its weights while it works

    def on(self, device: torch.device) -> "FeatureExtractor":
        """A copy there."""
        return copy.deepcopy(self).to(device, **self.layout)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1], many at a time -> (B, D) or (B, G, D)."""
        at_once = max(1, AT_ONCE // images[:1].numel()) if len(images) else 1
        return torch.cat([self.trunk(batch) for batch in images.split(at_once)])


class Classifier(FeatureExtractor):
    """Convolutions, fully connected 64 (the features), classes. A deep one pools, the other strides.

    The first convolution has `width` channels, each next twice as many, 4 width at most.
    """

    kind = "classifier"

    def __init__(self, shape: ImageShape, classes: int, width: int = 16, deep: bool = False):
        super().__init__()
        self.shape, self.options = shape, {"classes": classes, "width": width, "deep": deep}
        if deep:
            self.layout = CHANNELS_LAST  # a CPU pools six times as fast in it
        self.trunk = nn.Sequential(*(_pooling if deep else _striding)(shape, width), nn.ReLU())
        self.classes = nn.Linear(FEATURES, classes)

    def lesson(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of the split's images to learn from, those at index (B,): in [0, 1], and their classes (B,)."""
        assert split.labels is not None
        return as_floats(split.images[index]), split.labels[index]

    @torch.no_grad()
    def accuracy(self, split: Split) -> float:
        """Share of a split's images whose class is right."""
        images, labels = self.lesson(split, torch.arange(len(split), device=split.images.device))
        return float((self.classes(self.features(images)).argmax(1) == labels).double().mean())


class Rotations(Classifier):
    """Tells by which quarter turns an image was rotated; it need not be square, then by which half turns.

    What tells up from down is in the things that images show, so the features see these, without labels.
    Gidaris, Singh & Komodakis 2018.
    """

    kind = "rotations"

    def __init__(self, shape: ImageShape, width: int = 16):
        self.turns = range(0, 4, 1 if shape.height == shape.width else 2)
        super().__init__(shape, len(self.turns), width, deep=True)
        self.options = {"width": width}

    def lesson(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Equal parts of the images are rotated by each of the turns, which are the labels."""
        parts = as_floats(split.images[index]).tensor_split(len(self.turns))
        rotated = [part.rot90(turn, (2, 3)) for turn, part in zip(self.turns, parts, strict=True)]
        labels = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        return torch.cat(rotated), labels.to(index.device)


class UntrainedNetworks(FeatureExtractor):
    """Three convolutional networks as they are drawn: a group of 64 features each.

    They need no labels, and rank generators nearly as trained ones do (benchmarks/label_free.py).
    """

    kind = "untrained"

    def __init__(self, shape: ImageShape, width: int = 16, count: int = 3):
        super().__init__()
        self.shape, self.options = shape, {"width": width, "count": count}
        self.trunk = _Groups(nn.Sequential(*_striding(shape, width)) for _ in range(count))


class WaveletPackets(FeatureExtractor):
    """The packets of a Haar wavelet transform, the groups, each of 8x8 at most. Veeramacheneni et al. 2025."""

    kind = "wavelets"

    def __init__(self, shape: ImageShape):
        super().__init__()
        self.shape, self.options = shape, {}
        self.trunk = HaarPackets(len(shape.maps()) - 1)


class Program(FeatureExtractor):
    """A user's own, as `torch.export.save` wrote it: images (B, C, H, W) in [0, 1] -> features (B, D).

    PyTorch reads it with pickle, so it can run any code. Raises ValueError on a file that is none.
    """

    kind = "program"

    def __init__(self, content: bytes, device: torch.device = CPU):
        super().__init__()
        self.content = content
        logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # it prints a traceback before it raises
        with refusing("no program of torch.export"):  # whatever its parts raise
            program = torch.export.load(io.BytesIO(content))
            self.trunk = (move_to_device_pass(program, device) if device != CPU else program).module()

    def on(self, device: torch.device) -> "Program":
        return Program(self.content, device)  # its operators name devices, too

    def __reduce__(self) -> tuple[type["Program"], tuple[bytes]]:
        return Program, (self.content,)

    def require_fit(self, images: Tensor) -> None:
        """Raises ValueError unless such images (N, C, H, W), in batches of any size, give features to compare."""
        for batch in (images[:1], images[:2], images):
            with refusing(f"takes no images {'x'.join(map(str, batch.shape))}"):
                found = self.trunk(batch)
            if not (isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 2 and found.numel()):
                shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"gives {shown} for {len(batch)} images; expected floats (images, features)")
            if len(found) != len(batch):
                raise ValueError(f"gives {len(found)} rows of features for {len(batch)} images")
            if not bool(found.isfinite().all()):
                raise ValueError("gives features that are not finite")


class HaarPackets(nn.Module):
    """Images (B, C, H, W) -> packets (B, 4^levels, C h w), orthonormal; the first holds means.

    A row or column more is repeated where a side is odd.
    """

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def forward(self, images: Tensor) -> Tensor:
        packets = images.unsqueeze(1)
        for _ in range(self.levels):
            height, width = packets.shape[-2:]
            if height % 2 or width % 2:
                flat = F.pad(packets.flatten(1, 2), (0, width % 2, 0, height % 2), mode="replicate")
                packets = flat.unflatten(1, packets.shape[1:3])
            a, b = packets[..., ::2, ::2], packets[..., ::2, 1::2]
            c, d = packets[..., 1::2, ::2], packets[..., 1::2, 1::2]
            packets = torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2
        return packets.flatten(2)


class _Groups(nn.ModuleList):
    """Images (B, C, H, W) -> what each of the networks makes of them, side by side: (B, G, D)."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in self], 1)


def _striding(shape: ImageShape, width: int) -> list[nn.Module]:
    """Convolutions (3x3, stride 2) down to the smallest map of the shape, and from all of it to the features."""
    channels = channels_of(shape, width)
    layers: list[nn.Module] = []
    for pair in pairwise(channels):
        layers += [nn.Conv2d(*pair, 3, stride=2, padding=1), nn.ReLU()]
    return [*layers, nn.Flatten(), nn.Linear(channels[-1] * math.prod(shape.maps()[-1]), FEATURES)]


def _pooling(shape: ImageShape, width: int) -> list[nn.Module]:
    """The same with a convolution more, the first of 5x5, and the largest of every 2x2 after each."""
    channels = [*channels_of(shape, width), width * min(2 ** (len(shape.maps()) - 1), MOST_CHANNELS)]
    layers: list[nn.Module] = []
    for kernel, (inputs, outputs) in zip([5] + [3] * len(channels), pairwise(channels), strict=False):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.MaxPool2d(2), nn.ReLU()]
    halved = len(channels) - 1
    flat = channels[-1] * (shape.height >> halved) * (shape.width >> halved)
    return [*layers, nn.Flatten(), nn.Linear(flat, FEATURES)]


KINDS: dict[str, type[Any]] = {made.kind: made for made in (Classifier, Rotations, UntrainedNetworks, WaveletPackets)}
Trained = TypeVar("Trained", bound=Classifier)


def train_classifier(data: Data, seed: int, width: int = 16, deep: bool = False) -> Classifier:
    """Train and freeze a classifier of labelled data: the same `seed` gives the same one on the same device."""
    assert data.classes is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fit(Classifier(data.shape, data.classes, width, deep), data.train)


def train_rotations(data: Data, seed: int) -> Rotations:
    """Train and freeze a network on images without labels: the same `seed` gives the same one on the same device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fit(Rotations(data.shape), data.train, rate=1e-3)


def fit(extractor: Trained, train: Split, rate: float = 4e-3) -> Trained:
    """Train and freeze a classifier in place, where the images are; at a quarter of the rate where its units die, and
    all images look alike to it."""
    extractor.to(train.images.device, **extractor.layout)
    start = copy.deepcopy(extractor.state_dict())
    for slower in range(4):
        extractor.load_state_dict(start)
        _descend(extractor, train, rate / 4**slower)
        if bool(extractor.features(as_floats(train.images[:BATCH])).var(0).any()):
            break
    return extractor.to(CPU, **CONTIGUOUS).eval().requires_grad_(False)


def _descend(extractor: Classifier, train: Split, rate: float) -> None:
    """Adam with cosine decay, no augmentation."""
    steps = min(MOST_STEPS, MOST_EPOCHS * len(train) // BATCH)
    optimizer = torch.optim.Adam(extractor.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(train))])
        index, order = order[:BATCH].to(train.images.device), order[BATCH:]
        images, labels = extractor.lesson(train, index)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(extractor.classes(extractor.trunk(images)), labels).backward()
        optimizer.step()
        schedule.step()


def draw_untrained(shape: ImageShape, seed: int) -> UntrainedNetworks:
    """The same `seed` gives the same networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UntrainedNetworks(shape).eval().requires_grad_(False)


def to_bytes(extractor: FeatureExtractor) -> bytes:
    """A program's own file; of the others a safetensors file that says what it is of."""
    if isinstance(extractor, Program):
        return extractor.content
    described = {"kind": extractor.kind, "shape": extractor.shape, **extractor.options}
    return save(extractor.state_dict(), metadata={"extractor": json.dumps(described)})


def from_bytes(content: bytes) -> FeatureExtractor:
    """What `to_bytes` wrote. Raises whatever its readers raise on anything else."""
    if content.startswith(b"PK"):  # as every zip file does
        return Program(content)
    weights = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = json.loads(header["__metadata__"]["extractor"])
    with torch.device("meta"):  # takes neither time nor random numbers
        made: FeatureExtractor = KINDS[described.pop("kind")](ImageShape(*described.pop("shape")), **described)
    made.load_state_dict(weights, assign=True)
    return made.eval().requires_grad_(False)


def load_extractor(path: Path, sha256: str) -> FeatureExtractor:
    """Read an extractor back. Raises ValueError when the file is not the one that was frozen."""
    with refusing(path, OSError):
        content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Refused(f"{path}: not the extractor this run was scored with (its SHA-256 differs)")
    with refusing(f"{path}: not readable as an extractor"):
        return from_bytes(content)
