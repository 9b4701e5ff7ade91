"""YAML as people write it, and what is laid over a file."""

import re
from pathlib import Path

import pytest
import yaml
from spec_file import SEARCH, written

from tuner import spec as specs
from tuner import yaml_text


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A file of every section."""
    return written(tmp_path, SEARCH, "search.yaml")


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("budget.trials=8", ("budget.trials", 8)),
        ("data.download=false", ("data.download", False)),
        ("budget.time_limit=30m", ("budget.time_limit", "30m")),
        ("fixed.list=[5, 10]", ("fixed.list", [5, 10])),
        ("space.prior={choices: [standard_normal]}", ("space.prior", {"choices": ["standard_normal"]})),
        ("data.directory=a=b", ("data.directory", "a=b")),
        ("budget.time_limit=", ("budget.time_limit", None)),
    ],
)
def test_an_override_is_a_dotted_key_and_a_value_typed_as_in_yaml(text, pair):
    assert yaml_text.parse_override(text) == pair


@pytest.mark.parametrize("text", ["budget.trials", "=8", " =8", "budget.trials={", "seed=2020-13-45"])
def test_an_override_without_key_or_value_is_refused_by_its_text(text):
    with pytest.raises(ValueError, match="--set") as error:
        yaml_text.parse_override(text)
    assert text.strip() in str(error.value)


def test_an_override_names_options_of_a_users_own_model_by_their_prefix(search):
    overrides = [
        ("space.model.depth", {"type": "int", "low": 1, "high": 4}),
        ("space.model.depth.low", 2),
        ("space.model.choices", ["vae", "own"]),
        ("fixed.model.width", 8),
    ]
    spec = specs.load(search, overrides)
    assert (spec.values("model.depth"), spec.values("model")) == ([2, 4], ["vae", "own"])
    assert spec.parameters({"model.depth": 3, "model": "own"}).options == {"depth": 3, "width": 8}
    assert specs.load(search, [("fixed.model", "own")]).values("model") == ["own"]


def test_overrides_are_laid_over_the_file(search):
    keys = ["budget.trials", "space.latent_dim.high", "fixed.width", "space.schedule", "objective"]
    values = [3, 8, 16, {"choices": ["cosine"]}, "mse"]
    spec = specs.load(search, list(zip(keys, values, strict=True)))
    plain = specs.load(search)
    assert (spec.budget.trials, spec.budget.max_epochs) == (3, plain.budget.max_epochs)
    assert (spec.space["latent_dim"].low, spec.space["latent_dim"].high) == (4, 8)
    assert spec.fixed == {**plain.fixed, "width": 16}
    assert list(spec.space) == [*plain.space, "schedule"]
    assert spec.objective[0].metric == "mse"


def test_an_override_can_reach_a_section_that_the_file_does_not_have(tmp_path):
    path = written(tmp_path, "space: {latent_dim: {choices: [4, 8]}}")
    assert specs.load(path, [("budget.trials", 3)]).budget.trials == 3


@pytest.mark.parametrize("key", ["seed.x", "retrain.priors.0", "objective.metric"])
def test_an_override_below_a_plain_value_is_refused(search, key):
    with pytest.raises(ValueError, match=rf"--set {key}: .* is not a mapping"):
        specs.load(search, [(key, 3)])


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    """PyYAML wants a dot in 1e-3, so that it comes as a string."""
    assert yaml.safe_load("1e-3") == "1e-3"
    text = SEARCH.replace("low: 0.0003", "low: 1e-3") + "points_to_evaluate: [{learning_rate: 2e-3}]\n"
    spec = specs.load(written(tmp_path, text))
    assert spec.space["learning_rate"].low == 0.001
    assert type(spec.space["learning_rate"].low) is float
    assert spec.points_to_evaluate == ({"learning_rate": 0.002},)


def test_a_fixed_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    spec = specs.load(written(tmp_path, "{space: {latent_dim: {choices: [8]}}, fixed: {learning_rate: 1e-2}}"))
    assert spec.parameters({"latent_dim": 8}).learning_rate == 0.01


def test_a_number_that_yaml_reads_as_text_is_a_number_among_choices_too(tmp_path):
    text = SEARCH.replace("{type: float, low: 0.0003, high: 0.01, log: true}", "{choices: [1e-3, 1e-2]}")
    spec = specs.load(written(tmp_path, text))
    assert spec.space["learning_rate"].choices == (0.001, 0.01)
    assert spec.baseline_point() == {"latent_dim": 16, "learning_rate": 0.001, "kl_weight": 1}


def test_what_an_anchor_brings_may_be_given_again(tmp_path):
    """A key given twice is refused (test_bad_input); one that overrides what a merge brings is none."""
    text = "space: {latent_dim: &range {type: int, low: 2, high: 8}, width: &wide {<<: *range, high: 16}, "
    spec = specs.load(written(tmp_path, text + "batch_size: {<<: *wide, high: 32}}"))
    assert [spec.space[name].high for name in ("latent_dim", "width", "batch_size")] == [8, 16, 32]


@pytest.mark.parametrize(
    ("text", "number"), [("1:30", 90), ("010", 8), ("-1:30.5", -90.5), ("1:00:00", 3600), ("+017", 15), ("0_7", 7)]
)
def test_a_number_that_yaml_reads_as_another_one_than_people_is_refused_by_both(tmp_path, text, number):
    assert yaml.safe_load(text) == number
    for spec in (f"{SEARCH}\nretrain2: {text}", SEARCH.replace("low: 4", f"low: {text}")):
        with pytest.raises(ValueError, match=re.escape(f"{text} would be read as {number}")):
            specs.load(written(tmp_path, spec))
    with pytest.raises(ValueError, match=re.escape(f"--set seed={text}: not YAML: {text} would be read as {number}")):
        yaml_text.parse_override(f"seed={text}")


def test_numbers_that_say_how_they_are_meant_and_quoted_texts_are_taken():
    assert yaml_text.parse("[0x1F, 0b11, 1_000, 0, 0.5, -0.5, 0e1, '1:30', \"010\", 1:30m]") == [
        *(31, 3, 1000, 0, 0.5, -0.5, 0.0),
        *("1:30", "010", "1:30m"),
    ]
