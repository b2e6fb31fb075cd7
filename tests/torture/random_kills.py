"""SIGKILL at random instants: hooks, control daemons, servers, and several of them together; then repair."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.harness.gpunode import EPILOG, PROLOG

from .node import COMMAND
from .strike import KINDS, StruckNode, environment_of

if TYPE_CHECKING:
    import subprocess

JOBS = {4711: "0,1", 4712: "2", 4713: "3"}
LONGEST_SECONDS = 0.22  # of an undisturbed prolog or epilog, and a little more
VICTIMS = ("hook", "daemon", "server")
REPAIRS = ("epilog", "reconcile", "prolog")


@dataclass(frozen=True)
class Kill:
    """One try, all of it from the seed and its number."""

    kind: str
    hooks: dict[int, str]  #: which hook of which job is at work
    reconcile: bool  #: and reconcile beside them
    after_seconds: float
    victims: tuple[str, ...]
    repair: str

    def __str__(self) -> str:
        hooks = " and ".join(f"{hook} of {job}" for job, hook in self.hooks.items()) + " and reconcile" * self.reconcile
        what = ", ".join(self.victims)
        return f"{self.kind}: {hooks}, {what} killed after {self.after_seconds * 1000:.1f} ms, then {self.repair}"


def draw(seed: int, number: int) -> Kill:
    """The try of this number."""
    chance = random.Random(f"{seed}:{number}")
    jobs = chance.sample(sorted(JOBS), chance.choice((1, 1, 2, 3)))
    return Kill(
        kind=chance.choice(KINDS),
        hooks={job: chance.choice(("prolog", "epilog")) for job in sorted(jobs)},
        reconcile=chance.random() < 0.2,
        after_seconds=chance.uniform(0.01, LONGEST_SECONDS) * (1 + 0.5 * (len(jobs) - 1)),
        victims=tuple(chance.sample(VICTIMS, chance.choice((1, 1, 2, 3)))),
        repair=chance.choice(REPAIRS),
    )


def attempt(node: StruckNode, kill: Kill) -> list[str]:
    """Do it, and repair it. Returns everything that was wrong."""
    environments = {job: environment_of(job, kill.kind, JOBS[job]) for job in kill.hooks}
    for job, hook in kill.hooks.items():
        if hook == "epilog":
            node.run(PROLOG, env=environments[job]).check()
    node.slurm_says(dict.fromkeys(kill.hooks, "RUNNING|NONE|n1"))
    started = [
        node.start({"prolog": PROLOG, "epilog": EPILOG}[hook], env=environments[job])
        for job, hook in kill.hooks.items()
    ]
    if kill.reconcile:
        started.append(node.start(COMMAND, "reconcile"))
    time.sleep(kill.after_seconds)
    _strike(node, kill, started)
    for one in started:
        one.wait(30)
    node.slurm_says({})
    wrong = _repair(node, kill, environments)
    if left := node.left():
        wrong.append(f"left: {left}")
    if wrong:
        node.reset()
    return [f"{kill}: {what}" for what in wrong]


def _strike(node: StruckNode, kill: Kill, started: list[subprocess.Popen[bytes]]) -> None:
    if "hook" in kill.victims:
        for one in started:
            if one.poll() is None:
                node.machine.signal(one, 9)
    found = node.mps_processes()
    pids = {process.pid for process, _ in node.control_daemons()}
    chosen = [p for p in found if ("daemon" if p.pid in pids else "server") in kill.victims]
    node.kill(*chosen)


def _repair(node: StruckNode, kill: Kill, environments: dict[int, dict[str, str]]) -> list[str]:
    wrong = []
    for job in kill.hooks if kill.repair == "prolog" else ():
        result = node.run(PROLOG, env={**environments[job], "SLURM_JOB_RESTART_COUNT": "1"})
        status = node.verdict(job).get("status")
        if result.returncode or result.stderr or status != "ready":
            wrong.append(f"drained by prolog of {job}: {result.returncode} {result.stderr} {status}")
    for job in () if kill.repair == "reconcile" else kill.hooks:
        result = node.run(EPILOG, env=environments[job])
        if result.returncode or result.stderr:
            wrong.append(f"drained by epilog of {job}: {result.returncode} {result.stderr}")
    if kill.repair == "reconcile":
        result = node.reconcile()
        if result.returncode:
            wrong.append(f"reconcile: {result.returncode} {result.stdout}{result.stderr}")
    return wrong
