"""Specs: what a file means."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from spec_file import SEARCH, written

from tuner import spec as specs
from tuner.spec import DEFAULT, Objective, Spec
from tuner.study import distributions
from tuner.vae.flow import Flow
from tuner.vae.metrics import METRICS
from tuner.vae.model import Builder
from tuner.vae.parameters import CLASSIC, Parameters
from tuner.vae.shape import ImageShape

build = Builder(ImageShape(1, 28, 28))

SHIPPED = sorted(DEFAULT.parent.glob("*.yaml"))
RAW = yaml.safe_load(SEARCH)


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A file of every section."""
    return written(tmp_path, SEARCH, "search.yaml")


def _spec(**parts: Any) -> Spec:
    return Spec.model_validate({"space": {"latent_dim": {"type": "int", "low": 4, "high": 32}}, **parts})


# What a shipped file says


OBJECTIVES = {
    "cifar10": ["frechet_distance"],
    "fashion_mnist": ["frechet_distance"],
    "folder": ["frechet_distance"],
    "digits": ["frechet_distance"],
    "mnist": ["frechet_distance"],
    "mnist_binarized": ["nll"],
    "mnist_pareto": ["rate", "distortion"],
    "mnist_standard_normal": ["frechet_distance_standard_normal"],
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_load_and_search_the_three_parameters_of_the_mission(path):
    spec = specs.load(path)
    assert list(spec.space) == ["latent_dim", "learning_rate", "kl_weight"]
    assert [objective.metric for objective in spec.objective] == OBJECTIVES[path.stem]
    assert path.stem.startswith(spec.data.name)
    assert spec.retrain.epochs == 50


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_measure_against_the_classic_settings(path):
    spec = specs.load(path)
    changed = {name for name, _ in spec.baseline.model_dump().items() - CLASSIC.model_dump().items()}
    assert "batch_size" in changed
    assert changed <= {"batch_size", "likelihood", "pixels", "prior", "prior_components"}
    plain = [("fixed.temperature", "one"), ("fixed.warmup_steps", 0), ("fixed.schedule", "constant")]
    plain += [("fixed.width", 32), ("fixed.kl_unit", "absolute")]
    point = specs.load(path, plain).baseline_point()
    assert point == {"latent_dim": 16, "learning_rate": 1e-3, "kl_weight": 1}


def test_the_network_of_the_mnist_search_and_its_prior_are_never_larger_than_the_classic_network():
    spec = specs.load(DEFAULT.parent / "mnist.yaml")
    widest = spec.parameters({"latent_dim": spec.widest, "learning_rate": 1e-3, "kl_weight": 1.0})
    network, classic = (
        sum(weight.numel() for weight in build(parameters, 0).parameters()) for parameters in (widest, CLASSIC)
    )
    for wanted in spec.retrain.priors:
        latents, components = widest.latent_dim, wanted.prior_components
        prior = components * (1 + latents + latents * (latents + 1) // 2)
        if wanted.prior == "flow":
            prior += sum(weight.numel() for weight in Flow(latents).parameters())
        assert network + prior <= classic


# A trial's parameters


@pytest.mark.parametrize("name", Parameters.model_fields)
def test_every_parameter_can_be_searched_or_fixed(name):
    value = getattr(CLASSIC, name)
    other = "latent_dim" if name != "latent_dim" else "width"
    searched = _spec(space={name: {"choices": [value]}})
    assert searched.parameters({name: value}) == CLASSIC
    fixed = _spec(space={other: {"choices": [8]}}, fixed={name: value})
    assert fixed.parameters({other: 8}) == CLASSIC.model_copy(update={other: 8})


def test_a_trial_has_its_searched_parameters_the_fixed_ones_and_the_classic_rest(search):
    parameters = specs.load(search).parameters({"latent_dim": 5, "learning_rate": 0.002, "kl_weight": 0.1})
    changed = {"batch_size": 32, "prior": "gaussian_mixture", "prior_components": 10}
    changed |= {"latent_dim": 5, "learning_rate": 0.002, "kl_weight": 0.1}
    assert parameters == CLASSIC.model_copy(update=changed)


# fixed and points_to_evaluate


def test_a_parameter_is_searched_or_fixed_and_known():
    with pytest.raises(ValidationError, match=r"fixed.latent_dim: it is searched in space too"):
        _spec(fixed={"latent_dim": 8})
    with pytest.raises(ValidationError, match=r"fixed.wdth: unknown parameter; known are .*width"):
        _spec(fixed={"wdth": 8})
    with pytest.raises(ValidationError, match=r"fixed.batch_size: True: Input should be a valid integer"):
        _spec(fixed={"batch_size": True})
    with pytest.raises(ValidationError, match=r"fixed.prior: 'vamp': Input should be 'standard_normal', "):
        _spec(fixed={"prior": "vamp"})


def test_points_to_try_first_may_leave_parameters_to_the_sampler_but_lie_in_the_space():
    assert _spec(points_to_evaluate=[{"latent_dim": 4}, {}, {"latent_dim": 32}]).points_to_evaluate == (
        {"latent_dim": 4},
        {},
        {"latent_dim": 32},
    )
    for value in (3, 33, 4.5, "many", True):
        with pytest.raises(ValidationError, match=r"points_to_evaluate.1.latent_dim: .* is outside"):
            _spec(points_to_evaluate=[{}, {"latent_dim": value}])
    with pytest.raises(ValidationError, match=r"points_to_evaluate.0.kl_weight: 1000* is outside"):
        _spec(
            space={"kl_weight": {"type": "float", "low": 0.1, "high": 1}}, points_to_evaluate=[{"kl_weight": 10**400}]
        )
    with pytest.raises(ValidationError, match=r"points_to_evaluate.0.width: not a searched parameter"):
        _spec(points_to_evaluate=[{"width": 32}])


# Objective


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", [lambda name: name, lambda name: {"metric": name}, lambda name: [name]])
def test_an_objective_is_a_name_a_mapping_or_a_list_and_its_direction_the_better_one(metric, form):
    spec = _spec(objective=form(metric), fixed={"likelihood": "bernoulli"})
    assert spec.objective == (Objective(metric=metric, direction=METRICS[metric].direction),)


def test_the_calibrated_unit_of_the_kl_weight_wants_squared_errors():
    with pytest.raises(ValidationError, match=r"kl_unit: calibrated counts in squared errors"):
        _spec(fixed={"likelihood": "bernoulli", "kl_unit": "calibrated"})
    _spec(fixed={"kl_unit": "calibrated"})


def test_options_of_a_users_own_model_are_parameters_under_their_prefix():
    spec = _spec(space={"model.depth": {"type": "int", "low": 1, "high": 4}}, fixed={"model.norm": "batch"})
    parameters = spec.parameters({"model.depth": 3})
    assert parameters.options == {"depth": 3, "norm": "batch"}
    assert parameters.model_dump()["model.depth"] == 3
    assert spec.baseline.options == {}
    assert spec.baseline_point() is None
    with pytest.raises(ValidationError, match=r"space\.depth: unknown parameter"):
        _spec(space={"depth": {"type": "int", "low": 1, "high": 4}})


def test_the_likelihood_of_binary_pixels_wants_a_bernoulli_decoder():
    with pytest.raises(ValidationError, match=r"nll is defined for fixed.likelihood bernoulli alone"):
        _spec(objective="nll")


def test_an_objective_can_name_its_direction_and_there_can_be_several():
    spec = _spec(objective=["frechet_distance", {"metric": "active_units", "direction": "minimize"}])
    assert [(o.metric, o.direction) for o in spec.objective] == [
        ("frechet_distance", "minimize"),
        ("active_units", "minimize"),
    ]
    with pytest.raises(ValidationError, match="a metric is named twice"):
        _spec(objective=["mse", {"metric": "mse", "direction": "maximize"}])


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("kl_weight", {"type": "float", "low": 0.1, "high": 1}),
        ("likelihood", {"choices": ["gaussian", "bernoulli"]}),
        ("model", {"choices": ["vae", "autoencoder"]}),
        ("kl_warmup_epochs", {"type": "float", "low": 0, "high": 1}),
    ],
)
def test_the_training_loss_is_no_objective_while_something_inside_of_it_is_searched(name, entry):
    with pytest.raises(ValidationError, match=f"can't be the objective while {name} is searched: that changes what it"):
        _spec(space={name: entry}, objective="loss")
    assert _spec(objective="loss", fixed={"kl_weight": 0.1}).objective[0].metric == "loss"


