"""Loads for a cluster, and what is counted while it bears them."""

from __future__ import annotations

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from tests.lab.progress import Progress

if TYPE_CHECKING:
    from tests.harness.site import Site, Snapshot

#: All nodes of a site share this machine's processors: their prologs take as much longer as there are of them.
PATIENT = "[deadlines]\nprolog = 60\nepilog = 60\ndaemon_start = 30\ncommand = 30\nquit = 30\nsignal = 15\n"
CLIENT = ("simulated-gpus", "client")
MPS = ("--mps-threads=25", "--mps-mem=8G")
#: What slurmctld hears of by itself, and what srun asks from time to time while it waits for a prolog, of any job.
_HEARTBEATS = {
    "MESSAGE_NODE_REGISTRATION_STATUS",
    "REQUEST_PING",
    "REQUEST_STATS_INFO",
    "REQUEST_NODE_INFO",
    "REQUEST_JOB_READY",
}
_RPC = re.compile(r"^\s+([A-Z_]+)\s+\(\s*\d+\) count:(\d+)", re.MULTILINE)


def rpcs(site: Site) -> Counter[str]:
    """How often slurmctld was called, by the type of the message, as sdiag tells."""
    by_type = site.machine.run(["sdiag"]).check().stdout.partition("by message type")[2].partition("by user")[0]
    return Counter({name: int(count) for name, count in _RPC.findall(by_type) if name not in _HEARTBEATS})


def rpcs_of(site: Site, jobs: int, *options: str) -> Counter[str]:
    """What so many jobs, one after the other, add to the controller's calls."""
    before = rpcs(site)
    for _ in range(jobs):
        site.cluster.srun("-wn1", "-N1", "--gres=gpu:1", *options, "true").check()
    # The last job's epilog tells the controller that it is over, a moment after srun has ended.
    site.cluster.until("the last epilog", lambda: _epilogs(site, before, jobs), 20)
    return rpcs(site) - before


def _epilogs(site: Site, before: Counter[str], jobs: int) -> bool | None:
    return (rpcs(site) - before)["MESSAGE_EPILOG_COMPLETE"] >= jobs or None


@dataclass(frozen=True)
class Run:
    """How long each job took, in seconds and in the order of their ends, and what was there before and after."""

    seconds: list[float]
    before: Snapshot
    after: Snapshot
    descriptors_before: int
    descriptors_after: int

    @property
    def last_to_first(self) -> float:
        """The median time of the last tenth of the jobs as a part of that of the first tenth."""
        part = max(1, len(self.seconds) // 10)
        return median(self.seconds[-part:]) / median(self.seconds[:part])


def _descriptors(site: Site) -> int:
    """How many files the cluster's slurmds have open."""
    slurmds = [process.pid for process in site.machine.processes() if process.comm == "slurmd"]
    return sum(len(list(site.machine.path(f"/proc/{pid}/fd").iterdir())) for pid in slurmds)


def run_jobs(site: Site, jobs: int, at_a_time: int) -> Run:
    """Run short MPS jobs, each a client that proves its limits, so many at a time."""

    def one(_: int) -> float:
        began = time.monotonic()
        said = site.cluster.srun("-N1", "-n1", "--gres=gpu:1", *MPS, *CLIENT).check().stdout
        assert "sms=32 free=8047 " in said, said
        return time.monotonic() - began

    one(0)
    before, descriptors, seconds = site.snapshot(), _descriptors(site), []
    progress = Progress("scale")
    with ThreadPoolExecutor(at_a_time) as pool:
        for took in pool.map(one, range(jobs)):
            seconds.append(took)
            progress.at(f"{len(seconds)} of {jobs} jobs, {at_a_time} at a time")
    after = site.snapshot()
    return Run(seconds, before, after, descriptors, _descriptors(site))


def run_on_all_nodes(site: Site) -> int:
    """Run one MPS job on every node, with a client on each. Returns how many of them were clients with the limits.

    Each node's first job, which checks the site configuration, comes before, a few nodes at a time.
    """
    nodes, progress = len(site.nodes), Progress("scale")
    for first in range(0, nodes, 4):
        progress.at(f"{first} of {nodes} nodes have had a job")
        some = site.nodes[first : first + 4]
        site.cluster.srun(f"-w{','.join(some)}", f"-N{len(some)}", "--gres=gpu:1", "--mps", "true").check()
    result = site.cluster.srun(f"-N{nodes}", f"-n{nodes}", "--gres=gpu:1", *MPS, *CLIENT, timeout=120).check()
    found: list[str] = re.findall(r"sms=32 free=8047 \S+ mps=\d+", result.stdout)
    return len(found)
