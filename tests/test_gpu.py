"""A cluster that counts a GPU, on a machine that need have none: who holds it, and when. The numbers are the CPU's."""

import sys
from collections.abc import Iterator

import pytest
import ray
from ray import cloudpickle

from tuner.cluster import cluster
from tuner.extractors import FeatureExtractors
from tuner.fusion import GPU_LEFT, fusion
from tuner.job import load_spec
from tuner.pool import RayPool
from tuner.run import RunFiles
from tuner.scoring import Bench, Evaluator
from tuner.search import parse, request
from tuner.spec import Resources, Spec
from tuner.trials import search_stage
from tuner.vae.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

SMALL = ["--trials=2", "--max-epochs=1", "--set=budget.grace_epochs=1", "--set=objective=[frechet_distance, mse]"]


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
        with cluster(None, 4, Resources()):
            yield


@pytest.fixture(scope="module", autouse=True)
def _works_travel_by_value() -> None:
    """Ray's workers can't import the modules of tests."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def given_gpus(bench: Bench) -> list[object]:
    return list(ray.get_gpu_ids())


def test_arrays_train_and_score_on_the_gpu_and_then_let_go_of_it(workspace, lend_extractors, gpu_cluster, tmp_path):
    run = RunFiles(tmp_path)
    spec = load_spec(run, request(parse(SMALL)))
    pool = RayPool(spec, workspace.data, concurrency=2)
    workers = pool(Bench(spec, workspace.data, {}))
    lend_extractors(run)
    extractors = FeatureExtractors(run, spec, workspace.data, workers)
    rows = search_stage(run, spec, pool, extractors)
    assert [row["state"] for row in rows] == ["complete"] * 2
    evaluate = Evaluator(spec, workspace.data, lambda: extractors.kept["search"])
    for row in rows:
        checkpoint = Checkpoint.from_bytes(run.checkpoint(row["trial"]).read_bytes())
        scores = evaluate(checkpoint.state.model, checkpoint.parameters, row["epoch"]).scores
        assert row["frechet_distance"] == pytest.approx(scores["frechet_distance"], rel=1e-4)
    at_once = round(1 / GPU_LEFT)
    assert all(workers.map(given_gpus, [()] * (at_once + 1)))


@pytest.mark.parametrize(
    ("overrides", "arrays"),
    [({}, 1), ({"execution": "process"}, 0), ({"fixed": {"pixels": "binary", "likelihood": "bernoulli"}}, 0)],
)
def test_where_there_is_a_gpu_trials_are_fused_unless_the_spec_keeps_them_apart(
    workspace, gpu_cluster, overrides, arrays
):
    spec = Spec.model_validate({"space": {"latent_dim": {"choices": [3, 5]}}, **overrides})
    with fusion(spec, ray.put(workspace.data), 8) as found:
        assert len(found.arrays) == arrays
        assert found.scores == bool(arrays)
        assert not found.resources.gpu


def test_beside_arrays_extractors_are_made_with_what_these_leave(workspace, gpu_cluster):
    spec = Spec.model_validate({"space": {"latent_dim": {"choices": [3, 5]}}})
    workers = RayPool(spec, workspace.data)(Bench(spec, workspace.data, {}))
    with fusion(spec, ray.put(workspace.data), 8):
        assert workers.begin(given_gpus, ()).result()
    apart = spec.model_copy(update={"execution": "process"})
    assert not RayPool(apart, workspace.data)(Bench(apart, workspace.data, {})).begin(given_gpus, ()).result()
