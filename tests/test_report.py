"""The report in a real browser: it opens without network, every figure is filled, and it says what failed and why."""

import base64
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState, create_trial
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tuner.advice import importance
from tuner.report import Material, importances, main, report
from tuner.run import RunFiles
from tuner.spec import Spec, load
from tuner.study import NEEDED, distributions, open_study
from tuner.vae.data import as_floats
from tuner.vae.image_grid import evenly_spaced, grid
from tuner.workspace import Checkpoints

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # No sandbox: CI is root in a container, and the page is ours.
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened_at(browser: Browser, path: Path, width: int) -> tuple[Page, list[str]]:
    """The page at a window width, and what it complained of or asked the network for."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda asked: troubles.append(asked.url) if asked.url.startswith(("http", "ws")) else None)
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot').length > 0")
    return page, troubles


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_opens_without_network_or_errors_and_fits_the_window(browser, finished_run, width):
    page, troubles = opened_at(browser, finished_run.report, width)
    page.wait_for_timeout(500)
    assert troubles == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p')].map(p => parseFloat(getComputedStyle(p).fontSize)))"
    )
    assert smallest >= 14


@needs_browser
def test_every_figure_holds_marks_and_every_picture_is_drawn(browser, finished_run):
    page, _ = opened_at(browser, finished_run.report, 1440)
    marks = "path.point, .points path, path.js-line, .point path, .contourbg path, .heatmaplayer image, .bars path"
    counts = page.eval_on_selector_all(".plot", f"plots => plots.map(plot => plot.querySelectorAll('{marks}').length)")
    assert len(counts) >= 5
    assert min(counts) > 0
    assert min(page.eval_on_selector_all("img", "pictures => pictures.map(picture => picture.naturalWidth)")) > 300


def test_every_section_says_what_to_see_before_its_picture(finished_run):
    sections = finished_run.report.read_text().split("<section>")[1:]
    titles = [section.split("</h2>")[0].removeprefix("<h2>") for section in sections]
    assert {"Who won, and by how much", "What they draw", "Learning curves", "Rate and distortion"} <= set(titles)
    assert {"Latents in use", "Who ran what", "Promotion", "The test split", "Where it came from"} <= set(titles)
    headline = finished_run.report.read_text().split("<section>")[0]
    trial = finished_run.summary().best.trial
    assert re.search(rf"Trial {trial} was chosen.*<b>-?\d\.\d{{3}} ± 0\.\d{{3}}</b>.*±.* on the test split", headline)
    for section in sections:
        sentence = section.split("<p class='see'>")[1].split("</p>")[0]
        assert sentence.endswith((".", "%."))
    assert finished_run.report.stat().st_size < 15 * MEGABYTE


def pictures(text: str) -> dict[str, np.ndarray]:
    """Of the section that shows what models draw: caption -> pixels."""
    section = text.split("<h2>What they draw</h2>")[1].split("</section>")[0]
    found = re.findall(r"base64,([^']*)'><figcaption>([^<]*)<", section)
    return {caption: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, caption in found}


def test_real_images_stand_before_the_samples_and_above_their_reconstructions(finished_run, workspace):
    shown = pictures(finished_run.report.read_text())
    real, *drawn, rebuilt, between = shown.values()
    assert [caption.split(",")[0] for caption in shown][:2] == ["real images", "classic settings"]
    assert len(drawn) == 4
    rows = [evenly_spaced(workspace.data.validation.images)[start : start + 8] for start in (0, 8)]
    expected = [grid(as_floats(row), 8, ink=True, scale=2) for row in rows]
    height = len(expected[0])
    assert np.array_equal(real[:height], expected[0])
    assert np.array_equal(rebuilt[:height], expected[0])
    assert np.array_equal(rebuilt[2 * (height + 4) :][:height], expected[1])
    last = Checkpoints(finished_run).best(finished_run.kept)
    ends = last.draw(last.model.encode(as_floats(rows[0][:1]))[0])
    assert np.abs(between[:56, :56].astype(int) - grid(ends, 1, ink=True, scale=2)).max() <= 1


def test_without_held_out_images_samples_are_shown_alone(run_copy: RunFiles):
    run_copy.held_out.unlink()
    assert len(pictures(report(run_copy).read_text())) == 4


@pytest.mark.parametrize("left", ["", "trial,state\n", "trial,sta"], ids=["nothing", "a header", "half of one"])
def test_it_is_made_of_the_journal_whatever_has_become_of_the_table(run_copy: RunFiles, finished_run: RunFiles, left):
    run_copy.trials.write_text(left)
    counts = [
        re.findall(r"Trials: [^<]*", page) for page in (report(run_copy).read_text(), finished_run.report.read_text())
    ]
    assert counts[0] == counts[1] != []
    assert run_copy.trials.read_text() == left, "a look writes nothing but the report"


def test_it_names_the_failed_trials_and_why(run_copy: RunFiles):
    spec = load(run_copy.spec)
    study = open_study(run_copy.journal, spec)
    parameters = spec.parameters({"latent_dim": 5, "learning_rate": 7.0, "kl_weight": 1.0})
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"parameters": parameters.model_dump()}))
    trial = study.trial(len(study.known()) - 1)
    trial.set_user_attr("evaluation:0", dict.fromkeys(NEEDED, 1.0))
    trial.set_user_attr("reason", "diverged: <b>training</b> loss not finite at epoch 1.56")
    study.tell(trial, state=TrialState.FAIL)
    text = report(run_copy).read_text()
    assert "Trials that failed" in text
    said = "diverged: &lt;b&gt;training&lt;/b&gt; loss not finite at epoch 1.56"
    assert said in text, "in the table"
    assert said.replace("/", "\\u002f") in text, "where a bar is pointed at"
    assert not re.search(r"training(<|\\u003c)", text)


def test_a_parameter_that_no_complete_trial_has_is_in_no_picture(run_copy: RunFiles):
    of_mixture = {"choices": [10, 20], "when": {"prior": "gaussian_mixture"}}
    space = {"latent_dim": {"type": "int", "low": 4, "high": 32}, "learning_rate": {"choices": [0.001, 0.01]}}
    space |= {"prior": {"choices": ["standard_normal", "gaussian_mixture"]}, "prior_components": of_mixture}
    spec = Spec.model_validate({"space": space, "objective": {"metric": "active_units"}})
    study = open_study(run_copy.path / "other.journal", spec)
    for latent_dim in range(4, 32, 2):
        complete = latent_dim % 4 == 0
        point = {"latent_dim": latent_dim, "learning_rate": 0.001 if latent_dim % 8 else 0.01}
        point |= {"prior": "standard_normal"} if complete else {"prior": "gaussian_mixture", "prior_components": 10}
        known = {name: found for name, found in distributions(spec).items() if name in point}
        state, value = (TrialState.COMPLETE, latent_dim) if complete else (TrialState.PRUNED, None)
        study.add_trial(create_trial(state=state, params=point, distributions=known, value=value))
    best, shares = [{"trial": trial} for trial in range(14)], importance(study, spec)
    material = Material(run_copy, spec, study, [], best, shares, run_copy.summary(), Checkpoints(run_copy))
    titles = re.findall("<h2>(.*?)</h2>", "".join(importances(material)))
    assert "latent_dim against learning_rate" in titles
    assert not [title for title in titles if "prior_components" in title]
    assert "look for where active_units is high" in "".join(importances(material))


def test_a_search_under_way_can_be_reported_on(run_copy: RunFiles):
    extractors = run_copy.summary().extractors
    run_copy.summary_file.unlink()
    run_copy.update_summary(extractors=extractors)
    run_copy.trials.unlink()
    shutil.rmtree(run_copy.retrain)
    assert "The search is under way" in report(run_copy).read_text()


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}: no search to report on (no spec.yaml or study.journal)\n"
