"""A file -> checked, frozen Spec. It is checked once, here; inside the package it is trusted."""

import argparse
import copy
import graphlib
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tuner import yaml_text
from tuner.budget import Budget, EvenBudget
from tuner.data_spec import DataSpec, DigitsSpec, Frozen, UserPath, Whole, user_path
from tuner.space import Entry, FloatRange, Real, Value
from tuner.vae.errors import Refused, refusing
from tuner.vae.metrics import METRICS
from tuner.vae.parameters import CLASSIC, OPTION, Parameters


class Objective(Frozen):
    """What is to be small or large; a metric's name alone means the metric's own direction."""

    metric: Literal[tuple(METRICS)] = Field(description="a metric's name")  # type: ignore[valid-type]
    direction: Literal["minimize", "maximize"] = Field(description="which way is better; by default the metric's own")

    @model_validator(mode="before")
    @classmethod
    def _default_direction(cls, value: Any) -> Any:
        """A metric alone means its own better direction."""
        value = {"metric": value} if isinstance(value, str) else value
        if isinstance(value, dict):
            known = METRICS.get(str(value.get("metric")))
            return {"direction": known.direction if known else "minimize"} | value
        return value

    def cost(self, scores: Mapping[str, Any]) -> float:
        """What is to be small, whichever way the metric goes: the one measure of better. Raises KeyError."""
        value = float(scores[self.metric])
        return value if self.direction == "minimize" else -value


YARDSTICKS = {  # what of the parameters changes what a metric counts, whatever the model learns
    "loss": {"kl_weight", "kl_unit", "likelihood", "model", "kl_warmup_epochs", "pixels"},
    "calibrated_nll": {"likelihood", "pixels"},
    "distortion": {"likelihood", "pixels"},
    "mse": {"pixels"},
}
DRAWN_BEST = Objective.model_validate("frechet_distance")


class FittedPrior(Frozen):
    """A prior that is fitted after training, as in a trial's parameters."""

    prior: Literal["gaussian_mixture", "matched_mixture", "flow"] = Field(description="as the parameter prior")
    prior_components: Whole = Field(Parameters.model_fields["prior_components"].default, ge=1, le=1000)
    """Gaussians in the mixture"""


class RetrainSpec(Frozen):
    """How the best of the promotion are trained on."""

    epochs: Whole = Field(50, ge=1, description="epochs that a finalist is trained on")
    finalists: Whole = Field(2, ge=1, le=5, description="how many of the promoted trials are trained on, side by side")
    priors: tuple[FittedPrior, ...] = tuple(
        FittedPrior(prior="gaussian_mixture", prior_components=count) for count in (10, 20, 50, 100)
    )
    """priors that each finalist gets after its last epoch and after its best; one of the best on validation is kept;
    where a trial's prior is standard_normal, that stays"""


class Resources(Frozen):
    """What one trial takes of a node; Ray places trials by it."""

    cpu: Real = Field(1, gt=0, description="CPU cores a trial; a fraction is allowed")
    gpu: Real = Field(0, ge=0, description="GPUs a trial; a fraction is allowed")


class OwnModelSpec(Frozen):
    """Which code a user's own model is."""

    function: str = Field(description="its name, MODULE:FUNCTION")
    sha256: str = Field(description="that of the module's file, in hex")


