"""A run's judges, trained beside the trials: nothing is scored before a trial's first rung."""

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
    """References to a run's judges, those of an earlier process among them."""

    def __init__(self, run: Run, spec: Spec, data: Data, reference: ObjectRef):
        self.run, self.spec, self.data, self.reference = run, spec, data, reference
        self.kept = load_judges(run)
        self.references = {name: ray.put(judge) for name, judge in self.kept.items()}

    def begin(self, name: str) -> ObjectRef:
        """Train a judge, unless that was begun before."""
        if name not in self.references:
            # On a cluster of our own no trial waits for it; elsewhere a node must have room.
            train = ray.remote(num_cpus=0 if is_ours() else 1, max_calls=1)(_train)
            seed = derive_seed(self.spec.seed, Stream.JUDGE, list(JUDGES).index(name))
            self.references[name] = train.remote(self.reference, seed, JUDGES[name])
        return self.references[name]

    def keep(self, name: str) -> Judge:
        """A judge, waited for and written to the run."""
        if name not in self.kept:
            while not ray.wait([self.begin(name)], timeout=1)[0]:
                require_ray()
            self.kept[name] = ray.get(self.begin(name))
            keep_judge(self.run, self.data, name, self.kept[name])
        return self.kept[name]


def _train(data: Data, seed: int, width: int) -> Judge:
    settle()
    return train_judge(data, seed, width)
