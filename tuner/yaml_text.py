"""YAML as specs are written in it: the only place that knows PyYAML."""

import codecs
import re
from typing import Any

import yaml

from tuner.vae.errors import Refused, refusing


class _Loader(yaml.SafeLoader):
    """PyYAML's loader that also reads 1e-3 as a number and refuses a key given twice, as YAML 1.2 does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if names.count(name) > 1:
                raise yaml.composer.ComposerError(None, None, f"{name} is given twice", key.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """A plain number. YAML 1.1 has 90 for 1:30 and 8 for 010, which nobody means who writes them."""
    number: int | float = getattr(loader, f"construct_yaml_{node.tag.rpartition(':')[2]}")(node)
    if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
        said = f"{node.value} would be read as {number}: write that number, or quote the text"
        raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
    return number


for kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _number)


def decode(content: bytes) -> str:
    """A file's text. Raises Refused with what it looks like where it is not UTF-8."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or content[:2].count(0) == 1 < len(content)
    try:
        if not wide:
            return content.decode()
        content.decode("utf-16")
    except UnicodeDecodeError as error:
        if wide or re.search(b"[\0-\x08]", content):
            raise Refused("not a text file") from error
    raise Refused(f"looks like {'UTF-16' if wide else 'Latin-1'}: save it as UTF-8")


def parse(text: str) -> Any:
    """YAML -> plain values. Raises Refused on text that is none."""
    with refusing("not YAML", yaml.YAMLError, ValueError, RecursionError):  # a date that is none is a ValueError
        return yaml.load(text, _Loader)


def parse_override(text: str) -> tuple[str, Any]:
    """'budget.trials=8' -> ('budget.trials', 8), the value read as YAML. Raises Refused without a key and '='."""
    key, equals, value = text.partition("=")
    if not (key.strip() and equals):
        raise Refused(f"--set {text}: expected path.to.key=value")
    with refusing(f"--set {text}", ValueError):
        return key.strip(), parse(value)


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in a mapping of mappings. Raises Refused where it leads through something else."""
    # space.model.depth.low: an option's name holds a dot; space.model.choices is that of the parameter model
    *parents, last = re.split(r"(?<!^space\.model)(?<!^fixed\.model)\.|\.(?=choices$)", key)
    for part in parents:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise Refused(f"--set {key}: {part} is not a mapping")
    raw[last] = value


def dump(raw: dict[str, Any]) -> str:
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
