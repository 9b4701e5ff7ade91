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

from tuner.callbacks import KeepCheckpoints, KeepContenders, KeepExtractors, KeepTable, ShowTrials
from tuner.exits import Fatal
from tuner.extractors import FeatureExtractors
from tuner.loggers import Trackers
from tuner.promote import CONTENDERS
from tuner.run import RunFiles, write_atomic
from tuner.spec import Spec
from tuner.study import RETRAIN, SEARCH, Study, open_study
from tuner.summary import Summary
from tuner.tensorboard import TensorBoard
from tuner.terminal import Progress
from tuner.vae.parameters import CLASSIC

SPEC = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 16]}}, "budget": {"trials": 8}})


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


def end(study: Study, number: int, distance: float, state: TrialState = TrialState.PRUNED, reason: str = "") -> None:
    """Score a trial and end it, as the searcher does before the callbacks hear of it."""
    score(study, number, distance)
    trial = study.trial(number)
    trial.set_user_attr("reason", reason)
    study.tell(trial, distance if state == TrialState.COMPLETE else None, state)


def score(study: Study, number: int, distance: float) -> None:
    """Write an evaluation, as the searcher does before the callbacks hear of it."""
    scores = {"epoch": 1.0, "seconds_train": 1.0, "seconds_score": 1.0, "frechet_distance": distance}
    study.trial(number).set_user_attr("evaluation:1", scores | {"frechet_distance_standard_normal": distance})


def test_the_table_is_written_at_once_and_with_each_start_and_end(run, study):
    kept = KeepTable(run, SPEC, study)
    assert len(run.trials.read_text().splitlines()) == 1 + 8
    end(study, 3, 5.0)
    kept.on_trial_complete(**told(3))
    with run.trials.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[3]["state"], rows[3]["frechet_distance"]) == ("pruned", "5.0")
    assert kept.rows[3]["frechet_distance"] == 5.0


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
    kept.on_trial_complete(**told(6))
    assert {path.name for path in run.checkpoints.iterdir()} == {f"{number:04d}.pt" for number in (0, 2, 3, 4, 5, 6, 7)}
    end(study, 7, 10.0, TrialState.COMPLETE)
    table.write()
    kept.on_trial_complete(**told(7))
    best = [3, 4, 5, 6, 7]
    assert len(best) == CONTENDERS
    assert {path.name for path in run.checkpoints.iterdir()} == {f"{number:04d}.pt" for number in (0, *best)}
    assert run.checkpoint(5).read_bytes() == b"5"


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
    run, study, bench, lend_extractors
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
    assert (list(extractors.begun), extractors.in_work()) == (["second"], 1)


def test_before_there_is_an_extractor_there_is_no_floor(run, study, bench):
    extractors = FeatureExtractors(run, SPEC, bench.data, Busy(bench))
    KeepExtractors(SPEC, study, extractors)
    assert math.isnan(study.floor)
    assert extractors.in_work() == 1


def test_a_trial_whose_worker_was_lost_is_shown_as_running_until_it_ends(run, study, tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", SPEC)
    table = KeepTable(run, SPEC, study)
    with Progress("search") as progress:
        shown = ShowTrials(SPEC, table, board, Trackers(run, SPEC, SEARCH), progress)
        shown.on_trial_start(**told(3))
        scores = {"trial": 3, "epoch": 1.0, "frechet_distance": 5.0}
        result = scores | {"pictures": {"samples": np.zeros((28, 28), np.uint8)}}
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
