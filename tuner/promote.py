"""The promotion: score the best few checkpoints again, with fresh noise and an extractor the search never saw."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuner.scoring import Bench, compared
from tuner.spec import Spec
from tuner.study import UNFINISHED, ranked
from tuner.summary import EXTRACTORS, Best, Compared, Promoted, Summary
from tuner.terminal import as_table, chosen_words, console, promotion_rows, stage
from tuner.vae.metrics import gap_closed
from tuner.workspace import Workspace

CONTENDERS = 5


def contenders(rows: Sequence[Mapping[str, Any]], spec: Spec) -> list[Mapping[str, Any]]:
    """The best few rows, best first, whose checkpoints the promotion scores again; of what a limit cut off as far as it
    came."""
    return ranked([row for row in rows if row["state"] in ("complete", "pruned", UNFINISHED)], spec)[:CONTENDERS]


def promising(rows: Sequence[Mapping[str, Any]], spec: Spec) -> list[Mapping[str, Any]]:
    """Of ended trials the contenders and, of several objectives, those that may yet be: a later trial can drive others
    off the front."""
    found = ranked([row for row in rows if row["state"] in ("complete", "pruned")], spec)
    return found if len(spec.objective) > 1 else found[:CONTENDERS]


def promote(workspace: Workspace, rows: Sequence[Mapping[str, Any]], show: Callable[[int], None]) -> Summary:
    """Choose the winner among a study's rows and write it to the summary.

    A contender's rank is the mean cost over all extractors, each extractor's scale set by the baseline; ties go to the
    earlier trial. The baseline must have been scored. Raises Refused where a checkpoint is damaged.
    """
    run, spec = workspace.run, workspace.spec
    objective, searched = spec.selection_objective, spec.trial_objective.metric
    chosen = contenders(rows, spec)
    models = [workspace.checkpoints.best(run.checkpoint(row["trial"])) for row in chosen]
    scored = (None, workspace.checkpoints.baseline(), *models)
    units = [(fitted, name) for name in EXTRACTORS for fitted in scored]
    measures = workspace.workers().map(Bench.score, units, show)
    by_extractor = {name: measures[part * len(scored) :][: len(scored)] for part, name in enumerate(EXTRACTORS)}
    real, classic, *_ = by_extractor["search"]
    entries: list[tuple[Promoted, Best, Compared]] = []
    for number, (row, fitted) in enumerate(zip(chosen, models, strict=True), 2):
        again, gaps, ranks = {}, {}, []
        for name, found in by_extractor.items():
            scores, yardstick = found[number].scores, found[1].scores
            again[name] = scores[objective.metric]
            distances = [each.scores["frechet_distance"] for each in (found[number], *found[:2])]
            gaps[name] = gap_closed(*distances)
            ranks.append(objective.cost(scores) / (abs(yardstick[objective.metric]) or 1))
        best = Best(trial=row["trial"], epoch=fitted.epoch, parameters=fitted.parameters.model_dump())
        validation = compared({"real": real, "baseline": classic, "best": by_extractor["search"][number]})
        entry = Promoted(
            trial=row["trial"],
            epoch=row["epoch"],
            searched=row[searched],
            again=again,
            gap_closed=gaps,
            error=validation.best.gap_closed_error,
            rank=sum(ranks) / len(ranks),
        )
        entries.append((entry, best, validation))
    entries.sort(key=lambda pair: (pair[0].rank, pair[0].trial))
    _, best, validation = entries[0]
    return run.update_summary(promotion=tuple(entry for entry, *_ in entries), best=best, validation=validation)


def promote_stage(workspace: Workspace, rows: Sequence[Mapping[str, Any]]) -> None:
    with stage(workspace.run, "promote") as progress:
        summary = promote(workspace, rows, lambda done: progress.show(f"{done} scored"))
        chosen = chosen_words(summary.promotion, workspace.spec.selection_objective)
        progress.done(f"{len(summary.promotion)} scored under two extractors. {chosen}")
    rows_shown = promotion_rows(summary.promotion, workspace.spec.selection_objective.metric)
    console().print(as_table(rows_shown, "Promotion, under fresh noise"))
