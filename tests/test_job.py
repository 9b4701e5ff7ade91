"""The spec that a run is worked on by."""

from pathlib import Path

import pytest
import torch

from tuner.job import Request, fastest_precision, load_spec
from tuner.run import RunFiles, write_atomic
from tuner.spec import DEFAULT, Spec, load


def spec(precision: str, **rest: object) -> Spec:
    return load(DEFAULT, [("fixed.precision", precision), *rest.items()])


def test_bfloat16_is_for_processors_with_instructions_for_it_and_no_gpu_beside():
    flags = Path("/proc/cpuinfo")
    known = flags.read_text().split() if flags.exists() else []
    fast = ("avx512_bf16" in known or "amx_bf16" in known) and not torch.cuda.is_available()
    assert fastest_precision(spec("auto")) == ("bfloat16" if fast else "float32")
    assert fastest_precision(spec("auto", **{"resources.gpu": 0.5})) == "float32"


def test_what_auto_means_is_decided_once_a_run(tmp_path):
    run = RunFiles(tmp_path / "run")
    request = Request(overrides=[("fixed.precision", "auto")])
    decided = load_spec(run, request)
    assert decided == spec(fastest_precision(decided))
    (other,) = {"float32", "bfloat16"} - {decided.fixed["precision"]}
    write_atomic(run.spec, spec(other).to_yaml())  # begun on another machine
    assert load_spec(run, request) == spec(other)
    with pytest.raises(ValueError, match=f"fixed.precision: {decided.fixed['precision']} here, {other} there"):
        load_spec(run, Request(overrides=[("fixed.precision", decided.fixed["precision"])]))


def test_auto_is_no_choice_of_a_trial():
    with pytest.raises(ValueError, match=r"space\.precision: auto is decided once a run"):
        load(DEFAULT, [("space.precision", {"choices": ["auto", "float32"]})])
