"""What every stage begins with: checkpoints, extractors and data of a run, or one line that says what is wrong."""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tuner import spec as specs
from tuner.extractors import keep_extractor, load_extractors, make, make_extractor, read_program
from tuner.run import RunFiles, write_atomic
from tuner.scoring import Bench, search_scorer
from tuner.spec import Spec
from tuner.study import BASELINE
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.data import Data, Split, as_floats
from tuner.vae.errors import Refused
from tuner.vae.extractor import from_bytes, to_bytes
from tuner.vae.fitted import FittedModel
from tuner.vae.image_grid import evenly_spaced
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import fit_mixture, standard_normal
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.workspace import Checkpoints, held_out_bytes, oddities, open_workspace, read_held_out, require_fit

build = Builder(ImageShape(1, 28, 28))

SMALL = Parameters(latent_dim=2, width=2, prior="gaussian_mixture", prior_components=1)


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path, shown="s3://bucket/run")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Of a small model that trained on after its best evaluation."""
    latents = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    best = FittedModel(build(SMALL, seed=0), SMALL, fit_mixture(latents, 1, seed=0), 0.5, 1.0, {"mse": 0.25})
    return Checkpoint(SMALL, State.of(build(SMALL, seed=1)), best, {"epoch": 2.0})


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_checkpoint_gives_its_best_model_and_the_baseline_where_its_training_stands(run, checkpoint):
    path = run.checkpoint(BASELINE)
    write_atomic(path, checkpoint.to_bytes())
    best, baseline = Checkpoints(run).best(path), Checkpoints(run).baseline()
    assert (best.parameters, best.temperature, best.epoch, best.scores) == (SMALL, 0.5, 1.0, {"mse": 0.25})
    assert torch.equal(best.model.mean.weight, checkpoint.best.model.mean.weight)
    assert torch.equal(best.prior.covariances, checkpoint.best.prior.covariances)
    assert torch.equal(baseline.model.mean.weight, checkpoint.state.model.mean.weight)
    assert torch.equal(baseline.prior.covariances, standard_normal(2).covariances)
    assert (baseline.parameters.prior, baseline.temperature) == ("standard_normal", 1.0)


def test_a_checkpoint_without_a_scored_model_has_no_best(run, checkpoint):
    path = run.checkpoint(3)
    write_atomic(path, Checkpoint(SMALL, checkpoint.state).to_bytes())
    assert Checkpoints(run).read(path).best is None
    with pytest.raises(Refused, match=r"^s3://bucket/run/checkpoints/0003\.pt: holds no scored model$"):
        Checkpoints(run).best(path)


class Code:
    """What a pickle can make its reader do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("never made",)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"nonsense")
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


