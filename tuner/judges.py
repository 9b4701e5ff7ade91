"""A run's judges, trained beside the trials: nothing is scored before a trial's first rung."""

import ray
from ray import ObjectRef
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.cluster import alive, require_ray
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
            # It takes no CPU from Ray's books, or trials that wait for it might hold the one that it waits for.
            train = ray.remote(num_cpus=0, max_calls=1)(_train)
            workers = [node["NodeID"] for node in alive() if node["Resources"].get("CPU")]
            if workers:
                place = NodeAffinitySchedulingStrategy(workers[len(self.references) % len(workers)], soft=True)
                train = train.options(scheduling_strategy=place)
            seed = derive_seed(self.spec.seed, Stream.JUDGE, list(JUDGES).index(name))
            self.references[name] = train.remote(self.reference, seed, JUDGES[name])
        return self.references[name]

    def in_training(self) -> int:
        """How many are: while the first is, a trial more would only make both its score and the others' wait."""
        references = list(self.references.values())
        return len(ray.wait(references, num_returns=len(references), timeout=0)[1])

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
