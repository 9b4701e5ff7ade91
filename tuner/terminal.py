"""What a run says while it works, and the table it ends with."""

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
from tuner.spec import Spec
from tuner.study import ENDED, read_study, table
from tuner.summary import Promoted, Scores, Summary

LOG_COLUMNS = 160
PLAIN_SECONDS = 10  # between lines where output is not a terminal


def console(file: TextIO | None = None) -> Console:
    """Progress goes to standard error, results to standard output; a log is not as narrow as rich takes it for."""
    made = Console(file=file or sys.stderr, highlight=False)
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
    with Progress(name) as progress:
        yield progress
    spent = run.summary().seconds.get(name, 0.0)
    run.update_summary(seconds={name: round(spent + time.monotonic() - started, 2)})


class Progress:
    """One line that says how a stage stands: redrawn on a terminal, printed now and then in a log."""

    def __init__(self, title: str):
        self.title = title
        self.console = console()
        self.started = time.monotonic()
        self.live = (
            Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        )
        self.printed = -float("inf")

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def show(self, text: str) -> None:
        """Put `text` behind the stage's title and time."""
        line = self._line(text)
        if self.live:
            self.live.update(line)
        elif time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            self.console.print(line)

    def done(self, text: str) -> None:
        """The stage's closing line, which stays."""
        if self.live:
            self.live.stop()
        self.console.print(self._line(text))

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
    parts.append(", ".join(f"{states[state]} {state}" for state in ("running", *ENDED) if states[state]))
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
        again = [number for name, value in entry.again.items() for number in (value, entry.gap_closed[name])]
        rows.append([text(number) for number in (entry.trial, entry.epoch, entry.searched, *again)])
    return rows


def result_rows(summary: Summary) -> list[list[str]]:
    """Real images, classic settings, best trial and retrained: distance and gap closed on validation and on test."""
    best, test = summary.best, summary.test
    assert best
    Pair = tuple[float, float] | None  # distance and gap closed, where they are known

    def pair(scores: Scores | None) -> Pair:
        return (scores.frechet_distance, scores.gap_closed) if scores else None

    parts: list[tuple[str, Pair, Pair]] = [
        ("real images", (best.floor, 1.0), (test.floor, 1.0) if test else None),
        ("classic settings", (best.baseline, 0.0), pair(test.baseline if test else None)),
        (f"best trial ({best.trial})", pair(best.scores), pair(test.best if test else None)),
    ]
    if summary.retrain:
        more = f"after {summary.retrain.epochs} more epochs"
        parts.append((more, pair(summary.retrain.scores), pair(test.retrained if test else None)))
    rows = [["", "validation", "gap closed", "test", "gap closed"]]
    for name, validation, tested in parts:
        cells = [f"{number:.4g}" for pair in (validation, tested) for number in pair or ()]
        rows.append([name, *cells, *[""] * (4 - len(cells))])
    return rows


def final_words(run: RunFiles, spec: Spec) -> list[Table | str]:
    """The closing table of a finished run, the winner's searched parameters and the paths to look at."""
    summary = run.summary()
    assert summary.best
    programs = ", ".join(sorted(path.name for path in run.export.glob("*coder.*")))
    found = summary.best.parameters  # classic settings have no options of a user's own model
    winner = [f"{name} {text(found[name])}" for name in spec.space if name in found]
    return [
        as_table(result_rows(summary), "Frechet distance, and how much of the gap to real images is closed"),
        f"winner   {', '.join(winner)}",
        f"model    {run.name_of(run.export)}: samples.png, config.json, weights.safetensors, {programs}",
        f"report   {run.name_of(run.report)}",
        f"trials   {run.name_of(run.trials)}",
        f"look     tensorboard --logdir {run.name_of(run.tensorboard)}",
    ]


def status_words(run: RunFiles) -> list[Table | str]:
    """How a run stands: the stages done with their seconds, the trials of its journal, and the result so far.

    Raises ValueError where a file is damaged.
    """
    spec, summary, study = specs.load(run.spec), run.summary(), read_study(run.journal)
    done = [f"{name} {duration(seconds)}" for name, seconds in summary.seconds.items()]
    words: list[Table | str] = [f"stages   {', '.join(done) or 'none done'}"]
    rows = table(study, spec) if study else []
    if rows:
        words += [f"search   {search_line(rows, spec)}", as_table(trials_rows(rows, spec))]
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
        shown.add_column(column, justify="right" if numbers else "left")
    for row in body:
        shown.add_row(*row)
    return shown


def text(value: Any) -> str:
    """Four digits of a number; nothing of what is not known."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
