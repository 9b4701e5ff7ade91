"""Progress in a plain log, and the status of a run from its files alone."""

import shlex
import subprocess
import sys

import pytest

from tuner.run import RunFiles
from tuner.search import main, show
from tuner.spec import DRAWN_BEST, Objective, Spec
from tuner.summary import Best, Compared, ExtractorInfo, Promoted, Retrained, Scores, Summary
from tuner.terminal import (
    Progress,
    as_table,
    chosen_words,
    duration,
    edges,
    final_words,
    finalists_line,
    promotion_rows,
    result_rows,
    search_line,
    stage,
    trials_rows,
    with_error,
)
from tuner.vae.parameters import CLASSIC

SPEC = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 8]}}, "budget": {"trials": 10}})


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3600, "1h00m"), (9000, "2h30m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_search_line_counts_and_extrapolates():
    rows = [
        {"trial": 0, "state": "complete", "frechet_distance": 40.0, "gap_closed": 0.5},
        {"trial": 1, "state": "pruned", "frechet_distance": 60.0},
        {"trial": 2, "state": "running"},
    ]
    line = search_line(rows, SPEC, seconds=30)
    assert line == (
        "2/10 trials | 1 running, 1 complete, 1 pruned | best frechet_distance 40 (trial 0, gap closed 0.500) | "
        "4.0 trials/min, 2m00s left"
    )
    assert search_line(rows, SPEC, seconds=30, before=1).endswith("2.0 trials/min, 4m00s left")
    assert search_line(rows, SPEC, seconds=30, before=2).endswith("gap closed 0.500)")


def test_the_finalists_line_says_how_far_each_has_come_and_which_is_out_of_it():
    spec = SPEC.of_retrain(3, 0)
    rows = [
        {"trial": 0, "reason": "", "epochs_trained": 15.0, "frechet_distance": 40.0},
        {"trial": 1, "reason": "diverged: by plan", "epochs_trained": 5.0, "frechet_distance": 60.0},
        {"trial": 2, "reason": "", "epochs_trained": 0},
    ]
    assert finalists_line(rows, spec) == (
        "finalist 0: epoch 15 of 50, best frechet_distance 40 | "
        "finalist 1: epoch 5 of 50, best frechet_distance 60, diverged: by plan | finalist 2: epoch 0 of 50"
    )
    assert finalists_line([], spec) == "starting"


@pytest.mark.parametrize(
    ("value", "error", "decimals", "text"),
    [
        (0.97123, 0.01449, 3, "0.971 ± 0.014"),
        (-1.0909, 0.02841, 3, "-1.091 ± 0.028"),
        (31.1967, 19.826, None, "31 ± 20"),
        (4059.61, 86.7698, None, "4060 ± 87"),
        (12.3456, 9.96, None, "12.3 ± 10.0"),
        (12.3456, 1.0, None, "12.3 ± 1.0"),
        (1.23456, 0.0558, None, "1.235 ± 0.056"),
        (1.23456, 0.000123, None, "1.23456 ± 0.00012"),
        (1.0, 0.0, 3, "1.000"),
        (31.1967, 0.0, None, "31.2"),
        (31.1967, None, None, "31.2"),
        (0.97123, None, 3, "0.971"),
    ],
)
def test_a_figure_has_as_many_decimals_as_show_two_digits_of_its_error(value, error, decimals, text):
    assert with_error(value, error, decimals) == text


def promoted(trial: int, search: float, second: float = 0.5, error: float | None = 0.0625) -> Promoted:
    """By the gaps it closes; numbers that floats hold exactly."""
    again, gaps = {"search": 100.0, "second": 25.0}, {"search": search, "second": second}
    return Promoted(trial=trial, epoch=9, searched=2, again=again, gap_closed=gaps, error=error, rank=1)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([], "Trial 7 was chosen"),
        ([promoted(3, 0.75)], "Trial 7 was chosen, not clearly before 3"),  # they just touch
        ([promoted(3, 0.74)], "Trial 7 was chosen"),
        ([promoted(3, 0.9)], "Trial 7 was chosen, not clearly before 3"),  # it lost by the other extractor
        ([promoted(3, 0.5, error=0.5)], "Trial 7 was chosen, not clearly before 3"),
        ([promoted(3, 0.8, error=None)], "Trial 7 was chosen"),
        ([promoted(3, 0.8), promoted(5, 0.5), promoted(2, 0.8)], "Trial 7 was chosen, not clearly before 3 and 2"),
        ([promoted(trial, 0.8) for trial in (3, 5, 2)], "Trial 7 was chosen, not clearly before 3, 5 and 2"),
    ],
)
def test_trials_whose_intervals_overlap_are_not_called_better_and_worse(others, words):
    assert chosen_words([promoted(7, 0.875), *others], DRAWN_BEST) == words
    by_likelihood = Objective.model_validate("calibrated_nll")  # of which the gap and its errors say nothing
    assert chosen_words([promoted(7, 0.875), *others], by_likelihood) == "Trial 7 was chosen"


