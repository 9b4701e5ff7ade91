"""What TensorBoard shows: one run per trial, written by the driver alone."""

from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.plugins.hparams import api_pb2
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from tuner.vae.score import METRICS

GROUPS = {
    "objective": (
        "frechet_distance",
        "frechet_distance_standard_normal",
        "frechet_distance_reconstruction",
        "kernel_distance",
        "sharpness",
    ),
    "loss": ("loss", "calibrated_nll", "rate", "distortion", "mse"),
    "latent": ("active_units",),
    "speed": ("images_per_second", "seconds_train", "seconds_score"),
}
TAGS = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}
EPOCH_STEPS = 1_000  # TensorBoard's steps are whole numbers: thousandths of an epoch
STATUS = {"complete": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE, "pruned": api_pb2.STATUS_SUCCESS}


class TensorBoard:
    """Writes event files under a run's `tensorboard/`; one writer a trial, flushed at each report."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.writers: dict[str, SummaryWriter] = {}

    def start_trial(self, number: int, parameters: dict[str, Any]) -> None:
        """Name the trial's hyperparameters, so that HParams lists it while it runs."""
        writer = self._writer(trial_name(number))
        experiment, session, _ = hparams(parameters, {TAGS[name]: 0.0 for name in METRICS})
        assert writer.file_writer is not None
        writer.file_writer.add_summary(experiment)
        writer.file_writer.add_summary(session)
        writer.flush()

    def report(self, name: str, report: dict[str, Any], sheet: np.ndarray | None = None) -> None:
        """Scalars and the sample sheet (H, W) uint8 of one evaluation."""
        writer, step = self._writer(name), round(report["epoch"] * EPOCH_STEPS)
        for key, tag in TAGS.items():
            if key in report:
                writer.add_scalar(tag, report[key], step)
        if sheet is not None:
            writer.add_image("samples", sheet, step, dataformats="HW")
        writer.flush()

    def end_trial(self, number: int, outcome: str) -> None:
        """Close a trial's files with its outcome."""
        name = trial_name(number)
        writer = self._writer(name)
        end = hparams({}, {})[2]
        end.value[0].metadata.plugin_data.content = _session_end(STATUS[outcome])
        assert writer.file_writer is not None
        writer.file_writer.add_summary(end)
        self.writers.pop(name).close()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()

    def _writer(self, name: str) -> SummaryWriter:
        if name not in self.writers:
            self.writers[name] = SummaryWriter(str(self.directory / name))
        return self.writers[name]


def trial_name(number: int) -> str:
    return f"trial-{number:04d}"


def _session_end(status: int) -> bytes:
    import time

    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    info = SessionEndInfo(status=status, end_time_secs=time.time())
    return bytes(HParamsPluginData(session_end_info=info, version=0).SerializeToString())
