"""Kills a small digits run at random moments, runs the same command again until it ends, and compares.

`python -m benchmarks.chaos --rounds 30 --seed 0 [--out FILE]`; `make chaos` does that. A round starts the real
command, kills -9 a process of it (driver, worker, raylet, gcs_server) at a random moment of a stage, starts the
command again, now and then kills again, and ends with an attempt that nothing disturbs. Stages and kinds of process
take turns, each with each. The result is held against a run that was never disturbed, and against every round before.

What is held to what is in `invariants.py`.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from benchmarks.invariants import (
    TRIALS,
    Known,
    Snapshot,
    accounting,
    compare,
    kept,
    lost_trials,
    snapshot,
    tally,
    trials_of,
)
from tuner.run import RunFiles

ROOT = Path(__file__).parents[1]
STAGES = ("search", "promote", "retrain", "export")
VICTIMS = ("driver", "worker", "raylet", "gcs_server")
FLAGS = (
    f"--trials={TRIALS}",
    "--concurrency=2",
    "--max-epochs=2",
    "--set=budget.grace_epochs=1",
    "--set=budget.reduction_factor=2",
    "--set=space.learning_rate.low=0.0015",  # lower or higher, two epochs collapse nearly all trials
    "--set=space.learning_rate.high=0.004",
    "--set=space.kl_weight.high=0.1",
    "--set=retrain.epochs=2",
    "--set=retrain.priors=[{prior: gaussian_mixture, prior_components: 5}]",
)
AGAIN = 1 / 3  # how often the attempt after a kill is disturbed as well
HANG_SECONDS = 420  # an attempt that takes longer hangs
LEFT_SECONDS = 20  # what the other processes of a command may take to go after it
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
AGENT_SECONDS = 75  # where driver and raylet were killed, these tell the head so for a minute, though that is gone too
POLL_SECONDS = 0.02


class Attempt:
    """One start of the command, in a session of its own; every process of it carries a mark."""

    def __init__(self, run: RunFiles, name: str):
        self.run, self.mark = run, f"TUNER_CHAOS={uuid.uuid4().hex}"
        self.log = run.path.with_name(f"{run.path.name}-{name}.log")
        key, value = self.mark.split("=")
        environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"} | {key: value}
        environment["XDG_CACHE_HOME"] = f"{run.path}-cache"  # what a run is to make anew
        with self.log.open("wb") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "tuner.search", "--run", str(run.path), *FLAGS],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def processes(self) -> dict[int, str]:
        """Those alive that carry the mark: their ids and what they are called."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[0]
            except OSError:  # gone meanwhile, or not ours
                continue
        return found

    def victims(self) -> dict[str, dict[int, str]]:
        """The processes that may be killed, by kind."""
        kinds: dict[str, dict[int, str]] = {}
        for pid, title in self.processes().items():
            name = Path(title).name
            if pid == self.driver.pid:
                kinds.setdefault("driver", {})[pid] = "driver"
            elif name in ("raylet", "gcs_server"):
                kinds.setdefault(name, {})[pid] = name
            elif title.startswith("ray::") and not title.startswith(AGENTS):
                kinds.setdefault("worker", {})[pid] = title.split(".")[0]
        busy = {pid: title for pid, title in kinds.get("worker", {}).items() if title != "ray::IDLE"}
        return kinds | ({"worker": busy} if busy else {})

    def wait(self) -> int:
        """The command's exit status. Raises TimeoutError where it hangs."""
        try:
            return self.driver.wait(max(0.0, HANG_SECONDS - self.seconds))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"hangs: {self.seconds:.0f} s, alive are {self.processes()}") from None

    def left(self) -> dict[int, str]:
        """Wait for all other processes of the command to go -> what stayed for too long, by pid."""
        begun = time.monotonic()
        while alive := self.processes():
            agents = all(title.startswith(AGENTS) for title in alive.values())
            if time.monotonic() > begun + (AGENT_SECONDS if agents else LEFT_SECONDS):
                return alive
            time.sleep(0.1)
        return {}

    def clear(self) -> None:
        """Kill what is left of the command."""
        while alive := self.processes():
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.driver.poll()
            time.sleep(0.05)
        self.driver.wait()


