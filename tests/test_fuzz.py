"""Damaged files: what reads them gives something of use or a ValueError, in one line that names the file."""

import copy
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tuner.export
import tuner.report
import tuner.retrain
import tuner.search
from tuner import sources
from tuner import spec as specs
from tuner.data_spec import IdxSpec
from tuner.run import RunFiles
from tuner.sources.idx import IDX_FILES
from tuner.spec import Spec
from tuner.study import RETRAIN, STATES, UNFINISHED, Study, open_study, read_study, table
from tuner.summary import Summary
from tuner.terminal import as_table, promotion_rows, result_rows, search_line, trials_rows
from tuner.vae import codec
from tuner.vae.checkpoint import Checkpoint
from tuner.vae.extractor import Classifier, FeatureExtractor, load_extractor, to_bytes
from tuner.vae.fitted import FittedModel
from tuner.vae.image_grid import HELD_OUT, samples
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.prior import standard_normal
from tuner.vae.shape import ImageShape
from tuner.vae.step import State, fastest_step
from tuner.workspace import Checkpoints, read_held_out

build = Builder(ImageShape(1, 28, 28))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch, of what is no checkpoint

MANY = settings(max_examples=60, deadline=None, derandomize=True)
KINDS = ["truncate", "flip", "zero", "insert", "drop", "double", "replace"]
PLACES = st.integers(0, 10**9)
DAMAGE = st.lists(st.tuples(st.sampled_from(KINDS), PLACES, PLACES), min_size=1, max_size=3)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(allow_subnormal=False),
    st.sampled_from([10**30, 10**400, 1e308, "", "x", "a\nb", "1e-3", "0", "search", "frechet_distance"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from("ab"), SCALARS, max_size=2))
TENSORS = st.sampled_from([torch.zeros(()), torch.ones(3), torch.eye(2), torch.ones(1, 2, 2), torch.zeros(0)])
CHANGE = st.tuples(PLACES, st.sampled_from(["replace", "delete", "add"]), VALUES | TENSORS)
CHANGES = st.lists(CHANGE, min_size=1, max_size=2)


def damaged(content: bytes, damage: list[tuple[str, int, int]]) -> bytes:
    """The bytes of a file after some accidents."""
    for kind, place, how in damage:
        lines = content.splitlines(keepends=True) or [b""]
        here, there, at = place % len(lines), how % len(lines), place % (len(content) + 1)
        if kind == "truncate":
            content = content[:at]
        elif kind == "flip":
            content = content[:at] + bytes(byte ^ (1 + how % 255) for byte in content[at : at + 1]) + content[at + 1 :]
        elif kind == "zero":
            content = content[:at] + bytes(len(content[at : at + how % 64])) + content[at + how % 64 :]
        elif kind == "insert":
            content = content[:at] + bytes([how % 256]) + content[at:]
        else:
            change = {"drop": [], "double": [lines[here]] * 2, "replace": [lines[there]]}[kind]
            content = b"".join([*lines[:here], *change, *lines[here + 1 :]])
    return content


