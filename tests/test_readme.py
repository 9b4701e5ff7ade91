"""Every command of the README runs, and its snippet needs neither this package nor torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tuner.export
import tuner.report
import tuner.retrain
import tuner.search
from tuner.run import RunFiles
from tuner.spec import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATA = ROOT.parent / "shared" / "data"
TINY = ["--trials=2", "--max-epochs=1", "--no-retrain", "--set=budget.grace_epochs=1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


def test_no_command_is_left_out_here():
    assert COMMANDS == [
        "make search",
        "python -m tuner.search search_spaces/mnist.yaml --data-dir data",
        "python -m tuner.search my_spec.yaml --run runs/mine",
        "python -m tuner.search my_spec.yaml --run runs/short --trials 8 --max-epochs 6 --set fixed.batch_size=64",
        "python -m tuner.spec my_spec.yaml",
        "tensorboard --logdir runs/mine/tensorboard",
        "python -m tuner.search --status runs/mine",
        "python -m tuner.report runs/mine",
        "python -m tuner.search --run runs/mine",
        "python -m tuner.retrain runs/mine",
        "python -m tuner.export runs/mine",
        "python -m tuner.spec --schema",
    ]


def arguments(command: str) -> list[str]:
    return command.split()[3:]


def test_make_targets_run_the_commands_that_are_tested():
    planned = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "search", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert planned.stdout.splitlines()[-2:] == [".venv/bin/python -m tuner.search", ".venv/bin/python -m pytest"]


@pytest.mark.slow
def test_the_readmes_own_spec_is_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_spec.yaml").write_text(blocks("yaml")[0])
    assert load(Path("my_spec.yaml")).budget.time_limit == 1800
    checked = subprocess.run([sys.executable, "-m", "tuner.spec", "my_spec.yaml"], capture_output=True, text=True)
    assert checked.stdout == "my_spec.yaml: good\n"
    assert tuner.search.main([*arguments(COMMANDS[2]), *TINY]) == 0
    assert tuner.search.parse(arguments(COMMANDS[3])).max_epochs == 6
    trials = RunFiles(Path("runs/mine")).read_trials()
    assert [row["latent_dim"] for row in trials] == [16, 12]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the MNIST files are not beside the project")
def test_mnist_is_searched_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(DATA)
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    small = ["--trials=2", "--max-epochs=0.1", "--set=budget.grace_epochs=0.1", "--no-retrain", "--run=runs/mnist"]
    assert tuner.search.main([*arguments(COMMANDS[1]), *small]) == 0
    scores = RunFiles(Path("runs/mnist")).summary()["test"]
    assert scores["baseline"]["frechet_distance"] > 10 * scores["best"]["floor"]


def test_stages_run_alone(run_copy, monkeypatch, capsys):
    monkeypatch.chdir(run_copy.path.parent)
    (run_copy.path.parent / "runs").mkdir()
    (run_copy.path.parent / "runs" / "mine").symlink_to(run_copy.path)
    assert tuner.search.main(arguments("python -m tuner.search --status runs/mine")) == 0
    assert tuner.search.main(arguments("python -m tuner.search --run runs/mine")) == 0
    assert tuner.report.main(["runs/mine"]) == 0
    assert tuner.retrain.main(["runs/mine"]) == 0
    assert tuner.export.main(["runs/mine"]) == 0
    capsys.readouterr()


def test_tensorboard_finds_the_run(finished_run):
    command = [str(Path(sys.executable).parent / "tensorboard"), "--inspect", "--logdir", str(finished_run.tensorboard)]
    inspected = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0000,latent_dim=16" in inspected.stdout


def test_the_snippet_runs_on_an_export_without_this_package_and_torch(finished_run):
    [snippet] = blocks("python")
    alone = "\nimport sys\nassert not {'tuner', 'torch'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", snippet + alone], cwd=finished_run.path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    gap_closed, shapes = done.stdout.split(maxsplit=1)
    assert float(gap_closed) == finished_run.summary()["test"]["retrained"]["gap_closed"]
    assert shapes == "(1, 1, 28, 28) (64, 1, 28, 28)\n"


def test_links_and_numbers_have_their_files():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
