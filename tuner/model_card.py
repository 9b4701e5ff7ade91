"""The README.md of an export: a model card, with the head that the Hugging Face Hub reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from tuner import yaml_text
from tuner.spec import Spec
from tuner.terminal import text, with_error
from tuner.vae.metrics import TEST_METRICS

TASK, TAGS = "unconditional-image-generation", ["vae", "image-generation", "anomaly-detection", "pytorch", "onnx"]


def model_card(name: str, spec: Spec, trials: int, searched: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """Of the run `name`, whose so many trials found these parameters; `info` is its export's config.json."""
    images, parameters, lineage, test = (info[part] for part in ("images", "parameters", "lineage", "test"))
    kinds = {score: kind for score, kind in TEST_METRICS.items() if score in test}
    scores = {score: with_error(test[score], test.get(f"{score}_error")) for score in kinds}
    metrics = [{"type": score, "value": said if "±" in said else float(said)} for score, said in scores.items()]
    data = {"type": spec.data.name, "name": spec.data.title, "split": "test"}
    head: dict[str, Any] = {"library_name": "vae-tuner", "pipeline_tag": TASK, "tags": TAGS}
    head["datasets"] = [spec.data.name] if spec.data.name == spec.data.title else []  # of a user's own there is no name
    results = [{"task": {"type": TASK}, "dataset": data, "metrics": metrics}]
    prepared = [f"{'x'.join(map(str, images['shape']))} numbers from 0 to 1"]
    prepared += ["bright strokes on black"] * images["ink"] + ["inverted before they are encoded"] * images["invert"]
    prepared += [images["resize"]] if images["resize"] else []
    scored = [[score, value, kinds[score].unit, kinds[score].meaning] for score, value in scores.items()]
    found = [[parameter, _plain(text(searched.get(parameter)))] for parameter in spec.space]
    return Template(Path(__file__).with_suffix(".md").read_text("utf-8")).substitute(
        parameters | lineage,
        head=yaml_text.dump(head | {"model-index": [{"name": name, "results": results}]}),
        name=_plain(name),
        data=_plain(spec.data.title),
        images="; ".join(prepared),
        shape=", ".join(map(str, images["shape"])),
        scores=_table(["score", "value", "unit", "what it says"], *scored),
        trials=trials,
        objective=" and ".join(objective.metric for objective in spec.objective),
        epochs=f"{lineage['epoch'] + (lineage['retrain_epoch'] or 0):g}",
        found=_table(["parameter", "value"], *found),
        left_out="".join(f"- There is no {file}: {_plain(reason)}\n" for file, reason in info["left_out"].items()),
    )


def _table(header: list[str], *rows: list[str]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """What people or their code have named, as text in Markdown."""
    return re.sub(r"[\\`*_\[\]<>&#]", r"\\\g<0>", text)