def test_the_promotion_is_shown_with_the_error_where_it_is_known():
    assert promotion_rows([promoted(7, 0.875), promoted(3, 0.75, error=None)], "frechet_distance")[1:] == [
        ["7", "9", "2", "100", "0.875 ± 0.062", "25", "0.500"],
        ["3", "9", "2", "100", "0.750", "25", "0.500"],
    ]


def test_a_winner_at_an_end_of_its_range_is_told_so():
    space = {
        "kl_weight": {"type": "float", "low": 0.01, "high": 3, "log": True},
        "latent_dim": {"type": "int", "low": 4, "high": 32, "log": True},
        "learning_rate": {"type": "float", "low": 0.0003, "high": 0.01, "log": True},
        "width": {"choices": [16, 32]},
        "model.depth": {"type": "int", "low": 1, "high": 3},
    }
    spec = Spec.model_validate({"space": space})
    found = {"kl_weight": 0.0103, "latent_dim": 32, "learning_rate": 0.001, "width": 16}
    assert edges(found, spec) == [
        "kl_weight 0.0103 is at the low end of 0.01..3: widen it",
        "latent_dim 32 is at the high end of 4..32: widen it",
    ]
    assert edges(found | {"kl_weight": 0.1, "latent_dim": 16}, spec) == []
    widest = Spec.model_validate({"space": {"latent_dim": {"type": "int", "low": 4, "high": 512}}})
    assert edges({"latent_dim": 512}, widest) == []  # no spec may have more
    assert edges({"latent_dim": 4}, widest) == ["latent_dim 4 is at the low end of 4..512: widen it"]


def scores(distance: float, error: float = 0.25) -> Scores:
    """Between a floor of 1 and a baseline of 3."""
    gap = {"gap_closed": (3 - distance) / 2, "gap_closed_error": error / 2}
    return Scores(frechet_distance=distance, frechet_distance_error=error, **gap)


def summary_with(**parts: object) -> Summary:
    named = {"real": scores(1, 0), "baseline": scores(3, 0), "best": scores(2)}
    return Summary(
        extractors={name: ExtractorInfo(kind="untrained", sha256="00", floor=1) for name in ("search", "second")},
        promotion=(promoted(7, 0.5),),
        **{"best": Best(trial=7, epoch=9, parameters=CLASSIC.model_dump()), "validation": Compared(**named)} | parts,
    )


def test_the_closing_table_tells_what_the_prior_did_from_what_the_epochs_did():
    named = {"real": scores(1, 0), "baseline": scores(3, 0), "best": scores(2)}
    later = {"refitted": scores(1.5), "retrained": scores(1.25)}
    retrain = {"epochs": 50, "kept_epoch": 45, "parameters": CLASSIC.model_dump(), "searched": CLASSIC.model_dump()}
    header = ["", "validation", "gap closed", "test", "gap closed"]
    real, classic = ["1", "1.000"], ["3", "0.000"]
    best, refitted, retrained = (
        ["2.00 ± 0.25", "0.500 ± 0.125"],
        ["1.50 ± 0.25", "0.750 ± 0.125"],
        ["1.25 ± 0.25", "0.875 ± 0.125"],
    )
    for trial, last in ((7, "after 45 more epochs"), (3, "after 45 more epochs (trial 3)")):
        summary = summary_with(
            retrain=Retrained(trial=trial, **retrain),
            validation=Compared(**named, **later),
            test=Compared(**named, **later),
        )
        assert result_rows(summary) == [
            header,
            ["real images", *real, *real],
            ["classic settings", *classic, *classic],
            ["best trial (7)", *best, *best],
            ["... with the final prior", *refitted, *refitted],
            [last, *retrained, *retrained],
        ]
    assert result_rows(summary_with()) == [
        header,
        ["real images", *real, "", ""],
        ["classic settings", *classic, "", ""],
        ["best trial (7)", *best, "", ""],
    ]


