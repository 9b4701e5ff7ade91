"""Damaged files: whatever reads them tells so in one line that names the file, or gives a correct result.

Nothing here trains a network or starts Ray: what would is replaced by a stand-in that says it was asked.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tuner.cluster
import tuner.export
import tuner.report
import tuner.retrain
import tuner.search
import tuner.trials
import tuner.vae.data
import tuner.workspace
from tuner import spec as specs
from tuner.run import Refused, RunFiles
from tuner.study import evaluations, open_study, read_study, table
from tuner.vae import codec
from tuner.vae.data import IDX_FILES, load, load_test
from tuner.vae.image_grid import samples
from tuner.vae.prior import standard_normal
from tuner.vae.score import FINAL_METRICS, METRICS
from tuner.workspace import FittedModel, best_of, last_of, load_extractors, load_tensors, retrained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch, of what is no checkpoint

SECONDS = 10  # an example that takes longer hangs
SMALL = settings(max_examples=16, deadline=None, derandomize=True)
MANY = settings(max_examples=80, deadline=None, derandomize=True)

Call = Callable[[], Any]


# Damage


PLACES = st.integers(0, 10**9)
BYTES = st.one_of(
    st.tuples(st.just("truncate"), PLACES, st.just(0)),
    st.tuples(st.just("flip"), PLACES, st.integers(1, 255)),
    st.tuples(st.just("zero"), PLACES, st.integers(1, 64)),
    st.tuples(st.just("insert"), PLACES, st.integers(0, 255)),
)
LINES = st.tuples(st.sampled_from(["drop", "double", "swap", "cut"]), PLACES, PLACES)
DAMAGE = st.lists(BYTES, min_size=1, max_size=3)
LINE_DAMAGE = st.lists(st.one_of(BYTES, LINES), min_size=1, max_size=3)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(allow_subnormal=False),
    st.sampled_from([10**30, 1e308, "", "x", "a\nb", "1e-3", "0", "search", "frechet_distance"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from("ab"), SCALARS, max_size=2))
TREES = st.lists(st.tuples(PLACES, st.sampled_from(["replace", "delete", "add"]), VALUES), min_size=1, max_size=2)


def damaged(content: bytes, damage: list[tuple[str, int, int]]) -> bytes:
    """The bytes of a file after some accidents."""
    for kind, place, how in damage:
        if kind in ("drop", "double", "swap", "cut"):
            lines = content.splitlines(keepends=True) or [b""]
            here, there = place % len(lines), how % len(lines)
            if kind == "drop":
                del lines[here]
            elif kind == "double":
                lines.insert(here, lines[here])
            elif kind == "swap":
                lines[here], lines[there] = lines[there], lines[here]
            else:
                lines[here] = lines[here][: how % (len(lines[here]) + 1)]
            content = b"".join(lines)
            continue
        here = place % (len(content) + 1)
        if kind == "truncate":
            content = content[:here]
        elif kind == "insert":
            content = content[:here] + bytes([how]) + content[here:]
        elif kind == "zero":
            content = content[:here] + bytes(len(content[here : here + how])) + content[here + how :]
        elif here < len(content):
            content = content[:here] + bytes([content[here] ^ how]) + content[here + 1 :]
    return content


def mutated(tree: Any, mutations: list[tuple[int, str, Any]]) -> Any:
    """A copy of nested mappings and lists with a leaf or branch replaced, deleted or added."""
    tree = json.loads(json.dumps(tree)) if not _has_tensors(tree) else _copy(tree)
    for number, kind, value in mutations:
        places = list(_places(tree))
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


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a node."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(items):
        yield node, key
        yield from _places(child)


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copy(child) for key, child in node.items()}
    return [_copy(child) for child in node] if isinstance(node, list) else node


def _has_tensors(node: Any) -> bool:
    if isinstance(node, torch.Tensor):
        return True
    children: Any = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return any(_has_tensors(child) for child in children)


# What may come of it


class Hang(BaseException):
    """No Exception: what reads a damaged file may take any of those for the damage."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang(f"{SECONDS} s and no end")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def result_of(call: Call, *names: str) -> Any:
    """What a function returns; None where it refused in one line that has one of the names in it."""
    try:
        with in_time():
            return call()
    except ValueError as error:
        line = str(error)
        assert line.strip(), "a refusal without words"
        assert len(line.splitlines()) == 1, line
        assert any(name in line for name in names), line
        return None


