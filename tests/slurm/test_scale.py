"""The short form of ``make scale``: no call to slurmctld, nothing that grows with the number of jobs or nodes."""

from __future__ import annotations

from tests.harness.site import Site
from tests.lab.scale.load import MPS, PATIENT, rpcs_of, run_jobs, run_on_all_nodes


def test_an_mps_job_calls_the_controller_no_more_than_any_other(site: Site) -> None:
    """By slurmctld's own count of its calls: a prolog that asks it something stops a large cluster."""
    assert rpcs_of(site, 5, *MPS) == rpcs_of(site, 5)


def test_many_jobs_at_once_leave_nothing_and_open_nothing_for_good(site: Site) -> None:
    run = run_jobs(site, 24, 8)
    assert run.after == run.before
    assert run.descriptors_after <= run.descriptors_before + 2


def test_a_job_on_many_nodes() -> None:
    with Site(nodes=12, gpus_per_node=1, cpus_per_node=2, config=PATIENT) as site:
        before = site.snapshot()
        assert run_on_all_nodes(site) == 12
        assert site.snapshot() == before
