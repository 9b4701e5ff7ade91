"""The files of an export: weights, prior and programs that work without this package, each checked by what it gives."""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from tuner.own_model import told
from tuner.run import write_atomic
from tuner.vae import codec
from tuner.vae.fitted import FittedModel, tempered
from tuner.vae.image_grid import fixed_noise, sheet
from tuner.vae.model import Model, OwnModel
from tuner.vae.prior import Sampler

TOLERANCE, OWN_TOLERANCE = 1e-5, 1e-3  # the second, a quarter of a grey level, for operators that we did not choose
SAMPLES = 100


class Encoder(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> mean (B, Z), and log-variance (B, Z) where the model has one."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mean, log_variance = self.model.encode(images)
        return mean if log_variance is None else (mean, log_variance)


class Decoder(nn.Module):
    """Latents (B, Z) -> images (B, C, H, W) in [0, 1]."""

    def __init__(self, fitted: FittedModel):
        super().__init__()
        self.model, self.temperature = fitted.model, fitted.temperature

    def forward(self, latents: Tensor) -> Tensor:
        return tempered(self.model.decode(latents), self.temperature)


@dataclass(frozen=True)
class Part:
    """One network of an export, with the names of what it takes and gives, and what it gives of some inputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    cases: list[tuple[tuple[Tensor, ...], Tensor]]  # batches of different sizes, and the first output of each
    theirs: bool  # a user's own network, which PyTorch may not be able to write, and may use weights without a gradient

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The batch size is free."""
        shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in self.inputs)
        given = tuple(self.inputs.values())
        return torch.export.export(self.module if self.theirs else self._trimmed(), given, dynamic_shapes=shapes)

    def _trimmed(self) -> nn.Module:
        """A copy in which weights that have no part in the output take no room."""
        module = copy.deepcopy(self.module).eval().requires_grad_(True)
        outputs = module(*self.inputs.values())
        total = torch.stack([part.sum() for part in (outputs if isinstance(outputs, tuple) else (outputs,))]).sum()
        weights = list(module.parameters())
        if weights:
            gradients = torch.autograd.grad(total, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is None:
                    weight.data = weight.data.new_empty(0)
        return module.requires_grad_(False)

    def compare(self, what: str, read: Callable[..., Any], exact: bool = False) -> None:
        """Raises RuntimeError where what was read gives something else."""
        tolerance = OWN_TOLERANCE if self.theirs and not exact else TOLERANCE
        for given, expected in self.cases:
            found = read(*given)
            error = ((found[0] if isinstance(found, tuple) else found) - expected).abs().max().item()
            if not error <= tolerance * max(1.0, expected.abs().max().item()):
                raise RuntimeError(f"{what} differs from the checkpoint by {error:.2g}")


@torch.no_grad()
def parts_of(fitted: FittedModel, images: Tensor) -> dict[str, Part]:
    """Encoder, decoder and prior by name; `images` (N, C, H, W) in [0, 1] are what they are compared on."""
    model = fitted.model.eval()
    own = fitted.parameters.model == "own"
    latents, uniform = torch.zeros(2, model.latent_dim), torch.zeros(2)
    cases: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = {"encoder": [], "decoder": [], "prior": []}
    for batch in (images[:1], images):
        means, log_variances = model.encode(batch)
        normal, level = fixed_noise(len(batch))
        noise = normal[:, : model.latent_dim].contiguous()
        cases["encoder"].append(((batch,), means))
        cases["decoder"].append(((means,), fitted.draw(means)))
        cases["prior"].append(((noise, level), fitted.prior.place(noise, level)))
    heads = ["mean"] if log_variances is None else ["mean", "log_variance"]
    blank = {"images": torch.zeros(2, *images.shape[1:])}
    return {
        "encoder": Part(Encoder(model), blank, heads, cases["encoder"], own),
        "decoder": Part(Decoder(fitted), {"latents": latents}, ["images"], cases["decoder"], own),
        "prior": Part(
            Sampler(fitted.prior), {"noise": latents, "uniform": uniform}, ["latents"], cases["prior"], False
        ),
    }


def write_files(
    fitted: FittedModel, info: dict[str, Any], directory: Path, images: Tensor, own: OwnModel | None = None
) -> None:
    """Everything of an export, into an empty directory, checked on `images` (N, C, H, W) in [0, 1].

    Of a user's own model, made by `own`, programs are left out that PyTorch can't write, or that give something else;
    config.json says why. Raises RuntimeError where any other file gives something else than the checkpoint.
    """
    weights = fitted.model.eval().state_dict()  # in the file none shares memory with another
    alone = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    write_atomic(directory / "weights.safetensors", save(alone))
    prior = io.BytesIO()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in fitted.prior.state_dict().items()}
    np.savez(prior, **arrays)
    write_atomic(directory / "prior.npz", prior.getvalue())
    left_out: dict[str, str] = {}
    for stem, part in parts_of(fitted, images).items():
        for kind, (to_bytes, reader) in PROGRAMS.items():
            path = directory / f"{stem}.{kind}"
            try:
                write_atomic(path, _quietly(to_bytes, part))
                if part.theirs:
                    part.compare(path.name, reader(path))
            except Exception as error:  # PyTorch and onnxruntime raise whatever they meet
                if not part.theirs:
                    raise
                path.unlink(missing_ok=True)
                left_out[path.name] = told(error)
    write_atomic(directory / "config.json", json.dumps(info | {"left_out": left_out}, indent=2) + "\n")
    check_files(fitted, images, directory, own)
    drawn = codec.load(directory, own).sample(SAMPLES)
    write_atomic(directory / "samples.png", sheet(drawn, 10, info["images"]["ink"]))


def check_files(fitted: FittedModel, images: Tensor, directory: Path, own: OwnModel | None = None) -> None:
    """Compare every file that is there with the checkpoint, on one image and on all. Raises RuntimeError."""
    loaded = codec.load(directory, own)
    of_weights: dict[str, Callable[..., Tensor]] = {
        "encoder": loaded.encode,
        "decoder": loaded.decode,
        "prior": loaded.fitted.prior.place,
    }
    for stem, part in parts_of(fitted, images).items():
        part.compare(f"{stem} as safetensors", of_weights[stem], exact=True)
        for kind, (_, reader) in PROGRAMS.items():
            path = directory / f"{stem}.{kind}"
            if path.exists():
                part.compare(f"{stem} as {kind}", reader(path))


def _quietly(to_bytes: Callable[[Part], bytes], part: Part) -> bytes:
    """PyTorch's exporters print where they give up, and warn of their own deprecations."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return to_bytes(part)


def _to_pt2(part: Part) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(part.program, buffer)
    return buffer.getvalue()


def _to_onnx(part: Part) -> bytes:
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in part.inputs)
    names: dict[str, Any] = {"input_names": list(part.inputs), "output_names": part.outputs}
    made = torch.onnx.export(part.program, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert made is not None
    content: bytes = made.model_proto.SerializeToString()
    return content


def _from_onnx(path: Path) -> Callable[..., Tensor]:
    """The first output of an ONNX file as a function of its inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*given: Tensor) -> Tensor:
        inputs = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


PROGRAMS: dict[str, tuple[Callable[[Part], bytes], Callable[[Path], Callable[..., Any]]]] = {
    "pt2": (_to_pt2, lambda path: torch.export.load(path).module()),
    "onnx": (_to_onnx, _from_onnx),
}
