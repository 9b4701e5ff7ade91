"""One self-contained page that shows what a run found: `python -m tuner.report RUN` -> `RUN/report.html`.

Made from the run's files alone, so it can be asked for while the search goes on.
"""

import argparse
import base64
import html
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs

from tuner import own_model
from tuner import spec as specs
from tuner.exits import command, refuse, resumable
from tuner.run import RunFiles, write_atomic
from tuner.spec import Objective, Spec
from tuner.storage import opened
from tuner.study import BASELINE, RETRAIN, Study, evaluations, front, read_study, table
from tuner.summary import Summary
from tuner.terminal import chosen_words, duration, edges, promotion_rows, result_rows, stage, text, with_error
from tuner.vae.fitted import FittedModel, encode
from tuner.vae.image_grid import (
    COLUMNS,
    HELD_OUT_ROWS,
    INTERPOLATED,
    REBUILT_ROWS,
    STEPS,
    interpolation,
    reconstructions,
    rows_that_fit,
    samples,
    sheet,
)
from tuner.vae.metrics import FINAL_METRICS, METRICS
from tuner.vae.model import OwnModel
from tuner.vae.prior import standard_normal
from tuner.workspace import Checkpoints, read_held_out

COLOURS = {"complete": "#1f77b4", "pruned": "#b8b8b8", "failed": "#d62728", "running": "#ff9f1c"}
RATE_AND_DISTORTION = tuple(Objective.model_validate(metric) for metric in ("rate", "distortion"))
NUMBERS = 1_000_000  # in a picture: PNG makes half a megabyte of it
IMPORTANCE_TRIALS = 4  # fewer finished trials say nothing about importance

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


@dataclass
class Page:
    """Sections of HTML in order; each has a heading and one sentence that says what to see."""

    parts: list[str] = field(default_factory=list)
    figures: int = 0

    def section(self, title: str, see: str, body: str) -> None:
        self.parts.append(
            f"<section><h2>{html.escape(title)}</h2><p class='see'>{html.escape(see)}</p>{body}</section>"
        )

    def figure(self, title: str, see: str, figure: go.Figure) -> None:
        figure.update_layout(
            title=None, template="plotly_white", margin={"l": 60, "r": 20, "t": 20, "b": 60}, autosize=True,
            width=None, legend={"orientation": "h", "y": 1.08, "yanchor": "bottom"}, font={"size": 13},
        )  # fmt: skip
        self.figures += 1
        name = f"figure-{self.figures}"
        body = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config={"responsive": True})
        self.section(title, see, f"<div class='plot'>{body}</div>")


@dataclass(frozen=True)
class Material:
    """All that the sections draw on, read once."""

    run: RunFiles
    spec: Spec
    study: Study
    trials: list[FrozenTrial]
    rows: list[dict[str, Any]]
    summary: Summary
    checkpoints: Checkpoints

    @property
    def metric(self) -> str:
        return str(self.spec.trial_objective.metric)


def report(run: RunFiles, own: OwnModel | None = None) -> Path:
    """Write `report.html` from what the run's files hold now. Raises ValueError where there is no search yet."""
    if not run.spec.exists() or not run.journal.exists():
        raise ValueError(f"{run.shown}: no search to report on (no {run.spec.name} or {run.journal.name})")
    spec, summary, study = specs.load(run.spec), run.summary(), read_study(run.journal)
    if study is None:
        raise ValueError(f"{run.shown}: no search to report on (its {run.journal.name} is empty)")
    rows = table(study, spec)
    material = Material(run, spec, study, study.known()[: len(rows)], rows, summary, Checkpoints(run, own))
    page = Page()
    for section in SECTIONS:
        section(page, material)
    document = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(run.name)}: VAE search</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(page.parts)}</body></html>"
    )
    write_atomic(run.report, document)
    return run.report


