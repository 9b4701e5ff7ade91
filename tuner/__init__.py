"""Find, train and export the variational autoencoder that draws your images best."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.api import Result, open, tune
    from tuner.spec import Spec

__version__ = "0.1.0"
__all__ = ["Result", "Spec", "open", "tune"]

if os.path.expanduser("~") == "~":  # a user without name and home, as OpenShift has them, for whom Ray has no import
    os.environ["HOME"] = os.environ.get("TMPDIR", "/tmp")


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: whoever asks a command for help does not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tuner import api

    return getattr(api, name)
