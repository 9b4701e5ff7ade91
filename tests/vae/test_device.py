"""Whatever trains, fits or scores does so on the device it is given, and comes to the CPU's numbers.

On a pretended GPU to the last bit; on a real one, and on a pretended one that rounds in its own way, to `TOLERANCE`.
"""

import io
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from pretended_gpu import Misplaced, Pretended, pretended_gpu
from torch import Tensor, nn

from tuner.export import neighbourhood
from tuner.extractors import make
from tuner.scoring import Bench
from tuner.spec import Spec
from tuner.vae.array import ArrayShape
from tuner.vae.data import Data, Split, as_floats
from tuner.vae.extractor import (
    FeatureExtractor,
    Program,
    WaveletPackets,
    draw_untrained,
    from_bytes,
)
from tuner.vae.fitted import FittedModel, Fitter
from tuner.vae.fused import Fused, Job
from tuner.vae.model import Builder
from tuner.vae.neighbours import copied, coverage, knn_accuracy, recall
from tuner.vae.parameters import Parameters
from tuner.vae.prior import Prior, fit_flow, standard_normal
from tuner.vae.process import CPU, device_of
from tuner.vae.score import Scorer
from tuner.vae.shape import ImageShape
from tuner.vae.step import AutogradStep, State, StepMaker, WrittenOutStep
from tuner.vae.train import Record, train

# Relative, of every score. A distance of 400 images has a standard error of some hundredths of it, so a thousandth
# changes no choice. Operators off by 64 units in the last place, more than any kernel should be, change 2e-5 at most.
TOLERANCE = 1e-3
ROUNDING = 64
SPEC = Spec.model_validate({"space": {"latent_dim": {"choices": [3, 4]}}})
SHAPE = ImageShape(1, 12, 12)
PLAIN = Parameters(latent_dim=3, width=4)
KINDS = {
    "vae": PLAIN,
    "autoencoder": Parameters(latent_dim=3, width=4, model="autoencoder"),
    "binary": Parameters(latent_dim=3, width=4, pixels="binary", likelihood="bernoulli"),
}


def _split(count: int, seed: int) -> Split:
    """Blobs: dark to the left in one class, to the right in the other."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    ramp = torch.linspace(-1, 1, 12).expand(12, 12) * (2 * labels - 1).view(-1, 1, 1, 1)
    noise = torch.randn(count, 1, 12, 12, generator=generator)
    return Split((255 * torch.sigmoid(3 * ramp + noise)).to(torch.uint8), labels)


DATA, TEST = Data(_split(200, 0), _split(120, 1)), _split(110, 2)


def _model(parameters: Parameters = PLAIN, seed: int = 4) -> Any:
    """Its last layer is PyTorch's own, as on a GPU, and its logits are large, as a trained model's are."""
    model: Any = Builder(SHAPE, None)(parameters, seed)
    model.up[-1].__class__ = nn.ConvTranspose2d
    nn.init.normal_(model.up[-1].weight, 0, 1, generator=torch.Generator().manual_seed(0))
    return model


def _program() -> Program:
    """It makes a tensor of its own, on the device that its file names."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(144, 8)

        def forward(self, images: Tensor) -> Tensor:
            return self.dense(images.flatten(1)) + torch.arange(8, device=images.device)

    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    given = (torch.zeros(2, *SHAPE),)
    program = torch.export.export(Network().eval(), given, dynamic_shapes=({0: batch},))
    torch.export.save(program, file := io.BytesIO())
    return Program(file.getvalue())


EXTRACTORS: dict[str, Callable[[], FeatureExtractor]] = {
    "untrained": lambda: draw_untrained(SHAPE, 0),
    "wavelets": lambda: WaveletPackets(SHAPE).eval().requires_grad_(False),
    "program": _program,
}


def _flow(device: torch.device = CPU) -> Prior:
    means = torch.randn(200, 3, generator=torch.Generator().manual_seed(5)).to(device)
    fitted = fit_flow(means, 0.1 * means.abs(), 2, seed=0, steps=20)
    assert fitted.means.device == device
    return fitted.to(CPU)


def _measured(kind: str, quasi_random: bool, device: torch.device, count: int = 60) -> tuple[Any, ...]:
    prior = _flow() if kind == "binary" else standard_normal(3)
    fitted = FittedModel(_model(KINDS[kind]), KINDS[kind], prior, 1.5)
    options = {"seed": 0, "count": count, "quasi_random": quasi_random}
    data = DATA.to(device)
    scorer = Scorer(EXTRACTORS["untrained"](), data.train, data.validation, **options)
    return *scorer.measure(fitted), scorer.floor, scorer.floor_replicates


