"""Every random number is a function of (study seed, what it is for, trial, epoch or step), never of what ran before: a
trial gives the same numbers alone or beside others, and a checkpoint needs no generator's state."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What a random number is for: streams never share numbers."""

    INITIALISATION = 0
    ORDER = 1
    NOISE = 2
    SCORE = 3
    EXTRACTOR = 4
    PROPOSAL = 5
    RETRAIN = 6
    PROMOTE = 7
    PIXELS = 8


class Scoring(IntEnum):
    """What a random number of `Stream.SCORE` is for."""

    IMAGES = 0
    POSTERIOR = 1
    MIXTURE = 2
    SAMPLES = 3
    RECONSTRUCTION = 4
    TEMPERATURE = 5
    LIKELIHOOD = 6
    BINARIZATION = 7
    MATCHING = 8
    HELD_OUT_PARTS = 9
    TRAINING_PARTS = 10
    SAMPLE_PARTS = 11


def derive_seed(seed: int, *path: int) -> int:
    """A well-mixed 63-bit seed for (seed, *path), all non-negative; the path starts with a Stream."""
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *path: int) -> torch.Generator:
    """A generator on the CPU, seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))
