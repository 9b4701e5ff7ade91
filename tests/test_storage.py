"""Runs kept in object storage: what a mirror copies, in which order, and a search that is killed and goes on from it.

The storage is a real S3 server on loopback (moto's), reached as any other one: through the environment.
"""

import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import processes_of
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

import tuner
from tuner import export, report, retrain, search
from tuner.exits import CutOff
from tuner.run import RunFiles, write_atomic
from tuner.storage import Mirror, opened
from tuner.study import read_study
from tuner.vae.errors import Refused
from tuner.vae.metrics import METRICS

ROOT = Path(tuner.__file__).parents[1]
SEARCHED = ("latent_dim", "learning_rate", "kl_weight")
# One epoch for each of five trials: the baseline, one that diverges, one that is named, two that are proposed.
TINY = [
    "--trials=5",
    "--max-epochs=1",
    "--concurrency=1",
    "--set=budget.grace_epochs=1",
    "--set=space.learning_rate.high=1e12",
    "--set=points_to_evaluate=[{learning_rate: 1e12}, {latent_dim: 8, learning_rate: 0.002, kl_weight: 0.1}]",
    "--no-retrain",
]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The address of an S3 server that holds nothing yet."""
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, server.kill)  # ends the reading below
    watchdog.start()
    try:
        assert server.stderr is not None
        said = ""
        while not (found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", said)):
            line = server.stderr.readline()
            assert line, f"it did not start: {said}"
            said += line
        watchdog.cancel()
        threading.Thread(target=server.stderr.read, daemon=True).start()  # a line a request: nobody else reads them
        yield found[1]
    finally:
        watchdog.cancel()
        server.kill()
        server.wait()


@pytest.fixture(scope="module", autouse=True)
def environment(s3_server: str) -> Iterator[dict[str, str]]:
    """Credentials and address in the environment, as a user sets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", s3_server)
        patch.setenv("PYTHONPATH", str(ROOT))
        yield dict(os.environ)


def _request(method: str, url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30).close()


@pytest.fixture
def bucket(s3_server: str) -> str:
    """The URL of a new bucket."""
    name = f"b{uuid.uuid4().hex}"
    _request("PUT", f"{s3_server}/{name}")
    return f"s3://{name}"


def contents(url: str) -> dict[str, bytes]:
    """Every object below a URL, by its name relative to it."""
    storage, root = FileSystem.from_uri(url)
    found = storage.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    files = [entry.path for entry in found if entry.type == FileType.File]
    return {path.removeprefix(f"{root}/"): storage.open_input_stream(path).read() for path in files}


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def put(run: RunFiles, **parts: str) -> None:
    """Write files of a run; `__` in a name stands for a slash, and `_` for a dot."""
    for name, content in parts.items():
        write_atomic(run.path / name.replace("__", "/").replace("_", "."), content)


def mirror_of(url: str, folder: Path) -> Mirror:
    mirror = Mirror(url, folder)
    mirror.pull()
    return mirror


# Copying


def test_what_was_pushed_is_pulled_again_byte_by_byte_with_its_folders(bucket, tmp_path):
    mirror = mirror_of(f"{bucket}/deep/mine", tmp_path / "here")
    put(mirror.run, spec_yaml="a: 1\n", study_journal="", checkpoints__0000_pt="c", tensorboard__0000__x__events="t")
    write_atomic(mirror.run.path / "extractor" / "big.bin", bytes(range(256)) * 40_000)  # several parts
    write_atomic(mirror.run.path / "extractor" / "two words, ü & 100%.txt", "odd name")
    mirror.push()
    mirror_of(f"{bucket}/deep/mine", tmp_path / "there")
    assert files(tmp_path / "there") == files(tmp_path / "here") == contents(f"{bucket}/deep/mine")
    assert len(files(tmp_path / "there")) == 6


