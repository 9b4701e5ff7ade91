"""Print docs/spec.md: every key of a spec, every parameter and every metric, from the schema and the code.

python docs/spec_reference.py > docs/spec.md
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tuner import spec as specs
from tuner.vae.metrics import FINAL_METRICS, METRICS, Metric
from tuner.vae.parameters import ModelParameters, SamplingParameters, TrainingParameters

Node = Mapping[str, Any]  # a part of the JSON schema
HEADER = ("type", "default", "range", "meaning")

INTRODUCTION = """\
# The spec

<!-- Made by `make docs` from the schema. Change the descriptions in spec.py, data_spec.py and vae/parameters.py. -->

A spec is a YAML file that says what is searched, on which images, for which objective, with which budget. Only `space`
is required. An unknown key, a key given twice and a value of the wrong type are refused in one line that names them.

```yaml
# yaml-language-server: $schema=search_spaces/schema.json
data: {name: digits}
space:
  latent_dim: {type: int, low: 4, high: 32, log: true}
  learning_rate: {type: float, low: 3e-4, high: 1e-2, log: true}
  kl_weight: {type: float, low: 0.001, high: 3, log: true}
  prior_components: {choices: [5, 10, 20]}
fixed: {prior: gaussian_mixture, temperature: fitted, batch_size: 32}
points_to_evaluate:
  - {latent_dim: 12, learning_rate: 2e-3, kl_weight: 0.05}
objective: frechet_distance
budget: {trials: 30, max_epochs: 18, grace_epochs: 3, reduction_factor: 3, time_limit: 30m}
retrain:
  epochs: 50
  priors:
    - {prior: matched_mixture, prior_components: 20}
```

With its first line an editor completes the file; the path is that of the schema as seen from the file.

```bash
python -m tuner.spec my_spec.yaml
python -m tuner.spec --schema
```

The first checks a file, the second prints the schema. `--set KEY=VALUE` lays a value over any key of the file, dotted:
`--set budget.trials=8`, `--set fixed.batch_size=64`. The flags `--trials`, `--max-epochs`, `--time-limit` and `--seed`
stand for `budget.trials`, `budget.max_epochs`, `budget.time_limit` and `seed`.
"""

KEYS = """\
A dot stands between a key and the keys below it, `[]` for each entry of a list. A key that is left out has its
default.
"""

RULES = """\
Besides these ranges:

- A parameter is searched or fixed, not both; but one with `when` may be fixed too: that value holds where the condition
  does not. Both ends of a range and all choices must be allowed values of it.
- A point in `points_to_evaluate` names searched parameters only, with values that its range can propose. Of more points
  than `budget.trials` leaves beside the baseline the first are run, and a new run says so.
- `~` at the beginning of a path is your home directory. A spec is a file in UTF-8; `1:30` and `010`, which YAML takes
  for 90 and 8, are refused.
- A metric is refused as the objective while a parameter is searched that changes what it counts: `loss` beside
  `kl_weight`, `kl_unit`, `likelihood`, `model`, `kl_warmup_epochs` and `pixels`, `distortion` and `calibrated_nll`
  beside `likelihood` and `pixels`, `mse` beside `pixels`. A metric can't be named twice.
- `nll` needs `fixed.likelihood: bernoulli`. `model: autoencoder` has no `calibrated_nll`, `rate` and `nll`.
- `kl_unit: calibrated` needs `likelihood: gaussian`. `precision: auto` can be fixed, not searched. `execution: fused`
  is refused with `model: own`. `temperature: fitted` and `pixels: binary` are refused for images in colour,
  `temperature: fitted` also for those of next to no grey.
- A trial is scored at its rungs: `grace_epochs`, then each time `reduction_factor` times as many epochs while that is
  below 95 % of `max_epochs`, then `max_epochs`; and where `grace_epochs` is 3 or more after the first epoch, a first
  look at which nobody is stopped.
- A run goes on with another `data.directory`, `data.file`, `data.download`, `features` that is the same program,
  `budget.time_limit`, `budget.plateau`, `resources`, `execution` or `loggers` than it began with. It grows by a larger
  `budget.trials` and by another `retrain`. What would change finished trials is refused.
"""

IMAGES = """\
What stands below `data`: keys by `name`, which is `digits` where it is left out. `--data-dir` stands for `directory` or
`file`.
"""

PARAMETERS = """\
Each of these can be a key of `space` or of `fixed`. What is in neither has its default; the defaults are the classic
settings of the MNIST tutorials. The baseline, trial 0, has them too, but for `batch_size`, `likelihood`, `pixels`,
`prior` and `prior_components` where the spec fixes these. `model.NAME` is an option of
[a model of your own](own-model.md).

