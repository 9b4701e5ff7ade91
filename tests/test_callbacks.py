"""What the driver keeps as results come in; Ray's part is a trial with its config."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState, create_trial
from plain_pool import PlainWorkers
from ray import cloudpickle, tune

from tuner.callbacks import KeepCheckpoints, KeepContenders, KeepExtractors, KeepTable, ShowBest, ShowTrials
from tuner.exits import Fatal
from tuner.extractors import FeatureExtractors
from tuner.loggers import Trackers
from tuner.promote import CONTENDERS, contenders
from tuner.run import RunFiles, write_atomic
from tuner.spec import Objective, Spec
from tuner.study import BASELINE, BEST, MANY, RETRAIN, SEARCH, Study, open_study, table
from tuner.summary import Summary
from tuner.tensorboard import TensorBoard
from tuner.terminal import Progress
from tuner.vae.image_grid import png
from tuner.vae.parameters import CLASSIC

SPEC = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 16]}}, "budget": {"trials": 8}})
PICTURE = png(np.zeros((28, 28), np.uint8))


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "run")


@pytest.fixture
def study(run: RunFiles) -> Study:
    """Of eight trials that run."""
    run.path.mkdir()
    study = open_study(run.journal, SPEC)
    parameters = CLASSIC.model_dump()
    study.add_trials(
        [create_trial(state=TrialState.RUNNING, user_attrs={"parameters": parameters})] * SPEC.budget.trials
    )
    return study


def told(number: int) -> dict[str, Any]:
    """What Ray tells of a trial."""
    trial = SimpleNamespace(config={"trial": number, "parameters": CLASSIC.model_dump()})
    return {"iteration": 1, "trials": [trial], "trial": trial}


def end(
    study: Study,
    number: int,
    distance: float,
    state: TrialState = TrialState.PRUNED,
    reason: str = "",
    more: dict[str, float] | None = None,
) -> None:
    """Score a trial and end it, as the searcher does before the callbacks hear of it."""
    score(study, number, distance, more)
    trial = study.trial(number)
    trial.set_user_attr("reason", reason)
    study.tell(trial, distance if state == TrialState.COMPLETE else None, state)


def score(study: Study, number: int, distance: float, more: dict[str, float] | None = None) -> None:
    """Write an evaluation, as the searcher does before the callbacks hear of it."""
    scores = {"epoch": 1.0, "seconds_train": 1.0, "seconds_score": 1.0, "frechet_distance": distance}
    scores |= {"frechet_distance_standard_normal": distance} | (more or {})
    study.trial(number).set_user_attr("evaluation:1", scores)


def written(run: RunFiles) -> list[dict[str, str]]:
    with run.trials.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_knows_each_event_at_once_and_is_written_when_it_is_due(run, study):
    kept = KeepTable(run, SPEC, study)
    assert [row["state"] for row in written(run)] == ["running"] * 8
    end(study, 3, 5.0)
    kept.on_trial_complete(**told(3))
    assert (kept.rows[3]["state"], kept.rows[3]["frechet_distance"]) == ("pruned", 5.0)
    kept.due = math.inf
    kept.on_step_end()
    assert written(run)[3]["state"] == "running"
    kept.due = 0.0
    kept.on_step_end()
    assert (written(run)[3]["state"], written(run)[3]["frechet_distance"]) == ("pruned", "5.0")


def test_rows_that_are_renewed_one_by_one_are_those_of_the_whole_study(run, study):
    kept = KeepTable(run, SPEC, study)
    for number in (1, 2):
        end(study, number, 5.0)
        kept.on_trial_complete(**told(number))
    study.set_user_attr("floor", 1.0)
    assert "gap_closed" not in kept.rows[1]
    end(study, 0, 9.0, TrialState.COMPLETE)
    kept.on_trial_complete(**told(0))
    assert kept.rows[1]["gap_closed"] == 0.5, "known with the floor and the baseline"
    study.add_trials([create_trial(state=TrialState.RUNNING, user_attrs={"parameters": CLASSIC.model_dump()})] * 2)
    kept.on_trial_start(**told(9))  # proposed after trial 8, and started before it
    score(study, 9, 3.0)
    kept.on_trial_result(**told(9), result={})
    assert kept.rows == table(study, SPEC)
    assert kept.rows[9]["gap_closed"] == 0.75


def test_checkpoints_of_the_baseline_of_contenders_and_of_what_still_runs_are_kept(run, study):
    table = KeepTable(run, SPEC, study)
    kept = KeepContenders(run, SPEC, table)
    for number in range(8):
        kept.on_trial_result(**told(number), result={"trial": number, "checkpoint": b"%d" % number})
    assert len(list(run.checkpoints.iterdir())) == 8
    end(study, 0, 90.0, TrialState.COMPLETE)
    end(study, 1, 0.0, TrialState.FAIL)
    for number, distance in enumerate([80.0, 20.0, 30.0, 40.0, 50.0], 2):
        end(study, number, distance)
    table.write()
    for number in range(7):
        kept.on_trial_complete(**told(number))
    assert {path.name for path in run.checkpoints.iterdir()} == {f"{number:04d}.pt" for number in (0, 2, 3, 4, 5, 6, 7)}
    end(study, 7, 10.0, TrialState.COMPLETE)
    table.write()
    kept.on_trial_complete(**told(7))
    best = [3, 4, 5, 6, 7]
    assert len(best) == CONTENDERS
    assert {path.name for path in run.checkpoints.iterdir()} == {f"{number:04d}.pt" for number in (0, *best)}
    assert run.checkpoint(5).read_bytes() == b"5"


def test_the_last_checkpoint_of_a_trial_that_is_out_of_it_is_not_written(run, study):
    table = KeepTable(run, SPEC, study)
    kept = KeepContenders(run, SPEC, table)
    for number, distance in enumerate([90.0, 10.0, 20.0, 30.0, 40.0, 50.0]):
        end(study, number, distance)
        table.on_trial_complete(**told(number))
        kept.on_trial_complete(**told(number))
    score(study, 7, 5.0)
    table.on_trial_result(**told(7), result={})
    for number, (distance, done) in {0: (90, True), 6: (99, False), 7: (99, True)}.items():
        result = {"trial": number, "frechet_distance": distance, "checkpoint": b"%d" % number, "done": done}
        kept.on_trial_result(**told(number), result=result)
        assert "checkpoint" not in result
    assert {path.name for path in run.checkpoints.iterdir()} == {"0000.pt", "0006.pt", "0007.pt"}, "7 was good before"
    kept.on_trial_result(**told(6), result={"trial": 6, "frechet_distance": 60.0, "checkpoint": b"later", "done": True})
    assert run.checkpoint(6).read_bytes() == b"6"


def test_of_several_objectives_the_whole_front_keeps_its_checkpoints_as_its_members_may_come_back(run, study):
    spec = SPEC.model_copy(update={"objective": (*SPEC.objective, Objective(metric="rate", direction="minimize"))})
    table = KeepTable(run, spec, study)
    kept = KeepContenders(run, spec, table)
    points = [(1.0, 7.0), (2.0, 6.0), (3.0, 5.0), (4.0, 4.0), (5.0, 3.0), (6.0, 2.0), (0.5, 3.5)]
    for number, (distance, rate) in enumerate(points, 1):  # the last beats the first four
        kept.on_trial_result(**told(number), result={"trial": number, "checkpoint": b"%d" % number})
        end(study, number, distance, more={"rate": rate})
        table.on_trial_complete(**told(number))
        kept.on_trial_complete(**told(number))
    assert {path.name for path in run.checkpoints.iterdir()} == {"0005.pt", "0006.pt", "0007.pt"}
    assert [row["trial"] for row in contenders(table.rows, spec)] == [7, 5, 6]


def test_what_a_limit_cut_off_keeps_its_checkpoint_and_takes_no_contenders_place(run, study):
    run.checkpoints.mkdir()
    for number in range(8):
        score(study, number, float(8 - number))
        run.checkpoint(number).write_bytes(b"%d" % number)
    for number in range(6):
        end(study, number, float(8 - number))
    study.trial(6).set_user_attr("reason", "time limit")
    study.trial(7).set_user_attr("reason", "time limit")
    KeepContenders(run, SPEC, KeepTable(run, SPEC, study))
    assert {path.name for path in run.checkpoints.iterdir()} == {f"{number:04d}.pt" for number in range(8)}
    end(study, 6, 2.0)
    KeepContenders(run, SPEC, KeepTable(run, SPEC, study))
    assert not run.checkpoint(1).exists()


def test_what_a_killed_driver_left_of_trials_that_are_out_is_removed_at_the_next_start(run, study):
    end(study, 1, 0.0, TrialState.FAIL)
    run.checkpoints.mkdir()
    run.checkpoint(1).write_bytes(b"left")
    run.checkpoint(2).write_bytes(b"going on")
    KeepContenders(run, SPEC, KeepTable(run, SPEC, study))
    assert [path.name for path in run.checkpoints.iterdir()] == ["0002.pt"]


def test_the_traceback_of_a_trial_that_failed_lies_where_its_reason_says(run, study):
    kept = KeepCheckpoints(run)
    result = {"trial": 3, "reason": "error: KeyError: 'x' (traceback in errors/0003.txt)", "traceback": "Traceback é\n"}
    kept.on_trial_result(**told(3), result=result)
    assert (run.path / "errors" / "0003.txt").read_text() == "Traceback é\n"
    assert "traceback" not in result, "what comes after has no use for it"
    assert not run.checkpoints.exists()


def test_what_can_not_be_written_ends_the_command_and_not_the_trial(run, study):
    kept = KeepCheckpoints(run)
    run.checkpoints.write_text("a file in the place of the folder")
    with pytest.raises(Fatal) as error:
        kept.on_trial_result(**told(3), result={"trial": 3, "checkpoint": b"3"})
    assert isinstance(error.value.__cause__, OSError)


class Busy(PlainWorkers):
    """Never ready with anything."""

    def begin(self, work: Any, item: Any) -> Any:
        return SimpleNamespace(ready=lambda: False)


def test_the_first_extractor_tells_the_floor_once_and_the_second_begins_with_the_last_quarter(
    run, study, bench, lend_extractors, empty_cache
):
    lend_extractors(run)
    run.extractor("second").unlink()
    known = run.summary().extractors["search"]
    write_atomic(run.summary_file, Summary(extractors={"search": known}).model_dump_json())
    extractors = FeatureExtractors(run, SPEC, bench.data, Busy(bench))
    kept = KeepExtractors(SPEC, study, extractors)
    assert study.floor == known.floor > 0
    written = run.journal.read_bytes()
    kept.on_step_end()
    assert run.journal.read_bytes() == written
    kept.on_trial_start(**told(4))
    assert not extractors.begun
    kept.on_trial_start(**told(5))
    assert list(extractors.begun) == ["second"]
    kept.on_step_end()
    assert (list(extractors.begun), extractors.awaited()) == (["second"], 0)


def test_before_there_is_an_extractor_there_is_no_floor(run, study, bench, empty_cache):
    extractors = FeatureExtractors(run, SPEC, bench.data, Busy(bench))
    KeepExtractors(SPEC, study, extractors)
    assert math.isnan(study.floor)
    assert extractors.awaited() == 1


def test_a_trial_whose_worker_was_lost_is_shown_as_running_until_it_ends(run, study, tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", SPEC)
    table = KeepTable(run, SPEC, study)
    with Progress("search") as progress:
        shown = ShowTrials(SPEC, table, board, Trackers(run, SPEC, SEARCH), progress)
        shown.on_trial_start(**told(3))
        scores = {"trial": 3, "epoch": 1.0, "frechet_distance": 5.0}
        result = scores | {"pictures": {"samples": PICTURE}}
        shown.on_trial_result(**told(3), result=result)
        assert result == scores, "what comes after has no use for pictures"
        shown.on_trial_result(**told(3), result=result)  # repeated, so without any
        shown.on_trial_error(**told(3))
        assert board.writers, "its files stay open"
        end(study, 3, 5.0, reason="among the weaker at epoch 1")
        table.write()
        shown.on_trial_complete(**told(3))
        assert not board.writers
        assert shown.line().startswith("1/8 trials | 7 running, 1 pruned | best frechet_distance 5 (trial 3)")


def test_a_trial_that_ended_before_its_start_is_shown_all_the_same(run, study, tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", SPEC)
    study.tell(study.trial(3), state=TrialState.FAIL)
    with Progress("search") as progress:
        ShowTrials(SPEC, KeepTable(run, SPEC, study), board, Trackers(run, SPEC, SEARCH), progress).on_trial_complete(
            **told(3)
        )
    assert len(list((tmp_path / "tensorboard").glob("0003,*/events*"))) == 1


def test_of_many_trials_tensorboard_shows_the_best_hundred_and_the_baseline(run, study, tmp_path):
    spec = SPEC.model_copy(update={"budget": SPEC.budget.model_copy(update={"trials": MANY + 1})})
    parameters = {"parameters": CLASSIC.model_dump()}
    study.add_trials([create_trial(state=TrialState.RUNNING, user_attrs=parameters)] * (MANY + 1 - 8))
    table, board = KeepTable(run, spec, study), TensorBoard(tmp_path / "tensorboard", spec)
    values = np.random.default_rng(0).permutation(MANY + 1).astype(float)
    with Progress("search") as progress:
        best = ShowBest(spec, table, board)
        callbacks = [table, best, ShowTrials(spec, table, board, Trackers(run, spec, SEARCH), progress)]
        for number, value in enumerate(values):
            result = {"trial": number, "epoch": 3.0, "frechet_distance": value, "pictures": {"samples": PICTURE}}
            score(study, number, value + 500)  # at its first rung, which is not among the best
            for callback in callbacks:
                callback.on_trial_start(**told(number))
                callback.on_trial_result(**told(number), result=result)
            end(study, number, value)
            for callback in callbacks:
                callback.on_trial_complete(**told(number))
    assert not board.writers
    shown = {int(path.name[:4]) for path in (tmp_path / "tensorboard").glob("[0-9]*")}
    others = [number for number in np.argsort(values).tolist() if number != BASELINE]
    assert shown == {BASELINE, *others[:BEST]}
    left = tmp_path / "tensorboard" / f"{others[-1]:04d},left=by a kill"
    left.mkdir()
    assert ShowBest(spec, table, board).costs.keys() - {BASELINE} <= best.costs.keys()
    assert not left.exists()


def test_finalists_are_shown_by_how_far_they_have_come_and_keep_their_checkpoints_whatever_becomes_of_them(run):
    ours, spec = run.of_retrain(), SPEC.of_retrain(2, 0)
    run.path.mkdir()
    study = open_study(ours.journal, spec, RETRAIN)
    for number in range(2):
        study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"parameters": CLASSIC.model_dump()}))
        write_atomic(ours.checkpoint(number), b"the start")
    table, board = KeepTable(ours, spec, study), TensorBoard(run.tensorboard, spec, RETRAIN)
    assert len((run.retrain / "trials.csv").read_text().splitlines()) == 1 + 2
    assert not run.trials.exists()
    kept = KeepCheckpoints(ours)
    kept.on_trial_result(**told(0), result={"trial": 0, "checkpoint": b"further on"})
    with Progress("retrain") as progress:
        shown = ShowTrials(spec, table, board, Trackers(run, spec, RETRAIN), progress)
        for number in range(2):
            shown.on_trial_start(**told(number))
        score(study, 0, 6.0)
        table.on_trial_result(**told(0), result={})
        assert shown.line() == "finalist 0: epoch 1 of 50, best frechet_distance 6 | finalist 1: epoch 0 of 50"
        end(study, 0, 5.0, TrialState.COMPLETE)
        end(study, 1, 1.0, TrialState.FAIL, "diverged: by plan")
        table.write()
        for callback in (kept, shown):
            for number in range(2):
                callback.on_trial_complete(**told(number))
        assert shown.line() == (
            "finalist 0: epoch 1 of 50, best frechet_distance 5 | "
            "finalist 1: epoch 1 of 50, best frechet_distance 1, diverged: by plan"
        )
    assert [ours.checkpoint(number).read_bytes() for number in range(2)] == [b"further on", b"the start"]
    assert not run.checkpoints.exists()


def test_ray_may_pickle_a_callback_which_comes_back_as_none_of_ours(run, study):
    kept = KeepTable(run, SPEC, study)
    assert type(cloudpickle.loads(cloudpickle.dumps(kept))) is tune.Callback
