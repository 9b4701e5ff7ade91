"""Parameters: the classic defaults, and what is refused."""

import math

import pytest
from pydantic import ValidationError

from tuner.vae.parameters import CLASSIC, ModelParameters, Parameters, SamplingParameters, TrainingParameters


def test_defaults_are_the_classic_settings():
    classic = (CLASSIC.latent_dim, CLASSIC.learning_rate, CLASSIC.kl_weight, CLASSIC.prior)
    assert classic == (16, 1e-3, 1.0, "standard_normal")
    assert (CLASSIC.model, CLASSIC.width, CLASSIC.likelihood, CLASSIC.schedule) == ("vae", 32, "gaussian", "constant")


def test_every_parameter_says_what_it_is():
    assert all(field.description for field in Parameters.model_fields.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latent_dim", 0),
        ("latent_dim", 513),
        ("latent_dim", 2.5),
        ("width", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("warmup_steps", -1),
        ("batch_size", 0),
        ("kl_weight", -0.1),
        ("kl_weight", math.inf),
        ("kl_warmup_epochs", -1.0),
        ("prior_components", 0),
        ("prior_components", 1001),
        ("model", "gan"),
        ("likelihood", "poisson"),
        ("schedule", "linear"),
        ("prior", "vamp"),
        ("temperature", "two"),
        ("temperature", 1.0),
        ("beta", 1.0),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValidationError, match=name):
        Parameters(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("latent_dim", 1), ("latent_dim", 512), ("width", 512), ("kl_weight", 0.0), ("prior_components", 1000)],
)
def test_the_bounds_themselves_are_allowed(name, value):
    assert getattr(Parameters(**{name: value}), name) == value


def test_parameters_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        CLASSIC.latent_dim = 2


def test_json_brings_them_back():
    parameters = Parameters(latent_dim=3, learning_rate=0.1 + 0.2, prior="gaussian_mixture")
    assert Parameters.model_validate_json(parameters.model_dump_json()) == parameters


def test_parameters_are_their_three_parts_which_share_no_name():
    parts = [part.model_fields.keys() for part in (ModelParameters, TrainingParameters, SamplingParameters)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert set().union(*parts) == Parameters.model_fields.keys()
    assert all(isinstance(CLASSIC, part) for part in (ModelParameters, TrainingParameters, SamplingParameters))