One that matters only beside others is searched only there: `prior_components: {choices: [10, 20], when: {prior:
gaussian_mixture}}`.
"""

ENTRIES = """\
What stands behind a name in `space`: a range of whole numbers, a range of real numbers, or a list of values. Numbers
may be written as `3e-4`.
"""

MEASURED = """\
Every one of these can be the objective. They are measured at each rung on the validation split, and on the test split
by the export; `loss` comes from training alone. A metric marked * needs a VAE. With `likelihood: bernoulli` the
distortion is the binary cross-entropy: there is no variance to fit.
"""

FINAL = """\
These are measured by the export alone, for the exported model on the test split, and can't be the objective. The test
split also gives `gap_closed`.
"""


def reference() -> str:
    """The whole page."""
    document = json.loads(specs.schema())
    definitions = document["$defs"]
    parts = [INTRODUCTION, "## Keys", KEYS, table("key", keys(document, definitions)), RULES]
    parts += ["## Images", IMAGES]
    for source in (resolved(part, definitions) for part in document["properties"]["data"]["oneOf"]):
        names = source["properties"]["name"]
        title = ", ".join(f"`{name}`" for name in names.get("enum", [names.get("const")]))
        parts += [f"### {title}", source["description"], table("key", keys(source, definitions))]
    parts += ["## Entries of the space", ENTRIES]
    for title, name in (("Whole numbers", "IntRange"), ("Real numbers", "FloatRange"), ("A list", "Choices")):
        parts += [f"### {title}", table("key", keys(definitions[name], definitions))]
    parts += ["## Parameters", PARAMETERS]
    for title, model in (
        ("The network", ModelParameters),
        ("Training", TrainingParameters),
        ("Drawing", SamplingParameters),
    ):
        parts += [f"### {title}", table("parameter", keys(model.model_json_schema(), {}))]
    parts += ["## Metrics", MEASURED, metrics_table(METRICS), "### Of the exported model", FINAL]
    parts.append(metrics_table(FINAL_METRICS))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def keys(node: Node, definitions: Node, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """A row for each key of an object of the schema, and below it for those of the objects inside."""
    for name, entry in node["properties"].items():
        inner = resolved(entry, definitions)
        default = code(entry["default"]) if "default" in entry else "required"
        if name not in node.get("required", ()) and "default" not in entry:
            default = "the metric's"
        is_part = "properties" in inner and name not in ("space", "fixed")
        of = kind(name, inner)
        meaning = " ".join((entry.get("description") or inner.get("description") or "").split())
        yield f"`{prefix}{name}`", of, "" if is_part else default, bounds(inner), escaped(meaning)
        if is_part:
            yield from keys(inner, definitions, f"{prefix}{name}.")
        forms = entry.get("anyOf", ())
        optional = next((resolved(part, definitions) for part in forms if "$ref" in part), {})
        if {"type": "null"} in forms and "properties" in optional:
            yield from keys(optional, definitions, f"{prefix}{name}.")
        item = next((resolved(part, definitions) for part in listed(inner)), {})
        if "properties" in item:
            yield from keys(item, definitions, f"{prefix}{name}[].")


def resolved(entry: Node, definitions: Node) -> Node:
    """What an entry refers to, and what it says itself."""
    name = str(entry.get("$ref", "")).rpartition("/")[2]
    return {**definitions[name], **entry} if name in definitions else entry


def listed(entry: Node) -> list[Node]:
    """The kinds of items of a list that are objects of their own."""
    for part in (entry, *entry.get("anyOf", ())):
        items = part.get("items", {})
        found = [item for item in (items, *items.get("anyOf", ())) if "$ref" in item]
        if found:
            return found
    return []


def kind(name: str, entry: Node) -> str:
    """The type of a value in words."""
    if name == "objective":
        return "metric, or list of metrics"
    if "discriminator" in entry:
        return "mapping"
    if name in ("space", "fixed"):
        return {"space": "mapping of parameters to entries", "fixed": "mapping of parameters to values"}[name]
    if "enum" in entry:
        return "choice"
    if "const" in entry:
        return "word"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": ""}
    names |= {"array": "list", "object": "mapping"}
    types = [part.get("type", "object" if "$ref" in part else "") for part in entry.get("anyOf", [entry])]
    flat = [one for part in types for one in (part if isinstance(part, list) else [part])]
    return " or ".join(dict.fromkeys(names[one] for one in flat if names.get(one)))


def bounds(entry: Node) -> str:
    """What values are allowed."""
    if "discriminator" in entry:
        return "[by name](#images)"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if "minItems" in entry or "minProperties" in entry:
        return "one or more"
    for part in entry.get("anyOf", ()):
        if "gt" in part:
            return f"above {part['gt']}"
        if found := bounds(part) if "enum" not in part else "":
            return found
    words = []
    for key, text in (("minimum", "{} or more"), ("exclusiveMinimum", "above {}")):
        if key in entry:
            words.append(text.format(number(entry[key])))
    for key, text in (("maximum", "{} at most"), ("exclusiveMaximum", "below {}")):
        if key in entry:
            words.append(text.format(number(entry[key])))
    return ", ".join(words)


def number(value: float) -> str:
    """Large powers of two as such."""
    powers = {sign * 2**power: f"{'-' * (sign < 0)}2^{power}" for power in (32, 53) for sign in (1, -1)}
    return powers.get(value, f"{value:g}") if isinstance(value, int) else f"{value:g}"


def code(value: Any) -> str:
    """A value as a spec would say it."""
    if value is None:
        return "none"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def table(first: str, rows: Iterator[tuple[str, ...]]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join((first, *HEADER))} |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def metrics_table(metrics: Mapping[str, Metric]) -> str:
    lines = ["| metric | better | unit | meaning |", "| --- | --- | --- | --- |"]
    better = {"minimize": "small", "maximize": "large"}
    for name, metric in metrics.items():
        star = " *" if metric.needs_vae else ""
        lines.append(f"| `{name}`{star} | {better[metric.direction]} | {metric.unit} | {escaped(metric.meaning)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
