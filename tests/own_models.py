"""Models of users' own, for tests of what takes them: a spec that searches one, and an export of one."""

import json
from pathlib import Path
from typing import Any

import torch

from tuner.export_files import write_files
from tuner.own_model import load
from tuner.spec import Spec
from tuner.vae.fitted import FittedModel
from tuner.vae.model import Builder, OwnModel
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.shape import ImageShape

DIGITS, COLOUR = ImageShape(1, 28, 28), ImageShape(3, 32, 32)


def spec_of(name: str, **parts: Any) -> tuple[Spec, OwnModel | None]:
    """A spec that searches a model of a user's own."""
    own, named = load(name)
    assert named
    raw: dict[str, Any] = {"space": {"latent_dim": {"type": "int", "low": 2, "high": 3}}, "own_model": named}
    return Spec.model_validate(raw | parts), own


def written(name: str, directory: Path, shape: ImageShape = DIGITS, **options: Any) -> FittedModel:
    """A fitted model of a user's own, and its export."""
    own, _ = load(name)
    parameters = Parameters.model_validate({"model": "own", "latent_dim": 3} | options)
    fitted = FittedModel(Builder(shape, own)(parameters, 0).eval(), parameters, standard_normal(3))
    directory.mkdir()
    images = torch.rand(7, *shape, generator=torch.Generator().manual_seed(0))
    write_files(fitted, described(fitted), directory, images, own)
    return fitted


def described(fitted: FittedModel) -> dict[str, Any]:
    images = {"shape": fitted.model.shape, "ink": True}
    return {"images": images, "parameters": fitted.parameters.model_dump(), "temperature": 1.0}


def left_out(directory: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / "config.json").read_text())["left_out"]
    return found
