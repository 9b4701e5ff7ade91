"""Every command, program and spec that README.md and docs/ show does what they say: each has its runner here.

Their links are tested in test_docs.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

import tuner.export
import tuner.report
import tuner.retrain
import tuner.search
import tuner.spec
import tuner.use
from tuner import sources
from tuner.data_spec import DigitsSpec
from tuner.job import load_spec
from tuner.own_model import load as load_model
from tuner.run import RunFiles
from tuner.sources.idx import IDX_FILES
from tuner.spec import DEFAULT, Spec, load

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {"", "text", "mermaid"}  # what is shown, and is no command
TINY = ["--trials=2", "--max-epochs=1", "--set=budget.grace_epochs=1", "--no-retrain"]


class Block(NamedTuple):
    document: Path
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    return [
        Block(document, language, text)
        for document in DOCUMENTS
        for language, text in re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", document.read_text(), re.DOTALL | re.M)
        if not languages or language in languages
    ]


def named(block: Block) -> str:
    return f"{block.document.name}: {block.text.strip().splitlines()[0][:60]}"


def commands() -> list[str]:
    """Each line of the shell blocks once, continued lines joined, without comments and what is set before it."""
    lines = [line for block in blocks("bash", "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    bare = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return list(dict.fromkeys(re.sub(r"^([A-Z_]+=\S* )+", "", line) for line in bare if line))


def own_specs() -> list[Block]:
    """The specs that are shown whole; the first is the my_spec.yaml of the commands."""
    return [block for block in blocks("yaml") if "space" in yaml.safe_load(block.text)]


# Commands


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, as the reader has it: with the shipped specs, the own one and no run so far."""
    for folder in ("search_spaces", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "my_spec.yaml").write_text(own_specs()[0].text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def finished_at(name: str, finished_run: RunFiles) -> None:
    """Put the finished run where a command looks for one, unless that is object storage."""
    if "://" not in name and not Path(name).exists():
        shutil.copytree(finished_run.path, name)


def search(words: list[str], finished_run: RunFiles) -> None:
    """What only looks or goes on does so on a finished run; what would search for long is read, and its spec is, and
    the model that it names is loaded."""
    arguments = tuner.search.parse(words)
    run = arguments.status or (arguments.run if arguments.spec is None and len(words) == 2 else None)
    if run and "://" not in run:
        finished_at(run, finished_run)
        assert tuner.search.main(words) == 0
    else:
        assert isinstance(
            load_spec(RunFiles(Path("new")), tuner.search.request(arguments), load_model(arguments.model)[1]), Spec
        )


def stage(main: Callable[[list[str]], int]) -> Callable[[list[str], RunFiles], None]:
    def run(words: list[str], finished_run: RunFiles) -> None:
        finished_at(words[0], finished_run)
        assert main(words) == 0

    return run


def use(words: list[str], finished_run: RunFiles) -> None:
    """On two photos, and what they are encoded to."""
    finished_at(str(Path(words[0]).parent), finished_run)
    Path("photos").mkdir()
    for name, image in zip(("a.png", "b.png"), sources.load(DigitsSpec()).validation.images[:, 0], strict=False):
        Image.fromarray(image.numpy()).save(f"photos/{name}")
    assert tuner.use.main([words[0], "encode", "photos", "--out", "latents.npz"]) == 0
    assert tuner.use.main(words) == 0


def check_spec(words: list[str], finished_run: RunFiles) -> None:
    assert tuner.spec.main(words) == 0


def tensorboard(words: list[str], finished_run: RunFiles) -> None:
    (folder,) = (words[i + 1] for i, word in enumerate(words) if word == "--logdir")
    finished_at(folder.removesuffix("/tensorboard"), finished_run)
    command = [str(Path(sys.executable).with_name("tensorboard")), "--inspect", *words]
    inspected = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0000,latent_dim=16" in inspected.stdout


def make(words: list[str], finished_run: RunFiles) -> None:
    """The target is there, and what it would start is there too."""
    command = ["make", "-C", str(ROOT), "--dry-run", *words]
    plain = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # make itself may run this
    planned = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    started = re.findall(r"^\.venv/bin/(\w[\w-]*)(?: -m (\S+))?", planned.stdout, re.MULTILINE)
    assert started, planned.stdout
    for program, module in started:
        ours = ROOT / f"{module.replace('.', '/')}.py"
        installed = find_spec(module.partition(".")[0]) if module else Path(sys.executable).with_name(program).exists()
        assert installed, (program, module)
        assert ours.exists() or "." not in module, module


def activate(words: list[str], finished_run: RunFiles) -> None:
    assert words == [".venv/bin/activate"]
    assert ".venv" in (ROOT / "Makefile").read_text()


RUNNERS: dict[str, Callable[[list[str], RunFiles], None]] = {
    "python -m tuner.search": search,
    "vae-tuner": search,
    "python -m tuner.report": stage(tuner.report.main),
    "python -m tuner.retrain": stage(tuner.retrain.main),
    "python -m tuner.export": stage(tuner.export.main),
    "python -m tuner.spec": check_spec,
    "python -m tuner.use": use,
    "tensorboard": tensorboard,
    "make": make,
    "source": activate,
}


def runner(command: str) -> tuple[Callable[[list[str], RunFiles], None], list[str]]:
    """What runs a command, and its arguments."""
    job = re.fullmatch(r"ray job submit .*-- (python -m tuner\.search.*)", command)
    command = job[1] if job else command
    for start, run in RUNNERS.items():
        if command == start or command.startswith(f"{start} "):
            return run, shlex.split(command.removeprefix(start))
    pytest.fail(f"nothing here runs: {command}")


def opens_a_cluster(command: str) -> bool:
    return command.startswith(("python -m tuner.retrain", "python -m tuner.export"))


@pytest.mark.parametrize(
    "command", [pytest.param(line, marks=[pytest.mark.slow] * opens_a_cluster(line)) for line in commands()]
)
def test_a_command_does_its_work(command, place, finished_run):
    run, words = runner(command)
    run(words, finished_run)


def test_a_command_that_nobody_runs_is_found():
    with pytest.raises(pytest.fail.Exception, match=r"nothing here runs: python -m tuner\.unknown"):
        runner("python -m tuner.unknown runs/mine")


def test_a_block_of_a_language_that_nobody_reads_is_found():
    assert {block.language for block in blocks()} <= {"bash", "sh", "python", "yaml"} | NOT_RUN
    assert commands()


# Searches


@pytest.mark.long
def test_the_own_spec_is_searched(begin_run, place):
    command = next(line for line in commands() if line.startswith("python -m tuner.search my_spec.yaml"))
    words = shlex.split(command)[3:]
    run = begin_run(Path(tuner.search.parse(words).run), *words, *TINY)
    assert tuner.search.main([*words, *TINY]) == 0
    searched = load(run.spec)
    assert searched.points_to_evaluate == load(Path("my_spec.yaml")).points_to_evaluate
    assert run.summary().trials["complete"] == 2
    assert run.report.exists()


def write_mnist(folder: Path) -> None:
    """The four files as they are published, of fewer and other images: the digits, moved about by a pixel or two."""
    digits = sources.load(DigitsSpec()).train
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    counts = (1_200, 200)
    for count, (images_file, labels_file) in zip(counts, list(pairwise(IDX_FILES))[::2], strict=True):
        chosen, moves = random.integers(len(digits), size=count), random.integers(-2, 3, size=(count, 2))
        images = np.stack(
            [np.roll(digits.images[index, 0], move, (0, 1)) for index, move in zip(chosen, moves, strict=True)]
        )
        for name, values in ((images_file, images), (labels_file, digits.labels[chosen].numpy())):
            head = np.array([0x800 + values.ndim, *values.shape], ">u4")
            (folder / name).write_bytes(head.tobytes() + values.astype(np.uint8).tobytes())


@pytest.mark.long
def test_mnist_is_searched_from_a_folder(place):
    command = next(line for line in commands() if "mnist --data-dir" in line)
    words = shlex.split(command)[3:]
    write_mnist(tuner.search.parse(words).data_dir / "MNIST" / "raw")
    assert tuner.search.main([*words, *TINY, "--run=runs/mnist"]) == 0
    tested = RunFiles(Path("runs/mnist")).summary().test
    assert tested.baseline.frechet_distance > 10 * tested.real.frechet_distance


# Specs and programs


@pytest.mark.parametrize("block", blocks("yaml"), ids=named)
def test_a_spec_loads_whole_or_as_a_part_of_the_shipped_one(block, tmp_path):
    parts = yaml.safe_load(block.text)
    path = tmp_path / "spec.yaml"
    path.write_text(block.text)
    spec = load(path) if "space" in parts else load(DEFAULT, list(parts.items()))
    assert parts.keys() <= spec.model_dump().keys()


@pytest.mark.parametrize("block", blocks("python"), ids=named)
def test_a_program_runs_where_an_export_lies_and_needs_no_more_than_it_imports(block, place, finished_run):
    shutil.copytree(finished_run.path, "runs/mine")
    Path("export").symlink_to("runs/mine/export")
    alone = not re.search(r"\b(tuner|torch)\b", block.text)
    more = "\nimport sys\nassert not {'tuner', 'torch'} & set(sys.modules)" if alone else ""
    done = subprocess.run(
        [sys.executable, *(["-I"] if alone else []), "-c", block.text + more],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if "gap_closed" in block.text:
        assert str(finished_run.summary().test.retrained.gap_closed) in done.stdout
