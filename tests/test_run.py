"""The run directory: one process at a time, files that are whole or not there, a table that keeps what it is given."""

import csv
import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from poor_file_system import poor_file_system, with_compiler

from tuner.run import RunFiles, write_atomic
from tuner.vae.errors import Refused


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "run")


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# write_atomic


def test_a_file_is_written_replaced_and_nothing_else_left(tmp_path):
    path = tmp_path / "some" / "deeper" / "file.txt"
    for content in (b"\0\1\2", "né\n", b""):
        write_atomic(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert _names(path.parent) == ["file.txt"]


def test_a_file_may_have_the_longest_name_there_is(tmp_path):
    for name in ("x" * 255, "ü" * 127, "\U0001f642" * 63):
        write_atomic(tmp_path / name, "content")
    assert len(_names(tmp_path)) == 3


@pytest.mark.parametrize("content", ["\ud800", 7], ids=["text that can't be encoded", "no text at all"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path, content):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with pytest.raises((UnicodeEncodeError, TypeError)):
        write_atomic(path, content)
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file.txt"]


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken", "content")
    assert _names(tmp_path) == ["taken"]


def test_a_reader_beside_a_writer_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file.bin"
    contents = [b"a" * 300_000, b"b" * 500_000]
    write_atomic(path, contents[0])
    done = threading.Event()
    seen: list[bytes] = []

    def read() -> None:
        while not done.is_set():
            content = path.read_bytes()
            if not seen or seen[-1] != content:
                seen.append(content)

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(200):
        write_atomic(path, contents[index % 2])
    done.set()
    reader.join()
    assert all(content in contents for content in seen)
    assert len(seen) > 1  # it did see the file change
    assert _names(tmp_path) == ["file.bin"]


def test_two_writers_of_one_file_leave_one_of_their_contents(tmp_path):
    path = tmp_path / "file.bin"
    contents = [b"a" * 200_000, b"b" * 200_000]
    writers = [
        threading.Thread(target=lambda content=content: [write_atomic(path, content) for _ in range(30)])
        for content in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() in contents
    assert _names(tmp_path) == ["file.bin"]


# One process at a time

HOLD = """
import sys, time
from pathlib import Path
from tuner.run import RunFiles
with RunFiles(Path(sys.argv[1])).claimed():
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_a_run_that_another_process_works_on_is_refused_until_that_process_is_gone_even_by_kill_9(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        left = run.path / ".trials.csv.01234567.tmp"
        left.write_text("being written")
        with pytest.raises(Refused, match="run: another process is working on this run"), run.claimed():
            pytest.fail("claimed twice")
        assert left.exists(), "it belongs to the process that holds the run"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=30)
    with run.claimed():
        assert not left.exists()


@with_compiler
@pytest.mark.parametrize("locks", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_on_a_file_system_without_locks_links_and_syncing_a_run_goes_on_and_says_once_what_is_lost(tmp_path, locks):
    code = """
import sys
from pathlib import Path
from tuner.run import RunFiles, write_atomic
run = RunFiles(Path(sys.argv[1]), shown="mine")
with run.claimed():
    for content in ("old", "new"):
        write_atomic(run.checkpoint(0), content)
with run.claimed():
    print(run.checkpoint(0).read_text())
"""
    environment = poor_file_system(tmp_path, tmp_path / "mount", locks)
    command = [sys.executable, "-c", code, str(tmp_path / "mount" / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "new\n"), done.stderr
    assert done.stderr.splitlines() == [
        "warning: mine: its file system has no locks: let no other command work on this run",
        "warning: the run's file system syncs no folders: a power cut may cost what was written last",
    ]


def test_a_claim_ends_with_its_block_whether_or_not_that_fails(run):
    with run.claimed():
        pass
    with pytest.raises(KeyError), run.claimed():
        raise KeyError
    with run.claimed():
        assert run.path.is_dir()


def test_a_claim_removes_what_a_killed_process_left_half_written_and_nothing_else(run):
    half = [
        directory / f".{name}.01234567.tmp"
        for directory, name in [
            (run.path, "summary.json"),
            (run.images, "train.safetensors"),
            (run.extractors, "search.safetensors"),
            (run.checkpoints, "0003.pt"),
            (run.retrain, "kept.pt"),
            (run.errors, "0003.txt"),
        ]
    ]
    kept = [
        run.path / ".report.html.01234567.tmp",  # a report is written without the lock
        run.path / "notes.tmp",
        run.path / ".hidden",
        run.checkpoints / "0003.pt",
    ]
    for path in half + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content")
    with run.claimed():
        assert [path for path in half if path.exists()] == []
        assert [path.read_text() for path in kept] == ["content"] * len(kept)


def test_where_no_folder_can_be_made_a_claim_is_refused_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(Refused, match=re.escape(str(path))), RunFiles(path).claimed():
            pytest.fail("claimed a file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_a_killed_command_had_only_just_made_is_no_foreign_one(run):
    assert not run.is_foreign()
    with run.claimed():
        assert not run.is_foreign()
    (run.path / ".spec.yaml.01234567.tmp").write_text("space:")
    run.images.mkdir()  # images are decoded before anything else
    assert sorted(os.listdir(run.path)) == [".images", ".lock", ".spec.yaml.01234567.tmp"]
    assert not run.is_foreign()


def test_a_file_and_a_folder_with_something_else_in_it_are_foreign_but_not_a_run(run, tmp_path):
    run.path.mkdir()
    (run.path / "photo.png").write_text("mine")
    assert run.is_foreign()
    run.spec.write_text("space: {}")
    assert not run.is_foreign()
    (tmp_path / "file").write_text("mine")
    assert RunFiles(tmp_path / "file").is_foreign()


# trials.csv


def test_trials_keep_the_order_of_rows_and_the_columns_in_order_of_first_appearance(run):
    run.write_trials(
        [
            {"trial": 2, "state": "complete", "mse": 0.25},
            {"trial": 0, "state": "failed", "reason": 'loss is "nan", at once'},
            {"trial": 1, "latent_dim": 8, "state": "pruned"},
        ]
    )
    with run.trials.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == ["trial", "state", "mse", "reason", "latent_dim"]
    assert [row["trial"] for row in rows] == ["2", "0", "1"]
    assert rows[0] == {"trial": "2", "state": "complete", "mse": "0.25", "reason": "", "latent_dim": ""}
    assert rows[1]["reason"] == 'loss is "nan", at once'
    assert rows[2]["latent_dim"] == "8"


def test_numbers_come_back_from_trials_bit_for_bit(run):
    numbers = [0.1 + 0.2, 1e-300, 2.0**60, -0.0]
    run.write_trials({"number": number} for number in numbers)
    with run.trials.open(newline="") as file:
        assert [float(row["number"]) for row in csv.DictReader(file)] == numbers


def test_a_later_table_replaces_the_earlier_one(run):
    run.write_trials([{"trial": 0}, {"trial": 1}])
    run.write_trials([{"trial": 0, "state": "running"}])
    assert run.trials.read_text() == "trial,state\n0,running\n"
    run.write_trials([])
    assert run.trials.read_text().strip() == ""
    assert _names(run.path) == ["trials.csv"]


# Paths


def test_every_file_of_a_run_lies_inside_of_it(run):
    paths = [value for name, value in vars(run).items() if isinstance(value, Path) and name != "path"]
    paths += [run.checkpoint(7), run.error(7), run.extractor("second")]
    assert all(run.path in path.parents for path in paths)
    assert len(set(paths)) == len(paths)
    assert run.checkpoint(7).name == "0007.pt"
    assert run.name_of(run.error(7)) == f"{run.shown}/errors/0007.txt"


def test_a_run_at_a_url_is_named_without_the_urls_query(tmp_path):
    run = RunFiles(tmp_path, shown="s3://bucket/mine?endpoint_override=http://localhost:9000&region=us-east-1")
    assert (run.name, run.place) == ("mine", "s3://bucket/mine")
    assert run.name_of(run.report) == "s3://bucket/mine/report.html"


def test_the_retrain_has_its_trials_in_a_folder_of_its_own_and_shares_the_rest(run):
    ours = run.of_retrain()
    own = {ours.checkpoint(0), ours.checkpoint(1), ours.error(1), ours.trials}
    assert {path.relative_to(run.path).as_posix() for path in own} == {
        "retrain/0000.pt",
        "retrain/0001.pt",
        "retrain/0001.txt",
        "retrain/trials.csv",
    }
    assert not own & {run.checkpoint(0), run.checkpoint(1), run.error(1), run.trials, run.kept, run.refitted}
    assert (run.kept.name, run.refitted.name) == ("kept.pt", "refitted.pt")
    shared = vars(run).keys() - {"checkpoints", "errors", "trials"}
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(run, name) for name in shared}
    assert run.name_of(ours.checkpoint(1)) == ours.name_of(ours.checkpoint(1)) == f"{run.shown}/retrain/0001.pt"
    assert run.checkpoint(0).parent == run.checkpoints, "the run itself is as it was"