def headline(page: Page, material: Material) -> None:
    summary, counts = material.summary, Counter(row["state"] for row in material.rows)
    counted = ", ".join(f"{count} {state}" for state, count in counts.items())
    title = f"{material.run.name}: the search for a VAE on {material.spec.data.title}"
    page.parts.append(f"<h1>{html.escape(title)}</h1>")
    best = summary.best
    if best is None:
        page.parts.append(
            f"<p class='big'>The search is under way: {counted} of {material.spec.budget.trials} trials.</p>"
        )
        return
    split, compared = ("test", summary.test) if summary.test else ("validation", summary.validation)
    assert compared
    final, baseline, floor = compared.exported, compared.baseline.frechet_distance, compared.real.frechet_distance
    searched = ", ".join(
        f"{name} {text(best.parameters[name])}" for name in material.spec.space if name in best.parameters
    )
    page.parts.append(
        f"<p class='big'>{chosen_words(summary.promotion)} ({searched}). What is exported closes "
        f"<b>{with_error(final.gap_closed, final.gap_closed_error, 3)}</b> of the gap between the classic settings "
        f"({baseline:.4g}) and real images ({floor:.4g}): Frechet distance "
        f"{with_error(final.frechet_distance, final.frechet_distance_error)} on the {split} split. "
        f"Trials: {counted}.</p>"
    )
    page.parts.extend(f"<p>{html.escape(note)}.</p>" for note in edges(best.parameters, material.spec))
    page.section(
        "Who won, and by how much",
        "Lower distance is better; a gap closed of 1 is as good as real images, and more is the luck of the draw. "
        "± is one standard error, over images and draws; the prior is the difference between the best "
        "trial and the row below it, the epochs between that and the last.",
        _table(result_rows(summary)),
    )


def pictures(page: Page, material: Material) -> None:
    run, summary = material.run, material.summary
    shown: list[tuple[str, FittedModel]] = []
    if run.checkpoint(BASELINE).exists():
        shown.append(("classic settings, samples from N(0, I)", material.checkpoints.baseline()))
    if summary.best:
        shown.append(
            (f"best trial ({summary.best.trial})", material.checkpoints.best(run.checkpoint(summary.best.trial)))
        )
    if summary.retrain:
        shown.append(("retrained", material.checkpoints.best(run.kept)))
    if not shown:
        return
    name, last = shown[-1]
    shape, ink = last.model.shape, material.spec.data.ink
    count = COLUMNS * rows_that_fit(shape, COLUMNS, HELD_OUT_ROWS, NUMBERS)
    sheets = [(caption, samples(fitted, count), COLUMNS) for caption, fitted in shown]
    if len(shown) > 1:
        plain = samples(replace(last, prior=standard_normal(last.model.latent_dim)), count)
        sheets.append(("the same model sampled from N(0, I): what the fitted prior is worth", plain, COLUMNS))
    if run.held_out.exists():
        real = read_held_out(run, shape)
        means, _ = encode(last.model, real)
        rebuilt = reconstructions(last, real, means, rows_that_fit(shape, 2 * COLUMNS, REBUILT_ROWS, NUMBERS))
        between = interpolation(last, means, rows_that_fit(shape, STEPS, INTERPOLATED, NUMBERS))
        sheets.insert(0, ("real images, held out: samples should be as sharp and as varied", real[:count], COLUMNS))
        sheets += [
            (f"held-out images, and below each its reconstruction ({name}): what differs is lost", rebuilt, COLUMNS),
            (f"from image to image through the latents ({name}): no step should be a double exposure", between, STEPS),
        ]
    figures = [_embedded(caption, sheet(images, columns, ink)) for caption, images, columns in sheets]
    page.section(
        "What they draw",
        "Every model got the same noise: compare image by image and with the real ones, and look for blur and broken "
        "shapes.",
        f"<div class='row'>{''.join(figures)}</div>",
    )


def failures(page: Page, material: Material) -> None:
    failed = [row for row in material.rows if row["state"] == "failed"]
    if failed:
        keys = ["trial", "reason", *material.spec.space]
        see = "Each failed for the reason given, with these parameters; the search avoided their like."
        page.section(
            "Trials that failed", see, _table([keys, *([text(row.get(key)) for key in keys] for row in failed)])
        )


def gap(page: Page, material: Material) -> None:
    rows = [row for row in material.rows if "gap_closed" in row]
    if rows:
        closed, colours = [row["gap_closed"] for row in rows], [COLOURS[row["state"]] for row in rows]
        said = [f"{row['state']} {row['reason']}" for row in rows]
        bars = go.Bar(x=[str(row["trial"]) for row in rows], y=closed, marker_color=colours, hovertext=said)
        figure = go.Figure(bars, {"xaxis_title": "trial", "yaxis_title": "gap closed"})
        figure.update_xaxes(type="category")
        figure.update_yaxes(range=[max(-1.0, min(0.0, *closed)), 1.05])
        see = "Blue bars were trained to the end, grey ones were stopped early; 1 is as good as real images."
        page.figure("Gap closed, trial by trial", see, figure)