def ends_well(main: Callable[[list[str]], int], *arguments: str | Path, names: tuple[str, ...]) -> str:
    """Run a command: status 0, or 2 and a last line on stderr that names a file -> its stdout, or ""."""
    out, err = io.StringIO(), io.StringIO()
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: object = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    text = err.getvalue()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text
    if status == 0:
        assert not errors, text
        return out.getvalue()
    assert (status, len(errors)) == (2, 1), text
    assert text.splitlines()[-1] == errors[0], text
    assert any(name in errors[0] for name in names), text
    return ""


class Copies:
    """A finished run to be damaged again and again: each example starts from whole files."""

    def __init__(self, run: RunFiles, directory: Path):
        self.path = directory / "run"
        self.spec = specs.load(run.spec)
        self.rows = run.read_trials()
        self.winner = run.summary()["best"]["trial"]
        self.content: dict[str, bytes] = {}
        self.whole = directory / "whole"
        for path in sorted(run.path.rglob("*")):
            name = str(path.relative_to(run.path))
            if path.is_file() and name.split("/")[0] not in ("ray", "tensorboard", "report.html", ".lock"):
                self.content[name] = path.read_bytes()
                (self.whole / name).parent.mkdir(parents=True, exist_ok=True)
                (self.whole / name).write_bytes(self.content[name])

    def new(self, name: str = "", content: bytes | None = None) -> RunFiles:
        """The whole run but for one file: with other content, or a folder where that is None."""
        shutil.rmtree(self.path, ignore_errors=True)
        for other, whole in self.content.items():
            path = self.path / other
            path.parent.mkdir(parents=True, exist_ok=True)
            if other == name and content is None:
                path.mkdir()
            elif other == name or other == "study.journal":  # the one file that is written in place
                path.write_bytes(whole if other != name or content is None else content)
            else:
                path.hardlink_to(self.whole / other)
        (self.path / "report.html").write_text("whole")
        return RunFiles(self.path)


