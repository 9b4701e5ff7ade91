"""TensorBoard's own backend reads what the driver wrote, while trials run and after."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tensorboard.util import tensor_util

from tuner import spec as specs
from tuner.data_spec import TorchvisionSpec
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.study import RETRAIN, read_study, table
from tuner.tensorboard import NUMBERS, OUTCOME_TAG, SPRITE, TensorBoard
from tuner.vae.image_grid import png

OUTCOMES = {number: outcome for outcome, number in NUMBERS.items()}
STATUS = {"running": 0, "pruned": 0, "complete": 1, "failed": 2}  # HParams': unknown, unknown, success, failure
ENDS = {0: "complete", 1: "failed", 2: "pruned"}
PICTURES = {
    "samples/fitted_prior",
    "samples/standard_normal",
    "reconstructions/above_and_below",
    "latent/traversal",
    "latent/interpolation",
}


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

    def groups(self) -> Sequence[api_pb2.SessionGroup]:
        """The rows of HParams' table."""
        request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=1000, allowed_statuses=[0, 1, 2, 3])
        return list_session_groups.Handler(context.RequestContext(), self.hparams, "1", request).run().session_groups

    def outcomes(self) -> dict[int, str]:
        """The outcome of each trial that HParams lists, by the outcome metric; its own status agrees."""
        found = {}
        for group in self.groups():
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