OTHERS: dict[str, Callable[[], bytes | None]] = {
    "nothing": lambda: b"",
    "text": lambda: b"hello\nworld\n",
    "a tensor": lambda: saved(torch.zeros(3)),
    "a list": lambda: saved([1, 2]),
    "an empty mapping": lambda: saved({}),
    "empty parts": lambda: saved({"parameters": {}, "state": {}, "best": None, "evaluation": {}}),
    "nothing in parts": lambda: saved({"parameters": None, "state": None, "best": None, "evaluation": None}),
    "code": lambda: saved(Code()),
    "a pickle with code": lambda: pickle.dumps(Code()),
    "a module": lambda: saved(torch.nn.Linear(2, 2)),
    "an array": array,
    "an archive": archive,
    "a folder": lambda: None,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch, of what is no checkpoint
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_checkpoint_is_refused_in_one_line_that_names_it_and_nothing_in_it_is_run(
    run, kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content, path = OTHERS[kind](), run.checkpoint(3)
    path.mkdir(parents=True) if content is None else write_atomic(path, content)
    with pytest.raises(Refused) as error:
        Checkpoints(run).read(path)
    assert str(error.value).startswith("s3://bucket/run/checkpoints/0003.pt: not readable as a checkpoint: ")
    assert len(str(error.value).splitlines()) == 1
    assert not Path("never made").exists()


@pytest.mark.parametrize("step", [-1, 1.5, "3", None])
def test_a_checkpoint_of_a_step_that_there_is_not_is_refused(run, checkpoint, step):
    path, state = run.checkpoint(3), checkpoint.state
    write_atomic(path, Checkpoint(SMALL, State(state.model, state.averages, step)).to_bytes())
    with pytest.raises(Refused, match=r"checkpoints/0003\.pt: not readable as a checkpoint: "):
        Checkpoints(run).read(path)


def test_a_checkpoint_that_is_gone_is_refused_by_its_name(run):
    with pytest.raises(Refused, match=r"checkpoints/0000\.pt: not readable as a checkpoint: .*No such file"):
        Checkpoints(run).baseline()


def test_an_extractor_comes_back_as_it_was_kept_and_another_file_in_its_place_is_refused(run, workspace):
    kept = workspace.extractors["second"]
    described = workspace.run.summary().extractors["second"]
    keep_extractor(run, "second", to_bytes(kept), described)
    found = load_extractors(run)["second"].state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in kept.state_dict().items())
    assert run.summary().extractors["second"] == described
    write_atomic(run.extractor("second"), run.extractor("second").read_bytes() + b" ")
    with pytest.raises(ValueError, match=rf"{re.escape(str(run.extractor('second')))}: not the extractor this run"):
        load_extractors(run)
    run.extractor("second").unlink()
    with pytest.raises(ValueError, match=r"second\.safetensors: No such file"):
        load_extractors(run)


def test_held_out_images_come_back_and_what_is_damaged_or_of_another_shape_is_refused(run, workspace):
    write_atomic(run.held_out, held_out_bytes(workspace.data))
    shape, whole = workspace.data.shape, run.held_out.read_bytes()
    expected = as_floats(evenly_spaced(workspace.data.validation.images))
    assert torch.equal(read_held_out(run, shape), expected)
    with pytest.raises(Refused, match=r"^s3://bucket/run/held_out\.safetensors: holds other images than the run's$"):
        read_held_out(run, ImageShape(3, 28, 28))
    for content in (whole[:-1], whole[:20], b"", save({"other": torch.zeros(1)})):
        write_atomic(run.held_out, content)
        with pytest.raises(Refused, match=r"^s3://bucket/run/held_out\.safetensors: not readable as images: [^\n]*$"):
            read_held_out(run, shape)


def test_a_workspace_is_what_its_run_was_made_with(workspace, finished_run):
    assert workspace.spec.data.name == "digits"
    assert workspace.extractors.keys() == finished_run.summary().extractors.keys() == {"search", "second"}


def test_a_run_goes_on_with_the_images_that_it_began_with_and_no_others(run_copy):
    images = np.random.default_rng(0).integers(0, 256, (1_000, 28, 28), np.uint8)
    other = specs.load(run_copy.spec, [("data", {"name": "arrays", "file": "other.npy"})])
    np.save(run_copy.path / "other.npy", images)
    write_atomic(run_copy.spec, other.to_yaml())
    with pytest.raises(Refused, match=rf"^{run_copy.path}: has begun with other images"):
        open_workspace(run_copy, run_copy.path / "other.npy")


def test_a_folder_without_a_spec_is_no_workspace(tmp_path):
    with pytest.raises(ValueError, match=r"not a run directory \(no spec\.yaml\)"):
        open_workspace(RunFiles(tmp_path))


def test_its_workers_score_on_validation_unless_they_are_given_the_test_split(workspace):
    bench = workspace.workers().bench
    assert (bench.spec, bench.data, bench.extractors) == (workspace.spec, workspace.data, workspace.extractors)
    assert bench.test is None
    assert workspace.workers(workspace.data.validation).bench.test is workspace.data.validation


SPACE = {"latent_dim": {"choices": [4, 8]}}


def pictures(grey: float, channels: int = 1, labels: bool = False) -> Data:
    """Images of which a share of the rows is grey, the others white."""
    images = torch.full((30, channels, 20, 20), 255, dtype=torch.uint8)
    images[:, :, : round(20 * grey)] = 128
    images[:, :, 0, 0] = torch.arange(30, dtype=torch.uint8).unsqueeze(1)
    known = torch.arange(30) % 3 if labels else None
    return Data(Split(images, known), Split(images[:10], None if known is None else known[:10]))


def spec_of(**parts: Any) -> Spec:
    return Spec.model_validate({"space": SPACE} | parts)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own extractor, for 20x20 in colour."""
    network = torch.nn.Sequential(torch.nn.AvgPool2d(5), torch.nn.Flatten())
    shapes = ({0: torch.export.Dim("batch")},)
    path = tmp_path_factory.mktemp("own") / "features.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 20, 20),), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize(
    ("labels", "own", "kinds"),
    [
        (True, False, ["classifier", "classifier"]),
        (False, False, ["untrained", "wavelets"]),
        (True, True, ["program", "classifier"]),
        (False, True, ["program", "wavelets"]),
    ],
)
def test_extractors_are_what_the_data_and_the_spec_have(run, program, labels, own, kinds):
    data, spec = pictures(0.2, 3, labels), spec_of(**({"features": str(program)} if own else {}))
    made = {"search": make(Bench(spec, data, {}), "search", read_program(spec) if own else None)}
    made["second"] = make(Bench(spec, data, {}), "second")
    for name, (content, info) in made.items():
        keep_extractor(run, name, content, info)
    described = run.summary().extractors
    files = [content for content, _ in made.values()]
    assert [from_bytes(file).kind for file in files] == [info.kind for info in described.values()] == kinds
    for name, (content, info) in made.items():
        assert described[name] == info
        assert info.floor == search_scorer(spec, data, from_bytes(content)).floor
    assert [info.accuracy is not None for info in described.values()] == [kind == "classifier" for kind in kinds]
    again = load_extractors(run)
    assert {name: to_bytes(extractor) for name, extractor in again.items()} == {
        name: content for name, (content, _) in made.items()
    }
    if own:
        assert (run.extractors / "search.pt2").read_bytes() == program.read_bytes()


@pytest.mark.parametrize("label", [0, 3])
def test_one_class_for_all_images_is_no_label(label):
    data = pictures(0.2, labels=True)
    alike = Data(Split(data.train.images, torch.full((30,), label)), data.validation)
    assert make_extractor("search", 0, alike).kind == "untrained"


MINE = {"name": "arrays", "file": "mine.npy"}


def turned(data: Data, scale: int = 1, label: int | None = None) -> Data:
    """Inverted, divided by `scale` and labelled alike."""
    labels = None if label is None else torch.full((len(data.train),), label)
    return Data(Split((255 - data.train.images) // scale, labels), data.validation)


@pytest.mark.parametrize(
    ("source", "data", "said"),
    [
        ({"name": "mnist"}, turned(pictures(0.2)), []),
        (MINE, pictures(0.2, labels=True), []),
        ({"name": "cifar10"}, pictures(0.2, 3), []),
        ({"name": "mnist"}, turned(pictures(0), label=3), ["one class found in 30 labels"]),
        ({"name": "mnist"}, pictures(0), ["mean grey 1.00 found, .*: data.invert turns those of data.name=arrays"]),
        (MINE | {"invert": True}, pictures(0), ["mean grey 1.00 found, .*: data.invert has made them so"]),
        (MINE, turned(pictures(0.5), scale=16), ["grey values from 0 to 15 found"]),
        (MINE, turned(pictures(0.5), scale=255, label=0), ["one class found", "grey values from 0 to 1 found"]),
    ],
)
def test_what_is_seldom_meant_is_told_with_its_evidence(source, data, said):
    found = list(oddities(spec_of(data=source), data))
    assert len(found) == len(said)
    for line, words in zip(found, said, strict=True):
        assert re.match(words, line), line


@pytest.mark.parametrize(
    ("parts", "data", "said"),
    [
        ({"fixed": {"temperature": "fitted"}}, pictures(0.5), None),
        ({"fixed": {"temperature": "one", "pixels": "grey"}}, pictures(0.8, 3), None),
        ({"fixed": {"pixels": "binary", "likelihood": "bernoulli"}}, pictures(0.8), None),
        (
            {"fixed": {"temperature": "fitted"}},
            pictures(0.8),
            "fixed.temperature: fitted does not go with images of more grey (80% of their pixels) than black and white",
        ),
        (
            {"fixed": {"temperature": "fitted"}},
            pictures(0.0),
            "fixed.temperature: fitted does not go with images of black and white alone "
            "(0.0% of their pixels are grey)",
        ),
        (
            {"space": SPACE | {"temperature": {"choices": ["one", "fitted"]}}},
            pictures(0.2, 3),
            "space.temperature: fitted does not go with images in colour",
        ),
        (
            {"fixed": {"pixels": "binary", "likelihood": "bernoulli"}},
            pictures(0.2, 3),
            "fixed.pixels: binary does not go with images in colour",
        ),
    ],
)
def test_what_does_not_go_with_the_images_is_refused(run, parts, data, said):
    if said is None:
        require_fit(run, spec_of(**parts), data)
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            require_fit(run, spec_of(**parts), data)


def test_a_program_that_takes_other_images_is_refused_by_name_and_one_that_is_kept_needs_its_file_no_more(
    run, program, tmp_path
):
    path = tmp_path / "mine.pt2"
    path.write_bytes(program.read_bytes())
    spec = spec_of(features=str(path))
    require_fit(run, spec, pictures(0.2, 3))
    with pytest.raises(ValueError, match=rf"^features: {re.escape(str(path))} takes no images 1x1x20x20: "):
        require_fit(run, spec, pictures(0.2))
    keep_extractor(run, "search", *make(Bench(spec, pictures(0.2, 3), {}), "search", read_program(spec)))
    path.write_bytes(b"another")
    require_fit(run, spec, pictures(0.2, 3))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: not the extractor this run"):
        require_fit(RunFiles(tmp_path / "other"), spec, pictures(0.2, 3))
