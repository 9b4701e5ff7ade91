"""The digits, one extractor, one fitter and one scorer, shared by all tests of the model side."""

from pathlib import Path

import pytest

from tuner.vae import data
from tuner.vae.data import Data, _torchvision_datasets
from tuner.vae.extractor import FeatureExtractor, train_extractor
from tuner.vae.fitted import Fitter
from tuner.vae.score import Scorer

_torchvision_datasets()  # torchmetrics imports torchvision, which beside a CPU torch dies without this


@pytest.fixture(scope="session")
def digits() -> Data:
    return data.load("digits", Path("never read"))


@pytest.fixture(scope="session")
def extractor(digits: Data) -> FeatureExtractor:
    return train_extractor(digits, seed=0, width=8)


@pytest.fixture(scope="session")
def fitter(digits: Data) -> Fitter:
    return Fitter(digits.train, seed=0, count=997, matching_count=400)


@pytest.fixture(scope="session")
def scorer(digits: Data, extractor: FeatureExtractor) -> Scorer:
    return Scorer(extractor, digits.train, digits.validation, seed=0, count=400)
