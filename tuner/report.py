"""One self-contained page that shows what a run found: `python -m tuner.report RUN` -> `RUN/report.html`.

Made from the run's files alone, so it can be asked for while the search goes on.
"""

import argparse
import base64
import html
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from optuna import visualization
from optuna.trial import TrialState
from plotly.offline import get_plotlyjs

from tuner import own_model, terminal
from tuner import spec as specs
from tuner.advice import advice, importance
from tuner.exits import command, resumable
from tuner.run import RunFiles, write_atomic
from tuner.spec import Objective, Spec
from tuner.storage import opened
from tuner.study import (
    BASELINE,
    BEST,
    MANY,
    RETRAIN,
    UNFINISHED,
    Study,
    evaluations,
    front,
    in_view,
    read_study,
    table,
)
from tuner.summary import Summary
from tuner.terminal import text, with_error
from tuner.vae import image_grid
from tuner.vae.errors import Refused
from tuner.vae.fitted import FittedModel, encode
from tuner.vae.metrics import METRICS, TEST_METRICS
from tuner.vae.model import OwnModel
from tuner.vae.prior import standard_normal
from tuner.workspace import Checkpoints, read_held_out

COLOURS = {
    "complete": "#1f77b4",
    "pruned": "#b8b8b8",
    "failed": "#d62728",
    "running": "#ff9f1c",
    UNFINISHED: "#ffcf8f",
}
BY_STATE = {"color": "state", "color_discrete_map": COLOURS}  # how plots tell trials apart
DOTS = {"marker": {"size": 10}}
RATE_AND_DISTORTION = tuple(Objective.model_validate(metric) for metric in ("rate", "distortion"))
NUMBERS = 1_000_000  # in a picture: PNG makes half a megabyte of it

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin: 2.2rem 0 .3rem; font-size: 1.2rem; }
p.see { margin: 0 0 .6rem; color: #444; } .big { font-size: 1.15rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } td.text { white-space: normal; min-width: 6rem; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 1.2rem; }
figure { margin: 0; } figure img { max-width: 100%; }
.row img { width: 100%; image-rendering: pixelated; border: 1px solid #ddd; } figcaption { font-size: .9rem; }
.plot { width: 100%; min-height: 420px; }
@media print { body { max-width: none; } h2 { break-after: avoid; } .plot, figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Material:
    """All that the sections draw on, read once."""

    run: RunFiles
    spec: Spec
    study: Study
    rows: list[dict[str, Any]]
    best: list[Mapping[str, Any]]  # of the rows, those that plots have room for
    shares: Mapping[str, float]  # of the differences in the objective, by parameter
    summary: Summary
    checkpoints: Checkpoints


def report(run: RunFiles, own: OwnModel | None = None) -> Path:
    """Write `report.html` from what the run's files hold now. Raises Refused where there is no search yet."""
    if not run.spec.exists() or not run.journal.exists():
        raise Refused(f"{run.shown}: no search to report on (no {run.spec.name} or {run.journal.name})")
    spec, summary, study = specs.load(run.spec), run.summary(), read_study(run.journal)
    if study is None:
        raise Refused(f"{run.shown}: no search to report on (its {run.journal.name} is empty)")
    rows = table(study, spec)
    shares, checkpoints = importance(study, spec), Checkpoints(run, own)
    material = Material(run, spec, study, rows, in_view(rows, spec), shares, summary, checkpoints)
    parts = [part for made in SECTIONS for part in made(material)]
    document = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(run.name)}: VAE search</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(parts)}</body></html>"
    )
    write_atomic(run.report, document)
    return run.report


def section(title: str, see: str, body: str) -> str:
    """A heading, one sentence that says what to see, and that."""
    return f"<section><h2>{html.escape(title)}</h2><p class='see'>{html.escape(see)}</p>{body}</section>"


def plot(title: str, see: str, figure: go.Figure) -> str:
    figure.update_layout(
        title=None, template="plotly_white", margin={"l": 60, "r": 20, "t": 20, "b": 60}, autosize=True, width=None,
        legend={"orientation": "h", "y": 1.08, "yanchor": "bottom", "title": None}, font={"size": 13},
    )  # fmt: skip
    body = figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True})
    return section(title, see, f"<div class='plot'>{body}</div>")


