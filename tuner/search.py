"""The main job, read top to bottom: spec -> search and extractors -> promote -> retrain -> export -> report.

`python -m tuner.search [SPEC.yaml] [--run DIR]`. On a run that was cut off, the same command goes on with it.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from tuner import spec as specs
from tuner import yaml_text
from tuner.exits import command, refuse, resumable
from tuner.run import RunFiles, write_atomic
from tuner.spec import OwnModelSpec, Spec
from tuner.storage import opened
from tuner.study import BASELINE
from tuner.terminal import console, final_words, status_words
from tuner.vae.errors import Refused

DEFAULT_SPEC = Path(__file__).parent.parent / "search_spaces" / "digits.yaml"


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parse(given)
    if arguments.status:
        return status(arguments.status)
    named: list[str] = []
    if arguments.run is None:
        arguments.run = f"runs/{(arguments.spec or DEFAULT_SPEC).stem}-{datetime.now():%Y%m%d-%H%M%S}"
        named = ["--run", arguments.run]
    with resumable(command("tuner.search", given, *named)), opened(arguments.run) as run:
        return job(run, arguments)


def job(run: RunFiles, arguments: argparse.Namespace) -> int:
    """All stages of a run, each skipped where it is done already -> exit status."""
    # torch and Ray take seconds to import: --help, --status and what is refused don't wait for them.
    from tuner import own_model
    from tuner.extractors import load_extractors
    from tuner.workspace import Workspace, keep_held_out, load_data, require_fit

    try:
        own, named = own_model.load(arguments.model)
        spec = load_spec(run, arguments, named)
        tested = run.summary().test
        if run.report.exists() and run.export.exists() and tested and (tested.retrained or arguments.no_retrain):
            return show(final_words(run, spec))
        load_extractors(run)
        data = load_data(run, spec)
        require_fit(run, spec, data)
        own_model.check(spec, data.shape, own)
    except ValueError as error:
        refuse(error)

    from tuner.cluster import cluster
    from tuner.export import export_stage
    from tuner.extractors import FeatureExtractors
    from tuner.pool import RayPool
    from tuner.promote import promote_stage
    from tuner.report import report_stage
    from tuner.retrain import retrain
    from tuner.scoring import Bench
    from tuner.trials import search_stage

    with run.claimed():
        if not run.spec.exists():
            write_atomic(run.spec, spec.to_yaml())
        if not run.held_out.exists():
            keep_held_out(run, data)
        with cluster(arguments.address, arguments.concurrency, spec.resources):
            pool = RayPool(spec, data, own, arguments.concurrency)
            rows: list[dict[str, Any]] = []
            if not run.summary().best:
                extractors = FeatureExtractors(run, spec, data, pool(Bench(spec, data, {})))
                rows = search_stage(run, spec, pool, extractors)
                if ends_here(rows):
                    return 1
            workspace = Workspace(run, spec, data, load_extractors(run), own, pool)
            if rows:
                promote_stage(workspace, rows)
            if not (arguments.no_retrain or run.summary().retrain):
                retrain(workspace, pool)
            run.report.unlink(missing_ok=True)  # a report is the last thing a finished run gets
            export_stage(workspace, pool)
        report_stage(run, own)
    return show(final_words(run, spec))


def ends_here(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Say why a search has found nothing to go on with, if so."""
    if not rows:
        print("error: no trial was started within budget.time_limit", file=sys.stderr)
    elif rows[BASELINE]["state"] == "failed" or not rows[BASELINE]["epochs_trained"]:
        everything = all(row["state"] == "failed" for row in rows)
        reasons = Counter(row["reason"] for row in (rows if everything else rows[: BASELINE + 1]))
        subject = "every trial failed" if everything else "the baseline was never scored"
        print(f"error: {subject}: {reasons.most_common(1)[0][0]}", file=sys.stderr)
    else:
        return False
    return True


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tuner.search",
        description="Search, promote, retrain and export a VAE; on a run that was cut off, go on with it.",
    )
    parser.add_argument("spec", nargs="?", type=Path, help="what to search (default: the embedded digits)")
    parser.add_argument("--run", metavar="DIR", help="run directory or URL (default: runs/SPEC-TIME)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where images lie or are downloaded to")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="what makes a model of your own; its code is run")
    parser.add_argument("--trials", type=int, metavar="N", help="budget.trials")
    parser.add_argument("--max-epochs", type=float, metavar="N", help="budget.max_epochs")
    parser.add_argument("--time-limit", metavar="TIME", help="budget.time_limit, such as 30m")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the study")
    parser.add_argument("--concurrency", type=int, metavar="N", help="trials at once (default: one a CPU)")
    parser.add_argument("--address", metavar="ADDR", help="join this Ray cluster (default: RAY_ADDRESS, or start one)")
    parser.add_argument("--no-retrain", action="store_true", help="export the best trial as the search left it")
    parser.add_argument("--status", metavar="RUN", help="show how a run stands, and do nothing else")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the spec, dotted")
    return parser.parse_args(argv)


def load_spec(run: RunFiles, arguments: argparse.Namespace, own: OwnModelSpec | None = None) -> Spec:
    """The spec to work by, `own` being the code that --model names.

    Raises ValueError where it is no good or the run belongs to another.
    """
    if arguments.concurrency is not None and arguments.concurrency < 1:
        raise ValueError(f"--concurrency {arguments.concurrency}: expected 1 or more")
    overrides = [yaml_text.parse_override(text) for text in arguments.set]
    budget = {f"budget.{key}": getattr(arguments, key) for key in ("trials", "max_epochs", "time_limit")}
    given = budget | {"seed": arguments.seed, "own_model": own and own.model_dump()}
    overrides += [(key, value) for key, value in given.items() if value is not None]
    started = run.spec.exists()
    spec = specs.load(arguments.spec or (run.spec if started else DEFAULT_SPEC), overrides)
    spec = spec.with_data_at(arguments.data_dir)
    begun = specs.load(run.spec) if started else spec
    begun.require_model(own)
    if started:
        differences = spec.differences(begun)
        if differences:
            raise ValueError(f"{run.shown}: belongs to another spec: {'; '.join(differences)}")
    elif run.is_foreign():
        raise ValueError(f"{run.shown}: exists and is not a run directory")
    return spec


def status(place: str) -> int:
    """How a run stands, from its files alone."""
    with resumable(command("tuner.search", ["--status", place])), opened(place) as run:
        if not run.spec.exists():
            raise Refused(f"{place}: not a run directory (no {run.spec.name})")
        try:
            return show(status_words(run))
        except ValueError as error:
            refuse(error)


def show(words: list[Table | str]) -> int:
    for part in words:
        console(sys.stdout).print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
