"""How commands end: one line, a status, and the command to go on with. What a signal does is seen in a process."""

import errno
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable

import optuna
import pytest
from optuna.trial import TrialState

from tuner.exits import CutOff, Fatal, command, fatal, resumable
from tuner.search import main
from tuner.spec import load
from tuner.study import open_study
from tuner.vae.errors import Refused

AGAIN = command("tuner.search", ["my spec.yaml", "--set", "space.latent_dim={choices: [4]}"], "--run", "runs/it's one")
BODY = """
import os, signal, sys, time
from tuner.exits import resumable
with resumable(sys.argv[1]):
"""
WAIT = "print('ready', flush=True); time.sleep(60)"
ENDS = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[[BaseException], tuple[int, str]]:
    """Raises an error in the body of a command -> its status and its one line on stderr."""

    def end(error: BaseException) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left, resumable(AGAIN):
            raise error
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert isinstance(left.value.code, int)
        return left.value.code, line

    return end


def body(lines: str) -> subprocess.Popen[str]:
    """A process that runs the lines as the body of a command; it has printed "ready"."""
    indented = "".join(f"    {line}\n" for line in lines.splitlines())
    arguments = [sys.executable, "-c", BODY + indented, AGAIN]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


# The command that is printed


def test_the_command_to_go_on_with_can_be_pasted_into_a_shell():
    words = ["my spec.yaml", "--set", "space.latent_dim={choices: [4]}", "--run", "runs/it's one"]
    assert shlex.split(AGAIN) == ["python", "-m", "tuner.search", *words]
    echoed = subprocess.run(["sh", "-c", AGAIN.replace("python -m tuner.search", "printf '%s\\n'", 1)],
                            capture_output=True, text=True, check=True)  # fmt: skip
    assert echoed.stdout.splitlines() == words


# Signals


@ENDS
def test_a_signal_ends_the_body_with_one_line_and_its_status(number, status):
    process = body(f"try:\n    {WAIT}\nfinally:\n    print('tidied up')")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert out == "tidied up\n"
    assert err.splitlines()[-1] == f"stopped; go on with: {AGAIN}"
    assert len(err.splitlines()) == 2, err
    assert "once more" in err.splitlines()[0]


@ENDS
@pytest.mark.parametrize(
    "lines",
    [
        f"while True:\n    try:\n        {WAIT}\n    except KeyboardInterrupt:\n        print('no', flush=True)",
        f"try:\n    {WAIT}\nfinally:\n    print('no', flush=True)\n    time.sleep(60)",
    ],
    ids=["a body that won't end", "a body that tidies up for long"],
)
def test_a_second_signal_ends_the_process_at_once_whatever_the_body_does(number, status, lines):
    process = body(lines)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "no\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=5)  # shorter than what a clean stop may take
    assert process.returncode == status
    assert err.splitlines()[-1] == f"stopped; go on with: {AGAIN}"
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_body_that_ignores_the_first_signal_is_ended_after_a_while():
    process = body(f"while True:\n    try:\n        {WAIT}\n    except KeyboardInterrupt:\n        pass")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines()[-1] == f"stopped; go on with: {AGAIN}"


def test_signals_do_what_they_did_before_once_the_body_is_done(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with resumable(AGAIN):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr() == ("", "")


# Errors


def test_what_is_refused_ends_with_status_2_and_no_command_to_repeat(ended):
    assert ended(Refused("run: taken")) == (2, "error: run: taken")


def test_what_cannot_go_on_now_ends_with_status_1_and_the_command_to_repeat(ended):
    assert ended(CutOff("Ray's raylet died")) == (1, f"error: Ray's raylet died; go on with: {AGAIN}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_told_with_the_file_and_ends_with_status_1(ended):
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert ended(caught.value) == (
        1,
        f"error: the run directory: No space left on device; once that is mended, go on with: {AGAIN}",
    )
    named = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/checkpoints/0003.pt")
    assert ended(named)[1].startswith("error: run/checkpoints/0003.pt: No space left on device; once that is mended, ")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system of its own: needs root")
def test_a_write_that_fills_the_disk_names_its_file_and_keeps_what_was_there(tmp_path):
    lines = (
        "from pathlib import Path\nfrom tuner.run import write_atomic\n"
        "path = Path('small/some.bin')\nwrite_atomic(path, 'old')\nwrite_atomic(path, bytes(2**20))"
    )
    code = BODY + "".join(f"    {line}\n" for line in lines.splitlines())
    (tmp_path / "small").mkdir()
    script = (
        "mount -t tmpfs -o size=256k none small || exit 77\n"
        f"{sys.executable} -c {shlex.quote(code)} again; echo $?; cat small/some.bin; ls -A small"
    )
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    assert done.stdout.splitlines() == ["1", "oldsome.bin"]
    (line,) = done.stderr.splitlines()
    assert "some.bin" in line
    assert "No space left on device" in line
    assert line.endswith("go on with: again")


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(errno.ECONNRESET, "gone"), OSError("no number at all"), KeyError("a bug"), ValueError("too")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_another_kind_is_not_swallowed(error, capsys):
    with pytest.raises(type(error)) as caught, resumable(AGAIN):
        raise error
    assert caught.value is error
    assert capsys.readouterr().err == ""


# Fatal


def test_what_ends_the_driver_from_inside_of_rays_loop_ends_it_as_its_cause(ended):
    for error, status in [(CutOff("Ray died"), 1), (Refused("run: damaged"), 2), (OSError(errno.ENOSPC, "full"), 1)]:
        wrapped = Fatal()
        wrapped.__cause__ = error
        assert ended(wrapped) == ended(error)
        assert ended(wrapped)[0] == status
    with pytest.raises(KeyError, match="a bug"), resumable(AGAIN):
        fatal({}.__getitem__)("a bug")


def test_a_fatal_method_passes_arguments_and_values_and_wraps_only_exceptions():
    @fatal
    def method(error: BaseException | None, *more: int, factor: int = 1) -> int:
        """Adds."""
        if error:
            raise error
        return factor * sum(more)

    assert method(None, 1, 2, factor=3) == 9
    assert (method.__name__, method.__doc__) == ("method", "Adds.")
    broken = ValueError("broken")
    with pytest.raises(Fatal) as caught:
        method(broken)
    assert caught.value.__cause__ is broken
    assert not isinstance(caught.value, Exception)  # Ray Tune takes those for the failure of one trial
    with pytest.raises(KeyboardInterrupt):
        method(KeyboardInterrupt())


# A whole command


@pytest.mark.slow
def test_a_search_in_which_every_trial_failed_ends_with_status_1_and_the_commonest_reason(run_copy, capsys):
    spec, extractors = load(run_copy.spec), run_copy.summary().extractors
    for path in (run_copy.summary_file, run_copy.journal, run_copy.trials, run_copy.report):
        path.unlink()
    run_copy.update_summary(extractors=extractors)
    study = open_study(run_copy.journal, spec)
    reasons = [
        "diverged: at step 3",
        "out of memory: 7 GB",
        "out of memory: 7 GB",
        "error: KeyError: 1",
        "never started",
    ]
    for reason in reasons:
        told = {"reason": reason, "parameters": spec.baseline.model_dump()}
        study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=told))
    assert main(["--run", str(run_copy.path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: every trial failed: out of memory: 7 GB"
    assert run_copy.summary().best is None