def headline(material: Material) -> Iterator[str]:
    summary, counts = material.summary, Counter(row["state"] for row in material.rows)
    counted = ", ".join(f"{count} {state}" for state, count in counts.items())
    yield f"<h1>{html.escape(f'{material.run.name}: the search for a VAE on {material.spec.data.title}')}</h1>"
    if len(material.best) < len(material.rows):
        yield f"<p class='see'>The plots show the best {len(material.best)} of {len(material.rows)} trials.</p>"
    best, winner = summary.best, summary.winner
    if best is None or winner is None:
        yield f"<p class='big'>The search is under way: {counted} of {material.spec.budget.trials} trials.</p>"
        return
    split, compared = ("test", summary.test) if summary.test else ("validation", summary.validation)
    assert compared
    final, baseline, floor = compared.exported, compared.baseline.frechet_distance, compared.real.frechet_distance
    kept = "" if winner.trial == best.trial else f"; of those trained on, trial {winner.trial} was kept"
    yield (
        f"<p class='big'>{terminal.chosen_words(summary.promotion, material.spec.selection_objective)}{kept} "
        f"({terminal.searched_words(winner.searched, material.spec)}). What is exported closes "
        f"<b>{with_error(final.gap_closed, final.gap_closed_error, 3)}</b> of the gap between the classic settings "
        f"({baseline:.4g}) and real images ({floor:.4g}): Frechet distance "
        f"{with_error(final.frechet_distance, final.frechet_distance_error)} on the {split} split. "
        f"Trials: {counted}.</p>"
    )
    yield section(
        "Who won, and by how much",
        "Lower distance is better; a gap closed of 1 is as good as real images, and more is the luck of the draw. "
        "± is one standard error, over images and draws; the prior is the difference between the best "
        "trial and the row below it, the epochs between that and the last.",
        _table(terminal.result_rows(summary)),
    )


def next_steps(material: Material) -> Iterator[str]:
    found = advice(material.rows, material.summary, material.spec, material.shares)
    if found:
        body = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found)
        yield section("What to do next", "Each with what it is concluded from.", f"<ul>{body}</ul>")


def pictures(material: Material) -> Iterator[str]:
    run, summary = material.run, material.summary
    shown: dict[str, FittedModel] = {}
    if run.checkpoint(BASELINE).exists():
        shown["classic settings, samples from N(0, I)"] = material.checkpoints.baseline()
    if summary.best:
        best = material.checkpoints.best(run.checkpoint(summary.best.trial))
        shown[f"best trial ({summary.best.trial})"] = best
    if summary.retrain:
        shown["retrained"] = material.checkpoints.best(run.kept)
    if not shown:
        return
    name, last = [*shown.items()][-1]
    if len(shown) > 1:
        plain = replace(last, prior=standard_normal(last.model.latent_dim))
        shown["the same model sampled from N(0, I): what the fitted prior is worth"] = plain
    shape, columns, steps = last.model.shape, image_grid.COLUMNS, image_grid.STEPS

    def rows(across: int, most: int) -> int:
        return image_grid.rows_that_fit(shape, across, most, NUMBERS)

    count = columns * rows(columns, image_grid.HELD_OUT_ROWS)
    sheets = [(caption, image_grid.samples(fitted, count), columns) for caption, fitted in shown.items()]
    if run.held_out.exists():
        real = read_held_out(run, shape)
        means, _ = encode(last.model, real)
        rebuilt = image_grid.reconstructions(last, real, means, rows(2 * columns, image_grid.REBUILT_ROWS))
        between = image_grid.interpolation(last, means, rows(steps, image_grid.INTERPOLATED))
        sheets.insert(0, ("real images, held out: samples should be as sharp and as varied", real[:count], columns))
        sheets += [
            (f"held-out images, and below each its reconstruction ({name}): what differs is lost", rebuilt, columns),
            (f"from image to image through the latents ({name}): no step should be a double exposure", between, steps),
        ]
    ink = material.spec.data.ink
    figures = [_embedded(caption, image_grid.sheet(images, across, ink)) for caption, images, across in sheets]
    yield section(
        "What they draw",
        "Every model got the same noise: compare image by image and with the real ones, and look for blur and broken "
        "shapes.",
        f"<div class='row'>{''.join(figures)}</div>",
    )


def failures(material: Material) -> Iterator[str]:
    keys = ["trial", "reason", *material.spec.space]
    failed = [row for row in material.rows if row["state"] == "failed"]
    if failed:
        see = "Each failed for the reason given, with these parameters; the search avoided their like."
        if len(failed) > MANY:
            see += f" These are the last {BEST} of {len(failed)}."
            failed = failed[-BEST:]
        rows = [[text(row.get(key)) for key in keys] for row in failed]
        yield section("Trials that failed", see, _table([keys, *rows]))


def gap(material: Material) -> Iterator[str]:
    trials = _trials(material, "gap_closed")
    if len(trials):
        order = {"trial": list(trials["trial"])}
        figure = px.bar(trials, x="trial", y="gap_closed", hover_data=["reason"], category_orders=order, **BY_STATE)
        figure.update_xaxes(type="category")
        figure.update_yaxes(range=[max(-1.0, min(0.0, *trials["gap_closed"])), 1.05], title="gap closed")
        see = "Blue bars were trained to the end, grey ones were stopped early; 1 is as good as real images."
        yield plot("Gap closed, trial by trial", see, figure)


