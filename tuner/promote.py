"""Stage 3: score the best few checkpoints again, with fresh noise and an extractor the search never saw."""

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.spec import Spec
from tuner.study import ranked
from tuner.summary import Best, Promoted, Scores, Summary
from tuner.terminal import as_table, console, promotion_rows, stage
from tuner.vae.metrics import gap_closed
from tuner.workspace import Workspace

CONTENDERS = 5


def contenders(rows: Sequence[Mapping[str, Any]], spec: Spec) -> list[Mapping[str, Any]]:
    """The best few rows of ended trials, best first: those whose checkpoints the promotion scores again."""
    return ranked([row for row in rows if row["state"] in ("complete", "pruned")], spec)[:CONTENDERS]


def promote(workspace: Workspace, rows: Sequence[Mapping[str, Any]]) -> Summary:
    """Choose the winner among a study's rows and write it to the summary.

    A contender's rank is the mean cost over all extractors, each extractor's scale set by the baseline; ties go to the
    earlier trial. Floor, baseline and the winner's scores in the summary are those of the search's extractor under the
    fresh noise. The baseline must have been scored. Raises Refused where a checkpoint is damaged.
    """
    run, spec = workspace.run, workspace.spec
    objective, searched = spec.selection_objective, spec.trial_objective.metric
    scorers = {name: workspace.scorer(name) for name in workspace.extractors}
    classic = {name: scorer(workspace.checkpoints.baseline()) for name, scorer in scorers.items()}
    entries: list[tuple[Promoted, Best]] = []
    for row in contenders(rows, spec):
        fitted = workspace.checkpoints.best(run.checkpoint(row["trial"]))
        scores = {name: scorer(fitted) for name, scorer in scorers.items()}
        gaps, ranks = {}, []
        for name, scorer in scorers.items():
            distance, baseline = scores[name]["frechet_distance"], classic[name]["frechet_distance"]
            gaps[name] = gap_closed(distance, scorer.floor, baseline)
            ranks.append(objective.cost(scores[name]) / (abs(classic[name][objective.metric]) or 1))
        entry = Promoted(
            trial=row["trial"],
            epoch=row["epoch"],
            searched=row[searched],
            again={name: scores[name][objective.metric] for name in scorers},
            gap_closed=gaps,
            rank=sum(ranks) / len(ranks),
        )
        best = Best(
            trial=row["trial"],
            epoch=fitted.epoch,
            parameters=fitted.parameters.model_dump(),
            scores=Scores(**scores["search"], gap_closed=gaps["search"]),
            floor=scorers["search"].floor,
            baseline=classic["search"]["frechet_distance"],
        )
        entries.append((entry, best))
    entries.sort(key=lambda pair: (pair[0].rank, pair[0].trial))
    return run.update_summary(promotion=tuple(entry for entry, _ in entries), best=entries[0][1])


def promote_stage(workspace: Workspace, rows: Sequence[Mapping[str, Any]]) -> None:
    with stage(workspace.run, "promote") as progress:
        summary = promote(workspace, rows)
        winner = summary.promotion[0].trial
        progress.done(f"trial {winner} won among {len(summary.promotion)} under two extractors")
    rows_shown = promotion_rows(summary.promotion, workspace.spec.selection_objective.metric)
    console().print(as_table(rows_shown, "Promotion, under fresh noise"))