def mutated(tree: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """A copy of nested mappings and lists with something replaced, deleted or added."""
    tree = copy.deepcopy(tree)
    for number, kind, value in changes:
        places = list(places_of(tree))
        if not places:
            break
        node, key = places[number % len(places)]
        if kind == "replace":
            node[key] = value
        elif kind == "delete":
            del node[key]
        elif isinstance(node, dict):
            node["more"] = value
        else:
            node.append(value)
    return tree


def places_of(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a node."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield node, key
        yield from places_of(child)


def result_of(read: Callable[[], Any], *names: str) -> Any:
    """What a reader returns; None where it refused in one line that has one of the names in it."""
    try:
        return read()
    except ValueError as error:
        line = str(error)
    assert len(line.splitlines()) == 1, line
    assert any(name in line for name in names), line
    return None


def torch_bytes(tree: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


# What of a file that was read is of use


def goes_on(checkpoint: Checkpoint, spec: Spec) -> None:
    assert isinstance(checkpoint.evaluation, dict)
    fastest_step(checkpoint.state, checkpoint.parameters, torch.device("cpu")).store()
    assert checkpoint.state.step >= 0
    assert checkpoint.best is None or samples(checkpoint.best, 200).shape == (200, 1, 28, 28)


def tells_digits(extractor: FeatureExtractor, spec: Spec) -> None:
    assert extractor.features(torch.zeros(2, 1, 28, 28)).shape == (2, 64)


def draws(loaded: codec.Codec, spec: Spec) -> None:
    shape = (3, *loaded.fitted.model.shape)
    assert loaded.sample(3).shape == loaded.decode(loaded.encode(torch.zeros(shape))).shape == shape


def are_shown(images: torch.Tensor, spec: Spec) -> None:
    assert (images.shape, images.dtype) == ((HELD_OUT, 1, 28, 28), torch.float32)
    assert 0 <= images.min() <= images.max() <= 1


def is_shown(summary: Summary, spec: Spec) -> None:
    if summary.best:
        assert as_table(result_rows(summary)).row_count >= 3
        assert as_table(promotion_rows(summary.promotion, "mse")).row_count == len(summary.promotion)
        assert summary.best.parameters.keys() >= spec.space.keys()


def makes_a_table(study: Study | None, spec: Spec) -> None:
    rows = table(study, spec) if study else []
    assert [row["trial"] for row in rows] == list(range(len(rows)))
    assert {row["state"] for row in rows} <= {*STATES.values(), UNFINISHED}
    assert search_line(rows, spec)
    assert as_table(trials_rows(rows, spec)).row_count == len(rows)


def is_written_again(read: Spec, spec: Spec) -> None:
    assert Spec.model_validate(yaml.safe_load(read.to_yaml())) == read
    assert read.budget.rungs[-1] == read.budget.max_epochs


def extractor_of(run: RunFiles) -> FeatureExtractor:
    """Whatever lies there, as if it had been frozen like that."""
    path = run.extractor("search")
    return load_extractor(path, hashlib.sha256(path.read_bytes()).hexdigest())


READERS: dict[str, tuple[Callable[[RunFiles], Any], Callable[[Any, Spec], None]]] = {
    "checkpoints/0003.pt": (lambda run: Checkpoints(run).read(run.checkpoint(3)), goes_on),
    "extractors/search.safetensors": (extractor_of, tells_digits),
    "export/config.json": (lambda run: codec.load(run.export), draws),
    "export/model.safetensors": (lambda run: codec.load(run.export), draws),
    "export/prior.safetensors": (lambda run: codec.load(run.export), draws),
    "held_out.safetensors": (lambda run: read_held_out(run, ImageShape(1, 28, 28)), are_shown),
    "summary.json": (RunFiles.summary, is_shown),
    "study.journal": (lambda run: read_study(run.journal), makes_a_table),
    "spec.yaml": (lambda run: specs.load(run.spec), is_written_again),
}


@pytest.fixture(scope="module")
def spec(finished_run: RunFiles) -> Spec:
    return specs.load(finished_run.spec)


@pytest.fixture(scope="module")
def files(finished_run: RunFiles) -> dict[str, bytes]:
    """What whole files hold: those of a run, but a small model and extractor."""
    parameters = Parameters(latent_dim=2, width=2)
    best = FittedModel(build(parameters, seed=0), parameters, standard_normal(2), 0.5, 1.0, {"mse": 0.25})
    checkpoint = Checkpoint(parameters, State.of(build(parameters, seed=1)), best, {"epoch": 2.0})
    made = {
        "checkpoints/0003.pt": checkpoint.to_bytes(),
        "extractors/search.safetensors": to_bytes(Classifier(ImageShape(1, 28, 28), 10, width=2)),
    }
    return {name: made.get(name) or (finished_run.path / name).read_bytes() for name in READERS}


@pytest.fixture(scope="module")
def run(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """Where one file after the other is damaged."""
    run = RunFiles(tmp_path_factory.mktemp("fuzz"))
    for name, content in files.items():
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(content)
    return run


def check(run: RunFiles, spec: Spec, files: dict[str, bytes], name: str, content: bytes) -> None:
    """The file is refused by its name, or its reader gives something of use."""
    path, (read, use) = run.path / name, READERS[name]
    path.write_bytes(content)
    # Another's weights or prior are no part of what a config.json with other parameters tells.
    found = result_of(lambda: read(run), *([str(run.export)] if name == "export/config.json" else [str(path)]))
    if found is not None:
        use(found, spec)
    path.write_bytes(files[name])


@pytest.mark.parametrize("name", READERS)
@MANY
@given(damage=DAMAGE)
def test_a_damaged_file(run, spec, files, name, damage):
    check(run, spec, files, name, damaged(files[name], damage))


FORMATS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
    "checkpoints/0003.pt": (lambda content: torch.load(io.BytesIO(content), weights_only=True), torch_bytes),
    "export/config.json": (json.loads, lambda tree: json.dumps(tree).encode()),
    "summary.json": (json.loads, lambda tree: json.dumps(tree).encode()),
    "study.journal": (
        lambda content: [json.loads(line) for line in content.splitlines()],
        lambda tree: b"".join(json.dumps(line).encode() + b"\n" for line in tree),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@MANY
@given(changes=CHANGES)
def test_a_file_that_says_something_else(run, spec, files, name, changes):
    parse, dump = FORMATS[name]
    if name != "checkpoints/0003.pt":
        changes = [change for change in changes if not isinstance(change[2], torch.Tensor)]
    check(run, spec, files, name, dump(mutated(parse(files[name]), changes)))


@MANY
@given(place=PLACES)
def test_a_journal_cut_off_anywhere_goes_on_with_all_that_was_written_before(run, spec, files, place):
    journal = files["study.journal"]
    cut = journal[: place % (len(journal) + 1)]
    run.journal.write_bytes(cut)
    study, whole = open_study(run.journal, spec), cut[: cut.rfind(b"\n") + 1]
    assert run.journal.read_bytes().startswith(whole)
    said = [json.loads(line) for line in whole.splitlines()]
    trials = [line["study_id"] for line in said if line["op_code"] == 4]
    assert len(study.known()) == trials.count(0), "the retrain's finalists are in a study of their own"
    makes_a_table(study, spec)
    if 1 in trials:
        makes_a_table(read_study(run.journal, RETRAIN), spec.of_retrain(2, 0))


# MNIST


def idx(name: str, count: int) -> bytes:
    sizes = (count, 28, 28) if "images" in name else (count,)
    header = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
    return header + bytes(index % 10 for index in range(math.prod(sizes)))


HEADERS = st.tuples(st.sampled_from(["flip", "zero", "insert"]), st.integers(0, 15), PLACES)


@MANY
@given(name=st.sampled_from(IDX_FILES), damage=st.lists(HEADERS, min_size=1, max_size=2) | DAMAGE)
@example(name="train-labels-idx1-ubyte", damage=[("flip", 8, 9)])
def test_a_damaged_idx_file(run, name, damage):
    raw = run.path / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for other in IDX_FILES:
        content = idx(other, 400 if other.startswith("train") else 70)
        (raw / other).write_bytes(content if other != name else damaged(content, damage))
    images = IdxSpec(name="mnist", directory=run.path, download=False)
    found = result_of(lambda: sources.load(images), name, f"{raw}: ")
    test = result_of(lambda: sources.load_test(images), name, f"{raw}: ")
    for split in ([found.train, found.validation] if found else []) + ([test] if test else []):
        assert (split.images.shape, split.images.dtype) == ((len(split), 1, 28, 28), torch.uint8)
        assert split.labels.shape == (len(split),)
        assert all(label in range(10) for label in split.labels.tolist())


def test_a_folder_in_the_place_of_an_idx_file(tmp_path: Path):
    raw = tmp_path / "MNIST" / "raw"
    for name in IDX_FILES:
        (raw / name).mkdir(parents=True)
    assert result_of(lambda: sources.load(IdxSpec(name="mnist", directory=tmp_path, download=False)), str(raw)) is None


# Whole commands


@pytest.mark.parametrize(
    ("main", "flags", "file"),
    [
        (tuner.search.main, ["--status"], "summary.json"),
        (tuner.search.main, ["--run"], "summary.json"),
        (tuner.search.main, ["--status"], "study.journal"),
        (tuner.retrain.main, [], "summary.json"),
        pytest.param(tuner.retrain.main, [], "checkpoints/0001.pt", marks=pytest.mark.slow),
        (tuner.export.main, [], "summary.json"),
        pytest.param(tuner.export.main, [], "retrain/kept.pt", marks=pytest.mark.slow),
        (tuner.report.main, [], "summary.json"),
        (tuner.report.main, [], "study.journal"),
        (tuner.report.main, [], "checkpoints/0000.pt"),
        (tuner.report.main, [], "held_out.safetensors"),
    ],
)
def test_a_command_on_a_run_with_a_damaged_file_ends_with_status_2_and_one_line(run_copy, capsys, main, flags, file):
    path = run_copy.path / file
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 2 :])
    with pytest.raises(SystemExit) as ended:
        main([*flags, str(run_copy.path)])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {path}: "), shown.err
    assert (len(shown.err.splitlines()), shown.out) == (1, "")