def _fitted(prior: str, kind: str, device: torch.device) -> FittedModel:
    temperature = "one" if kind == "binary" else "fitted"
    parameters = KINDS[kind].model_copy(update={"prior": prior, "prior_components": 3, "temperature": temperature})
    options = {"seed": 0, "count": 100, "samples": 100, "guide": EXTRACTORS["wavelets"]()}
    return Fitter(DATA.train.to(device), **options)(_model(parameters), parameters, 2.0)


def _trained(make_step: StepMaker, kind: str, device: torch.device) -> tuple[State, list[Record]]:
    parameters = KINDS[kind].model_copy(update={"kl_unit": "calibrated" if kind == "vae" else "absolute"})
    state, options = State.of(_model(parameters)), {"seed": 0, "trial": 1, "total_epochs": 2, "make_step": make_step}
    records = list(train(state, parameters, DATA.train.images.to(device), [1, 2], **options))
    return state, [replace(record, seconds=0) for record in records]


def _prior_scored(prior: str, device: torch.device) -> dict[str, float]:
    scorer = Scorer(EXTRACTORS["untrained"](), DATA.train, DATA.validation, seed=0, count=60, quasi_random=True)
    return scorer(_fitted(prior, "vae", device))


NUMBERS: dict[str, Callable[[torch.device], dict[str, float]]] = {
    **{f"scores of {kind}": partial(lambda kind, device: _measured(kind, True, device)[0], kind) for kind in KINDS},
    **{prior: partial(_prior_scored, prior) for prior in ("gaussian_mixture", "matched_mixture")},
    **{
        make_step.__name__: partial(lambda step, device: asdict(_trained(step, "vae", device)[1][-1]), make_step)
        for make_step in (AutogradStep, WrittenOutStep)
    },
}


def _both(work: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    """What some work gives on the pretended GPU, and on the CPU.

    That, too, while every operator is seen: PyTorch then takes the same ways through LAPACK.
    """
    with pretended_gpu() as device:
        return work(device), work(CPU)


def _assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    """To the last bit without a tolerance; and plain tensors on the CPU."""
    ours, theirs = (value.state_dict() if hasattr(value, "state_dict") else value for value in (ours, theirs))
    for tensor in ours.values() if isinstance(ours, dict) else [ours]:
        assert not isinstance(tensor, Pretended)
    torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("what", NUMBERS)
def test_a_real_gpu_comes_close_to_the_cpus_numbers(what):  # the first: beside a pretended GPU it is not itself
    assert NUMBERS[what](device_of(["0"])) == pytest.approx(NUMBERS[what](CPU), rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("what", NUMBERS)
def test_a_gpu_that_rounds_otherwise_comes_close_to_the_cpus_numbers(what):
    expected = NUMBERS[what](CPU)
    with pretended_gpu(ROUNDING) as device:
        found = NUMBERS[what](device)
    assert found != expected
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_a_process_that_was_given_no_gpu_works_on_the_cpu_whatever_it_sees():
    assert device_of([]) == CPU
    assert device_of(["0"]).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "misplaced",
    [
        lambda there, here: there + here,
        lambda there, here: there @ here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: here[there[0].long()],
        lambda there, here: here.add_(there),
        lambda there, here: there.add_(here),
        lambda there, here: torch.randn(3, device=there.device),
        lambda there, here: torch.multinomial(there, 1, generator=torch.Generator()),
        lambda there, here: nn.Linear(3, 3)(there),
    ],
)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(misplaced):
    with pretended_gpu() as device, pytest.raises(Misplaced):
        misplaced(torch.eye(3, device=device), torch.eye(3))


def test_the_pretended_gpu_takes_what_a_gpu_takes():
    with pretended_gpu() as device:
        there = torch.eye(3).to(device)
        assert there.device == device
        there[torch.tensor([0, 2])] = 2.0
        there[:1].mul_(torch.tensor(2.0))
        there[1].copy_(torch.ones(3))
        assert torch.tensor(1.5, device=device).item() == 1.5
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        _assert_same(there.cpu(), torch.tensor([[4.0, 4, 4], [1, 1, 1], [2, 2, 2]]))


@pytest.mark.parametrize(("kind", "quasi_random"), [("vae", True), ("autoencoder", False), ("binary", True)])
def test_scores_are_the_cpus(kind, quasi_random):
    ours, theirs = _both(lambda device: _measured(kind, quasi_random, device, count=10))
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]
    _assert_same(ours[1], theirs[1])
    _assert_same(ours[3], theirs[3])


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_features_are_the_cpus(kind):
    extractor, images = EXTRACTORS[kind](), as_floats(DATA.train.images)

    def features(device: torch.device) -> Tensor:
        found = extractor.on(device).features(images.to(device))
        assert found.device == device
        return found.cpu()

    _assert_same(*_both(features))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "kind"),
    [
        *((prior, kind) for prior in ("standard_normal", "gaussian_mixture") for kind in KINDS),
        pytest.param("matched_mixture", "vae", marks=pytest.mark.slow),
    ],
)
def test_fits_are_the_cpus(prior, kind):
    ours, theirs = _both(lambda device: _fitted(prior, kind, device))
    assert ours.temperature == theirs.temperature
    _assert_same(ours.prior, theirs.prior)
    _assert_same(ours.model, theirs.model)


