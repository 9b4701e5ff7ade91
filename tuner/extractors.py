"""A run's extractors; classifiers train in processes beside the driver: nothing is scored before a first rung."""

import os
import signal
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

from tuner import sources
from tuner.exits import CutOff
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.vae.data import Data
from tuner.vae.extractor import FeatureExtractor, from_bytes, to_bytes
from tuner.vae.process import settle
from tuner.workspace import keep_extractor, load_extractors, make_extractor, needs_training


class FeatureExtractors:
    """Makes extractors where the driver runs, so that no node's end takes one along.

    As a context it begins the search's extractor; on the way out what still trains is ended.

    Raises ValueError where an extractor of the run is not the one that was frozen.
    """

    def __init__(self, run: RunFiles, spec: Spec, data: Data):
        self.run, self.spec, self.data = run, spec, data
        self.kept = load_extractors(run)
        self.training: dict[str, tuple[BaseProcess, Connection]] = {}

    def __enter__(self) -> "FeatureExtractors":
        self.begin("search")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process, _ in self.training.values():
            process.terminate()
            process.join()

    def begin(self, name: str) -> None:
        """Train an extractor, or make and keep it if it needs no training; unless that was begun before."""
        if name in self.kept or name in self.training:
            return
        if not needs_training(name, self.spec, self.data):
            self.kept[name] = make_extractor(name, self.spec, self.data)
            keep_extractor(self.run, self.data, name, self.kept[name])
            return
        context = get_context("spawn")  # a fork would inherit torch's and Ray's threads
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, name, self.spec, self.run.images)
        process = context.Process(target=_train, args=arguments, daemon=True)
        # A Ctrl-C in the terminal is for the driver alone; a process starts with its parent's mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sender.close()
        self.training[name] = process, receiver

    def in_training(self) -> int:
        """How many are: while the first is, a trial more would only make both its score and the others' wait."""
        return sum(not receiver.poll() for _, receiver in self.training.values())

    def keep_done(self) -> list[str]:
        """Write to the run what has been trained since -> its names."""
        done = [name for name, (_, receiver) in self.training.items() if receiver.poll()]
        for name in done:
            self.keep(name)
        return done

    def keep(self, name: str) -> FeatureExtractor:
        """An extractor, waited for and written to the run. Raises CutOff where the process that trains it died."""
        self.begin(name)
        if name not in self.kept:
            process, receiver = self.training[name]
            try:
                self.kept[name] = from_bytes(receiver.recv_bytes())
            except EOFError as error:
                process.join()
                raise CutOff(f"the process that trains the {name} extractor died ({process.exitcode})") from error
            process.join()
            del self.training[name]
            keep_extractor(self.run, self.data, name, self.kept[name])
        return self.kept[name]


def _train(sender: Connection, name: str, spec: Spec, kept: Path) -> None:
    os.nice(19)  # Ray starts meanwhile, and gives its workers 15
    settle()
    extractor = make_extractor(name, spec, sources.load(spec.data, kept))
    with suppress(BrokenPipeError):  # the driver was killed meanwhile
        sender.send_bytes(to_bytes(extractor))
