"""The digits, one extractor, one fitter and one scorer, shared by all tests of the model side."""

import pytest

from tuner import sources
from tuner.data_spec import DigitsSpec
from tuner.sources.torchvision import torchvision_datasets
from tuner.vae.data import Data
from tuner.vae.extractor import Classifier, train_classifier
from tuner.vae.fitted import Fitter
from tuner.vae.score import Scorer

torchvision_datasets()  # torchmetrics imports torchvision, which beside a CPU torch dies without this


@pytest.fixture(scope="session")
def digits() -> Data:
    return sources.load(DigitsSpec())


@pytest.fixture(scope="session")
def extractor(digits: Data) -> Classifier:
    return train_classifier(digits, seed=0, width=8)


@pytest.fixture(scope="session")
def fitter(digits: Data) -> Fitter:
    return Fitter(digits.train, seed=0, count=997, samples=2_000)


@pytest.fixture(scope="session")
def scorer(digits: Data, extractor: Classifier) -> Scorer:
    return Scorer(extractor, digits.train, digits.validation, seed=0, count=400)
