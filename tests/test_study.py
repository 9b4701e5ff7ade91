"""The study of a run: what is written to its journal is read back, as one row a trial, and damage is told."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from pydantic import TypeAdapter

from tuner.spec import Entry, Objective, Spec
from tuner.study import (
    BEST,
    MANY,
    UNFINISHED,
    Study,
    distributions,
    front,
    in_view,
    open_study,
    ranked,
    read_study,
    table,
)
from tuner.vae.errors import Refused
from tuner.vae.parameters import CLASSIC

METRIC = "frechet_distance"


def spec_of(**parts: Any) -> Spec:
    return Spec.model_validate({"space": {"latent_dim": {"type": "int", "low": 4, "high": 32}}} | parts)


SPEC = spec_of()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


@pytest.fixture
def study(journal: Path) -> Study:
    """Of three trials that run."""
    study = open_study(journal, SPEC)
    for latents in (16, 8, 4):
        parameters = CLASSIC.model_copy(update={"latent_dim": latents}).model_dump()
        started = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"parameters": parameters})
        study.add_trial(started)
    return study


def evaluate(study: Study, number: int, rung: int, distance: float, **more: float) -> None:
    scores = {"epoch": 2.0**rung, "seconds_train": 1.0, "seconds_score": 0.5, METRIC: distance}
    scores |= {"frechet_distance_standard_normal": 2 * distance} | more
    study.trial(number).set_user_attr(f"evaluation:{rung}", scores)


def test_no_file_but_the_journal_is_made(study, journal):
    study.set_user_attr("floor", 1.0)
    assert [path.name for path in journal.parent.iterdir()] == [journal.name]


def test_the_floor_survives_reopening(study, journal):
    assert math.isnan(study.floor)
    study.set_user_attr("floor", 2.5)
    assert open_study(journal, SPEC).floor == read_study(journal).floor == 2.5


def test_what_an_event_writes_is_there_while_it_lasts(study, journal):
    with study.journal.event():
        study.trial(1).set_user_attr("reason", "first")
        assert [trial.user_attrs.get("reason") for trial in read_study(journal).known()] == [None, "first", None]
    assert not study.journal.in_event


def test_a_trial_is_found_by_its_number(study):
    assert study.at(2) == study.known()[2]
    with pytest.raises(KeyError):
        study.at(3)


def test_a_trial_is_written_to_by_its_number(study, journal):
    study.trial(2).set_user_attr("reason", "two")
    study.trial(0).set_user_attr("reason", "none")
    reasons = [row["reason"] for row in table(read_study(journal), SPEC)]
    assert reasons == ["none", "", "two"]


def test_the_closed_gap_appears_once_the_baseline_ended_and_compares_with_its_last_distance(study):
    study.set_user_attr("floor", 2.0)
    evaluate(study, 0, 1, 50.0)
    evaluate(study, 0, 2, 51.0)
    evaluate(study, 1, 1, 27.0)
    assert math.isnan(study.baseline)
    assert all("gap_closed" not in row for row in table(study, SPEC))
    study.tell(study.trial(0), 51.0)
    assert study.baseline == 102.0
    assert [row.get("gap_closed") for row in table(study, SPEC)] == [pytest.approx(0.52), pytest.approx(0.75), None]


def test_a_row_has_the_best_evaluation_but_all_epochs_and_seconds(study):
    evaluate(study, 1, 1, 9.0, mse=0.1)
    evaluate(study, 1, 2, 7.0, mse=0.2)
    evaluate(study, 1, 10, 8.0, mse=0.3)  # after the second, though not in the alphabet
    study.trial(1).set_user_attr("reason", "among the weaker at epoch 1024")
    study.tell(study.trial(1), state=TrialState.PRUNED)
    waiting, row, running = table(study, SPEC)
    assert (row["trial"], row["state"], row["reason"]) == (1, "pruned", "among the weaker at epoch 1024")
    assert (row["epoch"], row[METRIC], row["mse"], row["latent_dim"]) == (4.0, 7.0, 0.2, 8)
    assert (row["epochs_trained"], row["seconds_train"], row["seconds_score"]) == (1024.0, 3.0, 1.5)
    assert row["ended"] > row["started"]
    for other in (waiting, running):
        assert (other["state"], other["epochs_trained"]) == ("running", 0)
        assert not {"epoch", METRIC, "ended"} & other.keys()


def test_where_more_is_better_the_best_evaluation_has_most(study):
    evaluate(study, 1, 1, 9.0, active_units=3)
    evaluate(study, 1, 2, 7.0, active_units=2)
    assert table(study, spec_of(objective="active_units"))[1]["active_units"] == 3


# Who is better


def test_the_front_is_what_nothing_beats_in_one_objective_without_losing_in_another():
    objectives = [Objective.model_validate("rate"), Objective.model_validate("active_units")]  # less and more
    points = [(1, 1), (2, 5), (2, 5), (3, 5), (4, 9), (1, 0)]
    rows = [{"rate": rate, "active_units": units} for rate, units in points]
    assert front(rows, objectives) == [rows[0], rows[1], rows[2], rows[4]]
    assert front([], objectives) == []


def test_the_front_of_many_points_is_that_of_all_pairs():
    random = np.random.default_rng(0)
    rows = [dict(zip(("mse", "rate"), map(float, pair), strict=True)) for pair in random.integers(0, 30, (400, 2))]
    costs = [(row["mse"], row["rate"]) for row in rows]
    expected = [
        row
        for row, here in zip(rows, costs, strict=True)
        if not any(other != here and other[0] <= here[0] and other[1] <= here[1] for other in costs)
    ]
    assert front(rows, [Objective.model_validate(name) for name in ("mse", "rate")]) == expected
    assert front([], [Objective.model_validate("mse")]) == []


def test_a_view_has_room_for_all_or_for_the_best_hundred_in_their_order():
    values = np.random.default_rng(0).permutation(MANY + 1).tolist()
    rows = [{"trial": number, "state": "pruned", METRIC: value} for number, value in enumerate(values)]
    assert in_view(rows[:MANY], SPEC) == rows[:MANY]
    assert in_view(rows, SPEC) == [row for row in rows if row[METRIC] < BEST]


def test_rows_are_ranked_by_the_objective_and_then_by_number_without_those_that_failed_or_have_no_score():
    scored = [("pruned", 3.0), ("complete", 1.0), ("failed", 0.0), ("running", 1.0), ("complete", math.inf)]
    rows = [{"trial": number, "state": state, METRIC: value} for number, (state, value) in enumerate(scored)]
    rows.append({"trial": 5, "state": "running"})
    assert [row["trial"] for row in ranked(rows, SPEC)] == [1, 3, 0, 4]
    two = spec_of(objective=[METRIC, "rate"])
    rows = [
        {"trial": n, "state": "complete", METRIC: d, "rate": r} for n, (d, r) in enumerate([(3, 1), (2, 2), (9, 9)])
    ]
    assert [row["trial"] for row in ranked(rows, two)] == [1, 0]


# What a search can propose


RANGES = {
    "whole": {"type": "int", "low": 4, "high": 32},
    "whole from one": {"type": "int", "low": 1, "high": 3},
    "whole with steps": {"type": "int", "low": 4, "high": 32, "step": 4},
    "whole in logarithms": {"type": "int", "low": 4, "high": 32, "log": True},
    "real": {"type": "float", "low": 0.1, "high": 8},
    "real with steps": {"type": "float", "low": 0.1, "high": 0.7, "step": 0.1},
    "real in logarithms": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "choices": {"choices": [1, 4.0, 0.5]},
    "words": {"choices": ["vae", "flow"]},
}
VALUES = [
    *(-1, 0, 1, 2, 3, 4, 5, 8, 32, 33, 36, 10**400),
    *(0.0, 0.1, 0.3, 0.1 + 0.2, 0.30001, 0.35, 0.5, 0.7, 0.1 + 6 * 0.1, 1.0, 4.0, 4.5, 1e-4, 1e-3, 1e-2, 0.011),
    *(math.nextafter(0.1, 0), math.nextafter(8, 9), math.inf, -math.inf, math.nan, "vae", "other", ""),
]


def entry_and_distribution(entry: dict[str, Any], name: str = "kl_weight") -> tuple[Any, BaseDistribution]:
    spec = Spec.model_construct(space={name: TypeAdapter(Entry).validate_python(entry)})
    return spec.space[name], distributions(spec)[name]


def taken(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (ValueError, OverflowError):
        return False


@pytest.mark.parametrize("name", RANGES)
def test_a_value_is_in_the_space_where_optunas_distribution_takes_it(name):
    entry, distribution = entry_and_distribution(RANGES[name])
    wanted = [v for v in VALUES if taken(distribution, v)]
    offered = [v for v in wanted if v == entry.nearest(v) or math.isclose(v, entry.nearest(v))]
    assert [v for v in VALUES if entry.contains(v)] == offered != []
    assert all(entry.contains(end) and taken(distribution, end) for end in entry.ends())


def test_truth_is_no_number_though_optuna_takes_it_for_one():
    for name in ("whole from one", "real", "choices"):
        entry, distribution = entry_and_distribution(RANGES[name])
        assert (entry.contains(True), taken(distribution, True)) == (False, True)
    entry, distribution = entry_and_distribution({"choices": [True, False]})
    assert [entry.contains(value) for value in (True, False, 1, 0.0)] == [True, True, False, False]
    assert taken(distribution, 1)


def test_what_optuna_draws_lies_in_the_space():
    for name in RANGES:
        entry, distribution = entry_and_distribution(RANGES[name])
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = [entry.nearest(study.ask({name: distribution}).params[name]) for _ in range(50)]
        assert all(map(entry.contains, drawn)), name


# What is no journal


def test_a_search_that_has_not_begun_has_no_study(journal):
    assert read_study(journal) is None
    journal.touch()
    assert read_study(journal) is None


def test_a_last_line_that_a_kill_cut_off_is_no_damage_and_is_removed(study, journal):
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines(keepends=True)[-1][:-9])
    assert len(read_study(journal).known()) == 3, "it may be being written"
    assert len(open_study(journal, SPEC).known()) == 3
    assert journal.read_bytes().startswith(whole)
    assert journal.read_bytes().endswith(b"}\n")


DAMAGE = {
    "a blank line": b"\n",
    "NUL bytes": bytes(40) + b"\n",
    "NUL bytes before a record": bytes(40) + b'{"op_code":8,"worker_id":"a"}\n',
    "two lines in one": b'{"op_code":8,"worker_id":"a"}{"op_code":8,"worker_id":"a"}\n',
    "other bytes": b"\xff\xfe\n",
    "a number": b"7\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_all_up_to_the_damage_is_taken_and_the_damaged_file_is_kept_aside(study, journal, damage, capsys):
    evaluate(study, 0, 1, 50.0)
    sound = journal.read_bytes()
    evaluate(study, 1, 1, 27.0)
    rest = journal.read_bytes().removeprefix(sound)
    journal.write_bytes(sound + damage + rest)
    count = len(sound.splitlines())
    opened = open_study(journal, SPEC)
    assert [row.get(METRIC) for row in table(opened, SPEC)] == [50.0, None, None]
    assert journal.read_bytes().startswith(sound)
    assert b"27.0" not in journal.read_bytes()
    kept = journal.with_name("study.journal.damaged")
    assert kept.read_bytes() == sound + damage + rest
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{journal}: line {count + 1} of {count + 2} is damaged" in line
    assert kept.name in line
    evaluate(opened, 1, 1, 26.0)
    assert [row.get(METRIC) for row in table(open_study(journal, SPEC), SPEC)] == [50.0, 26.0, None]
    assert capsys.readouterr().err == ""


def test_a_look_at_a_damaged_journal_shows_what_comes_before_and_writes_nothing(study, journal, capsys):
    evaluate(study, 0, 1, 50.0)
    sound = journal.read_bytes()
    evaluate(study, 1, 1, 27.0)
    content = sound + b"\n" + journal.read_bytes().removeprefix(sound)
    journal.write_bytes(content)
    assert [row.get(METRIC) for row in table(read_study(journal), SPEC)] == [50.0, None, None]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {journal}: damaged, read up to there: ")
    assert (journal.read_bytes(), [path.name for path in journal.parent.iterdir()]) == (content, [journal.name])


def test_a_file_that_was_never_a_journal_is_refused_and_left_alone(journal):
    for content in (b"hello\n", b"\0" * 9 + b"\n" + b'{"op_code":0}\n'):
        journal.write_bytes(content)
        with pytest.raises(Refused, match=f"{journal}: not readable as an Optuna journal: "):
            open_study(journal, SPEC)
        assert (journal.read_bytes(), [path.name for path in journal.parent.iterdir()]) == (content, [journal.name])


def test_a_study_that_is_deleted_begins_anew(study, journal):
    study.set_user_attr("floor", 2.5)
    study.delete()
    anew = open_study(journal, SPEC)
    assert (anew.known(), math.isnan(anew.floor)) == ([], True)
    anew.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"parameters": CLASSIC.model_dump()}))
    assert [row["trial"] for row in table(read_study(journal), SPEC)] == [0]


def test_what_runs_and_has_a_reason_why_it_does_not_is_unfinished(study):
    study.trial(1).set_user_attr("reason", "time limit")
    assert [row["state"] for row in table(study, SPEC)] == ["running", UNFINISHED, "running"]
    study.trial(1).set_user_attr("reason", "")
    assert [row["state"] for row in table(study, SPEC)] == ["running"] * 3


def test_what_is_written_meanwhile_is_read(study, journal):
    reader = read_study(journal)
    study.trial(1).set_user_attr("reason", "new")
    assert table(reader, SPEC)[1]["reason"] == "new"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("floor", "low"),
        ("reason", 3),
        ("parameters", None),
        ("parameters", {"latent_dim": "many"}),
        ("parameters", {"latnet_dim": 4}),
        ("evaluation:x", {}),
        ("evaluation:1", []),
        ("evaluation:1", {"epoch": 1.0}),
    ],
)
def test_a_journal_that_says_something_else_is_refused_in_one_line_that_names_it(study, journal, key, value):
    (study if key == "floor" else study.trial(1)).set_user_attr(key, value)
    for read in (read_study, lambda journal: open_study(journal, SPEC)):
        with pytest.raises(Refused, match=rf"{journal}: not the journal of a search: ") as error:
            read(journal)
        assert len(str(error.value).splitlines()) == 1


def test_a_score_that_is_no_number_and_an_end_without_scores_are_refused(study, journal):
    evaluate(study, 1, 1, 9.0, mse="small")
    with pytest.raises(Refused, match="mse of trial 1 is 'small'"):
        read_study(journal)
    evaluate(study, 1, 1, 9.0)
    study.tell(study.trial(0), 9.0)
    with pytest.raises(Refused, match="trial 0 is complete without scores"):
        read_study(journal)


@pytest.mark.parametrize("content", [b"hello\n", b"{}\n", b"[]\n", b"\xff\xfe\n", b'{"op_code": 99}\n', None])
def test_what_is_no_journal_is_refused_in_one_line_that_names_it(journal, content):
    journal.mkdir() if content is None else journal.write_bytes(content)
    with pytest.raises(Refused, match=rf"{journal}: not readable as an Optuna journal: ") as error:
        read_study(journal)
    assert len(str(error.value).splitlines()) == 1