@pytest.mark.parametrize(
    ("metric", "name"),
    [("distortion", "likelihood"), ("calibrated_nll", "likelihood"), ("calibrated_nll", "pixels"), ("mse", "pixels")],
)
def test_no_metric_is_the_objective_beside_what_changes_its_scale(metric, name):
    choices = {"likelihood": ["gaussian", "bernoulli"], "pixels": ["grey", "binary"]}[name]
    with pytest.raises(ValidationError, match=f"{metric} can't be the objective while {name} is searched"):
        _spec(space={name: {"choices": choices}}, objective=metric)


def test_what_a_parameter_is_where_it_is_not_searched_counts():
    conditional = {"choices": ["gaussian"], "when": {"model": "vae"}}
    space = {"model": {"choices": ["vae", "autoencoder"]}, "likelihood": conditional}
    assert _spec(space=space, fixed={"likelihood": "bernoulli"}).values("likelihood") == ["gaussian", "bernoulli"]
    assert _spec(space=space).values("likelihood") == ["gaussian", "gaussian"]
    space["latent_dim"] = {"choices": [8, 32], "when": {"model": "vae"}}
    assert _spec(space=space, fixed={"latent_dim": 64}).widest == 64
    space = {"width": {"choices": [16, 32]}, "likelihood": {"choices": ["gaussian"], "when": {"width": 16}}}
    with pytest.raises(ValidationError, match=r"nll is defined for fixed\.likelihood bernoulli alone"):
        _spec(space=space, fixed={"likelihood": "bernoulli"}, objective="nll")


