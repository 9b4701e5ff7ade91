"""What TensorBoard shows: one run per trial, written by the driver alone, so that workers share no disk."""

import io
import re
import shutil
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hp
from torch.utils.tensorboard.writer import SummaryWriter

from tuner.space import Choices, IntRange
from tuner.spec import Spec
from tuner.study import BEST, MANY, SEARCH
from tuner.vae.metrics import METRICS

GROUPS = {
    "objective": (
        "frechet_distance",
        "frechet_distance_standard_normal",
        "frechet_distance_reconstruction",
        "kernel_distance",
        "sharpness",
    ),
    "loss": ("loss", "calibrated_nll", "nll", "rate", "distortion", "mse"),
    "latent": ("active_units",),
    "speed": ("images_per_second", "seconds_train", "seconds_score"),
}
TAGS = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}
# HParams' own status can't tell a running trial from one that was stopped early: both are unknown to it. So the
# outcome is a metric as well, which its table can be filtered by.
STATUS = {"complete": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE, "pruned": api_pb2.STATUS_UNKNOWN}
OUTCOME_TAG = "outcome/state"
LONGEST = 200  # bytes of a folder's name, which a space of many parameters would pass
SPRITE = 32  # pixels a side at most: all sprites are one picture, which the browser holds as a texture
NUMBERS = {"running": 0, "pruned": 1, "complete": 2, "failed": 3}  # what the outcome is as a metric