def test_a_second_push_writes_what_has_changed_and_removes_what_is_gone(bucket, tmp_path):
    class Counting(Mirror):
        def _write(self, path: Path, content: bytes) -> None:
            written.append(path.relative_to(self.run.path).as_posix())
            super()._write(path, content)

    written: list[str] = []
    mirror = Counting(bucket + "/mine", tmp_path / "run")
    mirror.pull()
    put(mirror.run, spec_yaml="s", study_journal="1", checkpoints__0000_pt="0", checkpoints__0001_pt="1", trials_csv="")
    mirror.push()
    assert sorted(written) == sorted(files(mirror.run.path))
    written.clear()
    mirror.push()
    assert written == []
    put(mirror.run, study_journal="12", checkpoints__0002_pt="2")
    mirror.run.checkpoint(1).unlink()
    mirror.push()
    assert sorted(written) == ["checkpoints/0002.pt", "study.journal"]
    assert contents(bucket + "/mine") == files(mirror.run.path)
    assert "checkpoints/0001.pt" not in contents(bucket + "/mine")


def test_a_mirror_that_pulled_writes_only_what_has_changed_since(bucket, tmp_path):
    first = mirror_of(bucket + "/mine", tmp_path / "first")
    put(first.run, spec_yaml="s", study_journal="1", checkpoints__0000_pt="0", report_html="r")
    first.push()
    second = mirror_of(bucket + "/mine", tmp_path / "second")
    assert second.known.keys() == {second.run.path / name for name in files(second.run.path)}
    second.run.report.unlink()
    put(second.run, checkpoints__0000_pt="changed")
    second.push()
    assert contents(bucket + "/mine") == {"spec.yaml": b"s", "study.journal": b"1", "checkpoints/0000.pt": b"changed"}