def curves(material: Material) -> Iterator[str]:
    study, spec = material.study, material.spec
    see = "Each line is a trial; a cross marks where a trial was stopped, and lines that go on were worth it."
    yield from _lines("Learning curves", see, study, material.best, spec.trial_objective.metric)
    retrain = read_study(material.run.journal, RETRAIN)
    if retrain:
        see = (
            "Each line is a finalist, scored on the way under its trial's prior; what is kept is chosen under the last."
        )
        yield from _lines("Retrain", see, retrain, table(retrain, spec), spec.selection_objective.metric)


def _lines(title: str, see: str, study: Study, rows: Sequence[Mapping[str, Any]], metric: str) -> Iterator[str]:
    points = pd.DataFrame(
        {"trial": row["trial"], "state": row["state"], "epoch": scores["epoch"], metric: scores[metric]}
        for row in rows
        for scores in evaluations(study.at(row["trial"]))
    )
    if len(points):
        logarithmic = bool((points[metric] > 0).all())
        drawn = {"line_group": "trial", "hover_name": "trial", "markers": True, "log_y": logarithmic}
        figure = px.line(points, x="epoch", y=metric, **drawn, **BY_STATE)
        ends = points.groupby("trial").tail(1).query("state in ('pruned', 'failed')")
        cross = {"symbol": "x", "size": 10, "color": ends["state"].map(COLOURS)}
        figure.add_scatter(x=ends["epoch"], y=ends[metric], mode="markers", marker=cross, name="stopped")
        yield plot(title, see, figure)


def importances(material: Material) -> list[str]:
    study, spec, metric, shares = material.study, material.spec, material.spec.trial_objective.metric, material.shares
    if not shares:
        return []
    best = optuna.create_study(directions=study.directions)
    best.add_trials([study.at(row["trial"]) for row in material.best])
    apart = [name for name in spec.space if name not in shares]
    see = f"Functional ANOVA: the share of the differences in {metric} that each parameter explains."
    if apart:
        see += f" Of {', '.join(apart)} nothing is known: some complete trials have none, or all have one value."
    figure = px.bar(x=[*shares.values()], y=[*shares], text_auto=".0%", labels={"x": "share", "y": ""})
    parts = [plot("Which parameters matter", see, figure.update_yaxes(autorange="reversed"))]
    better = "low" if spec.trial_objective.direction == "minimize" else "high"
    see = f"Each dot is a trial; look for where {metric} is {better}."
    parts.append(plot("One parameter at a time", see, visualization.plot_slice(best)))
    see = f"The colour is {metric} between the trials (dots): darker is {better}er."
    known = {name for trial in best.trials if trial.state == TrialState.COMPLETE for name in trial.params}
    for pair in combinations([name for name in spec.space if name in known], 2):
        figure = visualization.plot_contour(best, params=list(pair))
        parts.append(plot(f"{pair[0]} against {pair[1]}", see, figure))
    return parts


def plane(material: Material) -> Iterator[str]:
    """The trials by two objectives, or where there are not two by rate and distortion."""
    two = material.spec.objective if len(material.spec.objective) == 2 else RATE_AND_DISTORTION
    x, y = (objective.metric for objective in two)
    trials = _trials(material, x, y)
    if len(trials):
        labels = {name: f"{name}, {METRICS[name].unit}" for name in (x, y)}
        figure = px.scatter(trials, x=x, y=y, hover_name="trial", labels=labels, **BY_STATE).update_traces(DOTS)
        best = pd.DataFrame(front(trials.to_dict("records"), two)).sort_values(x)
        figure.add_scatter(x=best[x], y=best[y], mode="lines", name="front", line={"color": "#222", "dash": "dot"})
        see = "No trial beats those on the dotted front in both."
        if two is RATE_AND_DISTORTION:
            see = f"Left costs fewer nats to encode, lower reconstructs better. {see}"
        yield plot(f"{x} and {y}".capitalize(), see, figure)


def units(material: Material) -> Iterator[str]:
    trials = _trials(material, "active_units")
    if len(trials):
        see = "Trials on the diagonal use every latent they have; those below it left some idle."
        figure = px.scatter(trials, x="latent_dim", y="active_units", hover_name="trial", **BY_STATE)
        figure.update_traces(DOTS)
        yield plot("Latents in use", see, figure)


