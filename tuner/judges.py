"""A run's judges, trained while the first trials train: nothing is scored before a trial's first rung."""

import os

import ray
from ray import ObjectRef

from tuner.cluster import is_ours, require_ray
from tuner.run import Run
from tuner.spec import Spec
from tuner.vae.data import Data
from tuner.vae.judge import Judge, train_judge
from tuner.vae.process import settle
from tuner.vae.train import Stream, derive_seed
from tuner.workspace import JUDGES, keep_judge, load_judges


class Judges:
    """References to a run's judges, those of an earlier process among them; `keep` puts one into the run."""

    def __init__(self, run: Run, spec: Spec, data: Data, reference: ObjectRef):
        self.run, self.data = run, data
        self.kept = load_judges(run)
        # Beside the trials on a cluster of our own, the second out of their way; elsewhere a node must have room.
        train = ray.remote(num_cpus=0 if is_ours() else 1, max_calls=1)(_train)
        self.references = {
            name: ray.put(self.kept[name])
            if name in self.kept
            else train.remote(reference, derive_seed(spec.seed, Stream.JUDGE, index), width, is_ours() and index > 0)
            for index, (name, width) in enumerate(JUDGES.items())
        }

    def keep(self, name: str) -> Judge:
        """A judge, waited for and written to the run."""
        if name not in self.kept:
            while not ray.wait([self.references[name]], timeout=1)[0]:
                require_ray()
            self.kept[name] = ray.get(self.references[name])
            keep_judge(self.run, self.data, name, self.kept[name])
        return self.kept[name]


def _train(data: Data, seed: int, width: int, in_the_background: bool) -> Judge:
    settle()
    if in_the_background:
        os.nice(19)
    return train_judge(data, seed, width)