@dataclass
class Kill:
    round: int
    stage: str
    victim: str
    title: str
    seconds: float  # after the attempt's start
    training: int  # workers alive that train trials
    repeated: int = 0  # evaluations begun and lost: at most one for each running trial whose worker died
    status: int | None = None  # the attempt's
    ended: float = 0.0  # seconds from the kill to the attempt's end


@dataclass
class Round:
    """One run that was disturbed: its kills and whatever is wrong with it."""

    number: int
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    lost: int = 0
    compared: int = 0
    tallied: bool = False
    seconds: float = 0.0


def stage_of(run: RunFiles) -> str | None:
    """The stage a run is in, by its files; None when it is finished."""
    summary = run.summary()
    for part, stage in (("trials", "search"), ("best", "promote"), ("retrain", "retrain")):
        if not getattr(summary, part):
            return stage
    return None if run.report.exists() and summary.test and summary.test.retrained else "export"


def ended(attempt: Attempt, status: int, victim: str | None) -> Iterator[str]:
    """Faults in how an attempt ended."""
    text = attempt.log.read_text(errors="replace")
    allowed = {None: {0}, "driver": {-signal.SIGKILL}, "worker": {0}}.get(victim, {0, 1})
    if status not in allowed:
        yield f"exit status {status} with {victim or 'nothing'} killed: {text.strip().splitlines()[-1:]}"
    if "Traceback" in text:
        yield f"a traceback with {victim or 'nothing'} killed: {text[text.index('Traceback') :][-1500:]}"
    rays_own = "Raylet is terminated" in text or "GCS may have been killed" in text  # it may end a process in C++
    if status == 1 and not rays_own and not re.search(r"^error: [^\n]*; go on with: [^\n]*\n*\Z", text, re.MULTILINE):
        yield f"status 1 without a word on how to go on: {text.strip().splitlines()[-1:]}"


