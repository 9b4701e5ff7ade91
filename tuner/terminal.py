"""What a run says while it works, and the table it ends with."""

import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tuner import spec as specs
from tuner.run import RunFiles
from tuner.space import Choices
from tuner.spec import DRAWN_BEST, Objective, Spec
from tuner.study import ENDED, UNFINISHED, in_view, read_study, table
from tuner.summary import Promoted, Summary
from tuner.vae.parameters import Parameters

LOG_COLUMNS = 160
LIVE_SECONDS, PLAIN_SECONDS = 0.25, 10  # between two texts on a terminal, and in a log


def console(file: TextIO | None = None) -> Console:
    """Progress goes to standard error, results to standard output; a log is not as narrow as rich takes it for.

    Nothing is markup: much of what is shown is what users wrote.
    """
    made = Console(file=file or sys.stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made.width = LOG_COLUMNS
    return made


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


@contextmanager
def stage(run: RunFiles, name: str) -> Iterator["Progress"]:
    """Show a stage's progress and add its seconds to the summary."""
    started = time.monotonic()
    stopped: KeyboardInterrupt | None = None
    with Progress(name) as progress:
        try:
            yield progress
        except KeyboardInterrupt as error:  # what was stopped took its time, too
            stopped = error
    spent = run.summary().seconds.get(name, 0.0)
    run.update_summary(seconds={name: round(spent + time.monotonic() - started, 2)})
    if stopped:
        raise stopped


class Progress:
    """One line that says how a stage stands: redrawn on a terminal, printed now and then in a log."""

    def __init__(self, title: str):
        self.title, self.console = title, console()
        self.started, self.printed = time.monotonic(), -math.inf
        self.live = Live(console=self.console, refresh_per_second=1 / LIVE_SECONDS, transient=True)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def due(self) -> bool:
        """Whether there is time for another text."""
        return time.monotonic() - self.printed >= (LIVE_SECONDS if self.console.is_terminal else PLAIN_SECONDS)

    def show(self, text: str) -> None:
        """Put `text` behind the stage's title and time."""
        if self.console.is_terminal:
            self.live.update(self._line(text))
        elif self.due:
            self.console.print(self._line(text), soft_wrap=True)
        else:
            return
        self.printed = time.monotonic()

    def done(self, text: str) -> None:
        """The stage's closing line, which stays."""
        self.live.stop()
        self.console.print(self._line(text), soft_wrap=True)

    def _line(self, text: str) -> str:
        return f"{self.title:<8} {duration(self.seconds):>6}  {text}"


def search_line(rows: Sequence[Mapping[str, Any]], spec: Spec, seconds: float | None = None, before: int = 0) -> str:
    """Counts and the best so far from the rows of a study; with the seconds so far, the rate and the time left.

    `before` is how many of the trials had ended before these seconds began.
    """
    metric, trials = spec.trial_objective.metric, spec.budget.trials
    states = Counter(row["state"] for row in rows)
    ended = sum(states[state] for state in ENDED)
    scored = [row for row in rows if metric in row and row["state"] != "failed"]
    best = min(scored, key=spec.trial_objective.cost, default=None)
    parts = [f"{ended}/{trials} trials"]
    shown = ("running", UNFINISHED, *ENDED)
    parts.append(", ".join(f"{states[state]} {state}" for state in shown if states[state]))
    if best is not None:
        gap = f", gap closed {best['gap_closed']:.3f}" if "gap_closed" in best else ""
        parts.append(f"best {metric} {best[metric]:.4g} (trial {best['trial']}{gap})")
    if ended > before and seconds:
        each = seconds / (ended - before)
        parts.append(f"{60 / each:.1f} trials/min, {duration(each * (trials - ended))} left")
    return " | ".join(part for part in parts if part)


def promotion_rows(promotion: Sequence[Promoted], metric: str) -> list[list[str]]:
    """The trials in the order they came out, under each extractor; the first row names the columns."""
    columns = [column for name in promotion[0].again for column in (f"{metric}, {name} extractor", "gap closed")]
    rows = [["trial", "epoch", "in the search", *columns]]
    for entry in promotion:
        cells = [text(number) for number in (entry.trial, entry.epoch, entry.searched)]
        for name, value in entry.again.items():
            error = entry.error if name == "search" else None
            cells += [text(value), with_error(entry.gap_closed[name], error, 3)]
        rows.append(cells)
    return rows


def chosen_words(promotion: Sequence[Promoted], objective: Objective) -> str:
    """Which trial was chosen, and which others may be as good: their intervals overlap with its own. Of another
    objective than the Frechet distance no errors are known."""
    first, *others = promotion
    level = [
        str(other.trial)
        for other in others
        if objective == DRAWN_BEST
        and first.gap_closed["search"] - other.gap_closed["search"] <= (first.error or 0) + (other.error or 0)
    ]
    listed = " and ".join([", ".join(level[:-1]), level[-1]] if level[1:] else level)
    beside = f", not clearly before {listed}" if level else ""
    return f"Trial {first.trial} was chosen{beside}"


def searched_words(found: Mapping[str, Any], spec: Spec) -> str:
    """What a trial's searched parameters are; classic settings have no options of a user's own model."""
    return ", ".join(f"{name} {text(found[name])}" for name in spec.searched(found))


def edges(found: Mapping[str, Any], spec: Spec) -> list[str]:
    """Which parameters of a winner stand at an end of their range: better ones may lie beyond."""
    notes = []
    for name in spec.searched(found):
        entry = spec.space[name]
        if isinstance(entry, Choices):
            continue
        end = entry.end_near(found[name])
        limits = Parameters.model_fields[name].metadata if name in Parameters.model_fields else []
        allowed = [getattr(limit, "ge", getattr(limit, "le", None)) for limit in limits]
        if end and {"low": entry.low, "high": entry.high}[end] not in allowed:  # beyond which there is nothing
            notes.append(f"{name} {text(found[name])} is at the {end} end of {entry.low:g}..{entry.high:g}: widen it")
    return notes


def finalists_line(rows: Sequence[Mapping[str, Any]], spec: Spec) -> str:
    """How far each finalist has come, and what it scores."""
    metric, epochs = spec.trial_objective.metric, spec.budget.max_epochs
    parts = []
    for row in rows:
        said = [f"finalist {row['trial']}: epoch {row['epochs_trained']:g} of {epochs:g}"]
        said += [f"best {metric} {row[metric]:.4g}"] if metric in row else []
        parts.append(", ".join([*said, row["reason"]] if row["reason"] else said))
    return " | ".join(parts) or "starting"


def result_rows(summary: Summary) -> list[list[str]]:
    """Real images, classic settings, best trial and retrained: distance and gap closed on validation and on test."""
    best, retrain = summary.best, summary.retrain
    assert best
    names = {"real": "real images", "baseline": "classic settings", "best": f"best trial ({best.trial})"}
    if retrain:
        names["refitted"] = "... with the final prior"
        other = "" if retrain.trial == best.trial else f" (trial {retrain.trial})"
        names["retrained"] = f"after {retrain.kept_epoch:g} more epochs{other}"
    rows = [["", "validation", "gap closed", "test", "gap closed"]]
    for key, name in names.items():
        cells = []
        for split in (summary.validation, summary.test):
            scores = getattr(split, key, None)
            cells += [with_error(scores.frechet_distance, scores.frechet_distance_error)] if scores else [""]
            cells += [with_error(scores.gap_closed, scores.gap_closed_error, 3)] if scores else [""]
        rows.append([name, *cells])
    return rows


def with_error(value: float, error: float | None, decimals: int | None = None) -> str:
    """'0.971 ± 0.014': by default as many decimals as show two digits of the error, which may not be known."""
    if not error:
        return text(value) if decimals is None else f"{value:.{decimals}f}"
    if decimals is None:
        decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def final_words(run: RunFiles, spec: Spec) -> list[Table | str]:
    """The closing table of a finished run, the winner's searched parameters and the paths to look at."""
    summary = run.summary()
    assert summary.winner
    winner = summary.winner
    made = [run.export / name for name in ("README.md", "samples.png", "model.safetensors")]
    made += sorted(run.export.glob("*/*coder.*"), key=lambda path: path.name)
    exported = ", ".join(path.name for path in made if path.exists())
    return [
        as_table(result_rows(summary), "Frechet distance, and how much of the gap to real images is closed"),
        f"winner   trial {winner.trial}: {searched_words(winner.searched, spec)}",
        *(f"note     {note}" for note in edges(winner.searched, spec)),
        *([f"model    {run.name_of(run.export)}: {exported}"] if exported else []),
        *([f"report   {run.name_of(run.report)}"] if run.report.exists() else []),
        f"trials   {run.name_of(run.trials)}",
        f"look     tensorboard --logdir {shlex.quote(run.name_of(run.tensorboard))}",
    ]


def status_words(run: RunFiles) -> list[Table | str]:
    """How a run stands: the stages done with their seconds, the trials of its journal, and the result so far.

    Raises Refused where a file is damaged.
    """
    spec, summary, study = specs.load(run.spec), run.summary(), read_study(run.journal)
    done = [f"{name} {duration(seconds)}" for name, seconds in summary.seconds.items()]
    words: list[Table | str] = [f"stages   {', '.join(done) or 'none done'}"]
    rows = table(study, spec) if study else []
    if rows:
        best = in_view(rows, spec)
        title = f"The best {len(best)} of {len(rows)} trials" if len(best) < len(rows) else None
        words += [f"search   {search_line(rows, spec)}", as_table(trials_rows(best, spec), title)]
    return words + (final_words(run, spec) if summary.best else [])


def trials_rows(rows: Sequence[Mapping[str, Any]], spec: Spec) -> list[list[str]]:
    """A line a trial: state, epochs, objective, gap closed, searched parameters and the reason it ended."""
    metric = spec.trial_objective.metric
    keys = ("trial", "epochs_trained", metric, "gap_closed", *spec.space, "state", "reason")
    header = ["trial", "epochs", metric, "gap closed", *spec.space, "state", "reason"]
    return [header, *([text(row.get(key, "")) for key in keys] for row in rows)]


def as_table(rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """Rows for a terminal; the first names the columns. Numbers stand to the right."""
    header, *body = rows
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(header):
        numbers = all(row[index][:1] in "-0123456789" for row in body)
        shown.add_column(column, overflow="fold", justify="right" if numbers else "left")
    for row in body:
        shown.add_row(*row)
    return shown


def text(value: Any) -> str:
    """Four digits of a number; nothing of what is not known."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
