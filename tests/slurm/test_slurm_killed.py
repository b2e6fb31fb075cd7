"""slurmd and slurmstepd die in the middle of an MPS job: the job ends as Slurm ends it, and the node is as before."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.harness.cluster import Job
    from tests.harness.site import Site


def running_job(site: Site) -> Job:
    """A job with a client on each of its two GPUs."""
    job = site.cluster.sbatch(
        "-wn1", "-n2", "--gres=gpu:2", "--mps-threads=25", script="srun simulated-gpus client --hold 60"
    )
    site.cluster.until_output(job, "uuid=", times=2)
    return job


def kill(site: Site, *names: str) -> None:
    """Kill every process whose command line begins so, as the kernel's out-of-memory killer might."""
    for process in site.machine.processes():
        if any(" ".join(process.cmdline).startswith(name) for name in names):
            site.machine.run(["kill", "-9", str(process.pid)])


#: The job's own processes: without cgroups nobody ends what a killed slurmstepd leaves.
USERS = ("/usr/bin/simulated-gpus client", "srun ", "/bin/bash /var/spool/slurmd")


def end(site: Site, job: Job) -> None:
    site.machine.run(["scancel", str(job)])
    site.cluster.wait(job, 90)


def test_slurmd_is_killed_and_comes_back(site: Site) -> None:
    job = running_job(site)
    site.cluster.stop_daemon("slurmd-n1", signal.SIGKILL)
    site.cluster.start_node("n1")
    end(site, job)


def test_the_jobs_slurmstepds_are_killed(site: Site) -> None:
    job = running_job(site)
    kill(site, "slurmstepd: ")
    kill(site, *USERS)
    end(site, job)


def test_all_of_it_is_killed_at_once(site: Site) -> None:
    """As a node that runs out of memory does it; until slurmd is back, reconcile leaves to the epilog what is its."""
    job = running_job(site)
    site.cluster.stop_daemon("slurmd-n1", signal.SIGKILL)
    kill(site, "slurmstepd: ", "nvidia-cuda-mps-server", "/usr/bin/nvidia-cuda-mps-control", *USERS)
    site.machine.run(["scancel", str(job)]).check()
    meanwhile = site.node("n1", "/opt/slurm-mps/bin/slurm-mps", "reconcile")
    kept = site.compute_modes("n1")
    site.cluster.start_node("n1")
    end(site, job)
    assert meanwhile.returncode == 0
    assert f"job {job} is not over: to Slurm it is COMPLETING" in meanwhile.stderr
    assert kept[:2] == ["Exclusive_Process"] * 2
