"""Packaging: one set of versions everywhere, nothing of the machine it was made on, and imports that do nothing."""

import ast
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tuner

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
CONSTRAINTS = {canonicalize_name(line.split("==")[0]): line.split("==")[-1] for line in LINES}
ASKED = [
    Requirement(text) for part in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for text in part
]
DISTRIBUTIONS = {
    "grpc": "grpcio",
    "mlflow": "mlflow-skinny",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}  # where the import has another name
MODULES = [module.name for module in pkgutil.walk_packages(tuner.__path__, "tuner.")]


def _installed(name: str) -> str:
    return Version(version(name)).public  # torch 2.13.0+cpu is 2.13.0


def _required() -> dict[str, str]:
    """Every installed distribution that the project requires, at any depth, extras included: name -> by whom.

    One that another package pins itself needs no constraint of ours, nor do the libraries of a CUDA build.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("vae-tuner", "", requirement) for requirement in ASKED]
    while waiting:
        parent, extra, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name.startswith(("cuda-", "nvidia-")):
            continue
        if parent == "vae-tuner" or all(part.operator != "==" for part in requirement.specifier):
            found.setdefault(name, parent)
        for wanted in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, wanted))
            waiting += [(name, wanted, Requirement(text)) for text in distribution(name).requires or []]
    return found


def _modules(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def _kept_files() -> Iterator[tuple[Path, str]]:
    """Text files of the repository, without what is built, cached or run there."""
    ignored = {".git", "runs", "data", "__pycache__", ".hypothesis", ".import_linter_cache"}
    for folder, folders, names in os.walk(ROOT):
        kept = [name for name in folders if not name.startswith(".venv") and not name.endswith(("_cache", ".egg-info"))]
        folders[:] = [name for name in kept if name not in ignored]
        for name in names:
            path = Path(folder, name)
            if path.name != "LICENSE" and path != Path(__file__):
                try:
                    yield path, path.read_text()
                except UnicodeDecodeError:
                    continue


# Versions


@pytest.mark.parametrize("name", ["torch", "torchvision", "ray"])
def test_ranges_of_what_must_match_begin_with_what_was_tested_together(name):
    """And end before the next major version, which may break the mix."""
    asked = {known.name: known.specifier for known in map(Requirement, PROJECT["dependencies"])}
    tested = Version(CONSTRAINTS[name])
    assert str(asked[name]) == f"<{tested.major + 1},>={tested.major}.{tested.minor}"
    assert _installed(name) == CONSTRAINTS[name]


def test_the_constraints_are_one_exact_version_a_line_sorted():
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert len(CONSTRAINTS) == len(LINES)
    assert sorted(LINES, key=lambda line: line.split("==")[0].lower()) == LINES


def test_the_constraints_cover_everything_that_the_project_requires():
    required = _required()
    assert required["sympy"] == "torch"
    assert required["tensorboardx"] == "ray"  # through ray[tune]
    assert {name: by for name, by in required.items() if name not in CONSTRAINTS} == {}


def test_the_constraints_are_what_is_installed():
    names = _required().keys() & CONSTRAINTS.keys()
    assert {name: _installed(name) for name in names} == {name: CONSTRAINTS[name] for name in names}


def test_the_constraints_satisfy_what_the_project_asks_for():
    names = {str(requirement): canonicalize_name(requirement.name) for requirement in ASKED}
    assert set(names.values()) - CONSTRAINTS.keys() == set()
    assert [text for text, name in names.items() if CONSTRAINTS[name] not in Requirement(text).specifier] == []


def test_every_package_that_is_imported_is_asked_for_by_name():
    """A package that only comes along with another leaves with it."""
    asked = {canonicalize_name(requirement.name) for requirement in ASKED}
    imported = {
        module.split(".")[0]
        for folder in ("tuner", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for module in _modules(node)
    }
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    known = {"tuner", "tests", "benchmarks", *ours, *sys.stdlib_module_names}
    others = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in imported - known}
    assert others - asked == set()


# Nothing of the machine it was made on


def test_no_file_names_a_folder_of_this_machine():
    files = list(_kept_files())
    assert {"pyproject.toml", "Makefile", "constraints.txt"} <= {path.name for path, _ in files}
    assert [str(path) for path, text in files if "/work/" in text or "/opt/pypi" in text] == []


def test_what_is_installed_and_how_names_no_host():
    paths = ["pyproject.toml", "Makefile", "constraints.txt", ".ci", "tuner", "search_spaces"]
    files = [(path, text) for path, text in _kept_files() if path.relative_to(ROOT).parts[0] in paths]
    assert len(files) > 20
    assert [str(path) for path, text in files if re.search("https?://|index-url", text)] == []


def test_what_make_and_ci_run_is_there():
    makefile = (ROOT / "Makefile").read_text()
    assert "--constraint constraints.txt" in makefile
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    assert {"search", "test", "check"} <= set(targets)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# Importing does nothing


def test_importing_every_module_prints_nothing_starts_nothing_and_writes_nothing(tmp_path):
    code = textwrap.dedent(
        f"""
        import importlib, multiprocessing, threading
        for name in {MODULES}:
            importlib.import_module(name)
        import ray
        assert not ray.is_initialized()
        assert threading.active_count() == 1, threading.enumerate()
        assert multiprocessing.active_children() == []
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
