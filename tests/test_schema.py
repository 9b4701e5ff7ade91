"""The JSON schema that editors complete and check spec files with: it takes and refuses what the loader does."""

import copy
import json
import subprocess
import sys

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from spec_file import SEARCH

from tuner import spec as specs
from tuner import yaml_text
from tuner.spec import DEFAULT, Spec
from tuner.vae.parameters import Parameters

SHIPPED = sorted(DEFAULT.parent.glob("*.yaml"))
RAW = yaml.safe_load(SEARCH)


@pytest.fixture(scope="module")
def editor() -> Draft202012Validator:
    """What an editor checks a spec file with."""
    schema = json.loads(specs.schema())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_are_valid_under_the_schema(editor, path):
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert [error.message for error in editor.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("objective", "mse"),
        ("objective", {"metric": "mse"}),
        ("objective", ["mse", {"metric": "rate", "direction": "maximize"}]),
        ("budget.time_limit", "30m"),
        ("budget.time_limit", 1800),
        ("budget.time_limit", None),
        ("space.batch_size", {"choices": [32, 64]}),
        ("space.width", {"type": "int", "low": 8, "high": 64, "step": 8}),
        ("fixed.likelihood", "bernoulli"),
        ("points_to_evaluate", [{"latent_dim": 8}]),
        ("data", {"name": "mnist", "directory": "somewhere", "download": False}),
    ],
)
def test_what_loads_is_valid_under_the_schema(editor, key, value):
    raw = copy.deepcopy(RAW)
    yaml_text.put(raw, key, value)
    if key == "space.batch_size":
        del raw["fixed"]["batch_size"]
    assert Spec.model_validate(raw)
    assert [error.message for error in editor.iter_errors(raw)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("colour", "red"),
        ("budget.colour", "red"),
        ("space.colour", {"choices": ["red"]}),
        ("fixed.colour", "red"),
        ("fixed.likelihood", "poisson"),
        ("space.latent_dim", {"type": "int", "low": 4}),
        ("objective", "accuracy"),
        ("objective", []),
        ("data.name", "cifar"),
        ("budget.trials", 0),
    ],
)
def test_the_schema_refuses_what_does_not_load(editor, key, value):
    raw = copy.deepcopy(RAW)
    yaml_text.put(raw, key, value)
    with pytest.raises(ValidationError):
        Spec.model_validate(raw)
    assert not editor.is_valid(raw)


def test_the_schema_knows_and_describes_every_parameter(editor):
    for part in ("space", "fixed"):
        described = editor.schema["properties"][part]["properties"]
        assert described.keys() == Parameters.model_fields.keys()
        assert all(entry["description"] for entry in described.values())


def test_the_shipped_schema_is_what_the_command_prints():
    command = [sys.executable, "-m", "tuner.spec", "--schema"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == (DEFAULT.parent / "schema.json").read_text()
    assert done.stderr == ""
