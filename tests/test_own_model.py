"""A user's own model: what is refused before anything starts, how it gets to workers, and how it leaves."""

import functools
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import DIGITS, left_out, spec_of, written
from ray import cloudpickle
from safetensors.torch import load_file

import tuner.export
import tuner.report
import tuner.retrain
import tuner.search
from tuner import spec as specs
from tuner.own_model import check, load
from tuner.pool import send_by_value
from tuner.run import RunFiles
from tuner.vae import codec
from tuner.vae.errors import Refused
from tuner.vae.parameters import CLASSIC
from tuner.vae.shape import ImageShape

ROOT = Path(__file__).parents[1]

LINEAR = """
import math
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self, shape, latent_dim, depth):
        super().__init__()
        self.pixels, self.size = tuple(shape), math.prod(shape)
        self.down = nn.Linear(self.size, 2 * latent_dim)
        self.between = nn.Sequential(*(nn.Linear(latent_dim, latent_dim) for _ in range(depth)))
        self.up = nn.Linear(latent_dim, self.size)

    def encode(self, images):
        mean, log_variance = self.down(images.flatten(1)).chunk(2, 1)
        return mean, log_variance

    def decode(self, latents):
        return self.up(self.between(latents)).unflatten(1, self.pixels)

def build(shape, latent_dim, depth=1):
    return Linear(shape, latent_dim, depth)
"""