class Chaos:
    """Rounds over runs in `directory`, all against one undisturbed run."""

    def __init__(self, seed: int, directory: Path, say: Callable[[str], None] = print):
        self.random, self.directory, self.say = random.Random(seed), directory, say
        self.known, self.rounds, self.deck = Known(), list[Round](), list[tuple[str, str]]()
        self.durations: dict[str, float] = {}
        self.startup = 0.0

    def undisturbed(self) -> None:
        """The run that all others are held against, and how long each stage takes."""
        run = RunFiles(self.directory / "undisturbed")
        attempt = Attempt(run, "1")
        try:
            begun, stage = 0.0, "search"
            while attempt.driver.poll() is None:
                if not self.startup and run.spec.exists():
                    self.startup = attempt.seconds
                now = stage_of(run)
                if now and now != stage:
                    self.durations[stage], stage, begun = attempt.seconds - begun, now, attempt.seconds
                if attempt.seconds > HANG_SECONDS:
                    raise TimeoutError("the undisturbed run hangs")
                time.sleep(POLL_SECONDS)
            self.durations[stage] = attempt.seconds - begun
            faults = [*ended(attempt, attempt.wait(), None), *accounting(run), *tally(run, Snapshot([], {}))]
            if left := attempt.left():
                faults.append(f"left behind: {left}")
        finally:
            attempt.clear()
        if faults or self.durations.keys() != set(STAGES):
            raise AssertionError(f"the undisturbed run: {faults}, stages {self.durations}")
        compare(self.known, run)
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.durations.items())
        self.say(f"undisturbed: {sum(self.durations.values()):.0f} s ({shown})")

    def round(self) -> Round:
        """Disturb a run until it is done: first by the stage and the kind of process whose turn it is."""
        this = Round(len(self.rounds))
        self.rounds.append(this)
        run = RunFiles(self.directory / f"round-{this.number:02d}")
        attempts: list[Attempt] = []
        started = time.monotonic()
        try:
            self._disturb(run, this, attempts, self._in_turn())
        except Exception as error:  # a hang, or a file that can't be read: the round's fault, not the end of all rounds
            this.faults.append(f"{type(error).__name__}: {error}")
        finally:
            for attempt in attempts:
                attempt.clear()
        this.seconds = time.monotonic() - started
        kills = "; ".join(
            f"{kill.title} at {kill.seconds:.1f} s in {kill.stage} -> {kill.status}" for kill in this.kills
        )
        self.say(
            f"round {this.number}: {this.seconds:.0f} s, {len(attempts)} attempts, {this.compared} compared; {kills}"
        )
        for fault in this.faults:
            self.say(f"  fault: {fault}")
        if not this.faults:
            for path in self.directory.glob(f"{run.path.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return this

    def _disturb(self, run: RunFiles, this: Round, attempts: list[Attempt], turn: tuple[str, str] | None) -> None:
        before = snapshot(run)
        while True:
            attempt = Attempt(run, str(len(attempts) + 1))
            attempts.append(attempt)
            kill = self._kill(attempt, this, *turn) if turn else None
            status = attempt.wait()
            if kill:
                kill.status, kill.ended = status, round(attempt.seconds - kill.seconds, 2)
                self.say(f"  {kill}")
            this.faults += ended(attempt, status, kill.victim if kill else None)
            after = snapshot(run)
            if kill and kill.stage == "search" and kill.victim != "worker":
                lost = after.repeated()
                kill.repeated = min(sum(lost), kill.training)
                if max(lost, default=0) > 1:
                    this.faults.append(f"evaluations lost by trial: {lost}")
            this.faults += kept(before, after)
            if before.left and run.summary().trials:
                this.tallied = True
                this.faults += tally(run, before)
            if not kill and status != 0:
                return
            before = after
            now = stage_of(run)
            if status == 0 and now is None:
                break
            left = STAGES[STAGES.index(now or "export") :]
            again = self.random.random() < AGAIN
            turn = (self.random.choice(left), self.random.choice(VICTIMS)) if again else None
        self._finished(run, this, attempts)

    def _finished(self, run: RunFiles, this: Round, attempts: list[Attempt]) -> None:
        """What is wrong with a run that says it is finished."""
        this.faults += accounting(run)
        this.lost = lost_trials(run)
        if this.lost:
            this.faults.append(f"{this.lost} trials lost")
        this.compared, differing = compare(self.known, run)
        this.faults += differing
        files = _files(run)
        attempt = Attempt(run, "more")
        attempts.append(attempt)
        this.faults += ended(attempt, attempt.wait(), None)
        if _files(run) != files:
            this.faults.append("the command once more changed a finished run")
        for attempt in attempts:
            if left := attempt.left():
                this.faults.append(f"left behind: {left}")

    def _in_turn(self) -> tuple[str, str]:
        """Each stage with each kind of process once in random order, and again."""
        if not self.deck:
            pairs = list(product(STAGES, VICTIMS))
            self.deck = self.random.sample(pairs, len(pairs))
        return self.deck.pop()

    def _kill(self, attempt: Attempt, this: Round, wanted: str, kind: str) -> Kill | None:
        """Kill a random process of a kind at a random moment of a stage, or the first there is after it.

        None where the attempt was over before.

        A stage is shorter on a quieter machine: then the kill falls at its end, and the next takes it for as short.
        """
        part, entered = self.random.random(), 0.0
        resumed = stage_of(attempt.run) == wanted != "search"
        while attempt.driver.poll() is None and attempt.seconds < HANG_SECONDS:
            now = stage_of(attempt.run)
            if now == wanted:
                entered = entered or attempt.seconds
                due = attempt.seconds - entered >= part * (self.durations[wanted] + (self.startup if resumed else 0))
                if due and kind in attempt.victims():
                    break
            elif now is None or STAGES.index(now) > STAGES.index(wanted):
                self._shorten(wanted, attempt.seconds - entered)
                break
            time.sleep(POLL_SECONDS)
        else:
            self._shorten(wanted, attempt.seconds - entered)
            return None
        stage, victims, running = stage_of(attempt.run), attempt.victims(), 0
        if kind not in victims or stage is None:
            return None
        pid, title = self.random.choice(sorted(victims[kind].items()))
        if kind == "worker" and stage == "search" and "Trainable" in title:
            running = sum(trial.state == TrialState.RUNNING for trial in trials_of(attempt.run))
        training = sum("Trainable" in name for name in victims.get("worker", {}).values())
        kill = Kill(this.number, stage, kind, title, round(attempt.seconds, 2), training, min(1, running))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        this.kills.append(kill)
        return kill

    def _shorten(self, stage: str, seconds: float) -> None:
        self.durations[stage] = min(self.durations[stage], seconds)

    def report(self) -> dict[str, Any]:
        """The count of everything, for one line of JSON."""
        kills = [kill for this in self.rounds for kill in this.kills]
        counted = Counter((kill.stage, kill.victim) for kill in kills)
        repeated = [kill.repeated for kill in kills]
        seconds = [this.seconds for this in self.rounds]
        return {
            "rounds": len(self.rounds),
            "rounds_with_faults": sum(bool(this.faults) for this in self.rounds),
            "kills": len(kills),
            "kills_per_stage": {
                stage: {victim: counted[stage, victim] for victim in VICTIMS if counted[stage, victim]}
                for stage in STAGES
            },
            "kills_per_victim": {victim: sum(kill.victim == victim for kill in kills) for victim in VICTIMS},
            "titles": dict(Counter(kill.title for kill in kills)),
            "trials_lost": sum(this.lost for this in self.rounds),
            "evaluations_repeated": {
                "mean": round(sum(repeated) / max(1, len(repeated)), 3),
                "worst_per_kill": max(repeated, default=0),
            },
            "numbers_compared": sum(this.compared for this in self.rounds),
            "tallies_compared": sum(this.tallied for this in self.rounds),
            "worst_seconds_to_the_end_after_ray_died": max(
                (kill.ended for kill in kills if kill.victim in ("raylet", "gcs_server")), default=0.0
            ),
            "seconds": round(sum(seconds), 1),
            "seconds_per_round": {
                "mean": round(sum(seconds) / max(1, len(seconds)), 1),
                "worst": round(max(seconds, default=0.0), 1),
            },
            "faults": [f"round {this.number}: {fault}" for this in self.rounds for fault in this.faults],
        }


def lines(report: dict[str, Any]) -> Iterable[str]:
    """Kills per stage and victim as a small table."""
    yield f"{'':<10}" + "".join(f"{victim:>12}" for victim in VICTIMS)
    for stage, counts in report["kills_per_stage"].items():
        yield f"{stage:<10}" + "".join(f"{counts.get(victim, 0):>12}" for victim in VICTIMS)
    yield f"{'all':<10}" + "".join(f"{report['kills_per_victim'][victim]:>12}" for victim in VICTIMS)


def _files(run: RunFiles) -> dict[str, tuple[int, int]]:
    stats = {str(path): path.stat() for path in run.path.rglob("*") if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill a small run at random moments and see that nothing is lost.")
    parser.add_argument("--rounds", type=int, default=30, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the line of JSON goes as well")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="for the runs; the faulty ones stay")
    arguments = parser.parse_args(argv)
    directory = arguments.dir or Path(tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(arguments.seed, directory, lambda text: print(text, flush=True))
    chaos.undisturbed()
    for _ in range(arguments.rounds):
        chaos.round()
    report = {"seed": arguments.seed} | chaos.report()
    line = json.dumps(report)
    print(line)
    print("\n".join(lines(report)))
    if arguments.out:
        arguments.out.write_text(f"{line}\n")
    if report["faults"]:
        print(f"{len(report['faults'])} faults; their runs are in {directory}")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