def test_a_plain_log_gets_lines_without_control_characters(capsys):
    with Progress("search") as progress:
        for step in range(100):
            progress.show(f"step {step}")
        progress.done("ended")
    error = capsys.readouterr().err
    assert [line.split()[2:] for line in error.splitlines()] == [["step", "0"], ["ended"]]
    assert error.isprintable() or set(error) - set(map(chr, range(32, 127))) == {"\n"}


def test_no_text_of_a_users_is_markup_and_what_is_printed_as_a_command_can_be_pasted(tmp_path, capsys):
    run = RunFiles(tmp_path / "my [old] [/b] :smile: run's" / ("deep" * 50))
    run.path.mkdir(parents=True)
    winner = Best(trial=7, epoch=9, parameters=CLASSIC.model_dump() | {"model.option": "[red]x[/b]"})
    run.update_summary(**dict(summary_with(best=winner)))
    run.report.touch()
    spec = Spec.model_validate({"space": {"model.option": {"choices": ["[red]x[/b]", "y"]}}})
    rows = [{"trial": 7, "state": "failed", "reason": "error: [/b] in list[int]", "model.option": "[red]x[/b]"}]
    show([*final_words(run, spec), as_table(trials_rows(rows, spec), title="[b]title")])
    with Progress("[b]") as progress:
        progress.show("[/b]" * 100)
        progress.done(f"{run.report} [/b]")
    out, err = capsys.readouterr()
    (pasted,) = (line.removeprefix("look ") for line in out.splitlines() if line.startswith("look "))
    assert shlex.split(pasted) == ["tensorboard", "--logdir", str(run.tensorboard)]
    assert f"report   {run.report}\n" in out
    for words in ("model.option [red]x[/b]", "error: [/b] in list[int]", "[b]title"):
        assert words in out
    assert [line.split("s  ")[1] for line in err.splitlines()] == ["[/b]" * 100, f"{run.report} [/b]"]


def test_what_is_not_made_yet_is_not_told_of(tmp_path):
    run = RunFiles(tmp_path)
    run.update_summary(**dict(summary_with(best=Best(trial=7, epoch=9, parameters=CLASSIC.model_dump()))))
    spec = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 16]}}})
    assert not [words for words in final_words(run, spec) if str(words).startswith(("model ", "report "))]
    run.export.mkdir()
    (run.export / "README.md").touch()
    assert f"model    {run.export}: README.md" in final_words(run, spec)


def test_a_stage_that_is_stopped_took_its_time_too(tmp_path):
    run = RunFiles(tmp_path)

    def stopped() -> None:
        with stage(run, "search"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert run.summary().seconds.keys() == {"search"}


def test_a_narrow_terminal_folds_numbers_and_cuts_none_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = [["learning_rate", "kl_weight", "latent_dim"], ["0.001235", "0.001876", "16"]]
    show([as_table(rows)])
    assert "…" not in capsys.readouterr().out


def test_status_shows_stages_trials_and_result(finished_run: RunFiles, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.path.rglob("*")}
    assert main(["--status", str(finished_run.path)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "stages",
        "5/5 trials",
        "best frechet_distance",
        "kl_weight",
        "classic settings",
        "... with the final prior",
        " more epochs",
        " ± ",
    ):
        assert words in shown
    assert {path: path.stat().st_mtime_ns for path in finished_run.path.rglob("*")} == before


def test_status_needs_neither_ray_nor_torch(finished_run: RunFiles):
    code = (
        "import sys; from tuner.search import main; "
        f"assert main(['--status', {str(finished_run.path)!r}]) == 0; "
        "assert not {'ray', 'torch', 'sklearn'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_status_of_no_run_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--status", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: not a run directory (no spec.yaml)\n"
