"""TensorBoard's own backend reads what the driver wrote, while trials run and after."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from tuner import spec as specs
from tuner.promote import CANDIDATES
from tuner.run import RunFiles
from tuner.study import BASELINE
from tuner.tensorboard import OUTCOME_TAG, OUTCOMES, TensorBoard

TRIALS = 12
DIVERGES = 1e12
RATES = [round(0.0015 + 0.0001 * step, 4) for step in range(30)]
STATUS = {"running": 0, "pruned": 0, "complete": 1, "failed": 2}  # HParams': unknown, unknown, success, failure


class Board:
    """A log directory as TensorBoard's server sees it."""

    def __init__(self, logdir: Path):
        self.events = plugin_event_multiplexer.EventMultiplexer(
            tensor_size_guidance={"images": 0}, purge_orphaned_data=False
        )
        self.events.AddRunsFromDirectory(str(logdir))
        self.events.Reload()
        provider = data_provider.MultiplexerDataProvider(self.events, str(logdir))
        tensorboard = base_plugin.TBContext(logdir=str(logdir), multiplexer=self.events, data_provider=provider)
        self.hparams = backend_context.Context(tensorboard)

    def experiment(self) -> api_pb2.Experiment:
        request = api_pb2.GetExperimentRequest(hparams_limit=0)
        return get_experiment.Handler(context.RequestContext(), self.hparams, "1", request).run()

    def outcomes(self) -> dict[int, str]:
        """The outcome of each trial that HParams lists, by the outcome metric; its own status agrees."""
        request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=1000, allowed_statuses=[0, 1, 2, 3])
        groups = list_session_groups.Handler(context.RequestContext(), self.hparams, "1", request).run().session_groups
        found = {}
        for group in groups:
            values = {metric.name.tag: metric.value for metric in group.metric_values}
            outcome = OUTCOMES[round(values[OUTCOME_TAG])] if OUTCOME_TAG in values else "running"
            found[round(group.hparams["trial"].number_value)] = outcome
            assert group.sessions[0].status in (STATUS[outcome], 0)
        return found

    def runs(self) -> dict[int, str]:
        """Trial number -> name of its run."""
        return {int(name[:4]): name for name in self.events.Runs() if name[:4].isdigit()}

    def tags(self, run: str) -> set[str]:
        return set(self.events.GetAccumulator(run).Tags()["tensors"])


@pytest.fixture(scope="module")
def search_with_a_diverging_trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFiles, dict[int, str]]:
    """A finished run, and what HParams listed when all trials had started and one still ran."""
    path = tmp_path_factory.mktemp("views") / "run"
    command = [
        sys.executable, "-m", "tuner.search", "--run", str(path), f"--trials={TRIALS}", "--concurrency=3",
        "--set=budget.max_epochs=4", "--set=budget.grace_epochs=1", "--set=budget.reduction_factor=2",
        f"--set=space.learning_rate={{choices: {[*RATES, DIVERGES]}}}", "--no-retrain",
        f"--set=points_to_evaluate=[{{learning_rate: {DIVERGES}}}]",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    listed: dict[int, str] = {}
    while process.poll() is None:
        if (path / "tensorboard").is_dir():
            now = Board(path / "tensorboard").outcomes()
            if len(now) == TRIALS and "running" in now.values():
                listed = now
        time.sleep(0.5)  # reading costs the search a core
    assert process.wait() == 0, process.stderr.read() if process.stderr else ""
    return RunFiles(path), listed


@pytest.mark.slow
def test_hparams_lists_every_trial_while_the_search_runs(search_with_a_diverging_trial):
    run, listed = search_with_a_diverging_trial
    assert sorted(listed) == list(range(TRIALS))
    final = {row["trial"]: row["state"] for row in run.read_trials()}
    assert {number: outcome for number, outcome in listed.items() if outcome != "running"}.items() <= final.items()


@pytest.mark.slow
def test_hparams_outcomes_are_those_of_the_study(search_with_a_diverging_trial):
    run, _ = search_with_a_diverging_trial
    final = {row["trial"]: row["state"] for row in run.read_trials()}
    assert Board(run.tensorboard).outcomes() == final
    assert final[1] == "failed"
    assert {"complete", "pruned", "failed"} == set(final.values())


@pytest.mark.slow
def test_of_more_trials_than_are_promoted_the_checkpoints_of_these_and_the_baseline_are_kept(
    search_with_a_diverging_trial,
):
    run, _ = search_with_a_diverging_trial
    promoted = [entry["trial"] for entry in run.summary()["promotion"]]
    assert len(promoted) == CANDIDATES < TRIALS - 2
    kept = sorted({BASELINE, *promoted})
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"{number:04d}.pt" for number in kept]


@pytest.mark.slow
def test_hparams_know_domains_and_metrics(search_with_a_diverging_trial):
    run, _ = search_with_a_diverging_trial
    experiment = Board(run.tensorboard).experiment()
    infos = {info.name: info for info in experiment.hparam_infos}
    assert set(infos) == {"trial", "latent_dim", "learning_rate", "kl_weight"}
    assert (infos["latent_dim"].domain_interval.min_value, infos["latent_dim"].domain_interval.max_value) == (4, 32)
    assert infos["kl_weight"].domain_interval.max_value == 3
    assert set(infos["learning_rate"].domain_discrete) >= {DIVERGES, RATES[0]}
    assert "objective/frechet_distance" in {info.name.tag for info in experiment.metric_infos}


@pytest.mark.slow
def test_stopped_trials_have_their_pictures_and_failed_ones_their_reason(search_with_a_diverging_trial):
    run, _ = search_with_a_diverging_trial
    board = Board(run.tensorboard)
    pictures = {
        "samples/fitted_prior",
        "samples/standard_normal",
        "reconstructions/above_and_below",
        "latent/traversal",
    }
    for row in run.read_trials():
        tags = board.tags(board.runs()[row["trial"]])
        if row["state"] == "failed":
            assert "outcome/reason/text_summary" in tags
        else:
            assert pictures | {"objective/frechet_distance", "loss/loss", "latent/active_units"} <= tags


@pytest.mark.slow
def test_steps_are_epochs_and_a_run_is_named_by_its_parameters(search_with_a_diverging_trial):
    run, _ = search_with_a_diverging_trial
    board = Board(run.tensorboard)
    name = board.runs()[0]
    assert name == "0000,latent_dim=16,learning_rate=0.001,kl_weight=1"
    assert [event.step for event in board.events.Tensors(name, "loss/loss")] == [1, 2, 4]


def test_the_retrain_and_the_projector_stand_beside_the_trials(finished_run: RunFiles):
    board = Board(finished_run.tensorboard)
    assert [event.step for event in board.events.Tensors("retrain", "loss/loss")] == [1, 2, 3, 4]
    projector = finished_run.tensorboard / "projector"
    assert (projector / "projector_config.pbtxt").exists()
    assert len(list(projector.rglob("sprite.png"))) == 1
    labels = next(projector.rglob("metadata.tsv")).read_text().split()
    assert len(labels) == 400
    assert set(labels) == set("0123456789")


def test_fractions_of_an_epoch_get_steps_of_their_own(tmp_path: Path, finished_run: RunFiles):
    for grace, steps in ((1, 1), (0.5, 10), (0.25, 100), (0.125, 1000)):
        spec = specs.load(finished_run.spec, [("budget.grace_epochs", grace)])
        assert TensorBoard(tmp_path, spec).steps_per_epoch == steps