def test_the_calibrated_unit_may_be_searched_where_the_likelihood_is_gaussian():
    unit = {"choices": ["absolute", "calibrated"], "when": {"likelihood": "gaussian"}}
    space = {"likelihood": {"choices": ["gaussian", "bernoulli"]}, "kl_unit": unit}
    assert _spec(space=space).is_searched("kl_unit", {"likelihood": "gaussian"})
    with pytest.raises(ValidationError, match="it needs likelihood gaussian"):
        _spec(space=space, fixed={"kl_unit": "calibrated"})
    with pytest.raises(ValidationError, match="it needs likelihood gaussian"):
        _spec(space=space | {"kl_unit": {"choices": ["absolute", "calibrated"]}})
    turned = {"kl_unit": {"choices": ["absolute", "calibrated"]}, "likelihood": {"choices": ["bernoulli", "gaussian"]}}
    turned["likelihood"]["when"] = {"kl_unit": "absolute"}
    assert _spec(space=turned).is_searched("likelihood", {"kl_unit": "absolute"})
    with pytest.raises(ValidationError, match="kl_unit: calibrated counts in squared errors"):
        _spec(space=turned, fixed={"likelihood": "bernoulli"})


def test_features_may_be_given_as_a_path(tmp_path):
    (tmp_path / "my.pt2").write_bytes(b"program")
    assert _spec(features=tmp_path / "my.pt2").features_sha256 == hashlib.sha256(b"program").hexdigest()


@pytest.mark.parametrize("metric", [name for name, metric in METRICS.items() if metric.needs_vae])
def test_an_autoencoder_has_no_rate(metric):
    with pytest.raises(ValidationError, match=f"{metric} is not defined for model autoencoder"):
        _spec(objective=metric, fixed={"model": "autoencoder"})
    with pytest.raises(ValidationError, match=f"{metric} is not defined for model autoencoder"):
        _spec(objective=metric, space={"model": {"choices": ["vae", "autoencoder"]}})


# Retrain


def test_finalists_are_trained_on_as_trials_are_but_all_of_them_to_the_end():
    spec = _spec(
        retrain={"epochs": 50, "finalists": 3},
        budget={"trials": 40, "max_epochs": 9, "time_limit": "30m"},
        resources={"cpu": 2, "gpu": 0.5},
        execution="fused",
        seed=7,
    )
    ours = spec.of_retrain(2, 123)
    assert (ours.budget.trials, ours.budget.max_epochs, ours.budget.rungs[-1]) == (2, 50, 50)
    assert ours.budget.grace_epochs == 50, "nobody is weak before the end"
    assert ours.budget.time_limit is None, "the limit ends the search, not what comes after it"
    assert (ours.seed, spec.seed) == (123, 7)
    for name in ("data", "space", "fixed", "retrain", "resources", "execution"):
        assert getattr(ours, name) == getattr(spec, name)


