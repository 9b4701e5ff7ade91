"""The tuner from Python and notebooks: `tuner.tune(...)` works on a run, `tuner.open(run)` reads one."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from tuner import spec as specs
from tuner.data_spec import user_path
from tuner.exits import Fatal
from tuner.job import SHORT, Request, new_run, work
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.study import read_study, table
from tuner.summary import Best, Summary
from tuner.vae.errors import Refused, refusing

if TYPE_CHECKING:
    import pandas as pd

    from tuner.vae.codec import Codec


def tune(
    spec: str | Path | Mapping[str, Any] | Spec | None = None,
    *,
    run: str | Path | None = None,
    data: Any = None,
    data_dir: str | Path | None = None,
    model: str | Callable[..., Any] | None = None,
    concurrency: int | None = None,
    address: str | None = None,
    no_retrain: bool = False,
    **overrides: Any,
) -> "Result":
    """Search, promote, retrain and export; on a run that was cut off, go on with it -> the finished run.

    spec: a file, the name of a shipped one, a mapping such as the file holds, or a `Spec`; by default that of the run,
        or of the digits.
    run: its directory; by default a new one under runs/.
    data: images (N, H, W) or (N, H, W, C), uint8 or floats in [0, 1]; or (images, labels (N,)). They take the place of
        the spec's data and are kept in the run. Splits are made by content.
    data_dir: where the spec's images lie or are downloaded to.
    model: what makes a model of your own, a function or MODULE:FUNCTION (docs/own-model.md).
    concurrency, address, no_retrain: as the command's flags.
    overrides: trials, max_epochs, time_limit and seed, or any key of the spec, dotted ones by **{"budget.trials": 8}.

    Ctrl-C raises KeyboardInterrupt, and the same call goes on. Raises ValueError, one line, on bad input, and
    RuntimeError where no trial came to a score.
    """
    given: Path | Mapping[str, Any] | None
    given = spec.model_dump(mode="json") if isinstance(spec, Spec) else Path(spec) if isinstance(spec, str) else spec
    place = str(run or new_run(given if isinstance(given, Path) else None))
    if "://" in place:
        raise Refused(f"run {place}: from Python a run is a directory; the command line takes URLs")
    files = RunFiles(user_path(place))
    laid = [] if data is None else [("data", {"name": "arrays", "file": str(keep(files, data))})]
    laid += [(SHORT.get(key, key), value) for key, value in overrides.items()]
    images = Path(data_dir) if data_dir else None
    request = Request(given, laid, images, model, concurrency, address, not no_retrain)
    try:
        work(files, request)
    except Fatal as error:
        raise error.__cause__ or error from None
    return Result(files)


def open(run: str | Path) -> "Result":
    """A run, finished or not, read from its files. Raises ValueError where there is none."""
    files = RunFiles(user_path(run))
    if not files.spec.exists():
        raise Refused(f"{run}: not a run directory (no {files.spec.name})")
    return Result(files)


def keep(run: RunFiles, data: Any) -> Path:
    """Write images, and labels if there are any, to the run. Raises Refused where it has begun with others, is none or
    can't be written."""
    images, labels = data if isinstance(data, tuple) else (data, None)
    arrays = {"images": np.asarray(images)} | ({} if labels is None else {"labels": np.asarray(labels)})
    begun = run.spec.exists()
    if begun:
        known = dict(np.load(run.given)) if run.given.exists() else arrays  # the job asks whether these are the run's
        same = known.keys() == arrays.keys() and all(np.array_equal(known[name], arrays[name]) for name in arrays)
        if not same or specs.load(run.spec).data.place.name != run.given.name:
            raise Refused(f"data: {run.shown} has begun with other images")
    elif run.is_foreign():
        raise Refused(f"{run.shown}: exists and is not a run directory")
    if not (begun and run.given.exists()):
        with refusing(run.shown, OSError):
            run.path.mkdir(parents=True, exist_ok=True)
            np.savez(run.given, allow_pickle=False, **arrays)
    return run.given


@dataclass(frozen=True)
class Result:
    """What a run has found, read from its files each time it is asked: a search may be going on."""

    files: RunFiles

    @property
    def path(self) -> Path:
        return self.files.path

    @cached_property
    def spec(self) -> Spec:
        return specs.load(self.files.spec)

    @property
    def summary(self) -> Summary:
        """Extractors, promotion, retrain, scores on validation and test with their standard errors, seconds a stage."""
        return self.files.summary()

    @property
    def best(self) -> Best | None:
        """The promoted trial: its number, epoch and parameters; None before the promotion."""
        return self.summary.best

    @property
    def trials(self) -> "pd.DataFrame":
        """A row a trial, as in trials.csv: state, parameters, best scores, gap closed, seconds; times as datetime."""
        import pandas as pd

        study = read_study(self.files.journal)
        found = pd.DataFrame(table(study, self.spec) if study else [])
        times = {name: pd.to_datetime(found[name]) for name in ("started", "ended") if name in found}
        return found.assign(**times).convert_dtypes()

    @property
    def study(self) -> optuna.Study:
        """The search as Optuna keeps it: a copy, so that whatever is done to it leaves the run alone."""
        copy = optuna.create_study(directions=[objective.direction for objective in self.spec.objective])
        study = read_study(self.files.journal)
        copy.add_trials(study.known() if study else [])
        return copy

    def model(self, model: str | Callable[..., Any] | None = None) -> "Codec":
        """The exported model: encode, decode and sample. `model` is what made one of your own."""
        from tuner import own_model
        from tuner.vae import codec

        return codec.load(self.files.export, own_model.load(model)[0])

    def report(self, model: str | Callable[..., Any] | None = None) -> "Report":
        """Make the report anew; a notebook shows it. `model` is what made one of your own."""
        from tuner import own_model
        from tuner.report import report

        return Report(report(self.files, own_model.load(model)[0]))


@dataclass(frozen=True)
class Report:
    """A report's file, shown inline by notebooks."""

    path: Path

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" width="100%" height="800" style="border: 0"></iframe>'
