"""FeatureExtractors: trained in a process of their own, kept by the run."""

import os
import signal
import time

import pytest
import torch

from tuner.exits import CutOff
from tuner.extractors import FeatureExtractors, load_extractors
from tuner.run import RunFiles
from tuner.spec import Spec
from tuner.vae.data import Data, Split
from tuner.vae.extractor import train_classifier
from tuner.vae.process import settle
from tuner.vae.seeds import Stream, derive_seed

SPEC = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 8]}}, "seed": 3})


@pytest.mark.slow
def test_an_extractor_trained_beside_the_driver_is_the_one_that_its_seed_gives_here_and_is_kept(workspace, tmp_path):
    run = RunFiles(tmp_path)
    with FeatureExtractors(run, SPEC, workspace.data) as extractors:
        assert extractors.in_training() == 1
        while not extractors.kept:
            extractors.keep_done()
            time.sleep(0.05)
        assert extractors.in_training() == 0
    settle()
    here = train_classifier(workspace.data, derive_seed(SPEC.seed, Stream.EXTRACTOR, 0)).state_dict()
    for kept in (extractors.kept["search"], load_extractors(run)["search"]):
        assert all(torch.equal(kept.state_dict()[key], here[key]) for key in here)
    with FeatureExtractors(run, SPEC, workspace.data) as again:
        assert again.in_training() == 0
        assert again.kept.keys() == {"search"}


def test_an_extractor_whose_process_dies_cuts_the_command_off(workspace, tmp_path):
    with FeatureExtractors(RunFiles(tmp_path), SPEC, workspace.data) as extractors:
        process, _ = extractors.training["search"]
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(CutOff, match=r"^the process that trains the search extractor died \(-9\)$"):
            extractors.keep("search")
    assert load_extractors(RunFiles(tmp_path)) == {}


def test_what_still_trains_at_the_end_is_ended(workspace, tmp_path):
    with FeatureExtractors(RunFiles(tmp_path), SPEC, workspace.data) as extractors:
        process, _ = extractors.training["search"]
        assert process.is_alive()
    assert not process.is_alive()


def test_what_needs_no_training_is_kept_at_once_and_no_process_is_started(tmp_path):
    images = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8)
    run, data = RunFiles(tmp_path), Data(Split(images[:20]), Split(images[20:]))
    with FeatureExtractors(run, SPEC, data) as extractors:
        assert (extractors.in_training(), extractors.keep("search").kind) == (0, "untrained")
        extractors.begin("second")
        assert not extractors.training
    assert {name: info.kind for name, info in run.summary().extractors.items()} == {
        "search": "untrained",
        "second": "wavelets",
    }
    with FeatureExtractors(run, SPEC, data) as again:
        assert again.kept.keys() == {"search", "second"}