class Spec(Frozen):
    """What is searched, on which data, for which objective, with which budget."""

    data: DataSpec = Field(DigitsSpec(), description="on which images")
    space: dict[str, Entry] = Field(min_length=1)
    """searched parameters: each name with a range or choices, all ends included"""
    fixed: dict[str, Value] = Field({})
    """parameters that all trials share; what is neither searched nor fixed has its default"""
    points_to_evaluate: tuple[dict[str, Value], ...] = ()
    """points of the space to run first, in this order; what a point leaves out is proposed"""
    objective: Annotated[
        tuple[Objective, ...],
        BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else [value]),
        Field(min_length=1),
    ] = (DRAWN_BEST,)
    """one metric, or a list; of several the front is searched, and no trial is stopped early"""
    budget: Budget = Field(Budget(), description="how much is searched, and when weak trials are stopped")
    retrain: RetrainSpec = Field(RetrainSpec(), description="how the best of the promotion are trained on")
    resources: Resources = Field(Resources(), description="what one trial takes of a node")
    execution: Literal["process", "fused", "auto"] = "auto"
    """process: each trial in its own; fused: many as one array; auto: fused where there is a GPU"""
    features: UserPath | None = None
    """a feature extractor of your own that the search scores with, a program that torch.export.save wrote: images
    (B, C, H, W) in [0, 1], B free, to features (B, D); PyTorch reads it with pickle, so it must be one you trust"""
    features_sha256: str | None = None
    """the SHA-256 of that file, in hex; by default that of the file as it is"""
    own_model: OwnModelSpec | None = None
    """which code model own is: noted from --model, so that a run goes on with no other; never imported from here"""
    loggers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """experiment trackers that are told of each trial and of the export"""
    warm_start: tuple[UserPath, ...] = ()
    """directories of earlier runs on the same images: the sampler knows their finished trials as far as they are points
    of this space, and the run scores with their feature extractors"""
    seed: Whole = Field(0, ge=0, lt=2**32)
    """what all random numbers of a run are derived from; the splits of the data do not depend on it"""

    @model_validator(mode="before")
    @classmethod
    def _know_features(cls, value: Any) -> Any:
        """A run goes on with the file it began with, wherever that lies."""
        path = value.get("features") if isinstance(value, dict) else None
        if not isinstance(path, str | Path) or value.get("features_sha256"):
            return value
        with refusing("features", Refused):
            file = user_path(path)
        with refusing(f"features: {file}", OSError):
            content = file.read_bytes()
        return value | {"features_sha256": hashlib.sha256(content).hexdigest()}

    @model_validator(mode="before")
    @classmethod
    def _own_model_is_meant(cls, value: Any) -> Any:
        """A model of the user's own is the one that is searched, where the spec says nothing else."""
        if isinstance(value, dict) and value.get("own_model"):
            space, fixed = value.get("space"), value.get("fixed", {})
            if isinstance(space, dict) and isinstance(fixed, dict) and "model" not in space:
                return value | {"fixed": {"model": "own"} | fixed}
        return value

    @model_validator(mode="after")
    def _check(self) -> "Spec":
        for name, entry in self.space.items():
            known = Parameters.model_fields.get(name)
            if isinstance(entry, FloatRange) and known and known.annotation is int:
                raise ValueError(f"space.{name}: takes whole numbers, so type: int")
            for value in entry.ends():
                _check_parameter(f"space.{name}", name, value)
            if name in self.fixed and not entry.when:
                raise ValueError(f"fixed.{name}: it is searched in space too")
            for parent, value in entry.when.items():
                if parent not in self.space:
                    raise ValueError(f"space.{name}.when.{parent}: not a searched parameter")
                if not self.space[parent].contains(value):
                    raise ValueError(f"space.{name}.when.{parent}: {value!r} is outside of space.{parent}")
        for name, value in self.fixed.items():
            _check_parameter(f"fixed.{name}", name, value)
        if "precision" in self.space and "auto" in self.space["precision"].ends():
            raise ValueError("space.precision: auto is decided once a run, so it is for fixed alone")
        try:
            self.in_order()
        except graphlib.CycleError as error:
            raise ValueError(f"space.{error.args[1][0]}.when: circular: {' -> '.join(error.args[1])}") from error
        for index, point in enumerate(self.points_to_evaluate):
            for name, value in point.items():
                if name not in self.space:
                    raise ValueError(f"points_to_evaluate.{index}.{name}: not a searched parameter")
                if not self.space[name].contains(value):
                    raise ValueError(f"points_to_evaluate.{index}.{name}: {value!r} is outside of space.{name}")
                if not self.is_searched(name, point):
                    when = ", ".join(f"{other}: {wanted}" for other, wanted in self.space[name].when.items())
                    raise ValueError(
                        f"points_to_evaluate.{index}.{name}: searched only where {{{when}}} is in the point"
                    )
        metrics = [objective.metric for objective in self.objective]
        if len(set(metrics)) < len(metrics):
            raise ValueError("objective: a metric is named twice")
        for metric in metrics:
            mixed = YARDSTICKS.get(metric, set()) & self.space.keys()
            if mixed:
                raise ValueError(
                    f"objective.metric: {metric} can't be the objective while {min(mixed)} is searched: that changes "
                    "what it counts, so the search would tune the yardstick, not the model; use frechet_distance"
                )
            if "autoencoder" in self.values("model") and METRICS[metric].needs_vae:
                raise ValueError(f"objective.metric: {metric} is not defined for model autoencoder")
            if metric == "nll" and {self.fixed.get("likelihood"), *self.values("likelihood")} != {"bernoulli"}:
                raise ValueError("objective.metric: nll is defined for fixed.likelihood bernoulli alone")
        units = self.values("kl_unit", likelihood="bernoulli")
        if "calibrated" in units and "bernoulli" in self.values("likelihood", kl_unit="calibrated"):
            raise ValueError("kl_unit: calibrated counts in squared errors, so it needs likelihood gaussian")
        if self.execution == "fused" and "own" in self.values("model"):
            raise ValueError("execution: fused trains the built-in models alone; with model own it is process or auto")
        if self.budget.grace_epochs > self.budget.max_epochs:
            raise ValueError(
                f"budget.grace_epochs: {self.budget.grace_epochs:g} is above max_epochs {self.budget.max_epochs:g}"
            )
        return self

    def in_order(self) -> list[str]:
        """The searched parameters, each after those that it depends on, else as they stand."""
        if not any(entry.when for entry in self.space.values()):
            return list(self.space)
        return list(graphlib.TopologicalSorter({name: entry.when for name, entry in self.space.items()}).static_order())

    def is_searched(self, name: str, values: Mapping[str, Value]) -> bool:
        """Whether a parameter of the space is searched where others have these values."""
        conditions = self.space[name].when.items()
        return all(values.get(other) == wanted and self.is_searched(other, values) for other, wanted in conditions)

    def searched(self, values: Mapping[str, Value]) -> list[str]:
        """The parameters of the space that are searched where they have these values; what is not there is left out."""
        return [name for name in self.space if name in values and self.is_searched(name, values)]

    def values(self, name: str, **beside: Value) -> list[Value]:
        """What a parameter can be `beside` others of these values: the ends of its range or its choices where it is
        searched, and its one value where it is not."""
        entry = self.space.get(name)
        if entry and not entry.when:
            return entry.ends()
        alone = self.fixed[name] if name in self.fixed else getattr(CLASSIC, name)
        if entry is None or any(entry.when.get(other, value) != value for other, value in beside.items()):
            return [alone]
        return [*entry.ends(), alone]

    @property
    def widest(self) -> int:
        """The most latents a trial can have."""
        return max(self.baseline.latent_dim, *map(int, self.values("latent_dim")))

    def parameters(self, searched: dict[str, Value]) -> Parameters:
        """A trial's full parameters from the searched ones."""
        return Parameters.model_validate(self.fixed | searched)

    @property
    def baseline(self) -> Parameters:
        """Trial 0: the classic settings with what this spec fixes of batches, pixels, likelihood and prior.

        With the spec's prior its `frechet_distance` compares with others'; the baseline figure is that under N(0, I).
        """
        kept = {"batch_size", "likelihood", "pixels", "prior", "prior_components"}
        return Parameters.model_validate({name: value for name, value in self.fixed.items() if name in kept})

    def baseline_point(self) -> dict[str, Value] | None:
        """The baseline as a point of the space, or None where the space can't express it."""
        full = {name: getattr(self.baseline, name, math.nan) for name in self.space}
        point = {name: value for name, value in full.items() if self.is_searched(name, full)}
        inside = all(self.space[name].contains(value) for name, value in point.items())
        return point if inside and self.parameters(point) == self.baseline else None

    def with_data_at(self, place: Path | None) -> "Spec":
        """The same spec with its images at another place; None leaves them where they are."""
        return self.model_copy(update={"data": self.data.at(place)})

    def with_fixed(self, name: str, value: Value) -> "Spec":
        """The same spec with a parameter that all trials share."""
        return self.model_copy(update={"fixed": self.fixed | {name: value}})

    def to_yaml(self) -> str:
        return yaml_text.dump(self.model_dump(mode="json"))

    def of_retrain(self, finalists: int, seed: int) -> "Spec":
        """By which finalists are trained on: as trials are, but all of them to the end."""
        budget = EvenBudget(trials=finalists, max_epochs=self.retrain.epochs, grace_epochs=self.retrain.epochs)
        return self.model_copy(update={"budget": budget, "seed": seed, "objective": (self.selection_objective,)})

    @property
    def trial_objective(self) -> Objective:
        """What ranks trials: the objective; samples where there are several, none of which can rank alone."""
        return self.objective[0] if len(self.objective) == 1 else DRAWN_BEST

    @property
    def selection_objective(self) -> Objective:
        """What ranks finished models: as trials; samples where that is the loss, which only training has."""
        return DRAWN_BEST if self.trial_objective.metric == "loss" else self.trial_objective

    def require_model(self, given: OwnModelSpec | None) -> None:
        """Raises Refused unless `given`, the code that --model names, is what this spec asks for."""
        noted = self.own_model
        if given is None and noted:
            raise Refused(f"the model is a user's own: name its code with --model {noted.function}")
        options = [name for name in (*self.space, *self.fixed) if name.startswith(OPTION)]
        if given is None and (options or "own" in self.values("model")):
            asks = options[0] if options else "model own"
            raise Refused(f"{asks} asks for a model of your own: name its code with --model MODULE:FUNCTION")
        if given and given != noted:
            there = f"with {noted.function}" if noted else "without a model of a user's own"
            if noted and given.function == noted.function:
                there = f"with another source (sha256 {given.sha256[:12]}... here, {noted.sha256[:12]}... there)"
            raise Refused(f"--model {given.function}: the run began {there}")

    def differences(self, other: "Spec") -> list[str]:
        """Keys that a run which began with `other` can't go on with, as 'key: ours, theirs': they would change its
        trials. Places and limits don't, nor do more trials and another retrain."""
        ours, theirs = _flatten(self.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
        free = {"data.directory", "data.file", "data.download", "features"}  # the program's hash says which it is
        free |= {"budget.time_limit", "budget.plateau", "budget.plateau.trials", "budget.plateau.min_improvement"}
        free |= {"resources.cpu", "resources.gpu", "execution", "loggers"}
        free |= {"retrain.epochs", "retrain.finalists", "retrain.priors"}
        free |= {"budget.trials"} if self.budget.trials > other.budget.trials else set()
        return [
            f"{key}: {ours.get(key, 'unset')} here, {theirs.get(key, 'unset')} there"
            for key in sorted(ours.keys() | theirs.keys())
            if key not in free and ours.get(key) != theirs.get(key)
        ]


def shipped() -> dict[str, Path]:
    """The specs that come with this package, by name."""
    inside = Path(__file__).parent / "search_spaces"  # of a wheel; else beside the package
    folder = inside if inside.is_dir() else Path(__file__).parents[1] / "search_spaces"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


DEFAULT = shipped()["digits"]


def load(source: Path | Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()) -> Spec:
    """Read and check a spec: a file, the name of a shipped one, or what a file holds.

    `overrides` are (dotted key, value) pairs laid over it. Raises Refused, naming file, key and value, on
    anything that is wrong.
    """
    named: object = "spec"
    if isinstance(source, Path):
        given = user_path(source)
        named = source = given if given.is_file() else shipped().get(str(source), given)
        with refusing(source, OSError, Refused):
            raw = yaml_text.parse(yaml_text.decode(source.read_bytes()))
    else:
        raw = copy.deepcopy(dict(source))
    if not isinstance(raw, dict):
        raise Refused(f"{named}: expected a mapping with space, budget, ..., found {type(raw).__name__}")
    for key, value in overrides:
        yaml_text.put(raw, key, value)
    _lower_grace(raw, dict(overrides))
    try:
        return Spec.model_validate(raw)
    except ValidationError as error:
        raise Refused(f"{named}: {_one_line(error)}") from error


def _lower_grace(raw: dict[str, Any], laid_over: Mapping[str, Any]) -> None:
    """Where max_epochs alone is laid over a spec, its grace_epochs are no more than that."""
    most, budget = laid_over.get("budget.max_epochs"), raw.get("budget")
    if isinstance(most, int | float) and isinstance(budget, dict) and "budget.grace_epochs" not in laid_over:
        grace = budget.get("grace_epochs", Budget().grace_epochs)
        if isinstance(grace, int | float) and grace > most:
            budget["grace_epochs"] = most


def schema() -> str:
    """The JSON schema of a spec file, parameters' names included."""
    document = Spec.model_json_schema()
    known = Parameters.model_json_schema()["properties"]
    document["$defs"]["Objective"]["required"] = ["metric"]
    metric = document["$defs"]["Objective"]["properties"]["metric"]
    objective = document["properties"]["objective"]
    one = {"anyOf": [metric, objective.pop("items")]}
    del objective["type"], objective["minLength"]
    objective["anyOf"] = [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}]
    for part in ("space", "fixed"):
        node = document["properties"][part]
        value_schema = node.pop("additionalProperties")
        for field in known.values():
            field.pop("title", None)
        described = {name: value_schema | {"description": field["description"]} for name, field in known.items()}
        node["properties"] = described if part == "space" else known
        node["patternProperties"] = {f"^{re.escape(OPTION)}": value_schema if part == "space" else {}}
        node["additionalProperties"] = False
    return json.dumps(document, indent=2) + "\n"


