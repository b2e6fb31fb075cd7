"""A job on nodes with an older driver, from sbatch to nothing left."""

from __future__ import annotations

import pytest

from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import Site


@pytest.mark.parametrize("branch", [535, 550])
def test_a_job_is_verified_and_leaves_nothing(branch: int) -> None:
    """Driver 535 writes no pid file and reports no state of a server, and neither driver lists its daemon's GPUs."""
    with Site(nodes=1) as site:
        site.node("n1", "simulated-gpus", "create", "4", "--seed", "n1", "--driver", str(branch)).check()
        before = site.snapshot()
        limits = ("--mps-threads=25", "--mps-mem=8G")
        command = f"{MOUNT_POINT}/bin/slurm-mps"
        script = f"{command} status; srun {command} verify"
        job = site.cluster.sbatch("-n4", "--gres=gpu:2", *limits, script=script)
        assert site.cluster.wait(job).state == "COMPLETED", site.cluster.output(job)
        said = site.cluster.output(job)
        assert ("RUNNING" if branch < 550 else "ACTIVE") in said, said
        assert site.snapshot() == before
