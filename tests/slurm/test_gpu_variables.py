"""What Slurm calls a job's GPUs, in the prolog and in its tasks: by index or UUID, found by itself or configured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.release import chosen
from tests.harness.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

SHOW = "/etc/slurm/prolog.d/05-show.sh"
SHOWN = "/var/log/slurm/prolog-sees"
RELEASE = chosen()


@pytest.fixture(scope="module", params=["", RELEASE.autodetect] if RELEASE.autodetect else [""])
def named(request: pytest.FixtureRequest) -> Iterator[tuple[Site, str]]:
    """A site without AutoDetect, and one with it where this Slurm can do without NVML; and what its prolog sees."""
    with Site(nodes=1, autodetect=request.param) as site:
        site.machine.write(SHOW, f"#!/bin/sh\necho ${{CUDA_VISIBLE_DEVICES-none}} >{SHOWN}\n", mode=0o755)
        yield site, RELEASE.prolog_sees if request.param else "indices"


@pytest.mark.every_release
@pytest.mark.parametrize("options", [("-n1", "--gres=gpu:3"), ("-n2", "--gpus-per-task=1"), ("-n2", "--gpus=2")])
def test_the_job_has_its_own_gpus_whatever_slurm_calls_them(named: tuple[Site, str], options: tuple[str, ...]) -> None:
    site, sees = named
    before = site.snapshot()
    uuids = [gpu["uuid"] for gpu in site.gpus("n1")]
    holder = site.cluster.sbatch("--gres=gpu:1", script="echo started; sleep 60")  # so that the job has not the first
    site.cluster.until_output(holder, "started")
    result = site.cluster.srun(
        *options, "--mps-threads=25", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; simulated-gpus client"
    )
    prolog = site.machine.read(SHOWN).strip()
    site.cluster.scancel(holder)
    assert site.cluster.wait(holder).state == "CANCELLED"
    given = sorted(name for line in result.stdout.splitlines() if "=" not in line for name in line.split(","))
    clients = [line for line in result.stdout.splitlines() if line.startswith("uuid=")]
    count = 3 if "--gres=gpu:3" in options else 2
    assert prolog == ",".join(uuids[1 : count + 1] if sees == "UUIDs" else [str(n) for n in range(1, count + 1)])
    assert set(given) == set(uuids[1 : count + 1]), result
    assert all(" sms=32 " in line for line in clients), result
    assert site.snapshot() == before


@pytest.mark.skipif(
    RELEASE.prolog_sees != "UUIDs", reason="with indices Slurm must count as NVML does (docs/limits.md)"
)
def test_slurm_may_count_gpus_in_another_order_than_nvml() -> None:
    """It goes by minor numbers, NVML by PCI addresses; tasks that are bound by its index have the right GPU."""
    with Site(nodes=1, autodetect=RELEASE.autodetect) as site:
        uuids = [gpu["uuid"] for gpu in site.gpus("n1")]
        site.cluster.stop_daemon("slurmd-n1")
        site.show_gpus_in_proc("n1", site.gpus("n1")[::-1])
        site.cluster.start_node("n1")
        result = site.cluster.srun("-n2", "--gpus-per-task=1", "--mps", "simulated-gpus", "client")
    clients = [line.split()[0] for line in result.stdout.splitlines()]
    assert sorted(clients) == sorted(f"uuid={uuid}" for uuid in uuids[2:]), result


@pytest.fixture(scope="module")
def run_in_job() -> Iterator[Site]:
    if RELEASE.no_run_in_job:
        pytest.skip(f"PrologFlags=RunInJob: {RELEASE.no_run_in_job}")
    with Site(nodes=1, constrain_devices=True, extra_slurm_conf="PrologFlags=RunInJob") as site:
        yield site


CLIENT = "simulated-gpus client"


@pytest.mark.parametrize("end", ["ends", "cancelled"])
def test_a_daemon_in_the_jobs_extern_step_serves_and_ends_as_elsewhere(run_in_job: Site, end: str) -> None:
    """With RunInJob, prolog and daemon are in the job's cgroup, whose processes Slurm ends before the epilog."""
    site = run_in_job
    before = site.snapshot()
    job = site.cluster.sbatch("--gres=gpu:2", "--mps-threads=25", script=f"srun {CLIENT}; exec {CLIENT} --hold 60")
    site.cluster.until_output(job, " sms=32 ", times=2)
    daemons = [p for p in site.machine.processes() if p.comm.startswith("nvidia-cuda-mps")]
    places = {site.machine.read(f"/proc/{daemon.pid}/cgroup").partition("devices:")[2].split()[0] for daemon in daemons}
    if end == "cancelled":
        site.cluster.scancel(job)
    else:
        site.machine.run(["pkill", "-f", "client --hold 60"]).check()
    site.cluster.wait(job)
    assert len(daemons) == 2
    assert {place.rpartition("/job_")[2] for place in places} == {f"{job}/step_extern"}
    assert not site.cluster.node_states()["n1"].drained
    assert site.snapshot() == before


def test_what_fails_there_fails_as_elsewhere(run_in_job: Site) -> None:
    site = run_in_job
    refused = site.cluster.srun("--mps", "true")
    site.fault("n1", "nvml.init=9")
    failed = site.cluster.srun("--gres=gpu:1", "--mps", "true")
    site.fault("n1")
    states = site.cluster.node_states()
    site.cluster.resume("n1")
    assert "this job has no GPU on this node" in refused.stderr
    assert failed.returncode != 0
    assert "Prolog" in states["n1"].reason
    assert states["n1"].drained