class TensorBoard:
    """Writes event files under a run's `tensorboard/`, flushed at each evaluation. The x axis counts epochs.

    Where a rung is a fraction of an epoch, TensorBoard's whole-numbered steps count tenths (hundredths, ...)
    of an epoch; the text panel says so.
    """

    def __init__(self, directory: Path, spec: Spec, stage: str = SEARCH):
        self.directory = directory
        self.spec, self.stage = spec, stage
        self.writers: dict[str, SummaryWriter] = {}
        self.names: dict[int, str] = {}
        self.steps_per_epoch = next(
            (scale for scale in (1, 10, 100) if all((rung * scale).is_integer() for rung in spec.budget.rungs)), 1000
        )

    def start_search(self) -> None:
        """Declare the searched parameters with their domains and the metrics, before any trial ends.

        In place of what an earlier command declared, when there may have been fewer trials.
        """
        for earlier in self.directory.glob("events.out.tfevents.*"):
            earlier.unlink()
        parameters = [hp.HParam("trial", hp.IntInterval(0, max(1, self.spec.budget.trials - 1)))]
        for name, entry in self.spec.space.items():
            domain: Any
            if isinstance(entry, Choices):
                domain = hp.Discrete(list(entry.choices))
            else:  # the baseline may lie outside of what is searched
                interval, number = (hp.IntInterval, int) if isinstance(entry, IntRange) else (hp.RealInterval, float)
                classic = getattr(self.spec.baseline, name, entry.low)
                domain = interval(number(min(entry.low, classic)), number(max(entry.high, classic)))
            parameters.append(hp.HParam(name, domain))
        legend = ", ".join(f"{number} {outcome}" for outcome, number in NUMBERS.items())
        metrics = [hp.Metric(OUTCOME_TAG, display_name=f"outcome ({legend})")]
        metrics += [hp.Metric(tag, display_name=name) for name, tag in TAGS.items() if name in METRICS]
        writer = self._writer(".")
        self._add(writer, hp.hparams_config_pb(parameters, metrics))
        unit = {1: "epochs", 10: "tenths", 100: "hundredths", 1000: "thousandths"}[self.steps_per_epoch]
        unit += "" if self.steps_per_epoch == 1 else " of an epoch"
        trials = self.spec.budget.trials
        most = f" Of the {trials} trials only the best {BEST} so far are here." if trials > MANY else ""
        writer.add_text("how_to_read", f"Steps are {unit}. The metric {OUTCOME_TAG} in HParams: {legend}.{most}")
        writer.flush()

    def start_trial(self, number: int, parameters: Mapping[str, Any]) -> None:
        """Name the trial and its parameters, so that HParams lists it from its first second."""
        searched = {name: parameters[name] for name in self.spec.searched(parameters)}
        shown = [
            f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in searched.items()
        ]
        listed = self.stage == SEARCH  # HParams would take a finalist for a trial more
        name = ",".join([f"{number:04d}" if listed else f"{self.stage}-{number}", *shown])
        self.names[number] = re.sub("[/\\0]", "_", name).encode()[:LONGEST].decode(errors="ignore")
        writer = self._writer(self.names[number])
        if listed:
            # Without an id of its own HParams takes the folder's name, which tells trials of several runs apart.
            self._add(writer, hp.hparams_pb({"trial": number} | searched, trial_id=""))
        writer.add_scalar(OUTCOME_TAG, NUMBERS["running"], 0)
        writer.flush()

    def shows(self, number: int) -> bool:
        """Whether a trial has begun to be shown, and has not ended."""
        return self.names.get(number) in self.writers

    def keep(self, numbers: Container[int]) -> None:
        """Remove the files of all other trials of the search."""
        for folder in self.directory.glob("[0-9]*"):
            if int(folder.name.partition(",")[0]) not in numbers:
                if folder.name in self.writers:
                    self.writers.pop(folder.name).close()
                shutil.rmtree(folder)

    def add_trial(self, number: int, evaluation: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
        """Scalars and pictures, PNG files, of one evaluation of a trial."""
        writer, step = self._writer(self.names[number]), round(evaluation["epoch"] * self.steps_per_epoch)
        for key, tag in TAGS.items():
            if key in evaluation:
                writer.add_scalar(tag, evaluation[key], step)
        for tag, picture in pictures.items():
            self._add(writer, _image(tag, picture), step)
        writer.flush()

    def end_trial(self, number: int, outcome: str, reason: str) -> None:
        """Close a trial's files with its outcome and the reason for it."""
        writer = self._writer(self.names[number])
        writer.add_scalar(OUTCOME_TAG, NUMBERS[outcome], 1)
        if reason:
            writer.add_text("outcome/reason", f"    {reason}")  # in Markdown that is text as it stands
        if self.stage == SEARCH:
            self._add(writer, _session_end(outcome))
        self.writers.pop(self.names[number]).close()

    def embed(self, latents: torch.Tensor, labels: torch.Tensor | None, images: torch.Tensor) -> None:
        """The projector: latents (N, Z) with labels (N,), if any, and images (N, C, H, W) in [0, 1] as sprites."""
        shutil.rmtree(self.directory / "projector", ignore_errors=True)  # an export that is made again
        writer = self._writer("projector")
        sprites = F.adaptive_avg_pool2d(images, (min(images.shape[2], SPRITE), min(images.shape[3], SPRITE)))
        names = None if labels is None else [str(label) for label in labels.tolist()]
        writer.add_embedding(latents, names, 1 - sprites if self.spec.data.ink else sprites, tag="test_latents")
        self.writers.pop("projector").close()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()

    def _writer(self, name: str) -> SummaryWriter:
        if name not in self.writers:
            self.writers[name] = SummaryWriter(str(self.directory / name))
        return self.writers[name]

    def _add(self, writer: SummaryWriter, summary: Any, step: int | None = None) -> None:
        """HParams' own summaries are of TensorFlow's message type where TensorFlow is there; bytes fit both."""
        assert writer.file_writer is not None
        writer.file_writer.add_summary(Summary.FromString(summary.SerializeToString()), step)


def _image(tag: str, png: bytes) -> Summary:
    """A picture as it is; PyTorch's own writer would encode it again, in colour."""
    width, height = Image.open(io.BytesIO(png)).size
    shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=shown)])


def _session_end(outcome: str) -> Summary:
    """HParams' note that a trial has ended."""
    info = plugin_data_pb2.SessionEndInfo(status=STATUS[outcome], end_time_secs=time.time())
    content = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    end = Summary()
    end.value.add(tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(content))
    end.value[0].tensor.CopyFrom(metadata.NULL_TENSOR)
    return end