def test_a_flow_is_fitted_as_on_the_cpu():
    _assert_same(*_both(_flow), rtol=1e-4, atol=1e-6)  # PyTorch derives SiLU by another formula for wrapped tensors


@pytest.mark.parametrize("bent", [False, True])
def test_densities_are_the_cpus(bent):
    prior, latents = _flow() if bent else standard_normal(3), torch.randn(50, 3)
    _assert_same(*_both(lambda device: prior.to(device).log_density(latents.to(device)).cpu()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make_step", [AutogradStep, WrittenOutStep])
def test_training_is_the_cpus(make_step: StepMaker, kind):
    (ours, our_records), (theirs, their_records) = _both(lambda device: _trained(make_step, kind, device))
    assert our_records == their_records
    assert (ours.step, ours.mse) == (theirs.step, theirs.mse)
    _assert_same(ours.model, theirs.model)
    _assert_same(ours.averages, theirs.averages)


def test_an_array_trains_as_on_the_cpu():
    def trained(device: torch.device) -> list[Job]:
        jobs = [Job(number, PLAIN, State.of(_model(seed=number)), 1, 0, 1) for number in range(2)]
        array = Fused(ArrayShape.of(jobs[0].state.model, PLAIN, 3), 2, DATA.train.images.to(device))
        for job in jobs:
            array.enter(job)
        while array.busy:
            array.advance()
        return jobs

    for ours, theirs in zip(*_both(trained), strict=True):
        assert ours.state.step == theirs.state.step == 2
        _assert_same(ours.state.model, theirs.state.model)


def test_neighbours_are_the_cpus():
    splits = DATA.validation, DATA.train

    def scores(device: torch.device) -> list[float]:
        real, samples = (as_floats(split.images.to(device)).flatten(1) for split in splits)
        labels, known = (split.labels.to(device) for split in splits)
        scored = [score(real, samples) for score in (recall, coverage, copied)]
        return [*scored, knn_accuracy(real, labels, samples, known)]

    ours, theirs = _both(scores)
    assert ours == theirs


def test_a_bench_does_all_of_it_on_its_device():
    """Trains the extractors, too, and looks at neighbours."""
    parameters = PLAIN.model_copy(update={"prior": "gaussian_mixture", "prior_components": 2})
    fitted = FittedModel(_model(), PLAIN, standard_normal(3))

    def work(device: torch.device) -> tuple[Any, ...]:
        made = [make(Bench(SPEC, DATA.to(device), {}), name) for name in ("search", "second")]
        extractors = {name: from_bytes(file) for name, (file, _) in zip(("search", "second"), made, strict=True)}
        bench = Bench(SPEC, DATA.to(device), extractors, TEST.to(device))
        numbers = (
            [(info.accuracy, info.floor) for _, info in made],
            neighbourhood(bench, fitted),
            bench.score(None).scores,
        )
        return numbers, *bench.refit(fitted, parameters), *extractors.values()

    ours, theirs = _both(work)
    assert ours[0] == theirs[0]
    assert ours[0][0][0][0] > 0.9
    assert ours[1].scores == theirs[1].scores
    _assert_same(ours[1].prior, theirs[1].prior)
    _assert_same(ours[2].replicates, theirs[2].replicates)
    for trained, expected in zip(ours[3:], theirs[3:], strict=True):
        _assert_same(trained, expected)