def _check_parameter(where: str, name: str, value: Any) -> None:
    if name not in Parameters.model_fields and not name.startswith(OPTION):
        raise ValueError(f"{where}: unknown parameter; known are {', '.join(Parameters.model_fields)}")
    try:
        Parameters.model_validate({name: value})
    except ValidationError as error:
        raise ValueError(f"{where}: {value!r}: {error.errors()[0]['msg']}") from error


def _one_line(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        part, *below = item["loc"] or ("",)
        if part == "data":  # pydantic names the union's arm
            del below[:1]
        elif part == "space":
            below = [name for name in below if name not in ("int", "float", "choices")]
        where = ".".join(map(str, (part, *below)))
        message = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "union_tag_invalid":
            where, message = f"{where}.name", f"{item['ctx']['tag']!r} is none of {item['ctx']['expected_tags']}"
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        given = item.get("input")
        shown = f" (got {given!r})" if isinstance(given, (str, int, float)) and item["type"] != "value_error" else ""
        lines.append(f"{where}: {message}{shown}" if where else f"{message}{shown}")
    return " ".join("; ".join(lines).split())


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {
        key: leaf
        for name, child in node.items()
        for key, leaf in _flatten(child, f"{prefix}.{name}".strip(".")).items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m tuner.spec --schema` prints the JSON schema; with files, checks them."""
    parser = argparse.ArgumentParser(prog="python -m tuner.spec", description="Check spec files or print their schema.")
    parser.add_argument("spec", nargs="*", type=Path, help="spec files to check")
    parser.add_argument("--schema", action="store_true", help="print the schema that editors complete the YAML with")
    arguments = parser.parse_args(argv)
    if arguments.schema:
        print(schema(), end="")
    for path in arguments.spec:
        try:
            load(path)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{path}: good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
