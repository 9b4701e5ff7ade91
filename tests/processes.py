"""Finding what a command of a test has left behind; and machines that are not as this one."""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

in_namespaces = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0,
    reason="a user may make no namespaces here",
)
# what runs the command behind it as a user without name and home, as OpenShift has them
AS_NOBODY = ["env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", "unshare", "-U", "--map-user=12345"]


def processes_of(mark: str) -> list[int]:
    """Ids of the running processes that inherited TUNER_TEST=mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"TUNER_TEST={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # gone meanwhile, or not ours
            continue
    return found


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `condition` gives as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found
