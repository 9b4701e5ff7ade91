"""A stage as a command of its own: `python -m tuner.retrain RUN` and `python -m tuner.export RUN`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tuner.cluster import address_of, cluster
from tuner.exits import command, resumable
from tuner.pool import RayPool
from tuner.storage import opened
from tuner.study import open_study, table
from tuner.vae.errors import Refused
from tuner.workspace import Workspace, open_workspace


def run_alone(
    module: str, description: str, work: Callable[[Workspace, RayPool], object], argv: Sequence[str] | None
) -> int:
    """One stage as a command of its own: `python -m MODULE RUN [FLAGS]` -> exit status.

    Ends the process with one line and status 2 where the run can't be worked on.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("run", metavar="RUN", help="run directory or URL of a search")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where images lie or are downloaded to")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="the model of your own that the search began with")
    parser.add_argument("--address", metavar="ADDR", help="join this Ray cluster (default: RAY_ADDRESS, or start one)")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    with resumable(command(module, given)), opened(arguments.run) as run:
        workspace = open_workspace(run, arguments.data_dir, arguments.model)
        if not run.summary().best:
            model = ["--model", arguments.model] if arguments.model else []
            again = command("tuner.search", ["--run", run.shown, *model])
            raise Refused(f"{run.shown}: its search has not ended; go on with {again}")
        address = address_of(arguments.address)
        with run.claimed():
            run.write_trials(table(open_study(run.journal, workspace.spec), workspace.spec))
            with cluster(address, None, workspace.spec.resources):
                pool = RayPool(workspace.spec, workspace.data, workspace.own)
                work(replace(workspace, pool=pool), pool)
    return 0
