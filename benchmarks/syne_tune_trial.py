"""A trial of the peer Syne Tune, whose local back end starts this script with its parameters as flags."""

import argparse
import pickle
from pathlib import Path

from syne_tune import Reporter

from benchmarks.peers import Task


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--task", type=Path)
    options.add_argument("--latent_dim", type=int)
    options.add_argument("--learning_rate", type=float)
    options.add_argument("--kl_weight", type=float)
    options.add_argument("--st_checkpoint_dir", type=Path)
    given = vars(options.parse_known_args()[0])
    task: Task = pickle.loads(given.pop("task").read_bytes())
    number = int(given.pop("st_checkpoint_dir").parent.name)
    report = Reporter()
    for epoch, distance in enumerate(task.trial(given, number), start=1):
        report(epoch=epoch, frechet_distance=distance)


if __name__ == "__main__":
    main()
