"""`python -m tuner.search [SPEC.yaml] [--run DIR]`: the main job as a command.

On a run that was cut off, the same command goes on with it.
"""

import argparse
import sys
from pathlib import Path

from rich.table import Table

from tuner import yaml_text
from tuner.exits import command, resumable
from tuner.job import SHORT, NothingFound, Request, new_run, work
from tuner.spec import shipped
from tuner.storage import opened
from tuner.terminal import console, final_words, status_words
from tuner.vae.errors import Refused


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parse(given)
    if arguments.status:
        return status(arguments.status)
    if arguments.specs:
        firsts = {name: path.read_text("utf-8").splitlines()[1] for name, path in shipped().items()}
        return show([f"{name:<22} {line.removeprefix('# ').partition('.')[0]}" for name, line in firsts.items()])
    named: list[str] = []
    if arguments.run is None:
        arguments.run = new_run(arguments.spec)
        named = ["--run", arguments.run]
    with resumable(command("tuner.search", given, *named)), opened(arguments.run, begins=True) as run:
        try:
            return show(final_words(run, work(run, request(arguments))))
        except NothingFound as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tuner.search",
        description="Search, promote, retrain and export a VAE; on a run that was cut off, go on with it.",
    )
    parser.add_argument("spec", nargs="?", type=Path, help="a file, or the name of a shipped spec (default: digits)")
    parser.add_argument("--run", metavar="DIR", help="run directory or URL (default: runs/SPEC-TIME)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where images lie or are downloaded to")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="what makes a model of your own; its code is run")
    parser.add_argument("--trials", type=int, metavar="N", help="budget.trials")
    parser.add_argument("--max-epochs", type=float, metavar="N", help="budget.max_epochs")
    parser.add_argument("--time-limit", metavar="TIME", help="budget.time_limit, such as 30m")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the study")
    parser.add_argument(
        "--concurrency", type=int, metavar="N", help="trials at once (default: as many as CPUs hold, or 64 a GPU)"
    )
    parser.add_argument("--address", metavar="ADDR", help="join this Ray cluster (default: RAY_ADDRESS, or start one)")
    parser.add_argument("--logger", action="append", metavar="NAME", help="tell mlflow or wandb of trials and export")
    parser.add_argument("--no-retrain", action="store_true", help="export the best trial as the search left it")
    parser.add_argument("--status", metavar="RUN", help="show how a run stands, and do nothing else")
    parser.add_argument("--specs", action="store_true", help="list the shipped specs, and do nothing else")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the spec, dotted")
    return parser.parse_args(argv)


def request(arguments: argparse.Namespace) -> Request:
    """What the command line asks for. Raises Refused where --set is no key and value."""
    flags = {key: getattr(arguments, name) for name, key in SHORT.items()}
    flags |= {"seed": arguments.seed, "loggers": arguments.logger}
    return Request(
        spec=arguments.spec,
        overrides=[
            *map(yaml_text.parse_override, arguments.set),
            *((key, value) for key, value in flags.items() if value is not None),
        ],
        data_dir=arguments.data_dir,
        model=arguments.model,
        concurrency=arguments.concurrency,
        address=arguments.address,
        retrain=not arguments.no_retrain,
    )


def status(place: str) -> int:
    """How a run stands, from its files alone."""
    with resumable(command("tuner.search", ["--status", place])), opened(place) as run:
        if not run.spec.exists():
            raise Refused(f"{run.shown}: not a run directory (no {run.spec.name})")
        return show(status_words(run))


def show(words: list[Table | str]) -> int:
    for part in words:
        console(sys.stdout).print(part, soft_wrap=isinstance(part, str))  # what is long can be copied whole
    return 0


if __name__ == "__main__":
    sys.exit(main())
