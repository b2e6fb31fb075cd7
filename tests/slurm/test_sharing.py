"""Two jobs on one GPU, as Slurm gives it to them with gres/shard: refused, or shared, as the site wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cluster import Job


@pytest.fixture(scope="module", params=[False, True], ids=["free", "constrained"])
def sharded(request: pytest.FixtureRequest) -> Iterator[Site]:
    with Site(nodes=1, gpus_per_node=1, shards_per_node=4, constrain_devices=request.param) as site:
        yield site


def start(site: Site, threads: int, user: str) -> Job:
    """A job of one shard, whose client stays for a while."""
    script = "echo started; simulated-gpus client --hold 2; echo over"
    return site.cluster.sbatch("-n1", "--gres=shard:1", f"--mps-threads={threads}", script=script, user=user)


def outputs(site: Site, *jobs: Job) -> list[str]:
    for job in jobs:
        site.cluster.wait(job)
    return [site.cluster.output(job) for job in jobs]


def test_shared_each_job_has_its_own_daemon_and_limits_and_the_mode_is_left_alone(sharded: Site) -> None:
    sharded.configure('[gpus]\nsharing = "share"\n')
    before = sharded.snapshot()
    jobs = [start(sharded, 25, "alice"), start(sharded, 50, "bob")]
    for job in jobs:
        sharded.cluster.until_output(job, "uuid=")
    during = sharded.compute_modes("n1")
    first, second = outputs(sharded, *jobs)
    assert "sms=32 " in first
    assert "sms=66 " in second
    assert first.rpartition("mps=")[2] != second.rpartition("mps=")[2]
    assert during == ["Default"]
    assert sharded.snapshot() == before


def test_refused_the_second_job_is_told_who_holds_the_gpu_and_the_first_is_not_disturbed(sharded: Site) -> None:
    sharded.configure("")
    before = sharded.snapshot()
    holder = start(sharded, 25, "alice")
    sharded.cluster.until_output(holder, "uuid=")
    late = start(sharded, 50, "bob")
    said = outputs(sharded, late)[0]
    during = sharded.compute_modes("n1")
    held = outputs(sharded, holder)[0]
    assert f"is held by MPS job {holder}; this site does not share a GPU between MPS jobs" in said
    assert "started" not in said
    assert during == ["Exclusive_Process"]
    assert "over" in held
    assert "FAILED" not in held
    assert not any(state.drained for state in sharded.cluster.node_states().values())
    assert sharded.snapshot() == before
