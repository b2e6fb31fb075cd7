"""Two at a time, and one cut short: what the next job finds."""

from __future__ import annotations

import signal
import time

from tests.attacks.weakened import attack, weaken
from tests.harness.gpunode import PROLOG, GpuNode, asked, job_environment


@attack("a GPU's ledger is locked")
def test_two_jobs_that_take_one_gpu_at_the_same_time(walls_down: tuple[str, ...], works: bool) -> None:
    """Alice and bob ask for the same GPU at once, on a site that does not share any; one of them must be refused.

    Both builds wait between reading the ledger and writing it, so that it does not hang on luck.
    """
    with GpuNode(gpus=1) as node:
        weaken(node.machine, ("a ledger is read and written at once", *walls_down))
        both = [
            node.start(PROLOG, env=job_environment(job, user=user, gpus="0", **asked()))
            for job, user in ((4711, "alice"), (4712, "bob"))
        ]
        assert [one.wait(20) for one in both] == [0, 0]
        verdicts = sorted(node.verdict(job)["status"] for job in (4711, 4712))
    assert (verdicts == ["ready", "ready"]) is works


@attack("the undo is on disk first")
def test_a_prolog_that_dies_half_way(node: GpuNode, works: bool) -> None:
    """A user who takes all memory has the kernel kill what it likes: no GPU may stay closed to the next job."""
    node.fault("daemon.start=hang")
    child = node.start(PROLOG, env=job_environment(4711, gpus="0", **asked()))
    deadline = time.monotonic() + 10
    while not (
        any(process.comm == "nvidia-cuda-mps" for process in node.machine.processes()) and node.compute_modes()[0]
    ):
        assert time.monotonic() < deadline
    node.machine.signal(child, signal.SIGKILL)
    child.wait(5)
    for left in node.mps_processes():
        node.run("kill", "-9", str(left.pid))
    node.fault()
    node.epilog(4711)
    closed = node.compute_modes()[0] != 0
    assert closed is works
