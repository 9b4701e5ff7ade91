"""An actor beside the driver that reads the run's files for workers. Imports no torch: it is there in a moment."""

from tuner.run import RunFiles


class FileServer:
    """Hands a run's files to workers, which may not see the run directory."""

    def __init__(self, run: RunFiles):
        self.run = run

    def checkpoint(self, trial: int) -> bytes | None:
        """A trial's checkpoint, None where it has none."""
        path = self.run.checkpoint(trial)
        return path.read_bytes() if path.exists() else None

    def extractor(self) -> bytes | None:
        """The file of the extractor that the search scores with, None before it is trained."""
        made = self.run.summary().extractors.get("search")
        return self.run.extractor("search", made.kind).read_bytes() if made else None
