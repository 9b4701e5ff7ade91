"""FeatureExtractors: made by the workers, kept by the run."""

import os
import time

import pytest
import torch
from plain_pool import PlainWorkers

from tuner.extractor_cache import MOST, ExtractorCache
from tuner.extractors import FeatureExtractors, load_extractors
from tuner.pool import RayPool
from tuner.run import RunFiles
from tuner.scoring import Bench, search_scorer
from tuner.spec import Spec
from tuner.summary import EXTRACTORS, ExtractorInfo
from tuner.vae.data import Data, Split
from tuner.vae.extractor import train_classifier
from tuner.vae.seeds import Stream, derive_seed

SPEC = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 8]}}, "seed": 3})

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.mark.slow
def test_an_extractor_trained_on_the_cluster_is_the_one_that_its_seed_gives_here_and_is_kept(
    workspace, ray_cluster, tmp_path
):
    run, workers = RunFiles(tmp_path), RayPool(SPEC, workspace.data)(Bench(SPEC, workspace.data, {}))
    extractors = FeatureExtractors(run, SPEC, workspace.data, workers)
    assert extractors.awaited() == 1
    while not extractors.kept:
        extractors.keep_done()
        time.sleep(0.05)
    assert extractors.awaited() == 0
    here = train_classifier(workspace.data, derive_seed(SPEC.seed, Stream.EXTRACTOR, 0))
    weights = here.state_dict()
    for kept in (extractors.kept["search"], load_extractors(run)["search"]):
        assert all(torch.equal(kept.state_dict()[key], weights[key]) for key in weights)
    floor = search_scorer(SPEC, workspace.data, here).floor
    assert run.summary().extractors["search"].floor == pytest.approx(floor, rel=1e-9)
    again = FeatureExtractors(run, SPEC, workspace.data, workers)
    assert again.awaited() == 0
    assert again.kept.keys() == {"search"}


def test_those_that_a_run_has_are_not_made_again(lend_extractors, bench, tmp_path):
    run = RunFiles(tmp_path)
    lend_extractors(run)
    extractors = FeatureExtractors(run, bench.spec, bench.data, PlainWorkers(bench))
    extractors.begin_all()
    for name in EXTRACTORS:
        assert extractors.keep(name) is extractors.kept[name]
    assert (extractors.awaited(), extractors.keep_done(), extractors.begun) == (0, [], {})


def labelled(count: int) -> Data:
    """Blank images and images with a spot, as many of each."""
    images = torch.zeros(count, 1, 16, 16, dtype=torch.uint8)
    images[::2, :, 4:8, 4:8] = 255
    images[:, :, 0, 0] = torch.arange(count, dtype=torch.uint8).unsqueeze(1)
    labels = torch.arange(count) % 2
    return Data(Split(images[20:], labels[20:]), Split(images[:20], labels[:20]))


def test_classifiers_are_begun_and_kept_once_they_are_there(tmp_path):
    run, data = RunFiles(tmp_path), labelled(60)
    extractors = FeatureExtractors(run, SPEC, data, PlainWorkers(Bench(SPEC, data, {})))
    assert list(extractors.begun) == ["search"]
    extractors.begin("search")
    assert (list(extractors.begun), run.summary().extractors) == (["search"], {})
    assert extractors.keep_done() == ["search"]
    assert extractors.keep_done() == []
    extractors.keep("second")
    described = run.summary().extractors
    assert {name: info.kind for name, info in described.items()} == {"search": "classifier", "second": "classifier"}
    for name, extractor in load_extractors(run).items():
        assert 0.5 <= described[name].accuracy <= 1
        assert described[name].floor == search_scorer(SPEC, data, extractor).floor


def test_another_run_on_the_same_images_takes_them_from_the_cache(empty_cache, tmp_path):
    data = labelled(60)
    bench = Bench(SPEC, data, {})

    def begun(folder: str, spec: Spec = SPEC, images: Data = data) -> tuple[RunFiles, FeatureExtractors]:
        run = RunFiles(tmp_path / folder)
        extractors = FeatureExtractors(run, spec, images, PlainWorkers(bench))
        extractors.begin_all()
        return run, extractors

    run, extractors = begun("first")
    assert list(extractors.begun) == ["search", "second"]
    assert extractors.keep_done() == ["search", "second"]
    again, taken = begun("second")
    assert (taken.begun, taken.awaited()) == ({}, 0)
    assert again.summary().extractors == run.summary().extractors
    for name in EXTRACTORS:
        files = [each.extractor(name).read_bytes() for each in (run, again)]
        assert files[0] == files[1]

    other = labelled(60)
    other.train.labels[0] = 1 - other.train.labels[0]
    assert list(begun("other labels", images=other)[1].begun) == ["search", "second"]
    assert list(begun("other seed", SPEC.model_copy(update={"seed": 4}))[1].begun) == ["search", "second"]
    for file in empty_cache.glob("second-*.safetensors"):
        file.write_bytes(b"damaged")
    assert list(begun("damaged")[1].begun) == ["second"]


def test_a_cache_that_cannot_be_written_or_read_is_as_good_as_none(empty_cache, tmp_path):
    empty_cache.parent.write_text("a file in the place of the folder")
    data = labelled(60)
    extractors = FeatureExtractors(RunFiles(tmp_path / "run"), SPEC, data, PlainWorkers(Bench(SPEC, data, {})))
    assert extractors.keep("search") is extractors.kept["search"]


def test_the_cache_forgets_the_oldest(empty_cache):
    cache = ExtractorCache(labelled(60), 0)
    info = ExtractorInfo(kind="classifier", sha256="0", floor=1)
    for number in range(MOST):
        cache.keep(f"{number}", b"", info)
        for file in empty_cache.glob(f"{number}-*"):
            os.utime(file, (number, number))
    left = {path.name.partition("-")[0] for path in empty_cache.iterdir()}
    assert left == {f"{number}" for number in range(MOST // 2, MOST)}


def test_without_labels_they_are_made_as_classifiers_are(tmp_path):
    images = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8)
    run, data = RunFiles(tmp_path), Data(Split(images[:20]), Split(images[20:]))
    workers = PlainWorkers(Bench(SPEC, data, {}))
    extractors = FeatureExtractors(run, SPEC, data, workers)
    assert (list(extractors.begun), run.summary().extractors) == (["search"], {})
    extractors.begin_all()
    assert extractors.keep_done() == ["search", "second", "guide"]
    kinds = {name: info.kind for name, info in run.summary().extractors.items()}
    assert kinds == {"search": "untrained", "second": "wavelets", "guide": "rotations"}
    assert FeatureExtractors(run, SPEC, data, workers).kept.keys() == kinds.keys()


def test_a_users_program_travels_to_the_workers_which_need_not_have_its_file(workspace, ray_cluster, tmp_path):
    path = tmp_path / "features.pt2"
    network = torch.nn.Sequential(torch.nn.AvgPool2d(7), torch.nn.Flatten())
    sizes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(network, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=sizes), path)
    run, spec = RunFiles(tmp_path / "run"), Spec.model_validate(SPEC.model_dump() | {"features": str(path)})
    workers = RayPool(spec, workspace.data)(Bench(spec, workspace.data, {}))
    extractors = FeatureExtractors(run, spec, workspace.data, workers)
    path.unlink()
    assert extractors.keep("search").kind == "program"
    assert run.extractor("search", "program").stat().st_size > 0
    floor = search_scorer(spec, workspace.data, extractors.kept["search"]).floor
    assert run.summary().extractors["search"].floor == pytest.approx(floor, rel=1e-9)