@pytest.fixture(scope="module")
def copies(finished_run: RunFiles, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    return Copies(finished_run, tmp_path_factory.mktemp("fuzz"))


class StandInScorer:
    """Scores of a scorer without its work."""

    floor = 1.0
    extractor = None

    def samples(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> dict[str, float]:
        return dict.fromkeys([name for name in METRICS if name != "loss"], 2.0)

    def fit(self, model: Any, parameters: Any) -> Any:
        return standard_normal(parameters.latent_dim)


@pytest.fixture(scope="module")
def _nothing_is_trained(copies: Copies) -> Iterator[None]:
    """The commands read, check and write as they do; what takes long between is left out."""

    def cluster(*_: Any) -> None:
        raise Refused("summary.json: this search would go on")

    board = SimpleNamespace(report=lambda *_: None, embed=lambda *_: None, close=lambda: None)
    digits = cache(tuner.vae.data._digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner.cluster, "cluster", cluster)
        patch.setattr(tuner.retrain, "train", lambda *_, **__: iter(()))
        patch.setattr(tuner.workspace.Workspace, "scorer", lambda *_, **__: StandInScorer())
        patch.setattr(tuner.retrain, "TensorBoard", lambda *_: board)
        patch.setattr(tuner.export, "TensorBoard", lambda *_: board)
        patch.setattr(tuner.export, "neighbourhood", lambda *_: dict.fromkeys(FINAL_METRICS, 0.5))
        patch.setattr(tuner.export, "beside_neighbours", lambda *_: np.zeros((4, 4), np.uint8))
        patch.setattr(tuner.export, "write_files", lambda *_: None)
        patch.setattr(tuner.export, "check_files", lambda *_: None)
        patch.setattr(tuner.vae.data, "_digits", digits)
        patch.setattr(tuner.report, "importances", lambda *_: None)
        patch.setattr(tuner.report, "get_plotlyjs", lambda: "")
        patch.setattr(tuner.report, "SECTIONS", tuple(s for s in tuner.report.SECTIONS if s.__name__ != "importances"))
        patch.chdir(copies.path.parent)
        yield


# The journal


def _check_study(run: RunFiles, spec: specs.Spec) -> None:
    """What the search reads of a journal is refused by name, or of the right kind and not less than it was."""
    for opened in (read_study, lambda journal: open_study(journal, spec)):

        def read(opened: Any = opened) -> Any:
            study = opened(run.journal)
            tuner.trials.require_whole(run, study)
            rows = table(study, spec, 1.0)
            left = tuner.trials.StudySearcher(study, spec).remaining
            tuner.trials.SuccessiveHalving(study, spec)
            return study, rows, left

        found = result_of(read, run.journal.name, run.trials.name)
        if found is None:
            continue
        study, rows, left = found
        assert [row["trial"] for row in rows] == list(range(len(rows)))
        assert {row["state"] for row in rows} <= {"complete", "pruned", "failed", "running"}
        running = sum(row["state"] == "running" for row in rows)
        assert left == max(0, spec.budget.trials - len(rows) + running)
        assert len(rows) - running >= sum(row["state"] != "running" for row in run.read_trials())
        for trial in study.trials:
            assert all(isinstance(scores, dict) for scores in evaluations(trial))


@pytest.fixture(scope="module")
def journal(copies: Copies) -> bytes:
    return copies.content["study.journal"]


@MANY
@given(damage=LINE_DAMAGE)
def test_a_damaged_journal(copies, journal, damage):
    _check_study(copies.new("study.journal", damaged(journal, damage)), copies.spec)


@MANY
@given(place=PLACES)
def test_a_journal_cut_off_anywhere_holds_all_that_was_written_before(copies, journal, place):
    """As a kill leaves it, without a trials.csv that knows more: every whole line is there, none is refused."""
    cut = journal[: place % (len(journal) + 1)]
    run = copies.new("study.journal", cut)
    run.trials.unlink()
    study = open_study(run.journal, copies.spec)
    whole = cut[: cut.rfind(b"\n") + 1]
    assert run.journal.read_bytes().startswith(whole)
    assert len(study.trials) == sum(json.loads(line)["op_code"] == 4 for line in whole.splitlines())


@SMALL
@given(mutations=TREES, line=PLACES)
def test_a_journal_with_a_line_that_says_something_else(copies, journal, mutations, line):
    lines = journal.splitlines()
    here = line % len(lines)
    lines[here] = json.dumps(mutated([json.loads(lines[here])], mutations)).encode()[1:-1]
    _check_study(copies.new("study.journal", b"\n".join(lines) + b"\n"), copies.spec)


# Checkpoints


def _torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class _Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("never made",)


def _others() -> dict[str, bytes]:
    """Files that are no checkpoint of a trial."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"nonsense")
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    return {
        "empty": b"",
        "text": b"hello\nworld\n",
        "a tensor": _torch_bytes(torch.zeros(3)),
        "a list": _torch_bytes([1, 2]),
        "an empty mapping": _torch_bytes({}),
        "empty parts": _torch_bytes({"last": {}, "best": {}, "report": {}}),
        "nothing in parts": _torch_bytes({"last": None, "best": None, "report": None}),
        "code": _torch_bytes(_Code()),
        "a pickle with code": pickle.dumps(_Code()),
        "a module": _torch_bytes(torch.nn.Linear(2, 2)),
        "an array": array.getvalue(),
        "an archive": archive.getvalue(),
    }


def _check_candidate(call: Call, name: str) -> None:
    """A checkpoint is refused by name or gives a model that draws."""

    def drawn() -> Any:
        candidate = call()
        assert isinstance(candidate, FittedModel)
        assert isinstance(candidate.epoch, int | float)
        return samples(candidate.model, candidate.prior, 3)

    images = result_of(drawn, name)
    assert images is None or images.shape == (3, 1, 28, 28)


def _check_checkpoint(copies: Copies, file: str, content: bytes | None) -> None:
    run = copies.new(file, content)
    if file.startswith("checkpoints"):
        _check_candidate(lambda: best_of(run, copies.winner), Path(file).name)
        _check_candidate(lambda: last_of(run, copies.winner), Path(file).name)
    else:
        _check_candidate(lambda: retrained(run), Path(file).name)


@pytest.fixture(scope="module", params=["a trial's", "the retrained"])
def checkpoint(request: pytest.FixtureRequest, copies: Copies) -> str:
    return f"checkpoints/{copies.winner:04d}.pt" if request.param == "a trial's" else "retrain/model.pt"


@SMALL
@given(damage=DAMAGE)
def test_a_damaged_checkpoint(copies, checkpoint, damage):
    _check_checkpoint(copies, checkpoint, damaged(copies.content[checkpoint], damage))


@SMALL
@given(mutations=TREES)
def test_a_checkpoint_that_holds_something_else(copies, checkpoint, mutations):
    saved = load_tensors(copies.content[checkpoint])
    _check_checkpoint(copies, checkpoint, _torch_bytes(mutated(saved, mutations)))


@pytest.mark.parametrize("kind", _others())
def test_a_file_that_is_no_checkpoint(copies, checkpoint, kind):
    _check_checkpoint(copies, checkpoint, _others()[kind])
    assert not Path("never made").exists()


def test_a_folder_in_the_place_of_a_checkpoint(copies, checkpoint):
    _check_checkpoint(copies, checkpoint, None)


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("kind", _others())
def test_a_retrain_that_goes_on_from_no_checkpoint(copies, kind):
    run = copies.new("retrain/checkpoint.pt", _others()[kind])
    assert not ends_well(tuner.retrain.main, run.path, names=("checkpoint.pt",))
    assert not Path("never made").exists()


@pytest.mark.usefixtures("_nothing_is_trained")
@SMALL
@given(damage=DAMAGE)
def test_a_retrain_that_goes_on_from_a_damaged_checkpoint(copies, damage):
    content = damaged(copies.content["retrain/checkpoint.pt"], damage)
    ends_well(tuner.retrain.main, copies.new("retrain/checkpoint.pt", content).path, names=("checkpoint.pt",))


@pytest.mark.usefixtures("_nothing_is_trained")
@SMALL
@given(mutations=TREES)
def test_a_retrain_that_goes_on_from_something_else(copies, mutations):
    content = _torch_bytes(mutated(load_tensors(copies.content["retrain/checkpoint.pt"]), mutations))
    ends_well(tuner.retrain.main, copies.new("retrain/checkpoint.pt", content).path, names=("checkpoint.pt",))


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("main", [tuner.export.main, tuner.retrain.main, tuner.report.main])
def test_a_stage_on_a_run_whose_checkpoint_is_gone(copies, main):
    run = copies.new()
    run.checkpoint(copies.winner).unlink()
    assert not ends_well(main, run.path, names=(run.checkpoint(copies.winner).name,))


# The extractors


@SMALL
@given(damage=DAMAGE, told=st.booleans())
def test_a_damaged_extractor(copies, damage, told):
    """Also where the summary was made to agree with it."""
    content = damaged(copies.content["extractor/search.safetensors"], damage)
    run = copies.new("extractor/search.safetensors", content)
    if told:
        known = run.summary()["extractors"]["search"]
        run.update_summary(extractors={"search": known | {"sha256": hashlib.sha256(content).hexdigest()}})
    extractors = result_of(lambda: load_extractors(run), "search.safetensors")
    assert extractors is None or extractors["search"].features(torch.zeros(2, 1, 28, 28)).shape == (2, 64)


# An export


@SMALL
@given(damage=DAMAGE, name=st.sampled_from(["weights.safetensors", "prior.npz", "model.json"]))
def test_a_damaged_export(copies, damage, name):
    run = copies.new(f"export/{name}", damaged(copies.content[f"export/{name}"], damage))

    def drawn() -> Any:
        return codec.load(run.export).sample(3)

    images = result_of(drawn, name)
    assert images is None or images.shape == (3, 1, 28, 28)


@SMALL
@given(mutations=TREES)
def test_an_export_whose_description_says_something_else(copies, mutations):
    info = mutated(json.loads(copies.content["export/model.json"]), mutations)
    run = copies.new("export/model.json", json.dumps(info).encode())
    images = result_of(lambda: codec.load(run.export).sample(3), "model.json", "weights.safetensors", "prior.npz")
    assert images is None or images.shape == (3, 1, 28, 28)


# IDX files


def _idx(name: str, count: int) -> bytes:
    sizes = (count, 28, 28) if "images" in name else (count,)
    header = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
    return header + bytes(index % 10 for index in range(math.prod(sizes)))


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("mnist") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    return raw


HEADERS = st.tuples(st.sampled_from(["flip", "zero", "insert"]), st.integers(0, 15), st.integers(1, 255))


@MANY
@given(name=st.sampled_from(IDX_FILES), damage=st.lists(st.one_of(HEADERS, BYTES), min_size=1, max_size=2))
@example(name="train-labels-idx1-ubyte", damage=[("flip", 8, 10)])
def test_a_damaged_idx_file(mnist, name, damage):
    for other in IDX_FILES:
        (mnist / other).write_bytes(_idx(other, 12 if other.startswith("train") else 5))
    (mnist / name).write_bytes(damaged((mnist / name).read_bytes(), damage))
    kind = "train" if name.startswith("train") else "t10k"
    data = result_of(lambda: load("mnist", mnist.parents[1], download=False), name, f"{mnist}: ")
    test = result_of(lambda: load_test("mnist", mnist.parents[1], download=False), name, f"{mnist}: ")
    splits = ([data.train, data.validation] if data else []) + ([test] if test else [])
    for split in splits:
        assert split.images.shape == (len(split), 1, 28, 28)
        assert split.labels.shape == (len(split),)
        assert split.images.dtype == torch.uint8
    undamaged = test if kind == "train" else data
    assert undamaged is None or sum(map(len, splits)) in (5, 12, 17)
    labels = torch.cat([split.labels for split in splits]) if splits else torch.zeros(1)
    assert labels.amin() >= 0, "no digit"
    assert labels.amax() <= 9, "no digit"


def test_a_folder_in_the_place_of_an_idx_file(mnist):
    for name in IDX_FILES:
        shutil.rmtree(mnist)
        mnist.mkdir()
        for other in IDX_FILES:
            (mnist / other).write_bytes(_idx(other, 5))
        (mnist / name).unlink()
        (mnist / name).mkdir()
        assert result_of(lambda: load("mnist", mnist.parents[1], download=False), "MNIST/raw") is None
    shutil.rmtree(mnist)
    mnist.mkdir()


# The small files of a run, and the commands that read them

COMMANDS: dict[str, Callable[[RunFiles], tuple[Callable[[list[str]], int], list[str]]]] = {
    "status": lambda run: (tuner.search.main, ["--status", str(run.path)]),
    "search": lambda run: (tuner.search.main, ["--run", str(run.path)]),
    "another seed": lambda run: (tuner.search.main, ["--run", str(run.path), "--seed=7"]),
    "retrain": lambda run: (tuner.retrain.main, [str(run.path)]),
    "export": lambda run: (tuner.export.main, [str(run.path)]),
    "report": lambda run: (tuner.report.main, [str(run.path)]),
}


def _check_command(run: RunFiles, command: str, *names: str) -> None:
    """The command refuses by name or does its work."""
    main, arguments = COMMANDS[command](run)
    out = ends_well(main, *arguments, names=names)
    if command == "another seed":
        assert not out
    if command == "report" and out:
        assert "</html>" in run.report.read_text()


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", ["summary.json", "trials.csv", "spec.yaml", "study.journal"])
def test_a_folder_in_the_place_of_a_file(copies, command, file):
    _check_command(copies.new(file, None), command, file, "spec")


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("command", COMMANDS)
@SMALL
@given(damage=LINE_DAMAGE)
def test_a_damaged_summary(copies, command, damage):
    content = damaged(copies.content["summary.json"], damage)
    _check_command(copies.new("summary.json", content), command, "summary.json", ".safetensors", "run: ", ".pt")


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("command", COMMANDS)
@SMALL
@given(mutations=TREES)
def test_a_summary_that_says_something_else(copies, command, mutations):
    summary = mutated(json.loads(copies.content["summary.json"]), mutations)
    run = copies.new("summary.json", json.dumps(summary).encode())
    _check_command(run, command, "summary.json", ".safetensors", "run: ", ".pt")


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("command", ["status", "report"])
@SMALL
@given(damage=LINE_DAMAGE)
def test_a_damaged_trials_csv(copies, command, damage):
    run = copies.new("trials.csv", damaged(copies.content["trials.csv"], damage))
    _check_command(run, command, "trials.csv")
    rows = result_of(run.read_trials, "trials.csv")
    assert rows is None or all(isinstance(row, dict) for row in rows)


CELLS = st.sampled_from(["", "x", "nan", "inf", "-1", "1e400", "7", "running", "complete", '"a\nb"', "a,b,c"])


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("command", ["status", "report"])
@SMALL
@given(line=PLACES, column=PLACES, cell=CELLS)
def test_a_trials_csv_with_another_cell(copies, command, line, column, cell):
    lines = [text.split(",") for text in copies.content["trials.csv"].decode().splitlines()]
    row = lines[line % len(lines)]
    row[column % len(row)] = cell
    text = "".join(",".join(row) + "\n" for row in lines)
    _check_command(copies.new("trials.csv", text.encode()), command, "trials.csv")


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("command", COMMANDS)
@SMALL
@given(damage=LINE_DAMAGE)
def test_a_damaged_spec_of_a_run(copies, command, damage):
    content = damaged(copies.content["spec.yaml"], damage)
    _check_command(copies.new("spec.yaml", content), command, "spec.yaml", "belongs to another spec", "no MNIST")


@pytest.mark.usefixtures("_nothing_is_trained")
@SMALL
@given(damage=LINE_DAMAGE)
def test_the_report_of_a_damaged_journal(copies, journal, damage):
    _check_command(copies.new("study.journal", damaged(journal, damage)), "report", "study.journal", "trials.csv")


@pytest.mark.usefixtures("_nothing_is_trained")
def test_the_report_of_a_journal_that_knows_less_than_trials_csv(copies, journal):
    content = b"".join(journal.splitlines(keepends=True)[:3])
    _check_command(copies.new("study.journal", content), "report", "study.journal", "trials.csv")


@pytest.mark.usefixtures("_nothing_is_trained")
def test_a_whole_run_is_refused_by_nobody(copies):
    for command in COMMANDS:
        main, arguments = COMMANDS[command](copies.new())
        out = ends_well(main, *arguments, names=("belongs to another spec",))
        assert bool(out) == (command in ("status", "search", "report"))
