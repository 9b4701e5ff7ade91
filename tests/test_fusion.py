"""Trials fused behind real Ray get the scores they get in processes of their own, whatever happens to their array."""

import threading
from pathlib import Path

import pytest
import ray

from tuner.extractors import FeatureExtractors
from tuner.fusion import fusion, train_fused
from tuner.job import load_spec
from tuner.pool import RayPool
from tuner.run import RunFiles
from tuner.scoring import Bench
from tuner.search import parse, request
from tuner.spec import Spec
from tuner.trials import search_stage
from tuner.vae.losses import Diverged
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.vae.train import train

build = Builder(ImageShape(1, 28, 28))

pytestmark = pytest.mark.slow

POINTS = (
    "[{latent_dim: 8, learning_rate: 0.002, kl_weight: 0.1}, {latent_dim: 4, learning_rate: 0.004, kl_weight: 0.05}]"
)
SMALL = [
    "--trials=3",
    "--max-epochs=1",
    "--set=budget.grace_epochs=1",
    "--set=objective=[frechet_distance, mse]",  # with two objectives nothing is stopped early
    f"--set=points_to_evaluate={POINTS}",
    "--no-retrain",
]
GOOD = Parameters(latent_dim=3, learning_rate=2e-3, kl_weight=0.1, batch_size=32)
SPEC = Spec.model_validate(
    {"space": {"latent_dim": {"choices": [3, 5]}}, "fixed": {"batch_size": 32}, "budget": {"max_epochs": 4}}
)


def rows_of(workspace, lend_extractors, folder: Path, execution: str) -> list[dict]:
    run = RunFiles(folder / execution)
    spec = load_spec(run, request(parse([*SMALL, f"--set=execution={execution}"])))
    lend_extractors(run)
    pool = RayPool(spec, workspace.data, concurrency=2)
    extractors = FeatureExtractors(run, spec, workspace.data, pool(Bench(spec, workspace.data, {})))
    return search_stage(run, spec, pool, extractors)


@pytest.mark.long
def test_a_fused_search_gets_the_scores_of_one_in_processes(workspace, lend_extractors, ray_cluster, tmp_path):
    alone, fused = (rows_of(workspace, lend_extractors, tmp_path, execution) for execution in ("process", "fused"))
    assert [row["state"] for row in fused] == [row["state"] for row in alone] == ["complete"] * 3
    for ours, theirs in zip(fused, alone, strict=True):
        assert ours["latent_dim"] == theirs["latent_dim"]
        for name in ("frechet_distance", "mse", "rate", "loss"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-2), name


def test_an_array_that_dies_starts_again_and_its_trials_go_on(workspace, ray_cluster):
    images = workspace.data.train.images
    with fusion(SPEC.model_copy(update={"execution": "fused"}), ray.put(workspace.data), concurrency=2) as fused:
        host = fused.arrays[0]
        state = State.fresh(build, GOOD, 0, 1)
        records = train_fused(host, len(images), state, GOOD, SPEC, 1)
        assert next(records).epoch == 1
        killer = threading.Timer(0.2, ray.kill, [host], {"no_restart": False})
        killer.start()
        rest = list(records)
        killer.join()
    assert [record.epoch for record in rest] == [3, 4]
    straight = list(train(State.fresh(build, GOOD, 0, 1), GOOD, images, [1, 3, 4], seed=0, trial=1, total_epochs=4))
    assert [record.loss for record in rest] == pytest.approx([record.loss for record in straight[1:]], rel=1e-3)


def test_a_trial_that_diverges_is_told_so_through_ray(workspace, ray_cluster):
    wild = GOOD.model_copy(update={"learning_rate": 1e10})
    other = GOOD.model_copy(update={"width": 4, "latent_dim": 5})  # another shape: an array of its own
    images = len(workspace.data.train.images)
    with fusion(SPEC.model_copy(update={"execution": "fused"}), ray.put(workspace.data), concurrency=2) as fused:
        (host,) = fused.arrays
        with pytest.raises(Diverged, match="not finite at epoch"):
            list(train_fused(host, images, State.fresh(build, wild, 0, 1), wild, SPEC, 1))
        assert next(train_fused(host, images, State.fresh(build, other, 0, 2), other, SPEC, 2)).epoch == 1


@pytest.mark.parametrize(("execution", "arrays"), [("process", 0), ("auto", 0), ("fused", 1)])
def test_without_a_gpu_trials_are_fused_where_the_spec_says_so(workspace, ray_cluster, execution, arrays):
    with fusion(SPEC.model_copy(update={"execution": execution}), ray.put(workspace.data), 8) as found:
        assert len(found.arrays) == arrays
        assert not found.scores
        assert found.resources.cpu == (SPEC.resources.cpu if not arrays else pytest.approx(4 / 8))


def test_the_widest_trial_of_a_spec_is_the_baseline_or_the_end_of_the_space():
    assert SPEC.widest == 16
    wide = {"space": {"latent_dim": {"type": "int", "low": 4, "high": 64}}}
    assert Spec.model_validate(wide).widest == 64
    assert Spec.model_validate({"space": {"kl_weight": {"choices": [1.0]}}, "fixed": {"latent_dim": 99}}).widest == 99