def spec_of(**budget: Any) -> Spec:
    space = {
        "latent_dim": {"type": "int", "low": 4, "high": 12},
        "learning_rate": {"choices": [1e-3, 1e12]},
        "kl_weight": {"type": "float", "low": 0.01, "high": 3, "log": True},
    }
    return Spec.model_validate(
        {"space": space, "budget": {"trials": 4, "max_epochs": 4, "reduction_factor": 2} | budget}
    )


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four trials, the last of which still runs."""
    directory = tmp_path_factory.mktemp("logs")
    board = TensorBoard(directory, spec_of())
    board.start_search()
    picture = png(np.zeros((28, 28), np.uint8))
    for number in range(4):
        board.start_trial(number, {"latent_dim": 16, "learning_rate": 1e-3, "kl_weight": 1.0})
    for number, epochs in {0: (1, 2, 4), 2: (1,), 3: (1, 2)}.items():
        for epoch in epochs:
            board.add_trial(
                number, {"epoch": epoch, "loss": 9.0, "frechet_distance": 10.0 - epoch}, {"picture": picture}
            )
    for number, outcome in ENDS.items():
        board.end_trial(number, outcome, "" if outcome == "complete" else f"why it {outcome}")
    return directory


def test_hparams_lists_every_trial_while_it_runs_and_with_its_end(logdir):
    assert Board(logdir).outcomes() == ENDS | {3: "running"}


def test_a_trial_is_listed_from_its_first_second(tmp_path):
    board = TensorBoard(tmp_path, spec_of())
    board.start_search()
    board.start_trial(0, {"latent_dim": 4, "learning_rate": 1e-3, "kl_weight": 0.5})
    assert Board(tmp_path).outcomes() == {0: "running"}
    board.close()


def test_trials_of_the_same_number_of_two_runs_under_one_folder_are_two(tmp_path):
    for run in ("a/mnist", "b/mnist", "c"):
        board = TensorBoard(tmp_path / run / "tensorboard", spec_of())
        board.start_search()
        for number in range(2):
            board.start_trial(number, {"latent_dim": 4, "learning_rate": 1e-3, "kl_weight": 0.5})
        board.close()
    groups = Board(tmp_path).groups()
    names = [f"{run}/tensorboard/{number:04d}" for run in ("a/mnist", "b/mnist", "c") for number in range(2)]
    assert sorted(group.name.partition(",")[0] for group in groups) == names
    assert all(len(group.sessions) == 1 for group in groups)


def test_a_search_that_goes_on_with_more_trials_declares_them(tmp_path):
    for trials in (4, 9):
        board = TensorBoard(tmp_path, spec_of(trials=trials))
        board.start_search()
        board.close()
    (info,) = (info for info in Board(tmp_path).experiment().hparam_infos if info.name == "trial")
    assert info.domain_interval.max_value == 8


def test_a_finalist_has_its_curves_and_its_end_but_is_no_session_of_hparams(tmp_path):
    search, board = TensorBoard(tmp_path, spec_of()), TensorBoard(tmp_path, spec_of().of_retrain(2, 0), RETRAIN)
    parameters = {"latent_dim": 4, "learning_rate": 1e-3, "kl_weight": 0.5}
    search.start_search()
    search.start_trial(0, parameters)
    board.start_trial(0, parameters)
    for epoch in (5, 10):
        board.add_trial(0, {"epoch": epoch, "loss": 9.0, "frechet_distance": 10.0 - epoch}, {})
    board.end_trial(0, "failed", "diverged: by plan")
    search.close()
    shown, name = Board(tmp_path), "retrain-0,latent_dim=4,learning_rate=0.001,kl_weight=0.5"
    assert set(shown.events.Runs()) == {".", shown.runs()[0], name}
    assert [event.step for event in shown.events.Tensors(name, "objective/frechet_distance")] == [5, 10]
    scalars = {"objective/frechet_distance", "loss/loss", OUTCOME_TAG}
    assert shown.tags(name) == scalars | {"outcome/reason/text_summary"}
    last = shown.events.Tensors(name, OUTCOME_TAG)[-1]
    assert OUTCOMES[round(float(tensor_util.make_ndarray(last.tensor_proto)))] == "failed"
    assert shown.outcomes() == {0: "running"}


def test_hparams_know_domains_and_metrics(logdir):
    experiment = Board(logdir).experiment()
    infos = {info.name: info for info in experiment.hparam_infos}
    assert set(infos) == {"trial", "latent_dim", "learning_rate", "kl_weight"}
    latents = infos["latent_dim"].domain_interval
    assert (latents.min_value, latents.max_value) == (4, 16), "the baseline lies outside of what is searched"
    assert infos["kl_weight"].domain_interval.max_value == 3
    assert set(infos["learning_rate"].domain_discrete) == {1e-3, 1e12}
    assert {"objective/frechet_distance", OUTCOME_TAG} <= {info.name.tag for info in experiment.metric_infos}


@pytest.mark.parametrize("choices", [[0.1, 0.5, 1], [True, False], [1, 2], ["a/b", "[/c]", "../../up", "x" * 300]])
def test_whatever_a_list_holds_is_a_domain_and_names_one_folder_a_trial(tmp_path, choices):
    space = {"model.option": {"choices": choices}, "latent_dim": {"type": "int", "low": 4, "high": 8}}
    board = TensorBoard(tmp_path / "deep" / "there", Spec.model_validate({"space": space}))
    board.start_search()
    for number, value in enumerate(choices):
        board.start_trial(number, {"model.option": value, "latent_dim": 4})
        board.end_trial(number, "failed", "error: <b>__init__</b> [a](b)")
    board.close()
    assert len(list((tmp_path / "deep" / "there").iterdir())) == len(choices) + 1  # and what is said of all
    assert len(list((tmp_path / "deep").iterdir())) == len(list(tmp_path.iterdir())) == 1
    shown = Board(tmp_path / "deep" / "there")
    infos = {info.name: info for info in shown.experiment().hparam_infos}
    assert sorted(infos["model.option"].domain_discrete) == sorted(choices)
    assert shown.outcomes() == dict.fromkeys(range(len(choices)), "failed")
    reason = shown.events.Tensors(shown.runs()[0], "outcome/reason/text_summary")[0].tensor_proto
    told = markdown_to_safe_html(tensor_util.make_ndarray(reason).item())
    assert "&lt;b&gt;__init__&lt;/b&gt; [a](b)" in told


def test_trials_have_their_pictures_and_those_that_ended_early_their_reason(logdir):
    board = Board(logdir)
    tags = {number: board.tags(name) for number, name in board.runs().items()}
    assert all({"objective/frechet_distance", "loss/loss", "picture"} <= tags[number] for number in (0, 2, 3))
    assert "loss/loss" not in tags[1]
    assert {number for number in tags if "outcome/reason/text_summary" in tags[number]} == {1, 2}


def test_steps_are_epochs_and_a_run_is_named_by_its_parameters(logdir):
    board = Board(logdir)
    name = board.runs()[0]
    assert name == "0000,latent_dim=16,learning_rate=0.001,kl_weight=1"
    assert [event.step for event in board.events.Tensors(name, "loss/loss")] == [1, 2, 4]


def test_a_real_search_is_shown_as_its_study_says(finished_run: RunFiles):
    board = Board(finished_run.tensorboard)
    rows = table(read_study(finished_run.journal), specs.load(finished_run.spec))
    assert board.outcomes() == {row["trial"]: row["state"] for row in rows}
    for row in rows:
        if row["epochs_trained"]:
            assert PICTURES | {"objective/frechet_distance", "loss/loss"} <= board.tags(board.runs()[row["trial"]])


def test_the_retrain_and_the_projector_stand_beside_the_trials(finished_run: RunFiles):
    board, spec = Board(finished_run.tensorboard), specs.load(finished_run.spec)
    assert board.outcomes().keys() == set(range(spec.budget.trials)), "HParams takes no finalist for a trial"
    for number, entry in enumerate(finished_run.summary().promotion[: spec.retrain.finalists]):
        (name,) = (name for name in board.events.Runs() if name.startswith(f"retrain-{number},"))
        assert name.partition(",")[2] == board.runs()[entry.trial].partition(",")[2], "the parameters of its trial"
        assert PICTURES | {"objective/frechet_distance", OUTCOME_TAG} <= board.tags(name)
        assert [event.step for event in board.events.Tensors(name, "loss/loss")] == [1, 2, 3, 4]
        assert not any(tag.startswith("_hparams_") for tag in board.tags(name))
    projector = finished_run.tensorboard / "projector"
    assert (projector / "projector_config.pbtxt").exists()
    assert len(list(projector.rglob("sprite.png"))) == 1
    assert np.asarray(Image.open(next(projector.rglob("sprite.png"))))[0, 0].tolist() == [255] * 3, "ink is dark"
    labels = next(projector.rglob("metadata.tsv")).read_text().split()
    assert len(labels) == 400
    assert set(labels) == set("0123456789")


def test_without_labels_the_projector_shows_images_alone(tmp_path: Path):
    board = TensorBoard(tmp_path, spec_of())
    board.embed(torch.randn(9, 4), None, torch.rand(9, 1, 28, 28))
    board.close()
    projector = tmp_path / "projector"
    assert len(list(projector.rglob("sprite.png"))) == 1
    assert not list(projector.rglob("metadata.tsv"))


@pytest.mark.parametrize(("grace", "steps"), [(1, 1), (0.5, 10), (0.25, 100), (0.125, 1000)])
def test_fractions_of_an_epoch_get_steps_of_their_own(tmp_path: Path, grace, steps):
    assert TensorBoard(tmp_path, spec_of(grace_epochs=grace)).steps_per_epoch == steps


def colour_spec() -> Spec:
    return spec_of().model_copy(update={"data": TorchvisionSpec(name="cifar10")})


def test_colour_pictures_come_back_pixel_by_pixel(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    board = TensorBoard(tmp_path, colour_spec())
    board.start_trial(0, {})
    board.add_trial(0, {"epoch": 1.0}, {"samples": png(picture)})
    board.close()
    (event,) = Board(tmp_path).events.Tensors("0000", "samples")
    encoded = event.tensor_proto.string_val[2]  # after width and height
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), picture)


def test_sprites_are_small_and_photos_are_not_inverted_and_need_no_labels(tmp_path):
    board = TensorBoard(tmp_path, colour_spec())
    images = torch.tensor([[0.2, 0.4, 0.6], [1.0, 0.0, 0.0]])[:, :, None, None].expand(2, 3, 64, 64)
    board.embed(torch.zeros(2, 5), None, images)
    sprite = np.asarray(Image.open(next(tmp_path.rglob("sprite.png"))))
    assert sprite.shape == (2 * SPRITE, 2 * SPRITE, 3)
    assert sprite[0, 0].tolist() == [51, 102, 153]
    assert sprite[0, -1].tolist() == [255, 0, 0]
    assert not list(tmp_path.rglob("metadata.tsv"))
