"""One `load` for all sources; the test split has a function of its own."""

from pathlib import Path

import tuner


def test_only_the_export_may_read_the_test_split():
    package = Path(tuner.__file__).parent
    readers = [path for path in package.rglob("*.py") if "load_test" in path.read_text()]
    assert {path.relative_to(package).as_posix() for path in readers} == {"sources/__init__.py", "export.py"}
    others = [path for path in package.rglob("*.py") if path.parent.name != "sources"]
    assert [path.name for path in others if "tuner.sources." in path.read_text()] == []  # all splits are theirs alone