def timeline(material: Material) -> Iterator[str]:
    spans = []
    for row, trial in zip(material.rows, material.study.known(), strict=False):
        worker = trial.user_attrs.get("worker")
        if worker and trial.datetime_start:
            start = trial.datetime_start.timestamp()
            last = max([start, *(scores.get("timestamp", start) for scores in evaluations(trial))])
            end = trial.datetime_complete.timestamp() if trial.datetime_complete else last
            spans.append({"worker": worker, "start": start, "seconds": end - start} | row)
    if spans:
        found = pd.DataFrame(spans)
        found["start"] -= found["start"].min()
        drawn = found[found["trial"].isin([row["trial"] for row in material.best])]
        figure = px.bar(drawn, base="start", x="seconds", y="worker", text="trial", orientation="h", **BY_STATE)
        figure.update_layout(barmode="overlay", xaxis_title="seconds since the search began")
        busy = found["seconds"].sum() / ((found["start"] + found["seconds"]).max() * found["worker"].nunique())
        gaps = "; gaps are idle time" if len(drawn) == len(found) else ""
        see = f"One line a worker, one bar a trial{gaps}. Workers were busy {busy:.0%} of the time."
        yield plot("Who ran what", see, figure)


def promotion(material: Material) -> Iterator[str]:
    entries, described = material.summary.promotion, material.summary.extractors
    if entries:
        extractors = "; ".join(f"{name}: {info.words}" for name, info in described.items())
        yield section(
            "Promotion",
            "The best of the search, scored again with fresh noise and with an extractor the search never saw; the top "
            f"row won. The extractors are {extractors}.",
            _table(terminal.promotion_rows(entries, material.spec.selection_objective.metric)),
        )


def test_split(material: Material) -> Iterator[str]:
    test = material.summary.test
    if test:
        found = {name: scores.model_dump() for name, scores in test.models.items()}
        rows = [["score", *found, "unit", "what it says"]]
        for name, kind in TEST_METRICS.items():
            if any(name in scores for scores in found.values()):
                cells = [
                    with_error(scores[name], scores.get(f"{name}_error")) if name in scores else ""
                    for scores in found.values()
                ]
                rows.append([name, *cells, kind.unit, kind.meaning])
        yield section("The test split", "Read once, after every choice was made.", _table(rows))
    neighbours = material.run.export / "neighbours.png"
    if neighbours.exists():
        yield section(
            "Copies?",
            "Rows one and three are samples; below each is its nearest training image. They must not be the same.",
            _embedded("samples and their nearest training images", neighbours.read_bytes()),
        )


def lineage(material: Material) -> Iterator[str]:
    config = material.run.export / "config.json"
    spent = ", ".join(f"{name} {terminal.duration(seconds)}" for name, seconds in material.summary.seconds.items())
    text = f"time: {spent}\n\n{material.spec.to_yaml()}"
    if config.exists():
        text += f"\n{config.read_text('utf-8')}"
    yield section(
        "Where it came from",
        "The spec as it was run, the time each stage took, and the export's lineage and versions.",
        f"<details><summary>show</summary><div class='scroll'><pre>{html.escape(text)}</pre></div></details>",
    )


SECTIONS: tuple[Callable[[Material], Iterable[str]], ...] = (
    headline, next_steps, pictures, failures, gap, curves, importances, plane, units, timeline, promotion, test_split,
    lineage,
)  # fmt: skip


def _trials(material: Material, *needed: str) -> pd.DataFrame:
    """The trials of which so much is known, for Plotly, which takes texts for HTML."""
    known = pd.DataFrame(row for row in material.best if all(name in row for name in needed))
    return known.map(lambda value: html.escape(value) if isinstance(value, str) else value)


def _embedded(caption: str, picture: bytes) -> str:
    data, text = base64.b64encode(picture).decode(), html.escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def _table(rows: Iterable[list[str]]) -> str:
    header, *body = rows
    lines = [[f"<th>{html.escape(cell)}</th>" for cell in header]]
    for row in body:
        kinds = ["" if cell[-1:].isdigit() else " class=text" for cell in row]
        lines.append([f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)])
    shown = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f"<div class='scroll'><table>{shown}</table></div>"


def report_stage(run: RunFiles, own: OwnModel | None = None) -> None:
    with terminal.stage(run, "report") as progress:
        progress.done(run.name_of(report(run, own)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tuner.report", description="Write RUN/report.html from a run's files."
    )
    parser.add_argument("run", metavar="RUN", help="run directory or URL, of a finished search or one under way")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="the model of your own that the search began with")
    given = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(given)
    with resumable(command("tuner.report", given)), opened(arguments.run) as run:
        own, named = own_model.load(arguments.model)
        if run.spec.exists():
            specs.load(run.spec).require_model(named)
        print(run.name_of(report(run, own)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
