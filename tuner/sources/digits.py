"""scikit-learn's handwritten digits."""

import numpy as np
import torch
import torch.nn.functional as F

from tuner.data_spec import DigitsSpec
from tuner.sources.splits import SPLIT_SEED, Splits, take
from tuner.vae.data import Split

VALIDATION = TEST = 400


def read(spec: DigitsSpec) -> Splits:
    """1,797 digits (UCI, 8x8, 17 greys), resized to 28x28; 997 / 400 / 400."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    small, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(small).float().reshape(-1, 1, 8, 8) / 16
    resized = F.interpolate(grey, size=(28, 28), mode="bicubic", align_corners=False).clamp(0, 1)
    everything = Split(resized.mul(255).round().to(torch.uint8), torch.from_numpy(labels).long())
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST, random_state=SPLIT_SEED, stratify=labels)
    train, validation = train_test_split(rest, test_size=VALIDATION, random_state=SPLIT_SEED, stratify=labels[rest])
    return {
        "train": take(everything, train),
        "validation": take(everything, validation),
        "test": take(everything, test),
    }
