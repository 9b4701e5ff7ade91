"""torchvision's data sets."""

import subprocess
import sys
import textwrap
from pathlib import Path

import tuner


def _python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(tuner.__file__).parents[1])
    code = f"import sys; sys.path[:0] = [{str(path)!r}, {root!r}]\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_torchvision_data_sets_load_beside_a_cpu_torch(tmp_path):
    done = _python(
        """
        import torch
        from tuner.sources.torchvision import torchvision_datasets
        print(torchvision_datasets().MNIST is torchvision_datasets().MNIST)
        from torchvision import transforms, utils
        print(tuple(utils.make_grid(torch.zeros(4, 1, 2, 2)).shape))
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["True", "(3, 6, 18)"]), done.stderr


def test_a_whole_torchvision_that_declares_its_own_operators_loads_too(tmp_path):
    """A matching build registers `nms` from C++ when it is imported, and a second declaration is fatal."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    )
    (tmp_path / "torchvision" / "datasets.py").write_text("MNIST = 'whole'\n")
    code = "from tuner.sources.torchvision import torchvision_datasets; print(torchvision_datasets().MNIST)"
    done = _python(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
