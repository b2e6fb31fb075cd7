"""``python3 -m tests.lab.hardware.sharing``: several jobs on one real GPU, in each way that there is.

- *throughput*: four jobs of ``--gres=mps:25`` that share a daemon (joined), the same of two users, four with a daemon
  each (separate), one job of four ranks with the same thread limit, four ranks without MPS. All do the same within the
  same window.
- *fault*: one of two jobs has an illegal access; does the other's program go on?

About three minutes. Rows that did not work say why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.harness.cluster import SlurmError
from tests.harness.gpunode import UNCHANGED
from tests.harness.site import STATE_DIRECTORY, Site
from tests.lab.measured import write

from .site import NODE, PLACE, RealSite, data_file, measured_on, reports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cluster import Job

Row = dict[str, Any]

JOBS = 4
PART = 100 // JOBS
FLOODS = {"small": "flood:16:4000:64", "medium": "flood:132:10000:32"}
ALL_USERS = "joined, two users"
#: gpus.sharing; whose jobs; what each asks for
WAYS = {
    "joined": ("joined", ["alice"] * JOBS, [f"--gres=mps:{PART}", "-n1"]),
    ALL_USERS: (ALL_USERS, ["alice", "bob"] * (JOBS // 2), [f"--gres=mps:{PART}", "-n1"]),
    "separate": ("separate", ["alice"] * JOBS, [f"--gres=mps:{PART}", "-n1"]),
    "one job": ("refuse", ["alice"], ["--gres=gpu:1", f"-n{JOBS}", f"--mps-threads={PART}"]),
    "without MPS": ("refuse", ["alice"], ["--gres=gpu:1", f"-n{JOBS}"]),
}
_JOB_SECONDS = 90.0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def failure(error: Exception) -> str:
    """What went wrong, with the end of the daemons' logs that a SlurmError brings along."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 3000 else f"{text[:1000]}\n…\n{text[-2000:]}"


class SharedSite(RealSite):
    """The first GPU of this machine alone, in a hundred parts."""

    def __init__(self) -> None:
        Site.__init__(
            self, real=True, nodes=1, gpus_per_node=1, mps_per_node=100, config=UNCHANGED, constrain_devices=True
        )
        self._meetings = 0

    def share(self, way: str) -> None:
        all_users = 'joined_users = "all"\n[limits.memory]\nmax = "16G"\n' if way == ALL_USERS else ""
        self.configure(f'{UNCHANGED}sharing = "{way.partition(",")[0]}"\n{all_users}')

    def repaired(self) -> str:
        """Take the node back into service if it was drained. Returns: what drained it last, or nothing."""
        fault = self.node(NODE, "cat", f"{STATE_DIRECTORY}/last-fault").stdout
        if any(state.drained for state in self.cluster.node_states().values()):
            self.machine.run(["scontrol", "update", f"NodeName={NODE}", "State=RESUME"]).check()
        return fault

    def ended(self, *jobs: Job) -> list[str]:
        """What these jobs said; those that do not end are cancelled. Raises: SlurmError."""
        try:
            for job in jobs:
                self.cluster.wait(job, _JOB_SECONDS)
        except SlurmError as error:
            for job in jobs:
                self.cluster.scancel(job)
            raise SlurmError("\n".join([*(self.cluster.output(job)[-300:] for job in jobs), str(error)])) from error
        return [self.cluster.output(job) for job in jobs]


def throughput(site: SharedSite, seconds: float, rounds: int) -> Iterator[Row]:
    """Kernels a second over all ranks, by kernel; the ways take turns."""
    for number in range(rounds):
        ways = list(WAYS)
        for name in ways[number % len(ways) :] + ways[: number % len(ways)]:
            way, users, ask = WAYS[name]
            site.share(way)
            load = f"{PLACE}/load.py {JOBS} {site.meeting()} {seconds} {' '.join(FLOODS.values())}"
            script = f"srun /usr/bin/python3 {load}"
            jobs = [site.cluster.sbatch(*ask, script=script, user=user) for user in users]
            row: Row = {"way": name, "round": number}
            try:
                row |= _figures(site.ended(*jobs), seconds)
            except (SlurmError, KeyError, ValueError) as error:
                row |= {"failed": failure(error), "last_fault": site.repaired()}
            site.cluster.wait_idle()
            say(f"{name}: {row}")
            yield row


def _figures(texts: list[str], seconds: float) -> Row:
    """What the ranks of all jobs said. Raises: ValueError, KeyError."""
    said = [one for text in texts for one in reports(text)]
    if len(said) != JOBS or any("error" in one for one in said):
        raise ValueError(" | ".join(text[-300:] for text in texts))
    row: Row = {"sms": sorted({one["sms"] for one in said})}
    for at, kernel in enumerate(FLOODS):
        shares = sorted(round(one["phases"][at]["kernels"] / seconds) for one in said)
        row[kernel] = {"kernels_per_second": sum(shares), "shares": shares}
    return row


def faults(site: SharedSite) -> Iterator[Row]:
    """Whether a job's program goes on when another job's has an illegal access, and what its user is told."""
    client = f"/usr/bin/python3 {PLACE}/client.py"
    for way in ("joined", "separate"):
        site.share(way)
        row: Row = {"way": way}
        both = f"{site.meeting()}/both 2"  # the one that faults waits until the other is there to be hit
        scripts = [f"srun {client} hold 2 {both}", f"srun {client} fault 0 {both}"]
        try:
            victim, culprit = (site.cluster.sbatch("-n1", f"--gres=mps:{PART}", script=text) for text in scripts)
            said, row["culprit"] = (text[-700:] for text in site.ended(victim, culprit))
            row |= {"goes_on": "ended with error 0" in said, "victim": said}
        except (SlurmError, KeyError, ValueError) as error:
            row |= {"failed": failure(error), "last_fault": site.repaired()}
            site.machine.run(["scancel", "--user=alice"])
        site.cluster.wait_idle()
        say(f"fault, {way}: {row}")
        yield row


def main() -> int:
    """Measure and write; 1 when a row did not work."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.lab.hardware.sharing", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: docs/benchmarks/data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each kernel's window")
    options = parser.parse_args()
    target: Path = options.json or data_file("sharing")
    kept: dict[str, Any] = {"measured_on": measured_on(), "seconds": options.seconds, "throughput": [], "fault": []}
    with SharedSite() as site:
        for row in throughput(site, options.seconds, options.rounds):  # no row is lost with the machine
            kept["throughput"].append(row)
            write(target, kept)
        for row in faults(site):
            kept["fault"].append(row)
            write(target, kept)
        site.end_meetings()
    return int(any("failed" in row for row in [*kept["throughput"], *kept["fault"]]))


if __name__ == "__main__":
    sys.exit(main())
