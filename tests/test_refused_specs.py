"""Whatever is wrong with a spec file is a ValueError of one line that names the file."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spec_file import SEARCH, written

from tuner import spec as specs
from tuner.vae.parameters import Parameters

RAW = yaml.safe_load(SEARCH)


def _refusal(path: Path) -> str | None:
    """What is wrong with a file, or None. Fails where it is not told in one line that names the file."""
    try:
        specs.load(path)
    except ValueError as error:
        text = str(error)
    else:
        return None
    assert text.startswith(f"{path}: ")
    assert len(text.splitlines()) == 1, text
    return text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just words",
        "3",
        "[space, budget]",
        "space: {a: 1, a",
        "a: b: c",
        "\t- x",
        'a: "\0"',
        "? [1]\n: 2",
        "space: &loop {latent_dim: *loop}",
        "space: !!python/object:os.system {}",
        "seed: 2020-13-45",  # a date that is none
        "seed: 0b_",
        f"seed: {'9' * 5000}",  # more digits than Python converts
        "[" * 3000,
        "1: 2",
        "null: 2",
        r'"a\nb": 2',
        r'{space: {latent_dim: {choices: [4, 8]}}, fixed: {"a\nb": 2}}',
        r'{space: {latent_dim: {choices: [4, 8]}}, points_to_evaluate: [{"a\nb": 2}]}',
        r'space: {"a\nb": {type: int, low: 1, high: 2}}',
        r'space: {latent_dim: {choices: [4, 8], "a\nb": 2}}',
        f"space: {{latent_dim: {{type: int, low: {'9' * 400}, high: 8}}}}",
        f"space: {{latent_dim: {{type: int, low: 4, high: {'9' * 400}, step: 2}}}}",
    ],
)
def test_a_file_that_is_no_spec_is_refused_in_one_line(tmp_path, text):
    assert _refusal(written(tmp_path, text))


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_bytes(b"\xff\x00\x80")
    with pytest.raises(ValueError, match=r"some\.yaml: not a text file"):
        specs.load(path)


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a nested mapping or list, the whole first."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in items for place in _places(child, (*path, key)))]


WORDS = ["", "1e-3", "a\nb", "\u2028", "int", "loss", "30m", "-1", "low", "high", "log", "step", "type", "choices"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**30, 10**400, -(10**400), 2**32, 1e308, 1e-320, -0.0]),
    st.floats(allow_subnormal=False),
    st.sampled_from([*WORDS, *Parameters.model_fields]),
    st.text(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=4,
)
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "delete", "add"]), SCALARS, VALUES),
    min_size=1,
    max_size=4,
)


def _mutated(mutations: list[tuple[int, str, Any, Any]]) -> Any:
    """The spec with a value replaced, deleted or added at each of some places."""
    raw = copy.deepcopy(RAW)
    for number, kind, key, value in mutations:
        places = _places(raw)[1:]
        if not places:
            break
        *parents, last = places[number % len(places)]
        node = raw
        for part in parents:
            node = node[part]
        if kind == "replace":
            node[last] = value
        elif kind == "delete":
            del node[last]
        elif isinstance(node, dict):
            node[key] = value
        else:
            node.append(value)
    return raw


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mutations=MUTATIONS)
@example(mutations=[(3, "add", "a\nb", 1)])
@example(mutations=[(4, "replace", None, 10**400)])
def test_a_mutated_spec_loads_or_is_refused_in_one_line(tmp_path_factory, mutations):
    path = written(tmp_path_factory.getbasetemp(), yaml.safe_dump(_mutated(mutations)))
    _refusal(path)
