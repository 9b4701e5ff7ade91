"""What must hold of the small runs of `chaos.py`, whatever of them was killed: equal numbers, and nothing lost.

What can be compared: a proposal depends on the trial's number alone while TPE is in its random start-up (ten
trials), so parameters are equal, and so is every score of an evaluation, to the last bit. Which trials stop
at a rung depends on the order in which they reach it. So evaluations are compared by (trial, rung), promotion entries
by (trial, epoch), and retrain, test and export among the runs that promoted the same finalists.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from optuna.trial import FrozenTrial, TrialState

from tuner import sources
from tuner import spec as specs
from tuner.data_spec import DigitsSpec
from tuner.promote import contenders
from tuner.run import RunFiles
from tuner.study import BASELINE, RETRAIN, SEARCH, evaluations, read_study, table
from tuner.vae import codec
from tuner.vae.checkpoint import Checkpoint

TRIALS, FINALISTS = 6, 2
TIMES = {"seconds_train", "seconds_score", "timestamp"}


@dataclass
class Snapshot:
    """What the journal and the checkpoints hold between two attempts."""

    trials: list[FrozenTrial]
    rungs: dict[int, int]  # of the checkpoints

    @property
    def running(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials if trial.state == TrialState.RUNNING]

    @property
    def left(self) -> set[int]:
        """Numbers of the trials that a session has to run."""
        return set(range(TRIALS)) - {trial.number for trial in self.trials if trial.state.is_finished()}

    def repeated(self) -> list[int]:
        """Evaluations that the death of all workers costs, one entry a running trial."""
        return [max(1, len(evaluations(trial)) - self.rungs.get(trial.number, 0)) for trial in self.running]


def trials_of(run: RunFiles, name: str = SEARCH) -> list[FrozenTrial]:
    """The trials of a study of the journal; none before it holds it."""
    if not run.journal.exists() or b"directions" not in run.journal.read_bytes().split(b"\n", 1)[0]:
        return []
    study = read_study(run.journal, name)
    return study.known() if study else []


def snapshot(run: RunFiles) -> Snapshot:
    rungs = {}
    for path in run.checkpoints.glob("*.pt"):
        rungs[int(path.stem)] = Checkpoint.from_bytes(path.read_bytes()).evaluation["rung"]
    return Snapshot(trials_of(run), rungs)


class Known:
    """What undisturbed and earlier runs found: the first to find a thing sets what the others must find."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], Any] = {}

    def differs(self, key: tuple[Any, ...], value: Any) -> bool | None:
        """None where nobody found it before."""
        if key not in self.found:
            self.found[key] = value
            return None
        return repr(self.found[key]) != repr(value)  # NaN is equal to NaN, and no other bit may differ


def findings(run: RunFiles) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All numbers of a finished run, each with what it depends on."""
    summary = run.summary()
    yield ("extractors",), summary.extractors
    for split, found in (("validation", summary.validation), ("test", summary.test)):
        assert found
        yield (split, "real and baseline"), (found.real, found.baseline)
    for trial in trials_of(run):
        parameters = json.dumps(trial.user_attrs["parameters"], sort_keys=True)
        yield ("parameters", trial.number), parameters
        if trial.state == TrialState.FAIL:
            yield ("failure", trial.number, parameters), trial.user_attrs["reason"]
        for key, value in trial.user_attrs.items():
            if key.startswith("evaluation:"):
                scores = {name: number for name, number in sorted(value.items()) if name not in TIMES}
                yield (key, trial.number, parameters), scores
    for entry in summary.promotion:
        yield ("promotion", entry.trial, entry.epoch), entry
    winner = tuple((entry.trial, entry.epoch) for entry in summary.promotion[:FINALISTS])
    yield ("best", *winner), summary.best
    yield ("validation", *winner), summary.validation
    yield ("retrain", *winner), summary.retrain
    yield ("test", *winner), summary.test
    for name in ("model.safetensors", "prior.safetensors", "samples.png"):
        yield (name, *winner), hashlib.sha256((run.export / name).read_bytes()).hexdigest()


def compare(known: Known, run: RunFiles) -> tuple[int, list[str]]:
    """How many findings were held against others', and those that differ."""
    outcomes = [(key, known.differs(key, value), value) for key, value in findings(run)]
    faults = [f"{key}: {value} here, {known.found[key]} before" for key, differs, value in outcomes if differs]
    return sum(differs is not None for _, differs, _ in outcomes), faults


