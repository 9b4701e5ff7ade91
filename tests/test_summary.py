"""The summary of a run: parts are laid over parts, and what can't be true is refused in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tuner.run import RunFiles, write_atomic
from tuner.summary import Best, Compared, ExtractorInfo, Promoted, Retrained, Scores, Summary
from tuner.vae.errors import Refused
from tuner.vae.parameters import CLASSIC


def scores(distance: float, **more: float) -> Scores:
    """Between a floor of 1 and a baseline of 3."""
    errors = {"frechet_distance_error": 0.25, "gap_closed_error": 0.125}
    return Scores(frechet_distance=distance, gap_closed=(3 - distance) / 2, **errors, **more)


SCORES = scores(2, mse=0.01)
PROMOTED = Promoted(
    trial=1,
    epoch=4,
    searched=2,
    again={"search": 2.1},
    gap_closed={"search": 0.4},
    error=0.1,
    rank=0.5,
)
BEST = Best(trial=1, epoch=4, parameters=CLASSIC.model_dump())
RETRAINED = Retrained(epochs=9, trial=1, kept_epoch=5, parameters=CLASSIC.model_dump(), searched=CLASSIC.model_dump())
EXTRACTORS = {"search": ExtractorInfo(kind="classifier", sha256="00", accuracy=0.9, floor=1)}
VALIDATION = Compared(real=scores(1), baseline=scores(3), best=SCORES)
FINISHED: dict[str, Any] = {
    "extractors": EXTRACTORS,
    "promotion": (PROMOTED,),
    "best": BEST,
    "retrain": RETRAINED,
    "validation": VALIDATION,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "run")


def test_a_new_run_has_an_empty_summary_and_makes_no_file(run):
    assert run.summary() == Summary()
    assert not run.path.exists()


def test_a_mapping_is_merged_into_the_summary_and_anything_else_replaces(run):
    run.update_summary(**FINISHED, seconds={"extractor": 3})
    other = BEST.model_copy(update={"trial": 5})
    returned = run.update_summary(seconds={"search": 60, "extractor": 4}, best=other)
    assert returned == run.summary()
    assert returned.seconds == {"extractor": 4, "search": 60}
    assert (returned.best, returned.retrain, returned.promotion) == (other, RETRAINED, (PROMOTED,))


def test_the_parts_have_the_same_bytes_in_whatever_order_they_were_told(run, tmp_path):
    other = RunFiles(tmp_path / "other")
    run.update_summary(**FINISHED)
    for name in ("extractors", "validation", "promotion", "retrain", "best"):
        other.update_summary(**{name: FINISHED[name]})
    assert run.summary_file.read_bytes() == other.summary_file.read_bytes()


def test_what_is_not_known_is_not_in_the_file(run):
    run.update_summary(seconds={"search": 1})
    assert json.loads(run.summary_file.read_text()) == {"seconds": {"search": 1}}


def test_scores_keep_every_name_and_nothing_that_is_no_number():
    errors = {"frechet_distance_error": 0.25, "gap_closed_error": 0.125}
    assert SCORES.model_dump() == {"frechet_distance": 2.0, "gap_closed": 0.5, "mse": 0.01} | errors
    assert Scores.model_validate_json(SCORES.model_dump_json()) == SCORES
    for value in (float("nan"), float("inf"), "x", None):
        for name in ("frechet_distance", "gap_closed", "mse"):
            with pytest.raises(ValidationError):
                Scores(**SCORES.model_dump() | {name: value})


def test_errors_may_be_unknown_but_are_numbers(run):
    found = Scores(frechet_distance=2, gap_closed=0.5)
    assert (found.frechet_distance_error, found.gap_closed_error) == (None, None)
    compared = VALIDATION.model_copy(update={"best": found})
    run.update_summary(**FINISHED | {"validation": compared})
    assert json.loads(run.summary_file.read_text())["validation"]["best"] == {"frechet_distance": 2, "gap_closed": 0.5}
    assert run.summary().validation == compared
    with pytest.raises(ValidationError):
        Scores(frechet_distance=2, gap_closed=0.5, gap_closed_error=float("nan"))


def test_the_exported_model_is_the_last_there_is():
    other = scores(1.5)
    compared = Compared(real=scores(1), baseline=SCORES, best=other)
    assert (list(compared.models), compared.exported) == (["baseline", "best"], other)
    compared = Compared(real=scores(1), baseline=SCORES, best=SCORES, retrained=other)
    assert (list(compared.models), compared.exported) == (["baseline", "best", "retrained"], other)
    compared = Compared(real=scores(1), baseline=SCORES, best=SCORES, refitted=SCORES, retrained=other)
    assert (list(compared.models), compared.exported) == (["baseline", "best", "refitted", "retrained"], other)


def test_the_winner_is_what_the_retrain_kept_else_the_best_of_the_promotion():
    searched = Summary(**FINISHED | {"retrain": None})
    assert (Summary().winner, searched.winner) == (None, searched.best)
    assert Summary(**FINISHED).winner == Summary(**FINISHED).retrain != searched.best


@pytest.mark.parametrize("missing", ["extractors", "promotion", "validation"])
def test_a_best_trial_without_what_it_was_chosen_by_is_refused(run, missing):
    with pytest.raises(ValueError, match="not what it was chosen by"):
        run.update_summary(**{name: part for name, part in FINISHED.items() if name != missing})
    assert not run.summary_file.exists()


def test_a_promotion_by_other_extractors_than_there_are_is_refused():
    more = EXTRACTORS | {"second": EXTRACTORS["search"]}
    with pytest.raises(ValueError, match="not what it was chosen by"):
        Summary(**FINISHED | {"extractors": more})
    Summary(**FINISHED | {"extractors": EXTRACTORS | {"guide": EXTRACTORS["search"]}})  # which scores nothing
    for part in ("again", "gap_closed"):
        with pytest.raises(ValueError, match="not what it was chosen by"):
            Summary(**FINISHED | {"promotion": (PROMOTED.model_copy(update={part: {}}),)})


@pytest.mark.parametrize(("part", "value"), [("learning_rate", "x"), ("latnet_dim", 3)])
def test_parameters_that_no_trial_can_have_are_refused_in_one_line(run, part, value):
    run.update_summary(**FINISHED)
    raw = json.loads(run.summary_file.read_text())
    raw["best"]["parameters"][part] = value
    write_atomic(run.summary_file, json.dumps(raw))
    with pytest.raises(Refused, match=rf"summary\.json: damaged at best\.parameters\b.*{part}") as error:
        run.summary()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content", [b"", b'{"trials": {"complete": 1', b"[1, 2]", b"null", b"\xff\xfe", b"floor", b'{"floor": 1.9}']
)
def test_a_damaged_summary_is_named_and_kept(run, content):
    write_atomic(run.summary_file, content)
    for read in (run.summary, lambda: run.update_summary(trials={"complete": 1})):
        with pytest.raises(Refused, match=re.escape(str(run.summary_file))) as error:
            read()
        assert len(str(error.value).splitlines()) == 1
    assert run.summary_file.read_bytes() == content


def test_a_folder_in_the_place_of_a_summary_is_refused(run):
    run.summary_file.mkdir(parents=True)
    with pytest.raises(Refused, match=r"summary\.json: not readable"):
        run.summary()


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (EXTRACTORS["search"], "a classifier, 90.0% right"),
        (
            ExtractorInfo(kind="rotations", sha256="00", accuracy=0.7, floor=1),
            "a network that tells rotations, 70.0% right",
        ),
        (ExtractorInfo(kind="untrained", sha256="00", floor=1), "untrained networks"),
        (ExtractorInfo(kind="wavelets", sha256="00", floor=1), "wavelet packets"),
        (ExtractorInfo(kind="program", sha256="00", floor=1), "a program"),
    ],
)
def test_an_extractor_is_told_by_what_it_is(info, words):
    assert info.words == words