def curves(page: Page, material: Material) -> None:
    see = "Each line is a trial; a cross marks where a trial was stopped, and lines that go on were worth it."
    _lines(page, "Learning curves", see, material.trials, material.rows, material.metric)
    retrain = read_study(material.run.journal, RETRAIN)
    if retrain:
        see = (
            "Each line is a finalist, scored on the way under its trial's prior; what is kept is chosen under the last."
        )
        metric = material.spec.selection_objective.metric
        _lines(page, "Retrain", see, retrain.known(), table(retrain, material.spec), metric)


def _lines(
    page: Page, title: str, see: str, trials: Sequence[FrozenTrial], rows: Sequence[Mapping[str, Any]], metric: str
) -> None:
    figure = go.Figure(layout={"xaxis_title": "epoch", "yaxis_title": metric})
    for trial, row in zip(trials, rows, strict=True):
        scored = evaluations(trial)
        if not scored:
            continue
        symbols = ["circle"] * len(scored)
        if row["state"] in ("pruned", "failed"):
            symbols[-1] = "x"
        figure.add_scatter(
            x=[scores["epoch"] for scores in scored],
            y=[scores[metric] for scores in scored],
            mode="lines+markers", name=f"trial {trial.number}", showlegend=False,
            marker={"symbol": symbols, "size": 8}, line={"color": COLOURS[row["state"]]},
        )  # fmt: skip
    if figure.data:
        if all(value > 0 for line in figure.data for value in line.y):
            figure.update_yaxes(type="log")
        page.figure(title, see, figure)


def importances(page: Page, material: Material) -> None:
    finished = [trial for trial in material.trials if trial.state == TrialState.COMPLETE and trial.params]
    if len(finished) < IMPORTANCE_TRIALS or len(material.spec.objective) > 1 or len(material.spec.space) < 2:
        return
    study, metric = material.study, material.metric
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method is experimental, and says where few trials make it coarse
        see = f"Optuna's fANOVA: the share of the differences in {metric} that each parameter explains."
        page.figure("Which parameters matter", see, visualization.plot_param_importances(study))
        see = f"Each dot is a trial; look for where {metric} is low."
        page.figure("One parameter at a time", see, visualization.plot_slice(study))
        see = f"The colour is {metric} between the trials (dots): darker is lower."
        for pair in combinations(material.spec.space, 2):
            page.figure(f"{pair[0]} against {pair[1]}", see, visualization.plot_contour(study, params=list(pair)))


def plane(page: Page, material: Material) -> None:
    """The trials by two objectives, or where there are not two by rate and distortion."""
    two = material.spec.objective if len(material.spec.objective) == 2 else RATE_AND_DISTORTION
    x, y = (objective.metric for objective in two)
    rows = [row for row in material.rows if x in row and y in row]
    if rows:
        figure = _dots(rows, x, y)
        figure.update_layout(xaxis_title=f"{x}, {METRICS[x].unit}", yaxis_title=f"{y}, {METRICS[y].unit}")
        best = sorted(front(rows, two), key=lambda row: row[x])
        line = {"x": [row[x] for row in best], "y": [row[y] for row in best], "line": {"color": "#222", "dash": "dot"}}
        figure.add_scatter(mode="lines", name="front", **line)
        see = "No trial beats those on the dotted front in both."
        if two is RATE_AND_DISTORTION:
            see = f"Left costs fewer nats to encode, lower reconstructs better. {see}"
        page.figure(f"{x} and {y}".capitalize(), see, figure)


def units(page: Page, material: Material) -> None:
    rows = [row for row in material.rows if "active_units" in row]
    if rows:
        see = "Trials on the diagonal use every latent they have; those below it left some idle."
        page.figure("Latents in use", see, _dots(rows, "latent_dim", "active_units"))


