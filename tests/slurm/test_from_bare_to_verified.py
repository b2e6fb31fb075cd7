"""Somebody with a Slurm that knows nothing of slurm-mps gets to a verified job, as the README says, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.harness.cluster import Cluster
from tests.harness.site import gpu_machine
from tests.install.places import PROGRAM, report, snapshot

if TYPE_CHECKING:
    from tests.harness.machine import Machine

KILLER = """#!/bin/sh
# Like DeepOps' 50-exclusive-gpu: ends whatever it finds on the GPUs, and says what that was.
PATH=/usr/bin:/bin
pgrep -c nvidia-cuda-mps >> /var/log/slurm/left-for-50 || :
"""


def test_from_a_bare_slurm_to_a_verified_job_and_back() -> None:
    """What the README says, with what `install` says is left to do by hand; on a Slurm that knows nothing of it."""
    machine = gpu_machine()
    plugstack = "include /etc/slurm/plugstack.conf.d/*.conf\n"
    cluster = Cluster(machine, nodes=1, gpus_per_node=2, plugstack=plugstack, prolog_flags=None)
    with machine:
        machine.add_node("n1")
        machine.run(["simulated-gpus", "create", "2", "--seed", "n1"], node="n1").check()
        machine.write("/etc/slurm/epilog.d/50-exclusive-gpu", KILLER, mode=0o755)
        with cluster:
            assert cluster.srun("-N1", "--mps", "true").returncode != 0
            before = snapshot(machine)

            # the plugin is built here, by the compiler
            done = report(machine.run([PROGRAM, "install", "--json"], node="n1", timeout=60).check())
            assert done["problems"] == []
            lines = [line for todo in done["by_hand"] for line in todo["lines"] if "slurm.conf" in todo["where"]]
            assert [line.partition("=")[0] for line in lines] == ["Prolog", "Epilog", "PrologFlags"]
            conf = machine.read("/etc/slurm/slurm.conf")
            assert "scontrol reconfigure" in left_to_do(machine)
            reconfigure(cluster, conf + "\n".join(lines) + "\n")
            assert set(left_to_do(machine)) <= {"systemctl enable slurm-mps-reconcile.service"}

            job = cluster.sbatch(
                "--mps-threads=25", "--mps-mem=8G", "--gres=gpu:1", "-n2", script="srun slurm-mps verify"
            )
            info = cluster.wait(job)
            assert (info.state, cluster.output(job).count("32/132")) == ("COMPLETED", 2), cluster.output(job)
            assert "2 ranks, all clients" in cluster.output(job)
            cluster.wait_idle()
            assert machine.read("/var/log/slurm/left-for-50", node="n1").split() == ["0"]

            job = cluster.sbatch("--mps", "--gres=gpu:1", script="sleep 60")
            cluster.wait_running(job)
            refused = machine.run([PROGRAM, "uninstall"], node="n1")
            assert f"job {job} has MPS on this node" in refused.stderr
            cluster.scancel(job)
            cluster.wait_idle()
            machine.write("/etc/slurm/slurm.conf", conf)  # and no `scontrol reconfigure`
            refused = machine.run([PROGRAM, "uninstall"], node="n1")
            assert "so slurmctld has it; scontrol reconfigure" in refused.stderr
            assert refused.returncode == 1
            reconfigure(cluster, conf)
            machine.run([PROGRAM, "uninstall"], node="n1").check()
            assert snapshot(machine) == before
            cluster.srun("-N1", "true").check()
            assert not any(state.drained for state in cluster.node_states().values())


def left_to_do(machine: Machine) -> list[str]:
    """What `install` says is left, run again on a node where it has nothing to write."""
    again = report(machine.run([PROGRAM, "install", "--json"], node="n1", timeout=60).check())
    assert {change["what"] for change in again["changes"]} == {"is there"}
    return [line for todo in again["by_hand"] for line in todo["lines"]]


def reconfigure(cluster: Cluster, text: str) -> None:
    """Change slurm.conf as an admin does: the file, ``scontrol reconfigure``, then slurmd anew."""
    cluster.machine.write("/etc/slurm/slurm.conf", text)
    cluster.machine.run(["scontrol", "reconfigure"]).check()
    cluster.wait_idle()
    cluster.stop_daemon("slurmd-n1")
    cluster.start_node("n1")
    cluster.wait_idle()
