"""`vae-tuner COMMAND ...`, which is `python -m tuner.COMMAND ...`; without a command, a search."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("search", "retrain", "export", "report", "use", "spec")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    name = given.pop(0) if given and given[0] in COMMANDS else "search"
    status: int = importlib.import_module(f"tuner.{name}").main(given)
    return status


if __name__ == "__main__":
    sys.exit(main())