def _dots(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> go.Figure:
    """A dot a trial, coloured by its state."""
    figure = go.Figure(layout={"xaxis_title": x, "yaxis_title": y.replace("_", " ")})
    for state, colour in COLOURS.items():
        part = [row for row in rows if row["state"] == state]
        if part:
            figure.add_scatter(
                x=[row[x] for row in part], y=[row[y] for row in part], mode="markers", name=state,
                marker={"color": colour, "size": 10}, text=[f"trial {row['trial']}" for row in part],
            )  # fmt: skip
    return figure


def timeline(page: Page, material: Material) -> None:
    figure = go.Figure(
        layout={"barmode": "overlay", "xaxis_title": "seconds since the search began", "yaxis_title": "worker"}
    )
    begun = [trial.datetime_start.timestamp() for trial in material.trials if trial.datetime_start]
    spans: dict[str, list[tuple[float, float, str, int]]] = {}
    for trial, row in zip(material.trials, material.rows, strict=True):
        worker = trial.user_attrs.get("worker")
        if worker and trial.datetime_start:
            start = trial.datetime_start.timestamp()
            last = evaluations(trial)[-1].get("timestamp", start) if evaluations(trial) else start
            end = trial.datetime_complete.timestamp() if trial.datetime_complete else last
            spans.setdefault(worker, []).append((start - min(begun), end - start, row["state"], trial.number))
    if not spans:
        return
    for state, colour in COLOURS.items():
        bars = [(worker, *span) for worker, all_spans in spans.items() for span in all_spans if span[2] == state]
        if bars:
            figure.add_bar(
                y=[bar[0] for bar in bars], base=[bar[1] for bar in bars], x=[bar[2] for bar in bars], orientation="h",
                name=state, marker={"color": colour, "line": {"color": "white", "width": 1}},
                text=[str(bar[4]) for bar in bars], textposition="inside",
            )  # fmt: skip
    whole = max(start + length for all_spans in spans.values() for start, length, *_ in all_spans)
    busy = sum(length for all_spans in spans.values() for _, length, *_ in all_spans) / (whole * len(spans))
    page.figure(
        "Who ran what",
        f"One line a worker, one bar a trial; gaps are idle time. Workers were busy {busy:.0%} of the time.",
        figure,
    )


def promotion(page: Page, material: Material) -> None:
    entries, described = material.summary.promotion, material.summary.extractors
    if entries:
        extractors = "; ".join(f"{name}: {info.words}" for name, info in described.items())
        page.section(
            "Promotion",
            "The best of the search, scored again with fresh noise and with an extractor the search never saw; the top "
            f"row won. The extractors are {extractors}.",
            _table(promotion_rows(entries, material.spec.selection_objective.metric)),
        )


def test_split(page: Page, material: Material) -> None:
    test = material.summary.test
    if test:
        found = {name: scores.model_dump() for name, scores in test.models.items()}
        rows = [["score", *found, "unit", "what it says"]]
        described = METRICS | FINAL_METRICS
        for name in ("gap_closed", *described):
            if any(name in scores for scores in found.values()):
                known = described.get(name)
                words = [known.unit, known.meaning] if known else ["", "1 is as good as real images"]
                cells = [
                    with_error(scores[name], scores[f"{name}_error"])
                    if scores.get(f"{name}_error")
                    else text(scores.get(name))
                    for scores in found.values()
                ]
                rows.append([name, *cells, *words])
        page.section("The test split", "Read once, after every choice was made.", _table(rows))
    neighbours = material.run.export / "neighbours.png"
    if neighbours.exists():
        page.section(
            "Copies?",
            "Rows one and three are samples; below each is its nearest training image. They must not be the same.",
            _embedded("samples and their nearest training images", neighbours.read_bytes()),
        )


def lineage(page: Page, material: Material) -> None:
    config = material.run.export / "config.json"
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in material.summary.seconds.items())
    text = f"time: {spent}\n\n{material.spec.to_yaml()}"
    if config.exists():
        text += f"\n{config.read_text()}"
    page.section(
        "Where it came from",
        "The spec as it was run, the time each stage took, and the export's lineage and versions.",
        f"<details><summary>show</summary><div class='scroll'><pre>{html.escape(text)}</pre></div></details>",
    )


SECTIONS: tuple[Callable[[Page, Material], None], ...] = (
    headline, pictures, failures, gap, curves, importances, plane, units, timeline, promotion, test_split, lineage,
)  # fmt: skip


def _embedded(caption: str, picture: bytes) -> str:
    data, text = base64.b64encode(picture).decode(), html.escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def _table(rows: Iterable[list[str]]) -> str:
    header, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in body]
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def _cell(text: str) -> str:
    numeric = text[-1:].isdigit()
    return f"<td{'' if numeric else ' class=text'}>{html.escape(text)}</td>"


def report_stage(run: RunFiles, own: OwnModel | None = None) -> None:
    with stage(run, "report") as progress:
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
        try:
            own, named = own_model.load(arguments.model)
            if run.spec.exists():
                specs.load(run.spec).require_model(named)
            print(run.name_of(report(run, own)))
        except ValueError as error:
            refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
