"""Bad input: status 2, one line on stderr that names what and where, and nothing made or lost."""

import codecs
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from spec_file import SEARCH

import tuner.export
import tuner.report
import tuner.retrain
import tuner.search
import tuner.use
from tuner import spec as specs
from tuner import yaml_text
from tuner.run import RunFiles
from tuner.sources.idx import IDX_FILES
from tuner.spec import DEFAULT
from tuner.summary import Best, Compared, ExtractorInfo, Promoted, Scores
from tuner.vae.parameters import CLASSIC

MNIST = DEFAULT.parent / "mnist.yaml"
OFFLINE = ("--set", "data.download=false")

Refused = Callable[..., str]


def _tree(directory: Path) -> dict[str, bytes | None]:
    """Every file below with its bytes, every folder with None."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command in tmp_path, checks that it is refused and changes no file -> its one line on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")  # so that a search that is not refused ends at once

    def check(*arguments: str | Path, command: Callable[[list[str]], int] = tuner.search.main) -> str:
        before = _tree(tmp_path)
        try:
            status: object = command([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
        assert _tree(tmp_path) == before
        return err

    return check


def _write_mnist(directory: Path, train: int = 400, test: int = 400) -> Path:
    """Four whole IDX files of blank images -> the folder they are in."""
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES:
        count = train if name.startswith("train") else test
        sizes = (count, 28, 28) if "images" in name else (count,)
        header = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
        (raw / name).write_bytes(header + bytes(math.prod(sizes)))
    return raw


def _write_photos(place: Path, count: int) -> Path:
    """A folder of grey images."""
    place.mkdir()
    for number in range(count):
        (place / f"{number}.png").write_bytes(b"P5 16 16 255 " + bytes([number // 256, number % 256, *bytes(254)]))
    return place


def _run_of(directory: Path, *overrides: tuple[str, object]) -> RunFiles:
    """A run directory as a search begins it: its spec alone."""
    run = RunFiles(directory)
    directory.mkdir()
    run.spec.write_text(SEARCH)
    run.spec.write_text(specs.load(run.spec, list(overrides)).to_yaml())
    return run


# Spec files


def test_a_missing_spec_file(refused):
    assert "nowhere.yaml: No such file or directory" in refused("nowhere.yaml")
    assert "nowhere.yaml: No such file or directory" in refused("nowhere.yaml", "--run", "run")


def test_a_spec_that_is_a_folder(refused, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "photos: Is a directory" in refused("photos")


def test_a_folder_of_a_shipped_specs_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mnist").mkdir()
    assert specs.load(Path("mnist")) == specs.load(MNIST)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("space: {latent_dim: [", ["not YAML", "line 1"]),
        ("space:\n  a: 1\n b: 2", ["not YAML", "line 3"]),
        ("- space\n- budget", ["expected a mapping", "found list"]),
        ("latent_dim", ["expected a mapping", "found str"]),
        ("", ["expected a mapping", "found NoneType"]),
        ("\x00", ["not YAML", "#x0000"]),
        ("seed: 1\nfixed: {width: 8, width: 9}", ["not YAML", "width is given twice", "line 2"]),
        ("seed: 1\nseed: 1", ["not YAML", "seed is given twice", "line 1"]),
    ],
)
def test_a_file_that_is_no_mapping(refused, tmp_path, text, words):
    (tmp_path / "some.yaml").write_text(text)
    line = refused("some.yaml", "--run", "run")
    for word in ["error: some.yaml: ", *words]:
        assert word in line


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("budgets", {"trials": 3}, "budgets: unknown key"),
        ("budget.trial", 3, "budget.trial: unknown key (got 3)"),
        ("space.latent_dim.hihg", 3, "space.latent_dim.hihg: unknown key (got 3)"),
        ("space.latent_dim.low", 33, "space.latent_dim: low 33 is above high 32"),
        ("space.kl_weight.low", 0, "space.kl_weight: log needs low above 0, not 0"),
        ("space.learning_rate.low", -1, "space.learning_rate: log needs low above 0, not -1"),
        ("space.latent", {"choices": [4]}, "space.latent: unknown parameter; known are model, latent_dim"),
        ("space.latent_dim", {"choices": ["x"]}, "space.latent_dim: 'x': Input should be a valid integer"),
        ("fixed.latnet", 3, "fixed.latnet: unknown parameter; known are model, latent_dim"),
        (
            "fixed.prior",
            "vamp",
            "fixed.prior: 'vamp': Input should be 'standard_normal', 'gaussian_mixture', 'matched_mixture' or 'flow'",
        ),
        (
            "points_to_evaluate",
            [{"latent_dim": 3}],
            "points_to_evaluate.0.latent_dim: 3 is outside of space.latent_dim",
        ),
        ("objective", "accuracy", "(got 'accuracy')"),
        (
            "objective",
            "loss",
            "loss can't be the objective while kl_weight is searched: that changes what it counts",
        ),
        ("data.name", "cifar", "data.name: 'cifar' is none of 'digits', 'mnist', 'fashion_mnist', 'kmnist', "),
        ("data", {"name": "folder"}, "data.directory: Field required"),
        ("data", {"name": "folder", "directory": "there", "size": 30}, "data.size: Input should be a multiple of 4"),
        ("budget.time_limit", "soon", "budget.time_limit: 'soon' is not a time such as 90s, 30m or 1.5h"),
        ("budget.grace_epochs", 19, "budget.grace_epochs: 19 is above max_epochs 18"),
        ("seed", -1, "seed: Input should be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_spec_that_makes_no_sense(refused, tmp_path, key, value, words):
    raw = yaml.safe_load(SEARCH)
    yaml_text.put(raw, key, value)
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(raw))
    line = refused("some.yaml", "--run", "run")
    assert line.startswith("error: some.yaml: ")
    assert words in line


def test_several_faults_are_told_in_one_line(refused, tmp_path):
    raw = yaml.safe_load(SEARCH) | {"colour": "red", "seed": "x"}
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(raw))
    line = refused("some.yaml")
    assert "colour: unknown key" in line
    assert "seed: Input should be a valid integer" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (SEARCH.encode("utf-16"), "looks like UTF-16: save it as UTF-8"),
        (SEARCH.encode("utf-16-le"), "looks like UTF-16: save it as UTF-8"),
        (f"{SEARCH}# größe".encode("latin-1"), "looks like Latin-1: save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a text file"),
        (codecs.BOM_UTF16_BE + b"\xd8", "not a text file"),
    ],
)
def test_a_spec_in_another_encoding(refused, tmp_path, content, words):
    (tmp_path / "some.yaml").write_bytes(content)
    assert refused("some.yaml", "--run", "run") == f"error: some.yaml: {words}\n"


# Paths


PATHS = pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (tuner.search.main, ["{}"]),
        (tuner.search.main, ["--run={}"]),
        (tuner.search.main, ["--status={}"]),
        (tuner.search.main, [MNIST, *OFFLINE, "--data-dir={}"]),
        (tuner.search.main, [MNIST, *OFFLINE, "--set=data.directory={}"]),
        (tuner.search.main, ["--set=data={{name: arrays, file: {}}}"]),
        (tuner.search.main, ["--set=features={}"]),
        (tuner.search.main, ["--set=warm_start=[{}]"]),
        (tuner.retrain.main, ["{}"]),
        (tuner.export.main, ["{}"]),
        (tuner.report.main, ["{}"]),
        (tuner.use.main, ["{}", "sample", "3"]),
        (tuner.use.main, [".", "sample", "3", "--out={}"]),
        (tuner.use.main, [".", "encode", "{}", "--out", "x.npz"]),
    ],
    ids=lambda part: part.__module__ if callable(part) else " ".join(map(str, part[-2:])),
)


@PATHS
@pytest.mark.parametrize(
    "path", ["x" * 300, "~nobody-of-that-name/there", os.fsdecode(b"\xff")], ids=["long", "~", "bytes"]
)
def test_a_path_that_none_can_have(refused, command, arguments, path):
    """Nothing is made: neither here nor, by whoever expands `~`, in a home directory."""
    words = {"x": "File name too long", "~": "Could not determine home directory"}
    if path == os.fsdecode(b"\xff") and str(arguments[-1]).startswith("--set"):
        path = r'"\ud800"'  # which is how YAML may hold such a thing
    line = refused(*(str(argument).format(path) for argument in arguments), command=command)
    assert words.get(path[0], "not in UTF-8" if "not in UTF-8" in line else "as a unicode string") in line


@PATHS
def test_a_tilde_is_the_home_directory_and_nothing_is_made_there(refused, tmp_path, monkeypatch, command, arguments):
    home = tmp_path / "home"
    (home / "there").mkdir(parents=True)
    (home / "there" / "mine").write_text("kept")
    monkeypatch.setenv("HOME", str(home))
    line = refused(*(str(argument).format("~/there") for argument in arguments), command=command)
    assert "~" not in line
    assert f"{home}/there" in line or "config.json: not readable" in line


# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trials", "0"], ["trials", "greater than or equal to 1", "0"]),
        (["--trials", "-3"], ["trials", "greater than or equal to 1", "-3"]),
        (["--max-epochs", "0"], ["max_epochs", "greater than 0"]),
        (["--max-epochs", "nan"], ["max_epochs", "finite"]),
        (["--concurrency", "0"], ["concurrency 0: expected 1 or more"]),
        (["--time-limit", "soon"], ["time_limit", "'soon' is not a time such as 90s, 30m or 1.5h"]),
        (["--time-limit", "0"], ["time_limit", "greater than 0"]),
        (["--seed", "-1"], ["seed", "greater than or equal to 0", "-1"]),
        (["--set", "budget.trials"], ["--set budget.trials: expected path.to.key=value"]),
        (["--set", "=3"], ["--set =3: expected path.to.key=value"]),
        (["--set", "budget.trials={"], ["--set budget.trials={: not YAML"]),
        (["--set", "seed.x=3"], ["--set seed.x: seed is not a mapping"]),
        (["--set", "budget.trial=3"], ["budget.trial: unknown key"]),
        (["--set", "space.latent_dim.low=33"], ["space.latent_dim: low 33 is above high 32"]),
        (["--set", "objective=loss"], ["loss can't be the objective while kl_weight is searched"]),
        (["--set", "seed=2020-13-45"], ["seed=2020-13-45"]),
    ],
    ids=" ".join,
)
def test_a_flag_with_a_bad_value(refused, tmp_path, flags, words):
    (tmp_path / "search.yaml").write_text(SEARCH)
    for where in ([], ["--run", "run"]):
        line = refused("search.yaml", *flags, *where)
        for word in words:
            assert word in line


def test_the_flags_of_a_search_are_these(capsys):
    with pytest.raises(SystemExit) as end:
        tuner.search.main(["--help"])
    assert end.value.code == 0
    assert set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) == {
        "--help",
        "--run",
        "--data-dir",
        "--model",
        "--trials",
        "--max-epochs",
        "--time-limit",
        "--seed",
        "--concurrency",
        "--address",
        "--logger",
        "--no-retrain",
        "--specs",
        "--status",
        "--set",
    }


@pytest.mark.parametrize(
    "flags", [["--trials", "many"], ["--colour"], ["one.yaml", "two.yaml"], ["--run"]], ids=" ".join
)
def test_argparse_refuses_what_it_does_not_know(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        tuner.search.main(flags)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert _tree(tmp_path) == {}


# Data


@pytest.mark.parametrize("name", IDX_FILES)
def test_a_truncated_idx_file(refused, tmp_path, name):
    path = _write_mnist(tmp_path / "there") / name
    path.write_bytes(path.read_bytes()[:-1])
    line = refused(MNIST, "--data-dir", "there", "--run", "run")
    assert re.search(rf"there/MNIST/raw/{name}: damaged IDX file, [\d,]+ bytes where its header says", line)


@pytest.mark.parametrize(("train", "test", "validation"), [(400, 5, 66), (5_000, 0, 833), (200, 400, 33)])
def test_a_split_of_too_few_images_whichever_it_is(refused, tmp_path, train, test, validation):
    """That of the test split, too, which is not read before the export."""
    _write_mnist(tmp_path / "there", train, test)
    counts = f"{train - validation:,} for train where 200 are needed, {validation} for validation where 65 are needed"
    line = refused(MNIST, "--data-dir", "there", "--run", "run")
    assert line == f"error: there: too few images: {counts}, {test} for test where 65 are needed\n"


def test_mnist_that_is_nowhere_and_may_not_be_downloaded(refused):
    line = refused(MNIST, "--data-dir", "there", *OFFLINE, "--run", "run")
    for word in ["no MNIST in there/MNIST/raw", *IDX_FILES, "downloading is off", "data.name=digits"]:
        assert word in line
    assert "no MNIST in data/MNIST/raw" in refused(MNIST, *OFFLINE)


def test_a_data_directory_that_is_a_file(refused, tmp_path):
    (tmp_path / "there").write_text("mine")
    assert "no MNIST in there/MNIST/raw" in refused(MNIST, "--data-dir", "there", *OFFLINE, "--run", "run")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda place: None, "there: No such file or directory"),
        (lambda place: place.write_text("mine"), "there: not a folder, and not a whole .zip"),
        (lambda place: place.mkdir(), "there: no images in it"),
        (lambda place: _write_photos(place, 40), "there: too few images: "),
        (lambda place: (_write_photos(place, 40) / "7.png").write_text("mine"), "there: 1 of 40 images can't be read"),
        (lambda place: (_write_photos(place, 2) / "0.png").rename(place / "test"), "there: too few images: "),
    ],
    ids=["nowhere", "a file", "empty", "too few", "damaged", "a file in the place of a split"],
)
def test_a_folder_that_gives_no_images(refused, tmp_path, write, words):
    write(tmp_path / "there")
    spec = yaml.safe_load(SEARCH) | {"data": {"name": "folder", "directory": "elsewhere", "size": 16}}
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump(spec))
    assert words in refused("photos.yaml", "--data-dir", "there", "--run", "run")
    assert "elsewhere: No such file or directory" in refused("photos.yaml", "--run", "run")


# What does not go with the images


def test_a_temperature_for_images_in_colour(refused, tmp_path):
    photos = np.random.default_rng(0).integers(256, size=(1_000, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "photos.npy", photos)
    spec = yaml.safe_load(SEARCH) | {"data": {"name": "arrays", "file": "photos.npy"}}
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump(spec))
    line = refused("photos.yaml", "--run", "run", "--set", "fixed.temperature=fitted")
    assert line == "error: fixed.temperature: fitted does not go with images in colour\n"


def test_a_feature_extractor_that_is_none_or_for_other_images(refused, tmp_path):
    assert "features: own.pt2: No such file" in refused("--set", "features=own.pt2", "--run", "run")
    (tmp_path / "own.pt2").write_bytes(b"hello")
    assert "own.pt2: not readable as an extractor: " in refused("--set", "features=own.pt2", "--run", "run")
    network, shapes = torch.nn.Flatten(), ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=shapes), tmp_path / "own.pt2"
    )
    assert "features: own.pt2 takes no images 1x1x28x28: " in refused("--set", "features=own.pt2", "--run", "run")


# Run directories


def test_a_run_directory_that_belongs_to_another_spec(refused, tmp_path):
    run = _run_of(tmp_path / "run", ("budget.trials", 32), ("fixed.width", 16))
    (run.path / "trials.csv").write_text("kept\n")
    (tmp_path / "search.yaml").write_text(SEARCH)
    line = refused("search.yaml", "--run", "run")
    assert line.startswith("error: run: belongs to another spec: ")
    assert "budget.trials: 24 here, 32 there" in line
    assert "fixed.width: unset here, 16 there" in line
    assert "data.name: mnist here, digits there" in refused(MNIST, "--run", "run")
    assert "seed: 3 here, 0 there" in refused("--seed", "3", "--run", "run")


def test_a_run_directory_with_a_damaged_spec(refused, tmp_path):
    _run_of(tmp_path / "run").spec.write_text("space: [")
    assert "run/spec.yaml: not YAML" in refused("--run", "run")
    assert "run/spec.yaml: not YAML" in refused(MNIST, "--run", "run")


def test_a_run_directory_with_a_damaged_summary(refused, tmp_path):
    run = _run_of(tmp_path / "run")
    run.summary_file.write_text('{"best": {')
    for flag in ("--run", "--status"):
        assert "run/summary.json: damaged: Invalid JSON" in refused(flag, "run")
    for command in (tuner.retrain.main, tuner.export.main):
        assert "run/summary.json: damaged: Invalid JSON" in refused("run", command=command)


def test_a_run_whose_extractor_is_gone(refused, tmp_path):
    run = _run_of(tmp_path / "run")
    scores = Scores(frechet_distance=2.0, frechet_distance_error=0.1, gap_closed=0.5, gap_closed_error=0.1)
    searched, by = {"trial": 0, "epoch": 1.0}, {part: {"search": 1.0} for part in ("again", "gap_closed")}
    run.update_summary(
        extractors={"search": ExtractorInfo(kind="classifier", sha256="0" * 64, accuracy=1, floor=1.0)},
        promotion=(Promoted(**searched, **by, searched=2.0, rank=1.0),),
        best=Best(**searched, parameters=CLASSIC.model_dump()),
        validation=Compared(real=scores, baseline=scores, best=scores),
    )
    assert "run/extractors/search.safetensors" in refused("--run", "run")
    for command in (tuner.retrain.main, tuner.export.main):
        assert "run/extractors/search.safetensors" in refused("run", command=command)


def test_a_run_that_is_a_file(refused, tmp_path, monkeypatch):
    (tmp_path / "run").write_text("mine")
    assert "run: exists and is not a run directory" in refused("--run", "run")
    monkeypatch.delenv("RAY_ADDRESS")  # which is looked at before a folder is made
    assert "run/deeper" in refused("--run", "run/deeper")


def test_a_run_that_is_someone_elses_folder(refused, tmp_path):
    (tmp_path / "run" / "photos").mkdir(parents=True)
    (tmp_path / "run" / "photos" / "one.png").write_bytes(b"mine")
    assert "run: exists and is not a run directory" in refused("--run", "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".hidden").write_bytes(b"mine")
    assert "other: exists and is not a run directory" in refused("--run", "other")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (tuner.retrain.main, "not a run directory (no spec.yaml)"),
        (tuner.export.main, "not a run directory (no spec.yaml)"),
        (tuner.report.main, "no search to report on"),
    ],
    ids=["retrain", "export", "report"],
)
def test_a_stage_on_what_is_no_run(refused, tmp_path, command, words):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "file", "empty"):
        assert f"error: {name}: {words}" in refused(name, command=command)


def test_the_status_of_what_is_no_run(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("nowhere", "file"):
        assert f"{name}: not a run directory (no spec.yaml)" in refused("--status", name)


@pytest.mark.parametrize("command", [tuner.retrain.main, tuner.export.main], ids=["retrain", "export"])
def test_a_stage_on_a_run_whose_search_has_not_ended(refused, tmp_path, command):
    _run_of(tmp_path / "run")
    line = refused("run", command=command)
    assert "run: its search has not ended; go on with python -m tuner.search --run run" in line


# The real commands


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("tuner.search", [MNIST, *OFFLINE, "--run", "run"], "no MNIST in data/MNIST/raw"),
        ("tuner.export", ["nowhere"], "nowhere: not a run directory"),
        ("tuner.spec", [MNIST, "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    ],
)
def test_a_refused_command_ends_with_status_2_and_one_line_without_a_traceback(tmp_path, module, arguments, words):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert _tree(tmp_path) == {}
