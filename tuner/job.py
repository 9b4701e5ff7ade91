"""The main job, read top to bottom: spec -> search and extractors -> promote -> retrain -> export -> report."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import spec as specs
from tuner.run import RunFiles, write_atomic
from tuner.spec import OwnModelSpec, Spec
from tuner.study import BASELINE, UNFINISHED, open_study, read_study, table
from tuner.terminal import console
from tuner.vae.errors import Refused

if TYPE_CHECKING:
    from tuner.vae.data import Data

SHORT = {name: f"budget.{name}" for name in ("trials", "max_epochs", "time_limit")}  # as flags and calls say it


class NothingFound(RuntimeError):
    """A search ended with nothing to go on with; the text is one line that says why."""


@dataclass(frozen=True)
class Request:
    """What is asked of a run: a spec, by default that of the run or of the digits, what is laid over it, and where."""

    spec: Path | Mapping[str, Any] | None = None
    overrides: Sequence[tuple[str, Any]] = ()  # (dotted key, value)
    data_dir: Path | None = None
    model: str | Callable[..., Any] | None = None  # MODULE:FUNCTION, or the function
    concurrency: int | None = None
    address: str | None = None
    retrain: bool = True


def new_run(spec: Path | None) -> str:
    """A folder under `runs/`, named by the spec and the time."""
    return f"runs/{(spec or specs.DEFAULT).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def new_run_lines(run: RunFiles, spec: Spec, request: Request, data: "Data") -> Iterator[str]:
    """What is begun, for whoever meant to go on with something, on which images, and what of the spec won't be."""
    given = specs.DEFAULT.stem if request.spec is None else request.spec
    yield f"new run  {run.shown}: {'a spec from Python' if isinstance(given, Mapping) else given}"
    labels = data.train.labels
    classes = "no labels" if labels is None else f"classes: {len(labels.unique()):,}"
    yield f"images   {len(data.train):,} to train on, {len(data.validation):,} to choose by; {classes}"
    points, most = len(spec.points_to_evaluate), spec.budget.trials - 1
    if points > most:
        yield f"note     {most} of {points} points_to_evaluate are run: trials is {most + 1}, the baseline among them"


def work(run: RunFiles, request: Request) -> Spec:
    """All stages of a run, each skipped where it is done already -> its spec.

    Raises Refused on bad input, and NothingFound.
    """
    # torch and Ray take seconds to import: what is refused does not wait for them.
    from tuner import own_model, warm_start
    from tuner.extractors import load_extractors
    from tuner.loggers import require_installed
    from tuner.workspace import Workspace, held_out_bytes, load_data, oddities, require_begun_with, require_fit

    own, named = own_model.load(request.model)
    spec = load_spec(run, request, named)
    outgrown, tested = outgrown_by(spec, run), run.summary().test
    done = tested and (tested.retrained or not request.retrain) and run.report.exists() and run.export.exists()
    if done and not outgrown:
        return spec
    require_installed(spec.loggers)
    load_extractors(run)
    data = load_data(run, spec)
    require_fit(run, spec, data)
    own_model.check(spec, data.shape, own)
    held_out = held_out_bytes(data)
    require_begun_with(run, held_out)
    earlier = warm_start.gather(run, spec, held_out)

    from tuner.cluster import address_of, cluster

    address = address_of(request.address)
    for line in oddities(spec, data):
        print(f"warning: {spec.data.title}: {line}", file=sys.stderr)
    with run.claimed():
        with cluster(address, request.concurrency, spec.resources):
            if outgrown:  # before the spec: cut off between the two, the run is unfinished by either
                run.update_summary(**outgrown)
                begins = "search" if "best" in outgrown else "retrain"
                console().print(f"{run.shown}: goes on with its {begins}, and the stages after it are done anew")
            if not run.spec.exists():
                for line in new_run_lines(run, spec, request, data):
                    console().print(line, soft_wrap=True)
            # seconds in which a first worker comes up
            from tuner.export import export_stage
            from tuner.extractors import FeatureExtractors
            from tuner.pool import RayPool
            from tuner.promote import promote_stage
            from tuner.report import report_stage
            from tuner.retrain import retrain
            from tuner.scoring import Bench
            from tuner.trials import search_stage

            if not run.spec.exists() or specs.load(run.spec) != spec:
                write_atomic(run.spec, spec.to_yaml())
            run.write_trials(table(open_study(run.journal, spec), spec))
            if not run.held_out.exists():
                write_atomic(run.held_out, held_out)
            warm_start.take_over(run, spec, earlier)
            pool = RayPool(spec, data, own, request.concurrency)
            rows: list[dict[str, Any]] = []
            if not run.summary().best:
                extractors = FeatureExtractors(run, spec, data, pool(Bench(spec, data, {})))
                rows = search_stage(run, spec, pool, extractors)
                require_found(rows)
            workspace = Workspace(run, spec, data, load_extractors(run), own, pool)
            if rows:
                promote_stage(workspace, rows)
            if request.retrain and not run.summary().retrain:
                retrain(workspace, pool)
            run.report.unlink(missing_ok=True)  # a report is the last thing a finished run gets
            export_stage(workspace, pool)
        report_stage(run, own)
    return spec


