"""A run's feature extractors: made on the cluster, kept in the run and read."""

import hashlib

from tuner.extractor_cache import ExtractorCache
from tuner.run import RunFiles, write_atomic
from tuner.scoring import Bench, Pending, Workers, search_scorer
from tuner.spec import Spec
from tuner.summary import EXTRACTORS, GUIDE, ExtractorInfo
from tuner.vae.data import Data
from tuner.vae.errors import Refused
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
    train_rotations,
)
from tuner.vae.seeds import Stream, derive_seed

Made = tuple[bytes, ExtractorInfo]  # an extractor's file, and what the summary says of it


def has_classes(data: Data) -> bool:
    return data.train.labels is not None and len(data.train.labels.unique()) > 1


class FeatureExtractors:
    """Has a run's extractors made by the workers, beside the trials; nothing is scored before a first rung. The
    search's is begun at once. One that is in the user's cache is taken from there.

    Raises Refused where an extractor of the run is not the one that was frozen, or the user's own is not the spec's.
    """

    def __init__(self, run: RunFiles, spec: Spec, data: Data, workers: Workers):
        self.run, self.spec, self.data, self.workers = run, spec, data, workers
        self.names = EXTRACTORS if has_classes(data) else (*EXTRACTORS, GUIDE)
        self.kept, self.cache = load_extractors(run), ExtractorCache(data, spec.seed)
        self.begun: dict[str, Pending[Made]] = {}
        self.begin("search")

    def begin_all(self) -> None:
        for name in self.names:
            self.begin(name)

    def begin(self, name: str) -> None:
        """Have an extractor made, unless it is there or that was begun before."""
        if name in self.kept or name in self.begun:
            return
        program = read_program(self.spec) if self.spec.features and name == "search" else None
        found = None if program else self.cache.find(name)
        if found:
            self.kept[name] = keep_extractor(self.run, name, *found)
        else:
            self.begun[name] = self.workers.begin(make, (name, program))

    def awaited(self) -> int:
        """1 while the search's is in work, else 0: a trial more would only make all scores wait for it longer."""
        return int("search" in self.begun and not self.begun["search"].ready())

    def keep_done(self) -> list[str]:
        """Write to the run what has been made since -> its names."""
        done = [name for name, pending in self.begun.items() if pending.ready()]
        for name in done:
            self.keep(name)
        return done

    def keep(self, name: str) -> FeatureExtractor:
        """An extractor, waited for and written to the run."""
        self.begin(name)
        if name in self.begun:
            content, info = self.begun.pop(name).result()
            self.kept[name] = keep_extractor(self.run, name, content, info)
            if info.kind != Program.kind:
                self.cache.keep(name, content, info)
        return self.kept[name]


def read_program(spec: Spec) -> Program:
    """The user's feature extractor. Raises Refused where its file is not the one of the spec."""
    assert spec.features
    assert spec.features_sha256
    program = load_extractor(spec.features, spec.features_sha256)
    if not isinstance(program, Program):
        raise Refused(f"{spec.features}: no program of torch.export")
    return program


def make_extractor(name: str, seed: int, data: Data) -> FeatureExtractor:
    """One of a run's extractors: the same `seed`, the spec's, and data give the same one.

    Where there are labels, two classifiers; else untrained networks, which rank models nearly as those do, and for the
    second another family: wavelet packets. As guides either is little better than none: that is a network that was
    trained to tell rotations.
    """
    seed = derive_seed(seed, Stream.EXTRACTOR, (*EXTRACTORS, GUIDE).index(name))
    if has_classes(data):
        return train_classifier(data, seed, deep=name == "second")
    if name == GUIDE:
        return train_rotations(data, seed)
    return WaveletPackets(data.shape) if name == "second" else draw_untrained(data.shape, seed)


def make(bench: Bench, name: str, program: Program | None = None) -> Made:
    """One of a run's extractors, described; the user's own program where there is one."""
    extractor = program or make_extractor(name, bench.spec.seed, bench.data)
    scorer, accuracy = search_scorer(bench.spec, bench.data, extractor), None
    if isinstance(scorer.extractor, Classifier):
        accuracy = scorer.extractor.accuracy(bench.data.validation)
    content = to_bytes(extractor)
    sha256 = hashlib.sha256(content).hexdigest()
    return content, ExtractorInfo(kind=extractor.kind, sha256=sha256, accuracy=accuracy, floor=scorer.floor)


def keep_extractor(run: RunFiles, name: str, content: bytes, info: ExtractorInfo) -> FeatureExtractor:
    """Write a frozen extractor's file and what is known of it to a run -> the extractor."""
    write_atomic(run.extractor(name, info.kind), content)
    run.update_summary(extractors={name: info})
    return from_bytes(content)


def load_extractors(run: RunFiles) -> dict[str, FeatureExtractor]:
    """The run's extractors; empty before they were made. Raises Refused where a file is not the frozen one."""
    described = run.summary().extractors
    return {name: load_extractor(run.extractor(name, info.kind), info.sha256) for name, info in described.items()}
