"""Nodes of sixteen GPUs, which the driver brings up one after the other; `make scale` has 48 ranks on each of eight."""

from __future__ import annotations

from tests.harness.cluster import waits_for
from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import Site

GPUS = 16
STEP = f"srun -n{GPUS} --gpus-per-task=1"
CLIENT = "simulated-gpus client"
SLURM_MPS = f"{MOUNT_POINT}/bin/slurm-mps"
KILL_SERVER = f"{CLIENT} >$SLURM_LOCALID; kill -9 $(sed s/.*mps=// $SLURM_LOCALID); exit 1"


def test_whoever_waits_for_a_server_waits_until_the_driver_has_brought_every_gpu_up() -> None:
    """On n1 `status` and `verify` right after a job's start, on n2 the step after one whose servers died (O79)."""
    with Site(nodes=2, gpus_per_node=GPUS, cpus_per_node=GPUS) as site:
        before = site.snapshot()
        asked = [f"-n{GPUS}", f"--gres=gpu:{GPUS}"]
        script = f"{STEP} sh -c '{KILL_SERVER}'\necho killed\n{waits_for()}\n{STEP} {CLIENT}\n"
        killed = site.cluster.sbatch("-wn2", *asked, "--mps=per-gpu", script=script, until="killed")
        site.fault("n1", "server.start=slow:550")
        site.fault("n2", "server.start=slow:400")
        site.cluster.let_go(killed)
        script = f"echo begun\n{STEP} {SLURM_MPS} verify\n"
        verified = site.cluster.sbatch("-wn1", *asked, "--mps-mem=8G", script=script, until="begun")
        looked = site.node("n1", SLURM_MPS, "status", "--timeout", "0.5", "--noheader", "-o", "state")
        assert (looked.returncode, set(looked.stdout.split())) == (0, {"INITIALIZING"})
        for job in (killed, verified):
            site.cluster.wait(job)
        assert f"{GPUS} ranks, all clients, each GPU's ranks share one server" in site.cluster.output(verified)
        assert site.cluster.output(killed).count(" mps=") == GPUS
        site.cluster.wait_idle()
        assert site.snapshot() == before