def require_found(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises NothingFound where a search has found nothing to go on with."""
    if not rows or (rows[BASELINE]["state"] in ("waiting", UNFINISHED) and not rows[BASELINE]["epochs_trained"]):
        raise NothingFound(
            "budget.time_limit came before the baseline was scored; the run goes on with a longer one, or with null"
        )
    if rows[BASELINE]["state"] == "failed" or not rows[BASELINE]["epochs_trained"]:
        everything = all(row["state"] == "failed" for row in rows)
        reasons = Counter(row["reason"] for row in (rows if everything else rows[: BASELINE + 1]))
        subject = "every trial failed" if everything else "the baseline was never scored"
        raise NothingFound(f"{subject}: {reasons.most_common(1)[0][0]}")


def fastest_precision(spec: Spec) -> str:
    """What trials of a spec are trained in fastest: bfloat16 where they have no GPU and this machine, which stands for
    those they run on, has instructions for it. A GPU multiplies in TF32, and networks this small gain no more there."""
    import torch

    known = torch.cpu.get_capabilities()
    low = (known.get("avx512_bf16") or known.get("amx_bf16")) and not (spec.resources.gpu or torch.cuda.is_available())
    return "bfloat16" if low else "float32"


def outgrown_by(spec: Spec, run: RunFiles) -> dict[str, Any]:
    """What of a run's summary does not hold once its spec is this one, as parts to lay over it.

    Trials that are left, whether by a budget that has grown or a limit that was lifted, have all later stages done
    anew; another retrain those from there on.
    """
    if not run.spec.exists():
        return {}
    begun, found = specs.load(run.spec), run.summary()
    anew: dict[str, Any] = {"retrain": None, "test": None}
    if spec.budget != begun.budget and found.best:
        from tuner.searcher import StudySearcher

        study = read_study(run.journal)
        if study and StudySearcher(study, spec).remaining:
            return anew | {"promotion": (), "best": None, "validation": None}
    if spec.retrain != begun.retrain and found.retrain and found.validation:
        return anew | {"validation": found.validation.model_copy(update={"refitted": None, "retrained": None})}
    return {}


def load_spec(run: RunFiles, request: Request, own: OwnModelSpec | None = None) -> Spec:
    """The spec to work by, `own` being the code of a model of the user's own.

    Raises Refused where it is no good or the run belongs to another.
    """
    if request.concurrency is not None and request.concurrency < 1:
        raise Refused(f"concurrency {request.concurrency}: expected 1 or more")
    started = run.spec.exists()
    overrides = [*request.overrides, *([("own_model", own.model_dump())] if own else [])]
    given = (run.spec if started else specs.DEFAULT) if request.spec is None else request.spec
    spec = specs.load(given, overrides)
    spec = spec.with_data_at(run.images_at(request.data_dir))
    begun = specs.load(run.spec) if started else spec
    begun.require_model(own)
    if spec.fixed.get("precision") == "auto":
        decided = begun.fixed["precision"] if started else fastest_precision(spec)
        spec = spec.with_fixed("precision", decided)
    if started:
        differences = spec.differences(begun)
        if differences:
            raise Refused(f"{run.shown}: belongs to another spec: {'; '.join(differences)}")
    elif run.is_foreign():
        raise Refused(f"{run.shown}: exists and is not a run directory")
    return spec
