"""How long until a search holds a checkpoint that closes 0.8, 0.9 and 0.95 of the gap, against three peers.

    python -m benchmarks.search [--data-dir data] [--images mnist] [--seconds 240] [--seed 0] [--quick]

The peers are those of `peers.py`: Ray Tune, Optuna alone and Syne Tune, each once with our training step, so that
only the search differs, and once with the tutorial loop. All get the same data, epochs, kind of prior, temperature
and scorer, and two cores. The peers' prior is fitted on 5,000 codes, ours on 10,000, and each stops trials by its own
rule. Everyone trains its extractor on the clock, ours its baseline as well. Ours runs as its spec is shipped, which
names points to evaluate first, and again told nothing but what holds for any images: the KL weight in their own unit,
0.1 to 10, of which 1 is tried first. The peers search 0.001 to 3 of the absolute weight.

Each runs as one command for --seconds; whatever checkpoint it writes is kept with its time since the command, and
scored afterwards with noise and an extractor that nobody searched with. Baseline and floor are those of that extractor.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import LOOPS, PEERS
from benchmarks.setting import (
    command_of,
    load_spec,
    parser,
    reached,
    say,
    search_command,
    unseen_scorer,
    watch,
)
from tuner.vae.process import settle

OURS = ("ours", "ours, told nothing")
TOLD_NOTHING = {
    "fixed.kl_unit": "calibrated",
    "space.kl_weight": {"type": "float", "low": 0.1, "high": 10, "log": True},
    "points_to_evaluate": [{"kl_weight": 1}],
}


def main() -> None:
    options = parser(__doc__, None)
    options.add_argument("--images", default="mnist", help="the shipped spec whose data lie in --data-dir")
    options.add_argument("--seconds", type=float, default=240, help="for each search")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--quick", action="store_true", help="digits and one peer, 20 seconds each")
    arguments = options.parse_args()
    data_dir, images = arguments.data_dir and arguments.data_dir.resolve(), arguments.images
    seconds = 20.0 if arguments.quick else arguments.seconds
    peers, loops = (("optuna",), ("tutorial",)) if arguments.quick else (tuple(PEERS), LOOPS)

    settle()
    spec, data = load_spec(data_dir, images)
    scorer, baseline = unseen_scorer(spec, data)
    say({"floor": scorer.floor, "baseline": baseline}, 3)

    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for told in OURS if not arguments.quick else OURS[:1]:
            run = place / told
            blind = [f"--set={name}={json.dumps(value)}" for name, value in TOLD_NOTHING.items() if told != OURS[0]]
            command = search_command(data_dir, run, "--seed", arguments.seed, *blind, images=images)
            found = watch(command, run / "checkpoints", place / f"kept-{told}", seconds)
            results[told] = reached(found, scorer, baseline)
            say({"search": told, **results[told]})
        for peer in peers:
            for loop in loops:
                folder = place / f"{peer}-{loop}"
                folder.mkdir()
                where = ["--data-dir", data_dir, "--images", images] if data_dir else []
                command = command_of("benchmarks.peers", peer, loop, folder, *where, "--seed", arguments.seed)
                found = watch(command, folder, place / f"kept-{peer}-{loop}", seconds)
                results[f"{peer}, {loop}"] = reached(found, scorer, baseline)
                say({"search": f"{peer}, training of {loop}", **results[f"{peer}, {loop}"]})
    print("\n".join(verdict(results, peers, loops, seconds)))


def verdict(
    results: Mapping[str, Mapping[str, Any]], peers: Sequence[str], loops: Sequence[str], seconds: float
) -> Iterator[str]:
    """Lines that compare ours with the peers, the last with the ratio: how many times as long the best peer with the
    tutorial's loop takes, to the highest goal that ours reached. Where nothing can be compared it says so."""
    goal = next((str(goal) for goal in (0.9, 0.8, 0.5) if results[OURS[0]][str(goal)]), None)
    if goal is None:
        yield f"no ratio: ours did not close half of the gap within {seconds:g} s, so there is nothing to compare"
        return
    for told in (name for name in OURS if name in results):
        for loop in loops:
            times = {name: results[name][goal] for name in (told, *(f"{peer}, {loop}" for peer in peers))}
            said = ", ".join(f"{name} {time or f'not within {seconds:g}'} s" for name, time in times.items())
            yield f"to {goal}: {said}"
    best = min((time for peer in peers if (time := results[f"{peer}, tutorial"][goal])), default=None)
    bound = "" if best else f", at the least: no peer got there within {seconds:g} s"
    for told, name in ((OURS[1], "told nothing"), (OURS[0], "ratio")):
        if results.get(told, {}).get(goal):
            yield f"{name} {(best or seconds) / results[told][goal]:.2f}{bound}"


if __name__ == "__main__":
    main()
