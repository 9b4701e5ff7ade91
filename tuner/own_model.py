"""A user's own model: the function that the command line names, imported, and tried once before anything starts.

No file ever names code to import: what a run's spec keeps of it only tells another source apart.
"""

import hashlib
import importlib
import inspect
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.spec import OwnModelSpec, Spec
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.errors import Refused, one_line, refusing
from tuner.vae.metrics import METRICS
from tuner.vae.model import Builder, OwnModel, features
from tuner.vae.parameters import Parameters
from tuner.vae.shape import ImageShape
from tuner.vae.step import AutogradStep, Factors, State

NOT_THEIRS = (f"{Path(__file__).parent}/", f"{Path(torch.__file__).parent}/", "<frozen ")  # where no user's code is


def load(given: str | OwnModel | None) -> tuple[OwnModel | None, OwnModelSpec | None]:
    """A function, or the one that `MODULE:FUNCTION` names, and what tells its source apart; None for none.

    What lies in the current directory can be imported. Raises Refused where there is no such function.
    """
    if given is None:
        return None, None
    if not isinstance(given, str):
        file = getattr(sys.modules[given.__module__], "__file__", None)  # a notebook has none
        with refusing(f"model {given}", AttributeError, OSError, TypeError):
            of = Path(file).stem if file and given.__module__ == "__main__" else given.__module__
            name = f"{of}:{given.__qualname__}"
            source = Path(file).read_bytes() if file else inspect.getsource(given).encode()
        return given, OwnModelSpec(function=name, sha256=hashlib.sha256(source).hexdigest())
    name = given
    module_name, _, function = name.partition(":")
    if not (module_name and function):
        raise Refused(f"--model {name}: expected MODULE:FUNCTION, such as my_package.my_module:build")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
        build = getattr(module, function)
        digest = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    except (Exception, SystemExit) as error:  # a module can raise whatever it likes
        raise Refused(f"--model {name}: {told(error)}") from error
    if not callable(build):
        raise Refused(f"--model {name}: {function} is no function but of type {type(build).__name__}")
    return build, OwnModelSpec(function=name, sha256=digest)


def check(spec: Spec, shape: ImageShape, own: OwnModel | None) -> None:
    """Make the smallest and the largest model that a search can ask for, and take a step on two images of noise with
    each.

    Raises Refused where a model of the user's own is not what the protocol says, or the spec not what it takes.
    """
    if own is None:
        return
    assert spec.own_model
    named = f"--model {spec.own_model.function}"
    if "own" not in spec.values("model"):
        raise Refused(f"{named}: the spec has other models only; let fixed.model or space.model be own")
    ends: list[dict[str, Any]] = [{name: entry.ends()[end] for name, entry in spec.space.items()} for end in (0, -1)]
    for searched in ends:
        parameters = spec.parameters(searched | {"model": "own"})
        try:
            _try(own, shape, parameters, spec)
        except Exception as error:  # theirs, where it is not ours
            raise Refused(f"{named}: {error if isinstance(error, Refused) else told(error)}") from error


def _try(own: OwnModel, shape: ImageShape, parameters: Parameters, spec: Spec) -> None:
    takes = inspect.signature(own)
    try:
        takes.bind(shape, parameters.latent_dim, **parameters.options)
    except TypeError as error:
        raise Refused(f"takes {takes}, gets shape, latent_dim and the spec's model.NAME: {error}") from error
    generator, latents = torch.Generator().manual_seed(0), (2, parameters.latent_dim)
    images = torch.rand(2, *shape, generator=generator)
    model = Builder(shape, own)(parameters, seed=0)
    encoded: Any = model.encode(images)
    if not isinstance(encoded, tuple) or len(encoded) != 2:
        raise Refused(f"encode gives a {type(encoded).__name__}, expected (mean, log_variance), or (mean, None)")
    mean, log_variance = encoded
    _require("the mean of encode", mean, latents)
    if log_variance is not None:
        _require("the log_variance of encode", log_variance, latents)
    for objective in spec.objective:
        if log_variance is None and METRICS[objective.metric].needs_vae:
            raise Refused(f"encode gives no log_variance, without which {objective.metric} is not defined")
    _require("what decode gives", model.decode(mean), images.shape)
    low, high = model.decode(100 * torch.randn(latents, generator=generator)).aminmax()
    if 0 <= low < high <= 1:
        raise Refused(
            "decode gives numbers from 0 to 1 for latents of any size, expected logits: leave the sigmoid out"
        )
    model.eval()
    twice = [model.decode(model.encode(images)[0]) for _ in range(2)]
    if not torch.equal(*twice):
        raise Refused("gives other images the second time: once it is in eval mode, nothing in it may be random")
    found = features(model, images)
    _require("what its features gives", found, (2, found.shape[-1]))
    state = State.of(model)
    step = AutogradStep(state, parameters, torch.device("cpu"))
    step(images, torch.zeros(latents), Factors(parameters.learning_rate, 1.0))
    step.store()
    Checkpoint.from_bytes(Checkpoint(parameters, state).to_bytes(), own)


def _require(what: str, found: Any, shape: tuple[int, ...]) -> None:
    said = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
    if said != tuple(shape):
        raise Refused(f"{what} is {said}, expected {tuple(shape)} for two images")
    if not (found.is_floating_point() and found.isfinite().all()):
        raise Refused(f"{what} is not finite, or of {found.dtype}, for two images of noise")


def told(error: BaseException) -> str:
    """An error's first cause, which libraries wrap in advice, in one line and the line of the user's code behind it."""
    while error.__cause__:
        error = error.__cause__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(NOT_THEIRS)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"