def test_locks_temporary_files_decoded_images_and_rays_own_folder_stay_behind(bucket, tmp_path):
    mirror = mirror_of(bucket + "/mine", tmp_path / "run")
    put(mirror.run, spec_yaml="s", ray__search__state_json="{}")
    names = (".lock", ".trials.csv.1234.tmp", "checkpoints/.0000.pt.1234.tmp")
    for path in (*(mirror.run.path / name for name in names), mirror.run.images / "train.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with mirror.run.claimed():
        mirror.push()
    assert contents(bucket + "/mine") == {"spec.yaml": b"s"}


def test_what_only_the_copy_in_storage_has_stays_there(bucket, tmp_path):
    whole = {
        "spec.yaml": b"s",
        "given.npz": b"arrays",
        ".images/train.safetensors": b"decoded",
        "ray/search/state.json": b"{}",
    }
    for name, content in whole.items():
        path = tmp_path / "whole" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    copy_files(str(tmp_path / "whole"), f"{bucket}/whole", source_filesystem=LocalFileSystem())
    with opened(f"{bucket}/whole"):
        pass
    assert contents(f"{bucket}/whole") == whole


def test_a_refusal_names_the_url_and_no_copy_that_is_gone(bucket, tmp_path):
    put(RunFiles(tmp_path / "run"), spec_yaml="s", study_journal="x")
    copy_files(str(tmp_path / "run"), f"{bucket}/damaged", source_filesystem=LocalFileSystem())
    with (
        pytest.raises(Refused, match=rf"^{re.escape(bucket)}/damaged/study\.journal: "),
        opened(f"{bucket}/damaged") as run,
    ):
        read_study(run.journal)


def test_a_run_at_a_path_is_opened_as_it_is(tmp_path):
    with opened(str(tmp_path / "run")) as run:
        assert run.path == tmp_path / "run"
        assert run.shown == str(tmp_path / "run")
        assert not run.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_a_url_where_no_run_is_makes_nothing_there(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage, root = FileSystem.from_uri(bucket)
    for look, place in ((search.main, ["--status"]), (report.main, []), (retrain.main, []), (export.main, [])):
        with pytest.raises(SystemExit) as ended:
            look([*place, f"{bucket}/misspelt"])
        assert ended.value.code == 2
    assert storage.get_file_info(FileSelector(root)) == []
    with opened(f"{bucket}/new", begins=True):
        assert [found.base_name for found in storage.get_file_info(FileSelector(root))] == ["new"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_at_a_url_is_pushed_when_the_body_ends_even_by_an_error_and_leaves_nothing_here(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with opened(bucket + "/mine") as run:
        assert run.path.is_relative_to(tmp_path)
        put(run, spec_yaml="s")
    with pytest.raises(KeyboardInterrupt), opened(bucket + "/mine") as run:  # noqa: PT012 - both belong to the body
        put(run, study_journal="1")
        raise KeyboardInterrupt
    assert contents(bucket + "/mine") == {"spec.yaml": b"s", "study.journal": b"1"}
    assert list(tmp_path.iterdir()) == []


def test_a_run_at_a_url_is_pushed_while_the_body_works(bucket, monkeypatch):
    monkeypatch.setattr("tuner.storage.PUSH_SECONDS", 0.05)
    with opened(bucket + "/mine") as run:
        put(run, spec_yaml="s")
        wait_for(lambda: contents(bucket + "/mine") == {"spec.yaml": b"s"}, 60)


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.05)


# The order: at every moment the copy is one to go on from


class Watched(Mirror):
    """Calls `between` around each write: that is where a driver goes on, or is killed, or someone pulls."""

    def __init__(self, url: str, local: Path, between: Callable[[str], None]):
        super().__init__(url, local)
        self.between = between

    def _write(self, path: Path, content: bytes) -> None:
        name = path.relative_to(self.run.path).as_posix()
        self.between(f"before {name}")
        super()._write(path, content)
        self.between(f"after {name}")


def end_trial(run: RunFiles, number: int) -> None:
    """What the driver writes as a trial ends, in its order: checkpoint, journal, table."""
    write_atomic(run.checkpoint(number), f"checkpoint of {number}")
    with run.journal.open("a") as journal:
        journal.write(f"trial {number} ended\n")
    run.write_trials({"trial": n, "state": "complete", "reason": "", "epochs_trained": 1} for n in range(number + 1))


def missing(url: str, folder: Path) -> list[str]:
    """Pull as the same command on another machine would: what the lists there name that is not there."""
    run = mirror_of(url, folder).run
    here = files(folder)
    numbers = [int(row["trial"]) for row in rows(here.get("trials.csv", b""))]
    listed = [run.extractor(name) for name in run.summary().extractors]
    listed += [run.checkpoint(number) for number in numbers]
    finished = len(here.get("study.journal", b"").splitlines())
    told = [f"journal: trial {number}" for number in numbers[finished:]]
    return [path.name for path in listed if not path.exists()] + told


def test_whoever_pulls_between_two_writes_misses_nothing_that_is_listed(bucket, tmp_path):
    """Also when the driver ends a trial between any two of them."""
    url, seen = bucket + "/mine", []
    ended = iter(range(1, 100))

    def between(moment: str) -> None:
        if not moment.startswith("before spec"):
            if moment.startswith("before"):
                end_trial(mirror.run, next(ended))
            seen.append((moment, missing(url, tmp_path / f"pulled {len(seen)}")))

    mirror = Watched(url, tmp_path / "run", between)
    mirror.pull()
    write_atomic(mirror.run.spec, "spec")
    for name in ("search", "second"):
        write_atomic(mirror.run.extractor(name), name)
    described = {"kind": "classifier", "sha256": "1", "accuracy": 0.9, "floor": 1.0}
    mirror.run.update_summary(extractors={"search": described, "second": described})
    end_trial(mirror.run, 0)
    for _ in range(2):
        mirror.push()
    assert len(seen) > 15
    assert [(moment, names) for moment, names in seen if names] == []
    mirror.between = lambda moment: None
    mirror.push()
    assert contents(url) == files(mirror.run.path)


def test_the_journal_in_storage_tells_of_no_end_of_a_trial_whose_checkpoint_is_not_there(bucket, tmp_path):
    """Promotion reads the checkpoint of whatever the journal says has ended."""
    url = bucket + "/mine"

    def between(moment: str) -> None:
        if moment == "after checkpoints/0000.pt":
            end_trial(mirror.run, 1)

    mirror = Watched(url, tmp_path / "run", between)
    mirror.pull()
    write_atomic(mirror.run.spec, "spec")
    end_trial(mirror.run, 0)
    mirror.push()
    stored = contents(url)
    for number in range(len(stored["study.journal"].splitlines())):
        assert f"checkpoints/{number:04d}.pt" in stored


def test_the_lists_are_written_last_and_the_spec_first(bucket, tmp_path):
    moments: list[str] = []
    mirror = Watched(bucket + "/mine", tmp_path / "run", moments.append)
    mirror.pull()
    names = ["a.txt", "checkpoints/0000.pt", "spec.yaml", "study.journal", "summary.json", "trials.csv", "z/z.txt"]
    for name in names:
        write_atomic(mirror.run.path / name, "{}")
    mirror.push()
    order = [moment.removeprefix("before ") for moment in moments if moment.startswith("before")]
    assert sorted(order) == names
    assert order[0] == "spec.yaml"
    assert set(order[-2:]) == {"summary.json", "trials.csv"}


def test_a_copy_of_a_run_that_grows_never_has_the_results_of_before_under_the_spec_of_after(bucket, tmp_path):
    seen: list[dict[str, bytes]] = []

    def between(moment: str) -> None:
        if moment == "before a.txt":  # after the lists were read
            write_atomic(mirror.run.summary_file, "nothing")
            write_atomic(mirror.run.spec, "after")
        seen.append(contents(bucket + "/mine"))

    mirror = Watched(bucket + "/mine", tmp_path / "run", lambda moment: None)
    mirror.pull()
    for name, content in {"spec.yaml": "before", "summary.json": "results", "a.txt": "1"}.items():
        write_atomic(mirror.run.path / name, content)
    mirror.push()
    mirror.between = between
    write_atomic(mirror.run.path / "a.txt", "2")
    for _ in range(2):
        mirror.push()
    assert [(found["spec.yaml"], found["summary.json"]) for found in seen if found["spec.yaml"] == b"after"]
    assert not any((found["spec.yaml"], found["summary.json"]) == (b"after", b"results") for found in seen)


# What can't be opened


def refusal(place: str) -> str:
    with pytest.raises(Refused) as refused, opened(place, begins=True):
        pytest.fail("it was opened")
    (line,) = str(refused.value).splitlines()
    assert place in line
    return line


def test_a_prefix_that_holds_something_else_is_refused_and_left_alone(bucket):
    storage, root = FileSystem.from_uri(bucket + "/mine")
    with storage.open_output_stream(root + "/holiday.jpg") as file:
        file.write(b"picture")
    assert "not a run directory" in refusal(bucket + "/mine")
    assert contents(bucket + "/mine") == {"holiday.jpg": b"picture"}


def test_a_bucket_that_does_not_exist_is_refused():
    refusal(f"s3://b{uuid.uuid4().hex}/mine")


def test_a_kind_of_storage_that_nobody_knows_is_refused():
    assert "ftpx" in refusal("ftpx://host/mine")


@pytest.mark.slow
def test_storage_that_nobody_answers_for_is_refused(monkeypatch):
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        refusal("s3://anything/mine")


@pytest.mark.parametrize("place", ["s3://", "s3:///mine", "://mine"])
def test_half_a_url_is_refused(place):
    refusal(place)


def test_a_refusal_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    refusal(f"s3://b{uuid.uuid4().hex}/mine")
    refusal("ftpx://host/mine")
    assert list(tmp_path.iterdir()) == []


def test_a_last_push_that_fails_says_where_the_whole_run_lies(bucket, s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CutOff) as cut, opened(bucket + "/mine") as run:  # noqa: PT012 - all of it belongs to the body
        put(run, spec_yaml="s", checkpoints__0000_pt="c")
        _request("POST", f"{s3_server}/moto-api/reset")
    (line,) = str(cut.value).splitlines()
    assert bucket + "/mine" in line
    (kept,) = re.findall(rf"{re.escape(str(tmp_path))}\S+", line)
    assert files(Path(kept)) == {"spec.yaml": b"s", "checkpoints/0000.pt": b"c"}


# The command


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def rows(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


@pytest.fixture(scope="module")
def local_search(environment, tmp_path_factory) -> Iterator[tuple[RunFiles, subprocess.Popen[str]]]:
    """The same search in a folder, as it goes on beside the other one."""
    run = RunFiles(tmp_path_factory.mktemp("local") / "run")
    arguments = command("tuner.search", "--run", str(run.path), *TINY)
    search = subprocess.Popen(
        arguments, env=environment, cwd=run.path.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield run, search
    finally:
        search.terminate()
        search.communicate(timeout=30)


@pytest.fixture(scope="module")
def killed_run(
    local_search, s3_server, environment, tmp_path_factory
) -> tuple[str, dict[str, bytes], subprocess.CompletedProcess]:
    """A search with `TINY` whose run is in storage, killed once that has an ended trial and an extractor; gone on with.

    Its URL, what was in storage after the kill, and how the second command ended.
    """
    _request("PUT", f"{s3_server}/killed")
    url, mark = "s3://killed/mine", uuid.uuid4().hex
    folder = tmp_path_factory.mktemp("killed")
    theirs = environment | {
        "TUNER_TEST": mark,
        "TMPDIR": str(folder),
        "RAY_TMPDIR": "/tmp",
    }  # Ray's paths must be short
    again = command("tuner.search", "--run", url, *TINY)
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(again, env=theirs, cwd=folder, start_new_session=True, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 150
        while "summary.json" not in (stored := contents(url)) or not any(
            row["state"] not in ("waiting", "running") for row in rows(stored.get("trials.csv", b""))
        ):
            assert driver.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "no trial ended, or no extractor was trained"
            time.sleep(0.1)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        for pid in processes_of(mark):
            os.kill(pid, signal.SIGKILL)
    stored = contents(url)
    ended = subprocess.run(again, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
    return url, stored, ended


@pytest.mark.long
def test_a_killed_search_goes_on_from_its_copy_in_storage_to_the_end(killed_run):
    url, before, ended = killed_run
    assert "report.html" not in before
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert f"{url}/export" in ended.stdout
    stored = contents(url)
    assert {"spec.yaml", "study.journal", "trials.csv", "summary.json", "report.html"} <= stored.keys()
    assert {"export/config.json", "export/onnx/encoder.onnx", "checkpoints/0000.pt"} <= stored.keys()
    assert not [name for name in stored if name.startswith("ray/") or "/." in name or name.startswith(".")]
    summary = json.loads(stored["summary.json"])
    assert sum(summary["trials"].values()) == 5
    assert summary["test"].keys() == {"real", "baseline", "best"}
    kept = json.loads(before["summary.json"])["extractors"]
    assert kept, "what the search scored with before the kill"
    assert kept.items() <= summary["extractors"].items(), "and after it; the second may have come later"
    for row in rows(before["trials.csv"]):
        if row["state"] not in ("waiting", "running"):
            assert rows(stored["trials.csv"])[int(row["trial"])]["ended"] == row["ended"], "no trial was run twice"


@pytest.mark.long
def test_a_search_in_storage_scores_as_one_on_a_disk(killed_run, local_search):
    url, _, _ = killed_run
    local, search = local_search
    assert search.wait(200) == 0, search.communicate()[1]
    compared = ("trial", "state", "reason", "epoch", *SEARCHED, *METRICS)
    stored, here = rows(contents(url)["trials.csv"]), rows(local.trials.read_bytes())
    assert [[row.get(name) for name in compared] for row in stored] == [
        [row.get(name) for name in compared] for row in here
    ]
    summary = json.loads(contents(url)["summary.json"])
    expected = json.loads(local.summary_file.read_text())
    assert summary["best"] == expected["best"]
    assert summary["test"] == expected["test"]


@pytest.mark.long
def test_the_other_commands_take_a_url_too(killed_run, environment, tmp_path):
    url, _, _ = killed_run

    def started(*arguments: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command(*arguments), env=environment, cwd=tmp_path, text=True, **pipes)

    def said(process: subprocess.Popen[str]) -> str:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        return out

    before = contents(url)
    both = started("tuner.search", "--status", url), started("tuner.search", "--run", url, *TINY)
    assert all(url in said(process) for process in both)
    assert contents(url) == before, "it was finished"
    storage, root = FileSystem.from_uri(url)
    storage.delete_file(root + "/export/config.json")
    said(started("tuner.export", url))
    assert contents(url)["export/config.json"] == before["export/config.json"]
    assert list(tmp_path.iterdir()) == []
