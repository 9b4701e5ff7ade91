"""The pages under docs/: the generated one is what the code says, and links lead somewhere."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS, ROOT / "k8s" / "README.md"]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def spec_reference() -> ModuleType:
    described = importlib.util.spec_from_file_location("spec_reference", ROOT / "docs" / "spec_reference.py")
    assert described
    assert described.loader
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def test_the_page_of_the_spec_is_up_to_date(spec_reference):
    assert (ROOT / "docs" / "spec.md").read_text() == spec_reference.reference(), "stale: run make docs"


def test_every_key_and_parameter_is_described(spec_reference):
    rows = [line.split(" | ") for line in spec_reference.reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [row[0] for row in rows if not row[-1].strip(" |")] == []


def test_the_table_of_rooms_is_that_of_the_contracts():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    page = (ROOT / "docs" / "developing.md").read_text()
    told = re.findall(r"^\| (\d+) \| `(\w+)/?` \|", page, re.MULTILINE)
    expected = [
        (str(number), name.removeprefix("tuner."))
        for number, layer in enumerate(layers, 1)
        for name in layer.split(" | ")
    ]
    assert sorted(told) == sorted(expected)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            missing.append(target)
    assert missing == []
