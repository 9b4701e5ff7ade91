"""The notebook in examples/: its cells run in order, and what it shows was made by running them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "digits.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_its_cells_run_in_order(finished_run, tmp_path):
    """On a finished run under the name that it uses, which it would go on with."""
    shutil.copytree(finished_run.path, tmp_path / "runs" / "notebook")
    program = "\n".join("".join(cell["source"]) for cell in CELLS)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(NOTEBOOK.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{finished_run.summary().test.exported.gap_closed:.3f}" in done.stdout


def test_it_shows_what_running_it_gave():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert all(cell["outputs"] for cell in CELLS)
    shown = str(CELLS[0]["outputs"])
    assert all(
        f"{stage} " in shown for stage in ("new run", "search", "promote", "retrain", "priors", "export", "report")
    )
    assert all(output["output_type"] != "error" for cell in CELLS for output in cell["outputs"])
    pictures = [output for cell in CELLS for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
