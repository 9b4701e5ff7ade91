"""A run's extractors; classifiers train in processes beside the driver: nothing is scored before a first rung."""

import hashlib
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
from tuner.run import RunFiles, write_atomic
from tuner.spec import Spec
from tuner.summary import ExtractorInfo
from tuner.vae.data import Data, as_floats
from tuner.vae.extractor import (
    Classifier,
    FeatureExtractor,
    Program,
    WaveletPackets,
    draw_untrained,
    from_bytes,
    load_extractor,
    to_bytes,
    train_classifier,
)
from tuner.vae.process import settle
from tuner.vae.seeds import Stream, derive_seed

EXTRACTORS = ("search", "second")  # the search never sees the second, which sees what the first can't


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


def read_program(spec: Spec) -> Program:
    """The user's feature extractor. Raises ValueError where its file is not the one of the spec."""
    assert spec.features
    assert spec.features_sha256
    program = load_extractor(spec.features, spec.features_sha256)
    if not isinstance(program, Program):
        raise ValueError(f"{spec.features}: no program of torch.export")
    return program


def needs_training(name: str, spec: Spec, data: Data) -> bool:
    """Whether an extractor of a run is a classifier."""
    return (data.classes or 0) > 1 and not (spec.features and name == "search")


def make_extractor(name: str, spec: Spec, data: Data) -> FeatureExtractor:
    """One of a run's extractors: the same spec and data give the same one.

    Where there are labels, two classifiers; else untrained networks, which rank models as those do, and for the second
    another family: wavelet packets. The user's own program takes the place of the first.
    """
    seed = derive_seed(spec.seed, Stream.EXTRACTOR, EXTRACTORS.index(name))
    if needs_training(name, spec, data):
        return train_classifier(data, seed, deep=name == "second")
    if name == "second":
        return WaveletPackets(data.shape)
    return read_program(spec) if spec.features else draw_untrained(data.shape, seed)


def keep_extractor(run: RunFiles, data: Data, name: str, extractor: FeatureExtractor) -> None:
    """Write a frozen extractor; describe it by kind, hash and how often a classifier is right on validation."""
    content, held_out = to_bytes(extractor), data.validation
    write_atomic(run.extractor(name, extractor.kind), content)
    accuracy = None
    if isinstance(extractor, Classifier) and held_out.labels is not None:
        accuracy = extractor.accuracy(as_floats(held_out.images), held_out.labels)
    described = ExtractorInfo(kind=extractor.kind, sha256=hashlib.sha256(content).hexdigest(), accuracy=accuracy)
    run.update_summary(extractors={name: described})


def load_extractors(run: RunFiles) -> dict[str, FeatureExtractor]:
    """The run's extractors; empty before they were made. Raises ValueError where a file is not the frozen one."""
    described = run.summary().extractors
    return {name: load_extractor(run.extractor(name, info.kind), info.sha256) for name, info in described.items()}
