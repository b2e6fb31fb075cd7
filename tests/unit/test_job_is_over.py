"""Which job is over on a node, by what Slurm says of it (docs/decisions/0005)."""

from __future__ import annotations

import pytest

from slurm_mps.job.reconcile import is_over
from slurm_mps.slurm.jobs import SlurmJob

NOW = 1_800_000_000


ENDED = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT"),
    *("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"),
)
QUEUED = ("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
HERE = ("RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "RESIZING", "STAGE_OUT", "STOPPED", "NEW_IN_30")


@pytest.mark.parametrize("state", [*ENDED, *QUEUED])
def test_a_job_that_ended_or_waits_again_is_over(state: str) -> None:
    """Both before and after its nodes are forgotten; a final state is shown only when all epilogs are through."""
    assert is_over(SlurmJob(state, NOW, "n1"), "n1", NOW)[0]
    assert is_over(SlurmJob(state, None, ""), "n1", NOW)[0]


@pytest.mark.parametrize("state", HERE)
def test_a_job_that_may_be_here_is_not_over(state: str) -> None:
    """Also in a state that this version does not know, and where its nodes are not said or not readable."""
    for node, nodes in (("n1", "n[1-2]"), ("", "n2"), ("n1", ""), ("n1", "n[")):
        assert not is_over(SlurmJob(state, NOW - 5, nodes), node, NOW)[0], (node, nodes)
    assert is_over(SlurmJob(state, NOW - 5, "n[2-3]"), "n1", NOW)[0], "it runs elsewhere"


def test_what_slurm_does_not_know_is_over() -> None:
    """It forgets a job MinJobAge after its last epilog."""
    assert is_over(None, "n1", NOW) == (True, "Slurm does not know the job any more")


@pytest.mark.parametrize(("end", "over"), [(NOW - 590, False), (NOW - 610, True), (None, False)])
def test_completing_is_over_after_ten_minutes(end: int | None, over: bool) -> None:
    """Its epilog may be at work, or still to come when slurmd is back; without a time nothing is known."""
    assert is_over(SlurmJob("COMPLETING", end, "n1"), "n1", NOW)[0] is over
