"""Seeds: pinned, well mixed, and never shared by two purposes."""

import sys
from itertools import product

import pytest
import torch

from tuner.vae.extractor import Classifier
from tuner.vae.fitted import Fitter
from tuner.vae.model import Builder
from tuner.vae.parameters import Parameters
from tuner.vae.score import Scorer
from tuner.vae.seeds import Scoring, Stream, derive_seed, generator
from tuner.vae.shape import ImageShape
from tuner.vae.step import State
from tuner.vae.train import train

build = Builder(ImageShape(1, 28, 28))


def test_a_derived_seed_is_pinned():
    assert derive_seed(7, 1, 2, 3) == 5168399538067399530  # old runs can't go on where this changes


def test_streams_keep_their_numbers():
    streams = "INITIALISATION ORDER NOISE SCORE EXTRACTOR PROPOSAL RETRAIN PROMOTE PIXELS"
    purposes = "IMAGES POSTERIOR MIXTURE SAMPLES RECONSTRUCTION TEMPERATURE LIKELIHOOD BINARIZATION MATCHING"
    purposes += " HELD_OUT_PARTS TRAINING_PARTS SAMPLE_PARTS"
    assert {name: number for number, name in enumerate(streams.split())} == dict(Stream.__members__)
    assert {name: number for number, name in enumerate(purposes.split())} == dict(Scoring.__members__)


def test_derived_seeds_have_63_bits_and_differ_for_every_path():
    paths = list(product((0, 1), range(9), Stream, (0, 1)))
    seeds = [derive_seed(*path) for path in paths]
    assert len(set(seeds)) == len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


@pytest.mark.parametrize(("a", "b"), [((0, 1), (0, 1, 0)), ((3 + 5 * 2**32, 1), (3, 5, 1))])
def test_a_longer_path_or_a_larger_seed_is_no_other_path_in_disguise(a, b):
    assert derive_seed(*a) != derive_seed(*b)


def test_a_generator_begins_at_the_derived_seed():
    assert generator(3, Stream.SCORE, Scoring.SAMPLES).initial_seed() == derive_seed(3, 3, 3)


def test_trials_fits_and_scores_of_one_seed_share_no_numbers(digits):
    """Watched from outside: every call of `derive_seed`, by what it was called with."""
    used: dict[str, list[tuple[int, ...]]] = {"trained": [], "fitted": [], "scored": [], "floor": []}
    stage = "trained"

    def watch(frame, event, _):
        if event == "call" and frame.f_code is derive_seed.__code__:
            used[stage].append((frame.f_locals["seed"], *frame.f_locals["path"]))

    parameters = Parameters(latent_dim=3, width=4, batch_size=16, prior="matched_mixture", prior_components=1)
    parameters = parameters.model_copy(update={"likelihood": "bernoulli", "pixels": "binary", "temperature": "fitted"})
    sys.setprofile(watch)
    try:
        for trial in range(6):
            state = State.fresh(build, parameters, 5, trial)
            list(train(state, parameters, digits.train.images[:50], [1], seed=5, trial=trial, total_epochs=4))
        stage = "fitted"
        fitted = Fitter(digits.train, seed=5, count=50, samples=250)(state.model, parameters)
        stage = "scored"
        scorer = Scorer(Classifier(digits.shape, 10, 1), digits.train, digits.validation, seed=5, count=50)
        scorer.measure(fitted)
        stage = "floor"
        assert len(scorer.floor_replicates)
    finally:
        sys.setprofile(None)
    assert len(set(used["trained"])) == len(used["trained"]) == 6 * (3 + 4)  # weights, order, noise; pixels a step
    assert all(seed == 5 and Stream(stream) for calls in used.values() for seed, stream, *_ in calls if stream)
    purposes = {name: {path[2] for path in calls if path[1] == Stream.SCORE} for name, calls in used.items()}
    shared = {Scoring.IMAGES, Scoring.BINARIZATION}  # which images, and their one draw: the same for all models
    assert not purposes["trained"]
    assert purposes["fitted"] - shared == {Scoring.POSTERIOR, Scoring.MIXTURE, Scoring.TEMPERATURE, Scoring.MATCHING}
    assert purposes["scored"] - shared == {
        Scoring.SAMPLES,
        Scoring.RECONSTRUCTION,
        Scoring.LIKELIHOOD,
        Scoring.HELD_OUT_PARTS,
        Scoring.SAMPLE_PARTS,
    }
    assert purposes["floor"] - shared == {Scoring.TRAINING_PARTS}
    seeds = [derive_seed(*path) for path in {path for calls in used.values() for path in calls}]
    assert len(set(seeds)) == len(seeds)


def test_generators_leave_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    torch.randn(9, generator=generator(0, Stream.NOISE))
    assert torch.equal(torch.random.get_rng_state(), before)
