"""Stage 3: score the best few checkpoints again, with fresh noise and an extractor the search never saw."""

from collections.abc import Mapping, Sequence
from typing import Any

from tuner.spec import Spec
from tuner.study import BASELINE, front
from tuner.terminal import console, promotion_table, stage
from tuner.vae.score import gap_closed
from tuner.workspace import Workspace, best_of, last_of

CANDIDATES = 5


def contenders(rows: Sequence[Mapping[str, Any]], spec: Spec) -> list[Mapping[str, Any]]:
    """The best few rows of trials.csv, best first: those whose checkpoints the promotion scores again.

    Of several objectives' front those with the best samples.
    """
    trial_objective = spec.trial_objective
    scored = [row for row in rows if trial_objective.metric in row and row["state"] not in ("failed", "running")]
    if len(spec.objective) > 1:
        scored = front(scored, spec.objective)
    return sorted(scored, key=lambda row: (trial_objective.sign * row[trial_objective.metric], row["trial"]))[
        :CANDIDATES
    ]


def promote(workspace: Workspace, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Choose the winner among the rows of trials.csv and write it to the summary.

    A candidate's rank is the mean over both extractors of the spec's yardstick, each extractor's scale set by the
    baseline; ties go to the earlier trial. Floor, baseline and the winner's scores in the summary are those
    of the search's extractor under the fresh noise. The baseline must have been scored.
    """
    selection_objective = workspace.spec.selection_objective
    searched, metric = workspace.spec.trial_objective.metric, selection_objective.metric
    best = contenders(rows, workspace.spec)
    baseline = last_of(workspace.run, BASELINE)
    table: list[dict[str, Any]] = [
        {"trial": row["trial"], "epoch": row["epoch"], "searched": row[searched]} for row in best
    ]
    scores: dict[int, dict[str, float]] = {}
    floors, baselines = {}, {}
    for extractor in workspace.extractors:
        scorer = workspace.scorer(extractor)
        floors[extractor] = scorer.floor
        reference = scorer(baseline.model, baseline.parameters, baseline.prior)
        baselines[extractor] = reference["frechet_distance"]
        scale = (abs(reference[metric]) or 1) * len(workspace.extractors)
        for entry in table:
            candidate = best_of(workspace.run, entry["trial"])
            result = scorer(candidate.model, candidate.parameters, candidate.prior)
            if extractor == "search":
                scores[entry["trial"]] = result
            entry[f"{extractor}_{metric}"] = result[metric]
            entry[f"{extractor}_gap_closed"] = gap_closed(
                result["frechet_distance"], floors[extractor], baselines[extractor]
            )
            entry["rank"] = entry.get("rank", 0.0) + selection_objective.sign * result[metric] / scale
    table.sort(key=lambda entry: (entry["rank"], entry["trial"]))

    winner = table[0]["trial"]
    candidate = best_of(workspace.run, winner)
    return workspace.run.update_summary(
        floor=floors["search"],
        baseline=baselines["search"],
        promotion=table,
        best={
            "trial": winner,
            "params": candidate.parameters.model_dump(),
            "epoch": candidate.epoch,
            "gap_closed": gap_closed(scores[winner]["frechet_distance"], floors["search"], baselines["search"]),
            **scores[winner],
        },
    )


def promote_stage(workspace: Workspace, rows: list[dict[str, Any]]) -> None:
    with stage(workspace.run, "promote") as progress:
        summary = promote(workspace, rows)
        progress.done(f"trial {summary['best']['trial']} won among {len(summary['promotion'])} under two extractors")
    console().print(promotion_table(summary["promotion"], workspace.spec.selection_objective.metric))
