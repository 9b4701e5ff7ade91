"""A run that is kept in object storage: work goes on in a local folder, and a copy follows it.

`--run s3://bucket/path`, or any other URL that pyarrow knows; credentials come from the environment.
"""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tuner.data_spec import user_path
from tuner.exits import CutOff
from tuner.run import RunFiles
from tuner.vae.errors import Refused, one_line, refusing

PUSH_SECONDS = 5  # between two looks at what has changed


@contextmanager
def opened(place: str, begins: bool = False) -> Iterator[RunFiles]:
    """The run at a path, or a local copy of the run at a URL that is pushed back while and after the body works.

    Where there is none, a folder is made in storage only if a run `begins`: where nothing can be written, it is told at
    once. Raises Refused where the URL can't be reached, CutOff where the last push fails: the local copy then stays.
    """
    if "://" not in place:
        yield RunFiles(user_path(place))
        return
    local = Path(tempfile.mkdtemp(prefix="vae-tuner-")) / "run"
    try:
        mirror = Mirror(place, local)
        mirror.pull(begins)
    except BaseException:
        shutil.rmtree(local.parent)
        raise
    done = threading.Event()
    pusher = threading.Thread(target=mirror.follow, args=(done,), daemon=True)
    pusher.start()
    try:
        yield RunFiles(local, shown=place)
    except Refused as error:  # the copy is gone by the time that this is read
        raise Refused(str(error).replace(str(local), place)) from error
    finally:
        done.set()
        pusher.join()
        try:
            mirror.push()
        except (OSError, ValueError) as error:  # pyarrow has its own of either
            raise CutOff(f"{place}: {one_line(error)}; the whole run lies in {local}") from error
        shutil.rmtree(local.parent)


class Mirror:
    """Copies a run to storage so that at every moment the copy is one to go on from.

    A file that tells of others is read before them and written after them: checkpoints and the rest first, then the
    journal, trials.csv, summary.json and spec.yaml; that of a new run comes before all.
    """

    def __init__(self, url: str, local: Path):
        from pyarrow.fs import FileSystem  # not on the way of runs on a disk

        self.url = url
        self.run = RunFiles(local)
        with refusing(url, ValueError, OSError):
            self.storage, self.root = FileSystem.from_uri(url)
        self.known: dict[Path, tuple[int, int]] = {}

    def pull(self, begins: bool = False) -> None:
        """Fetch what is there. Raises Refused where the storage does not answer, or holds something else."""
        from pyarrow.fs import FileSelector, copy_files

        self.run.path.mkdir(parents=True)
        with refusing(self.url, OSError):
            files = self.storage.get_file_info(FileSelector(self.root, recursive=True, allow_not_found=True))
            if files and self._remote(self.run.spec) not in {found.path for found in files}:
                raise Refused(f"{self.url}: exists and is not a run directory")
            if files:
                copy_files(self.root, str(self.run.path), source_filesystem=self.storage)
            elif begins:
                self.storage.create_dir(self.root, recursive=True)
        self.known = {path: _signature(path) for path in self.run.path.rglob("*") if self._belongs(path)}

    def follow(self, done: threading.Event) -> None:
        """Push now and then until `done`; a push that fails is tried again."""
        while not done.wait(PUSH_SECONDS):
            with suppress(OSError, ValueError):
                self.push()

    def push(self) -> None:
        """Write what has changed since the last push, remove what is gone. Raises OSError or ValueError."""
        listing = [self.run.summary_file, self.run.trials, self.run.journal]
        if self.run.spec in self.known:  # else it comes first: without it there is no run
            listing.insert(0, self.run.spec)
        lists = {path: (_signature(path), path.read_bytes()) for path in listing if path.exists()}
        present = {path for path in self.run.path.rglob("*") if self._belongs(path)}
        for path in sorted(present - set(listing), key=lambda path: (path != self.run.spec, path)):
            with suppress(FileNotFoundError):  # replaced meanwhile: the next push has it
                signature = _signature(path)
                if self.known.get(path) != signature:
                    self._write(path, path.read_bytes())
                    self.known[path] = signature
        for path, (signature, content) in reversed(lists.items()):
            if self.known.get(path) != signature:
                self._write(path, content)
                self.known[path] = signature
        for path in self.known.keys() - present - set(listing):
            self.storage.delete_file(self._remote(path))
            del self.known[path]

    def _belongs(self, path: Path) -> bool:
        inside = path.relative_to(self.run.path)
        hidden = any(part.startswith(".") for part in inside.parts)
        return not hidden and self.run.ray not in path.parents and path.is_file()

    def _remote(self, path: Path) -> str:
        return f"{self.root}/{path.relative_to(self.run.path).as_posix()}"

    def _write(self, path: Path, content: bytes) -> None:
        remote = self._remote(path)
        self.storage.create_dir(remote.rpartition("/")[0], recursive=True)
        with self.storage.open_output_stream(remote) as stream:
            stream.write(content)


def _signature(path: Path) -> tuple[int, int]:
    """Changes whenever the file does."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
