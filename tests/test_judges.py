"""Judges: trained in a process of their own, kept by the run."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tuner.exits import CutOff
from tuner.judges import Judges
from tuner.run import Run
from tuner.spec import Spec
from tuner.vae.judge import train_judge
from tuner.vae.process import settle
from tuner.vae.train import Stream, derive_seed
from tuner.workspace import JUDGES, load_judges

SPEC = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 8]}}, "seed": 3})
NEVER_READ = Path("never read")


def test_a_judge_trained_beside_the_driver_is_the_one_that_its_seed_gives_here_and_is_kept(workspace, tmp_path):
    run = Run(tmp_path)
    with Judges(run, SPEC, workspace.data, NEVER_READ) as judges:
        assert judges.in_training() == 1
        while not judges.kept:
            judges.keep_done()
            time.sleep(0.05)
        assert judges.in_training() == 0
    settle()
    here = train_judge(workspace.data, derive_seed(SPEC.seed, Stream.JUDGE, 0), *JUDGES["search"]).state_dict()
    for kept in (judges.kept["search"], load_judges(run)["search"]):
        assert all(torch.equal(kept.state_dict()[key], here[key]) for key in here)
    with Judges(run, SPEC, workspace.data, NEVER_READ) as again:
        assert again.in_training() == 0
        assert again.kept.keys() == {"search"}


def test_a_judge_whose_process_dies_cuts_the_command_off(workspace, tmp_path):
    with Judges(Run(tmp_path), SPEC, workspace.data, NEVER_READ) as judges:
        process, _ = judges.training["search"]
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(CutOff, match=r"^the process that trains the search judge died \(-9\)$"):
            judges.keep("search")
    assert load_judges(Run(tmp_path)) == {}


def test_what_still_trains_at_the_end_is_ended(workspace, tmp_path):
    with Judges(Run(tmp_path), SPEC, workspace.data, NEVER_READ) as judges:
        process, _ = judges.training["search"]
        assert process.is_alive()
    assert not process.is_alive()