SENT = """
from tuner.own_model import load
from tuner.pool import send_by_value
from tuner.spec import Spec
own, named = load(build)
print(named.function)
spec = {"space": {"latent_dim": {"choices": [2]}}, "fixed": {"model": "own"}, "own_model": named.model_dump()}
send_by_value(Spec.model_validate(spec), own)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a module, which no other test has imported, into the current folder -> the name of its build."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str = LINEAR, *changes: tuple[str, str]) -> str:
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        name = f"own_{uuid.uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return f"{name}:build"

    return write


def refusal(name: str, shape: ImageShape = DIGITS, **parts: Any) -> str:
    """The one line with which a model is refused."""

    def tried() -> None:
        spec, own = spec_of(name, **parts)
        check(spec, shape, own)

    with pytest.raises(Refused) as refused:
        tried()
    line = str(refused.value)
    assert line.startswith(f"--model {name}: ")
    assert len(line.splitlines()) == 1
    return line


# What can't be imported


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere_to_be_found:build", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("nowhere_to_be_found", "expected MODULE:FUNCTION, such as my_package.my_module:build"),
        (":build", "expected MODULE:FUNCTION"),
        ("tuner.vae.model:", "expected MODULE:FUNCTION"),
        ("tuner.vae.model:bild", "AttributeError: module 'tuner.vae.model' has no attribute 'bild'"),
        ("tuner.vae.shape:LEAST_MAP", "LEAST_MAP is no function but of type int"),
    ],
)
def test_what_cannot_be_imported(name, words):
    assert words in refusal(name)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def build(:\n", "SyntaxError: invalid syntax"),
        ("import torch\n\nassert torch.zeros(1).item(), 'nothing there'\n", "AssertionError: nothing there (own_"),
        (
            "import torch\n\nassert torch.zeros(1).item(), 'nothing there'\n",
            ".py, line 3: assert torch.zeros(1).item()",
        ),
        ("import sys\nsys.exit('not now')\n", "SystemExit: not now"),
    ],
)
def test_a_module_that_fails_when_it_is_imported_says_in_which_line(module, source, words):
    assert words in refusal(module(source))


# What it takes, and what the spec gives


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("def build():", "takes (), gets shape, latent_dim and the spec's model.NAME: too many"),
        ("def build(shape, latent_dim, width):", "missing a required argument: 'width'"),
        ("def build(shape, latent_dim, deep=1):", "got an unexpected keyword argument 'depth'"),
        ("def build(shape, latent_dim, depth, *, norm):", "missing a required"),
    ],
)
def test_options_are_checked_against_the_signature(module, head, words):
    name = module(LINEAR, ("def build(shape, latent_dim, depth=1):", head))
    assert words in refusal(name, fixed={"model.depth": 2})


def test_options_may_be_gathered(module):
    name = module(LINEAR, ("def build(shape, latent_dim, depth=1):", "def build(shape, latent_dim, depth, **other):"))
    spec, own = spec_of(name, fixed={"model.depth": 2, "model.norm": "batch"})
    check(spec, DIGITS, own)


def test_both_ends_of_what_is_searched_are_tried(module):
    name = module(LINEAR, ("range(depth)", "range(1 // (7 - depth))"))
    depth = {"type": "int", "low": 1, "high": 7}
    line = refusal(name, space={"model.depth": depth})
    assert "ZeroDivisionError: integer division or modulo by zero" in line
    assert "line 11: self.between = nn.Sequential(" in line
    spec, own = spec_of(name, space={"model.depth": depth | {"high": 6}})
    check(spec, DIGITS, own)


# What it gives


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("return Linear(shape, latent_dim, depth)", "return lambda images: images")], "gives a function, expected a"),
        ([(".unflatten(1", ".sigmoid().unflatten(1")], "decode gives numbers from 0 to 1 for latents of any size"),
        (
            [("return mean, log_variance", "return mean.long(), log_variance")],
            "the mean of encode is not finite, or of t",
        ),
        ([("return mean, log_variance", "return mean * math.nan, log_variance")], "the mean of encode is not finite"),
        ([("return mean, log_variance", "return mean")], "encode gives a Tensor, expected (mean, log_variance), or"),
        ([("2 * latent_dim", "latent_dim")], "the mean of encode is (2, 1), expected (2, 2) for two images"),
        ([("return mean, log_variance", "return mean, log_variance[:, 1:]")], "the log_variance of encode is (2, 1)"),
        ([("return mean, log_variance", "return mean, 0.5")], "the log_variance of encode is a float, expected (2, 2)"),
        ([(".unflatten(1, self.pixels)", "")], "what decode gives is (2, 784), expected (2, 1, 28, 28) for two images"),
        ([("return self.up(", "return torch.rand(()) * self.up(")], "gives other images the second time"),
        ([("    def decode", "    def decoder")], "AttributeError: 'Linear' object has no attribute 'decode'"),
        ([("nn.Linear(latent_dim, self.size)", "nn.LazyLinear(self.size)")], "uninitialized"),
        (
            [("        self.up =", "        self.features = nn.Conv2d(1, 8, 3)\n        self.up =")],
            "what its features gives is (2, 8, 26, 26), expected (2, 26) for two images",
        ),
        (
            [("latents)).unflatten", "latents.numpy())).unflatten")],
            "RuntimeError: Can't call numpy() on Tensor that req",
        ),
    ],
)
def test_a_model_is_tried_on_two_images_of_noise(module, changes, words):
    assert words in refusal(module(LINEAR, *changes))


def test_what_fails_in_a_users_code_is_told_with_its_line(module):
    line = refusal(module(LINEAR, ("self.down(images.flatten(1))", "self.down(images)")))
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in line
    assert line.endswith(".py, line 15: mean, log_variance = self.down(images).chunk(2, 1))")


def test_an_objective_that_takes_a_vae_is_refused_for_a_model_without_a_variance(module):
    name = module(LINEAR, ("return mean, log_variance", "return mean, None"))
    spec, own = spec_of(name)
    check(spec, DIGITS, own)
    assert "encode gives no log_variance, without which rate is not defined" in refusal(name, objective="rate")


# The spec


def test_a_model_that_is_named_is_the_one_that_is_searched_unless_the_spec_says_otherwise(module):
    name = module()
    spec, own = spec_of(name)
    assert spec.fixed["model"] == "own"
    assert spec.parameters({"latent_dim": 2}).model == "own"
    assert spec.baseline == CLASSIC, "the classic VAE stays the yardstick"
    both, _ = spec_of(name, space={"model": {"choices": ["vae", "own"]}})
    assert "model" not in both.fixed
    check(both, DIGITS, own)
    assert "the spec has other models only" in refusal(name, fixed={"model": "vae"})


def test_own_models_are_not_trained_as_an_array(module):
    with pytest.raises(ValueError, match="execution: fused trains the built-in models alone"):
        spec_of(module(), execution="fused")


def refused(command: Callable[[list[str]], int], *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        command(list(arguments))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("setting", ["fixed.model=own", "fixed={model.depth: 1}", "space.model={choices: [vae, own]}"])
def test_a_spec_that_asks_for_an_own_model_wants_its_code_named(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refused(tuner.search.main, "--set", setting, capsys=capsys)
    assert line.endswith("asks for a model of your own: name its code with --model MODULE:FUNCTION")
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_with_the_code_that_it_began_with_and_no_other(module, tmp_path, capsys):
    name, other = module(), module()
    run = RunFiles(tmp_path / "run")
    run.path.mkdir()
    run.spec.write_text(spec_of(name)[0].to_yaml())
    later = (tuner.retrain.main, tuner.export.main, tuner.report.main)
    for command, words in ((tuner.search.main, ["--run", "run"]), *((main, ["run"]) for main in later)):
        line = refused(command, *words, capsys=capsys)
        assert line == f"error: the model is a user's own: name its code with --model {name}"
        line = refused(command, *words, "--model", other, capsys=capsys)
        assert line == f"error: --model {other}: the run began with {name}"
        if command is not tuner.search.main:
            line = refused(command, *words, "--model", name, capsys=capsys)
            assert "search has not ended" in line or "no search to report on" in line
    line = refused(tuner.retrain.main, "run", "--model", name, capsys=capsys)
    assert line.endswith(f"go on with python -m tuner.search --run run --model {name}")

    with (tmp_path / name.replace(":build", ".py")).open("a") as file:
        file.write("# another\n")
    for command, words in ((tuner.search.main, ["--run", "run"]), *((main, ["run"]) for main in later)):
        line = refused(command, *words, "--model", name, capsys=capsys)
        assert f"error: --model {name}: the run began with another source (sha256 " in line


def test_a_run_of_built_in_models_takes_no_other(module, tmp_path, capsys):
    name, run = module(), RunFiles(tmp_path / "run")
    run.path.mkdir()
    run.spec.write_text(specs.load(specs.DEFAULT).to_yaml())
    line = refused(tuner.report.main, "run", "--model", name, capsys=capsys)
    assert line == f"error: --model {name}: the run began without a model of a user's own"


# To the workers, and out


def test_it_travels_to_workers_that_do_not_have_its_package(module, tmp_path):
    package = tmp_path / "own_blocks"
    package.mkdir()
    (package / "parts.py").write_text(LINEAR.replace("class Linear(", "from own_blocks import sizes\n\nclass Linear("))
    (package / "sizes.py").write_text("")
    name = "own_blocks.parts:build"
    spec, own = spec_of(name, fixed={"model.depth": 2})
    send_by_value(spec, own)
    script = (
        "import sys, pickle; m = pickle.load(open(sys.argv[1], 'rb'))((1, 28, 28), 3, depth=2); print(type(m).__name__)"
    )
    (tmp_path / "sent").write_bytes(cloudpickle.dumps(own))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "sent")], cwd=elsewhere, capture_output=True, text=True
    )
    assert done.stdout == "Linear\n", done.stderr


def test_a_script_that_is_run_names_its_model_as_whoever_imports_it(module, tmp_path):
    name = module(LINEAR + SENT)
    script = tmp_path / f"{name.partition(':')[0]}.py"
    done = subprocess.run([sys.executable, script.name], capture_output=True, text=True)
    assert done.stdout == f"{name}\n", done.stderr


def test_what_is_no_function_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^model functools\.partial.*: .*__qualname__"):
        load(functools.partial(print))


def test_what_cannot_be_sent_is_refused(module):
    name = module(
        LINEAR,
        ("    return Linear(", "    assert lock\n    return Linear("),
        ("import torch", "import threading, torch\nlock = threading.Lock()"),
    )
    spec, own = spec_of(name)
    with pytest.raises(ValueError, match=f"--model {name}: can't be sent to workers: TypeError: cannot pickle"):
        send_by_value(spec, own)


@pytest.mark.slow
def test_weights_that_are_tied_leave_under_both_names(module, tmp_path):
    tied = "        self.up = nn.Linear(latent_dim, self.size)\n        self.twin = self.up"
    name = module(LINEAR, ("        self.up = nn.Linear(latent_dim, self.size)", tied))
    fitted = written(name, tmp_path / "export")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(weights["up.weight"], weights["twin.weight"])
    loaded = codec.load(tmp_path / "export", load(name)[0])
    assert torch.equal(loaded.fitted.model.twin.weight, fitted.model.up.weight)
    assert left_out(tmp_path / "export") == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "files", "words"),
    [
        (
            [("return self.up", "if latents.sum() > 0:\n            latents = 2 * latents\n        return self.up")],
            {"decoder.pt2", "decoder.onnx"},
            "if latents.sum() > 0:",
        ),
        (
            [
                ("return self.up(", "return torch.special.i0e(self.up("),
                ("unflatten(1, self.pixels)", "unflatten(1, self.pixels))"),
            ],
            {"decoder.onnx"},
            "No ONNX function found for <OpOverload(op='prims.bessel_i0e'",
        ),
    ],
    ids=["control flow", "operator"],
)
def test_a_program_that_pytorch_cannot_write_is_left_out_with_its_reason(
    module, tmp_path, capfd, changes, files, words
):
    written(module(LINEAR, *changes), tmp_path / "export")
    reasons = left_out(tmp_path / "export")
    assert reasons.keys() == files
    for reason in reasons.values():
        assert words in reason
        assert len(reason.splitlines()) == 1
    programs = {f"{stem}.{kind}" for stem in ("encoder", "decoder", "prior") for kind in ("pt2", "onnx")} - files
    assert {path.name for path in (tmp_path / "export").rglob("*.*")} == programs | {
        "config.json",
        "prior.safetensors",
        "samples.png",
        "model.safetensors",
    }
    assert capfd.readouterr() == ("", "")
