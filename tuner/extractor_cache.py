"""Feature extractors kept in the user's cache: a search on the same images need not train them again."""

import hashlib
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch

from tuner.run import write_atomic
from tuner.summary import ExtractorInfo
from tuner.vae.data import Data

MOST = 200  # files, of half a megabyte or so


class ExtractorCache:
    """Those of one data set and seed, in `$XDG_CACHE_HOME/vae-tuner` or `~/.cache/vae-tuner`.

    What other code, another PyTorch, other images or another seed made is not found. A cache that can't be read or
    written is as good as none.
    """

    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed
        self.folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vae-tuner"

    def find(self, name: str) -> tuple[bytes, ExtractorInfo] | None:
        """An extractor's file, and what is known of it."""
        with suppress(OSError, ValueError):
            content = self._path(name, "safetensors").read_bytes()
            info = ExtractorInfo.model_validate_json(self._path(name, "json").read_bytes())
            return (content, info) if hashlib.sha256(content).hexdigest() == info.sha256 else None
        return None

    def keep(self, name: str, content: bytes, info: ExtractorInfo) -> None:
        with suppress(OSError):
            write_atomic(self._path(name, "safetensors"), content)
            write_atomic(self._path(name, "json"), info.model_dump_json())
            kept = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for oldest in kept[:-MOST]:
                oldest.unlink()

    def _path(self, name: str, form: str) -> Path:
        return self.folder / f"{name}-{self._key}.{form}"

    @cached_property
    def _key(self) -> str:
        images = (self.data.shape, self.data.train.fingerprint(), self.data.validation.fingerprint())
        found = hashlib.sha256(repr((torch.__version__, self.seed, images)).encode())
        for source in sorted(Path(__file__).parent.rglob("*.py")):
            found.update(source.read_bytes())
        return found.hexdigest()[:32]