@pytest.mark.parametrize(
    ("objective", "ours"),
    [
        ("mse", "mse"),
        ("loss", "frechet_distance"),  # which only training has
        (["rate", "distortion"], "frechet_distance"),
        ({"metric": "active_units", "direction": "maximize"}, "active_units"),
    ],
)
def test_finalists_are_ranked_by_one_objective_that_finished_models_have(objective, ours):
    spec = Spec.model_validate({"space": {"latent_dim": {"choices": [4, 8]}}, "objective": objective})
    (found,) = spec.of_retrain(2, 0).objective
    assert (found.metric, found) == (ours, spec.selection_objective)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("trials", 0), ("max_epochs", 0), ("grace_epochs", 0), ("reduction_factor", 1), ("grace_epochs", 10)],
        *[("reduction_factor", 1.0001), ("trials", True), ("max_epochs", True), ("trials", "8")],
    ],
)
def test_a_budget_that_buys_nothing_is_refused(key, value):
    with pytest.raises(ValidationError, match=f"budget.{key}"):
        _spec(budget={key: value})


# Round trip and comparison


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [("budget.time_limit", "1.5h"), ("data.directory", "/some where/é"), ("seed", 2**32 - 1)],
        [
            ("objective", ["mse", {"metric": "rate", "direction": "maximize"}]),
            ("points_to_evaluate", [{"latent_dim": 5}, {}]),
        ],
        [("space.model", {"choices": ["vae", "autoencoder"]}), ("space.kl_weight.high", 1e300)],
    ],
)
def test_a_spec_written_and_read_again_is_the_same(search, tmp_path, overrides):
    spec = specs.load(search, overrides)
    again = specs.load(written(tmp_path, spec.to_yaml()))
    assert again == spec
    assert distributions(again) == distributions(spec)
    assert spec.differences(again) == []


def test_differences_name_the_key_and_both_values(search):
    ours = specs.load(search)
    theirs = specs.load(search, [("budget.trials", 32), ("space.latent_dim.high", 64), ("fixed.width", 16)])
    assert ours.differences(theirs) == [
        "budget.trials: 24 here, 32 there",
        "fixed.width: unset here, 16 there",
        "space.latent_dim.high: 32 here, 64 there",
    ]
    assert "objective" in ours.differences(specs.load(search, [("objective", "mse")]))[0]


def test_where_the_data_lie_and_the_time_limit_make_no_other_spec(search):
    free = [("data.directory", "/elsewhere"), ("data.download", False), ("budget.time_limit", 60)]
    assert specs.load(search).differences(specs.load(search, free)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("budget.trials", 25),
        ("budget.plateau", {"trials": 3}),
        ("retrain.epochs", 60),
        ("retrain.epochs", 1),
        ("retrain.finalists", 1),
        ("retrain.priors", []),
    ],
)
def test_a_run_grows_by_more_trials_and_another_retrain(search, key, value):
    assert specs.load(search, [(key, value)]).differences(specs.load(search)) == []


# Baseline


def test_the_baseline_is_the_classic_settings_with_the_batch_size_and_prior_of_the_spec(search):
    spec = specs.load(search, [("fixed.schedule", "cosine")])
    kept = {"batch_size": 32, "prior": "gaussian_mixture", "prior_components": 10}
    assert spec.baseline == CLASSIC.model_copy(update=kept)


@pytest.mark.parametrize(
    ("key", "value"),
    [("space.latent_dim.low", 17), ("space.kl_weight.high", 0.99), ("fixed.schedule", "cosine")],
)
def test_a_spec_that_cannot_express_the_baseline_has_no_point_for_it(search, key, value):
    assert specs.load(search, [(key, value)]).baseline_point() is None


def test_the_baseline_at_the_very_end_of_a_range_is_inside(search):
    spec = specs.load(search, [("space.kl_weight.high", 1), ("space.latent_dim.low", 16)])
    assert spec.baseline_point() == {"latent_dim": 16, "learning_rate": 1e-3, "kl_weight": 1}


def test_a_whole_range_of_a_real_parameter_holds_the_classic_value():
    spec = _spec(space={"kl_weight": {"type": "int", "low": 1, "high": 4}})
    assert spec.baseline_point() == {"kl_weight": 1.0}


# Frozen, and closed to unknown keys


def test_a_spec_is_frozen(search):
    spec = specs.load(search)
    for part in (spec, spec.data, spec.budget, spec.retrain, spec.objective[0], *spec.space.values()):
        for name in type(part).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(part, name, getattr(part, name))


@pytest.mark.parametrize("where", ["", "data.", "budget.", "retrain.", "objective.", "space.latent_dim."])
def test_an_unknown_key_is_refused_at_each_level(search, where):
    overrides = [("objective", {"metric": "mse"}), (f"{where}colour", "red")]
    with pytest.raises(ValueError, match=r"search\.yaml: .*colour: unknown key \(got 'red'\)"):
        specs.load(search, overrides)


