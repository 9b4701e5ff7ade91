"""What a run says while it works, and the table it ends with."""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tuner.run import Run

PLAIN_SECONDS = 10  # between lines where output is not a terminal


def console() -> Console:
    """Progress goes to standard error; standard output is left to results."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


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
        self.line = ""

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
        self.line = f"{self.title:<8} {duration(self.seconds):>6}  {text}"
        if self.live:
            self.live.update(self.line)
        elif time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            self.console.print(self.line)

    def done(self, text: str) -> None:
        """The stage's closing line, which stays."""
        if self.live:
            self.live.stop()
        self.console.print(f"{self.title:<8} {duration(self.seconds):>6}  {text}")


def search_line(rows: Sequence[Mapping[str, Any]], trials: int, metric: str, sign: int, seconds: float) -> str:
    """Counts, the best so far, the rate and the time left, from the rows of trials.csv."""
    states = Counter(row["state"] for row in rows)
    ended = len(rows) - states["running"]
    scored = [row for row in rows if metric in row]
    best = min(scored, key=lambda row: sign * row[metric], default=None)
    parts = [f"{ended}/{trials} trials"]
    parts.append(
        ", ".join(f"{states[state]} {state}" for state in ("running", "complete", "pruned", "failed") if states[state])
    )
    if best is not None:
        gap = f", gap closed {best['gap_closed']:.3f}" if "gap_closed" in best else ""
        parts.append(f"best {metric} {best[metric]:.4g} (trial {best['trial']}{gap})")
    if ended and seconds:
        parts.append(f"{60 * ended / seconds:.1f} trials/min, {duration(seconds / ended * (trials - ended))} left")
    return " | ".join(part for part in parts if part)


def result_table(summary: Mapping[str, Any]) -> Table:
    """Baseline, best trial and retrained on the validation split, and on the test split where it was read."""
    table = Table(title="Frechet distance, and share of the gap to real data that is closed", title_justify="left")
    for column in ("", "parameters", "validation", "gap closed", "test", "gap closed"):
        table.add_column(column, justify="left" if column in ("", "parameters") else "right")
    test = summary.get("test", {})

    def row(name: str, parameters: str, part: Mapping[str, Any], key: str) -> None:
        tested = test.get(key, {})
        cells = [
            f"{value:.4g}" if value is not None else "" for value in (part["frechet_distance"], part["gap_closed"])
        ]
        cells += [f"{tested[name]:.4g}" if name in tested else "" for name in ("frechet_distance", "gap_closed")]
        table.add_row(name, parameters, *cells)

    best = summary["best"]
    searched = ", ".join(f"{name} {best['params'][name]:.3g}" for name in ("latent_dim", "learning_rate", "kl_weight"))
    test = {"floor": {"frechet_distance": test["best"]["floor"], "gap_closed": 1.0}, **test} if test else {}
    row("real data", "the floor", {"frechet_distance": summary["floor"], "gap_closed": 1.0}, "floor")
    row("baseline", "classic, N(0, I)", {"frechet_distance": summary["baseline"], "gap_closed": 0.0}, "baseline")
    row(f"best (trial {best['trial']})", searched, best, "best")
    if "retrain" in summary:
        row("retrained", f"{summary['retrain']['epochs']} more epochs", summary["retrain"], "retrained")
    return table


def final_words(run: Run) -> list[Table | str]:
    """The closing table of a finished run, and the paths to look at."""
    return [
        result_table(run.summary()),
        f"model    {run.export}  (samples.png, model.json, encoder and decoder as .onnx and .pt2)",
        f"trials   {run.trials}",
        f"look     tensorboard --logdir {run.tensorboard}",
    ]
