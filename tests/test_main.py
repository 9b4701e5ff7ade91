"""The command that a wheel installs, and what is in the wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tuner.__main__ import COMMANDS, main
from tuner.spec import shipped

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_the_module_of_its_name(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m tuner.{command} " in capsys.readouterr().out


def test_without_a_command_it_searches(capsys):
    assert main(["--specs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert lines[1] == "digits                 The embedded digits: 1,797 real handwritten digits, no download"


@pytest.mark.slow
def test_a_wheel_brings_the_specs_and_finds_them_by_name(tmp_path):
    source = tmp_path / "source"
    for name in ("tuner", "search_spaces"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    command = [sys.executable, "-P", "-m", "tuner", "spec", *shipped()]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed")}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == [f"{name}: good" for name in shipped()]