def test_an_unknown_key_beside_choices_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"space.latent_dim.log: unknown key"):
        specs.load(written(tmp_path, "space: {latent_dim: {choices: [4, 8], log: true}}"))


# A feature extractor of one's own


def test_a_feature_extractor_of_ones_own_is_known_by_its_content(search, tmp_path):
    here, there, changed = (tmp_path / name for name in ("here.pt2", "there.pt2", "changed.pt2"))
    here.write_bytes(b"one")
    there.write_bytes(b"one")
    changed.write_bytes(b"another")
    ours, same, other = (specs.load(search, [("features", str(path))]) for path in (here, there, changed))
    assert ours.features_sha256 == hashlib.sha256(b"one").hexdigest()
    assert ours.differences(same) == []
    assert ours.differences(other) == [f"features_sha256: {ours.features_sha256} here, {other.features_sha256} there"]
    assert specs.load(search).differences(ours)
    again = tmp_path / "spec.yaml"
    again.write_text(ours.to_yaml())
    here.unlink()
    assert specs.load(again) == ours


@pytest.mark.parametrize("name", ["missing.pt2", "."])
def test_a_feature_extractor_that_can_not_be_read_is_refused_by_name(search, tmp_path, name):
    path = tmp_path / name
    with pytest.raises(ValueError, match=rf"features: {re.escape(str(path))}: .+"):
        specs.load(search, [("features", str(path))])


# Epochs laid over a spec


@pytest.mark.parametrize(
    ("overrides", "epochs", "grace"),
    [
        ([("budget.max_epochs", 2)], 2, 2),
        ([("budget.max_epochs", 0.5)], 0.5, 0.5),
        ([("budget.max_epochs", 40)], 40, 4),
    ],
)
def test_fewer_epochs_than_the_first_rungs_lower_that_rung(overrides, epochs, grace):
    budget = specs.load(DEFAULT, overrides).budget
    assert (budget.max_epochs, budget.grace_epochs) == (epochs, grace)


def test_a_grace_that_is_given_too_is_what_was_meant():
    with pytest.raises(ValueError, match=r"budget\.grace_epochs: 3 is above max_epochs 2"):
        specs.load(DEFAULT, [("budget.max_epochs", 2), ("budget.grace_epochs", 3)])


# Conditions


@pytest.mark.parametrize(
    ("when", "points", "said"),
    [
        ({"kl_weight": 1}, [], r"space\.latent_dim\.when\.kl_weight: not a searched parameter"),
        (
            {"prior": "matched_mixture"},
            [],
            r"space\.latent_dim\.when\.prior: 'matched_mixture' is outside of space\.prior",
        ),
        ({"width": 16}, [], r"space\.(latent_dim|width)\.when: circular: "),
        (
            {"prior": "flow"},
            [{"latent_dim": 4}],
            r"points_to_evaluate\.0\.latent_dim: searched only where {prior: flow} is",
        ),
    ],
)
def test_conditions_name_other_searched_parameters_and_values_of_theirs(when, points, said):
    space = {
        "latent_dim": {"choices": [4, 8], "when": when},
        "width": {"choices": [16, 32], "when": {"latent_dim": 4}},
        "prior": {"choices": ["flow", "gaussian_mixture"]},
    }
    with pytest.raises(ValueError, match=said):
        specs.load({"space": space, "points_to_evaluate": points})


def test_a_condition_holds_only_where_that_of_the_other_does():
    space = {
        "width": {"choices": [16, 32], "when": {"latent_dim": 4}},
        "latent_dim": {"choices": [4, 8], "when": {"prior": "flow"}},
        "prior": {"choices": ["flow", "gaussian_mixture"]},
    }
    spec = specs.load({"space": space})
    assert spec.in_order() == ["prior", "latent_dim", "width"]
    assert spec.searched({"prior": "flow", "latent_dim": 4, "width": 16}) == ["width", "latent_dim", "prior"]
    assert spec.searched({"prior": "flow", "latent_dim": 8, "width": 16}) == ["latent_dim", "prior"]
    assert spec.searched({"prior": "gaussian_mixture", "latent_dim": 4, "width": 16}) == ["prior"]
    assert spec.baseline_point() is None
    fixed = specs.load({"space": space, "fixed": {"width": 8}})
    assert fixed.parameters({"latent_dim": 8}).width == 8
    assert fixed.parameters({"latent_dim": 4, "width": 16}).width == 16
