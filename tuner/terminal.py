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

from tuner.run import OUTCOMES, RunFiles

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
    spent = run.summary().get("seconds", {}).get(name, 0.0)
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


def search_line(
    rows: Sequence[Mapping[str, Any]], digest: Mapping[str, Any], seconds: float | None = None, before: int = 0
) -> str:
    """Counts and the best so far from the rows of trials.csv; with the seconds so far, the rate and the time left.

    `before` is how many of the trials had ended before these seconds began.
    """
    metric, trials = digest["metric"], digest["trials"]
    sign = 1 if digest["direction"] == "minimize" else -1
    states = Counter(row["state"] for row in rows)
    ended = sum(states[state] for state in OUTCOMES)
    scored = [row for row in rows if metric in row and row["state"] != "failed"]
    best = min(scored, key=lambda row: sign * row[metric], default=None)
    parts = [f"{ended}/{trials} trials"]
    parts.append(", ".join(f"{states[state]} {state}" for state in ("running", *OUTCOMES) if states[state]))
    if best is not None:
        gap = f", gap closed {best['gap_closed']:.3f}" if "gap_closed" in best else ""
        parts.append(f"best {metric} {best[metric]:.4g} (trial {best['trial']}{gap})")
    if ended > before and seconds:
        each = seconds / (ended - before)
        parts.append(f"{60 / each:.1f} trials/min, {duration(each * (trials - ended))} left")
    return " | ".join(part for part in parts if part)


def promotion_table(promotion: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """The candidates in the order they came out, under both extractors."""
    table = Table(title=f"Promotion: {metric} under fresh noise, and gap closed", title_justify="left")
    for column in (
        "trial",
        "epoch",
        "in the search",
        "search extractor",
        "gap closed",
        "second extractor",
        "gap closed",
    ):
        table.add_column(column, justify="right")
    for entry in promotion:
        values = [entry["searched"], entry[f"search_{metric}"], entry["search_gap_closed"]]
        values += [entry[f"second_{metric}"], entry["second_gap_closed"]]
        table.add_row(str(entry["trial"]), f"{entry['epoch']:g}", *(f"{value:.4g}" for value in values))
    return table


def result_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Real images, classic settings, best trial and retrained: distance and gap closed on validation and on test."""
    best, test = summary["best"], summary.get("test", {})
    floor = {"frechet_distance": test["best"]["floor"], "gap_closed": 1.0} if test else {}
    parts: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("real images", {"frechet_distance": summary["floor"], "gap_closed": 1.0}, floor),
        ("classic settings", {"frechet_distance": summary["baseline"], "gap_closed": 0.0}, test.get("baseline", {})),
        (f"best trial ({best['trial']})", best, test.get("best", {})),
    ]
    if "retrain" in summary:
        more = f"after {summary['retrain']['epochs']} more epochs"
        parts.append((more, summary["retrain"], test.get("retrained", {})))
    keys = ("frechet_distance", "gap_closed")
    rows = [["", "validation", "gap closed", "test", "gap closed"]]
    for name, validation, tested in parts:
        rows.append(
            [name, *(f"{part[key]:.4g}" if key in part else "" for part in (validation, tested) for key in keys)]
        )
    return rows


def result_table(summary: Mapping[str, Any]) -> Table:
    """`result_rows` for a terminal."""
    header, *rows = result_rows(summary)
    table = Table(title="Frechet distance, and the share of the gap to real data that is closed", title_justify="left")
    for column in header:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return table


def final_words(run: RunFiles) -> list[Table | str]:
    """The closing table of a finished run, the winner's searched parameters and the paths to look at."""
    summary = run.summary()
    winner = [f"{name} {summary['best']['params'][name]:.3g}" for name in ("latent_dim", "learning_rate", "kl_weight")]
    return [
        result_table(summary),
        f"winner   {', '.join(winner)}",
        f"model    {run.name_of(run.export)}: samples.png, model.json, encoder and decoder as .onnx and .pt2",
        f"report   {run.name_of(run.report)}",
        f"trials   {run.name_of(run.trials)}",
        f"look     tensorboard --logdir {run.name_of(run.tensorboard)}",
    ]


def status_words(run: RunFiles) -> list[Table | str]:
    """How a run stands, from its files: the stages done with their seconds, the trials, and the result so far."""
    summary, rows = run.summary(), run.read_trials()
    done = [f"{name} {duration(seconds)}" for name, seconds in summary.get("seconds", {}).items()]
    words: list[Table | str] = [f"stages   {', '.join(done) or 'none done'}"]
    if rows:
        words += [f"search   {search_line(rows, summary['spec'])}", trials_table(rows, summary["spec"])]
    return words + (final_words(run) if "best" in summary else [])


def trials_table(rows: Sequence[Mapping[str, Any]], digest: Mapping[str, Any]) -> Table:
    """A line a trial: state, epochs, objective, gap closed, searched parameters and the reason it ended."""
    metric, searched = digest["metric"], digest["searched"]
    table = Table()
    for column in ("trial", "state", "epochs", metric, "gap closed", *searched, "reason"):
        table.add_column(column, justify="left" if column in ("state", "reason") else "right")
    for row in rows:
        numbers = [row.get(name, "") for name in ("epochs_trained", metric, "gap_closed", *searched)]
        cells = [f"{value:.4g}" if isinstance(value, float | int) else value for value in numbers]
        table.add_row(str(row["trial"]), row["state"], *cells, row["reason"])
    return table
