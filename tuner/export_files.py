"""The files of an export: weights, prior and programs that work without this package, each checked by what it gives.

They lie as the Hugging Face Hub has a model's: config.json and model.safetensors, programs in a folder for each format.
"""

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

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tuner.own_model import told
from tuner.run import write_atomic
from tuner.vae import codec
from tuner.vae.data import Split, as_floats
from tuner.vae.fitted import BATCH, FittedModel, tempered
from tuner.vae.image_grid import fixed_noise, sheet
from tuner.vae.model import Model, OwnModel
from tuner.vae.prior import Sampler

TOLERANCE, OWN_TOLERANCE = 1e-5, 1e-3  # the second, a quarter of a grey level, for operators that we did not choose
SAMPLES = 100
VALIDATED = 2_000  # validation images that a threshold is worked out from
PERCENTILE = 99


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
    theirs: bool  # a user's own network, which PyTorch may not be able to write

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The batch size is free, and weights that have no part in the outputs take no room."""
        shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in self.inputs)
        program = torch.export.export(self.module, tuple(self.inputs.values()), dynamic_shapes=shapes)
        used = {node.name for node in program.graph.nodes if node.users}
        for entry in program.graph_signature.input_specs:
            weight = program.state_dict.get(entry.target or "")
            if isinstance(weight, nn.Parameter) and entry.arg.name not in used:
                program.state_dict[str(entry.target)] = nn.Parameter(weight.new_empty(0), requires_grad=False)
        return program

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
    model = fitted.model.eval().requires_grad_(False)
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


def anomalies(fitted: FittedModel, validation: Split) -> dict[str, Any]:
    """What config.json says of anomalies: the negative ELBO that 1 % of validation images exceed, and the variance
    that it is counted with, which is fitted there."""
    variance = fitted.scores["mse"] if fitted.parameters.likelihood == "gaussian" else None
    parts, known = as_floats(validation.images[:VALIDATED]).split(BATCH), (fitted.temperature, variance)
    scores = torch.cat([codec.negative_elbo(fitted.model.encode, fitted.draw, part, *known) for part in parts])
    return {"variance": variance, "percentile": PERCENTILE, "threshold": scores.quantile(PERCENTILE / 100).item()}


def write_files(
    fitted: FittedModel, info: dict[str, Any], directory: Path, images: Tensor, own: OwnModel | None = None
) -> None:
    """Everything of an export, into an empty directory, checked on `images` (N, C, H, W) in [0, 1].

    Of a user's own model, made by `own`, programs are left out that PyTorch can't write, or that give something else;
    config.json says why. Raises RuntimeError where any other file gives something else than the checkpoint.
    """
    for name, weights in (("model", fitted.model.eval().state_dict()), ("prior", fitted.prior.state_dict())):
        # in the file none shares memory with another
        alone = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
        write_atomic(directory / f"{name}.safetensors", save(alone, {"format": "pt"}))
    left_out: dict[str, str] = {}
    for stem, part in parts_of(fitted, images).items():
        for kind, (to_bytes, reader) in PROGRAMS.items():
            path = directory / kind / f"{stem}.{kind}"
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
            path = directory / kind / f"{stem}.{kind}"
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


def from_onnx(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """An ONNX file as a function of its inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        inputs = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        return tuple(map(torch.from_numpy, session.run(None, inputs)))

    return run


PROGRAMS: dict[str, tuple[Callable[[Part], bytes], Callable[[Path], Callable[..., Any]]]] = {
    "pt2": (_to_pt2, lambda path: torch.export.load(path).module()),
    "onnx": (_to_onnx, from_onnx),
}
