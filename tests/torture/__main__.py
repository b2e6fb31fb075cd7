"""``make torture``: the kill matrix, random kills and random orders, for as long as it is given, then the exploits.

    make torture TORTURE="--minutes 10 --seed 7"

The seed is printed; the same one tries the same kills and orders again. The exploits, the hostile submissions and the
fuzzers take two minutes more. Exit status 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.lab.progress import Progress
from tests.torture.joined_life import JoinedLife
from tests.torture.life import Life

from . import exploits, random_kills
from .strike import (
    CAN_DIE,
    CAN_FAIL,
    FAULTS,
    PATIENCE,
    Scenario,
    StruckNode,
    build_library,
    configure,
    joined_scenarios,
    scenarios,
    strike,
)

#: Of the time: the matrix takes what it needs, up to this; then the kills; the orders have the rest.
MATRIX_SHARE, KILLS_SHARE = 0.6, 0.5
STEPS_OF_AN_ORDER = 30


@dataclass
class Count:
    """How much was tried, and everything that was wrong."""

    found: int = 0
    tried: int = 0
    survived: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, wrong: list[str]) -> None:
        self.tried += 1
        self.survived += not wrong
        self.wrong += wrong
        for what in wrong:
            print(f"torture: {what}", flush=True)

    def about(self, word: str) -> int:
        return sum(f": {word}" in what for what in self.wrong)


def matrix(node: StruckNode, chance: random.Random, end: float, progress: Progress) -> Count:
    """Every point of every scenario; where the time does not suffice, as many as it does, chosen evenly."""
    count = Count()
    points: list[tuple[Scenario, str, int]] = []
    for scenario in (*scenarios(), *joined_scenarios()):
        progress.at(f"looking for stop points: {len(points)} so far")
        for on in (CAN_DIE, CAN_FAIL):
            calls = scenario.calls(node, on)
            faults = [fault for fault, error in FAULTS.items() if bool(error) == (on == CAN_FAIL)]
            points += [(scenario, fault, at) for fault in faults for at in range(1, len(calls) + 1)]
    count.found = len(points)
    chance.shuffle(points)
    for scenario, fault, at in points:
        if time.monotonic() > end:
            break
        count.add(strike(node, scenario, fault, at, chance.choice(scenario.repairs)))
        progress.at(f"{count.tried} of {len(points)} stop points tried")
    return count


def kills(node: StruckNode, number: int, end: float, progress: Progress) -> Count:
    count = Count()
    while time.monotonic() < end:
        count.add(random_kills.attempt(node, random_kills.draw(number, count.tried)))
        progress.at(f"{count.tried} random kills tried")
    return count


def orders(node: StruckNode, number: int, end: float, progress: Progress) -> Count:
    """New orders until the time is over; one that goes wrong is printed step by step."""
    count = Count()
    node.reset()
    Life.node = JoinedLife.node = node
    few = settings(
        max_examples=5,
        stateful_step_count=STEPS_OF_AN_ORDER,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    while time.monotonic() < end:
        Life.orders = JoinedLife.orders = 0
        number += 1
        try:
            configure(node, PATIENCE)
            run_state_machine_as_test(seed(number)(Life), settings=few)
            run_state_machine_as_test(seed(number)(JoinedLife), settings=few)
            wrong = []
        except Exception:
            wrong = [f"order of seed {number}: {traceback.format_exc()}"]
        count.add(wrong)
        count.found += Life.orders + JoinedLife.orders
        progress.at(f"{count.found} orders tried")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="make torture")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (10)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000), help="to repeat a run")
    options = parser.parse_args()
    print(f"torture: seed {options.seed}, {options.minutes:g} minutes", flush=True)
    end = time.monotonic() + 60 * options.minutes
    progress = Progress("torture")
    with tempfile.TemporaryDirectory() as place, StruckNode(build_library(Path(place))) as node:
        node.prepare()
        now = time.monotonic()
        points = matrix(node, random.Random(options.seed), now + MATRIX_SHARE * (end - now), progress)
        now = time.monotonic()
        killed = kills(node, options.seed, now + KILLS_SHARE * (end - now), progress)
        ordered = orders(node, options.seed, end, progress)
        progress.say("exploits, hostile submissions and fuzzers, in about two minutes")
        attacked = exploits.run(Path(place))
    counts = (points, killed, ordered)
    print(f"stop points: {points.found} found, {points.tried} tried, {points.survived} survived")
    print(f"random kills: {killed.tried} tried, {killed.survived} survived")
    print(f"orders: {ordered.found} tried, in {ordered.tried} groups, of which {ordered.survived} survived")
    print(f"steps: {', '.join(f'{number} {name}' for name, number in Life.steps.most_common())}")
    print(f"inputs tried by the fuzzers: {attacked.inputs} (and libFuzzer's, for some seconds)")
    print(
        f"exploits: {attacked.tried} tried, {attacked.failed} failed; with a wall down {attacked.weaker_worked} worked"
    )
    print(f"hostile submissions: {attacked.submissions}")
    print("".join(f"torture: {what}\n" for what in attacked.wrong), end="")
    print(f"nodes drained wrongly: {sum(count.about('drained') for count in counts)}")
    print(f"residues: {sum(count.about('left') for count in counts)}")
    return int(any(count.wrong for count in counts) or bool(attacked.wrong))


if __name__ == "__main__":
    sys.exit(main())