def accounting(run: RunFiles) -> Iterator[str]:
    """Faults in what a finished run holds: trials counted, files left and missing, the export's use."""
    spec = specs.load(run.spec)
    study = read_study(run.journal)
    rows = table(study, spec) if study else []
    if [row["trial"] for row in rows] != list(range(TRIALS)):
        yield f"the journal has trials {[row['trial'] for row in rows]}"
    with run.trials.open(newline="") as file:
        written = list(csv.DictReader(file))
    if written != [{name: str(row.get(name, "")) for name in written[0]} for row in rows]:
        yield "trials.csv says something else than the journal"
    counts = Counter(row["state"] for row in rows)
    if dict(counts) != {state: count for state, count in run.summary().trials.items() if count}:
        yield f"the journal counts {dict(counts)}, summary.json {run.summary().trials}"
    kept = {row["trial"] for row in contenders(rows, spec)} | {BASELINE}
    checkpoints = {int(path.stem) for path in run.checkpoints.iterdir()}
    if checkpoints != kept:
        yield f"checkpoints of trials {sorted(checkpoints)}, not of {sorted(kept)}"
    left = [str(path) for path in run.path.rglob("*.tmp")]
    if left:
        yield f"half written files left: {left}"
    model = codec.load(run.export)
    latents = model.encode(sources.load_test(DigitsSpec()).images[:8])
    for name, images in (("decoded", model.decode(latents)), ("sampled", model.sample(8))):
        if images.shape != (8, 1, 28, 28) or not bool(torch.isfinite(images).all()):
            yield f"the export {name} {tuple(images.shape)}, finite: {bool(torch.isfinite(images).all())}"


def lost_trials(run: RunFiles) -> int:
    """Trials that failed because their workers were lost."""
    reasons = [trial.user_attrs.get("reason", "") for name in (SEARCH, RETRAIN) for trial in trials_of(run, name)]
    return sum("lost" in reason or "never started" in reason for reason in reasons)


def tally(run: RunFiles, before: Snapshot) -> Iterator[str]:
    """Faults in Ray's own account of the session that ran the trials that were left."""
    newest = max((run.ray / "search").glob("experiment_state-*.json"), key=lambda path: path.stat().st_mtime_ns)
    listed = [json.loads(trial[0]) for trial in json.loads(newest.read_text())["trial_data"]]
    numbers = {trial["config"]["trial"] for trial in listed}  # one that was put back is listed again
    if numbers != before.left:
        yield f"Ray's tally has trials {numbers}, left to run were {before.left}"
    states = Counter(trial["status"] for trial in listed)
    if states.keys() - {"TERMINATED", "ERROR"}:
        yield f"Ray's tally has {dict(states)}"


def kept(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """Faults in what an attempt did to what had been there: nothing finished may change, no evaluation vanish."""
    for old in before.trials:
        new = after.trials[old.number] if old.number < len(after.trials) else None
        if new is None or new.params != old.params:
            yield f"trial {old.number} is gone or another"
        elif old.state.is_finished():
            if (new.state, new.values, new.user_attrs, new.datetime_complete) != (
                old.state,
                old.values,
                old.user_attrs,
                old.datetime_complete,
            ):
                yield f"trial {old.number} had ended and was run again"
        else:
            changed = [
                key
                for key, value in old.user_attrs.items()
                if key.startswith("evaluation:") and new.user_attrs.get(key) != value
            ]
            if changed:
                yield f"trial {old.number} was evaluated twice: {changed}"
