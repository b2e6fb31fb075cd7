"""A process in a container is a client like any other, if the container has what docs/admins.md says.

The container is one in kind: what Apptainer and enroot do without privileges, a user namespace, a mount namespace and
another root, in which of /run there is what is bound there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness.site import Site

#: Runs "$@" in it, as the same user. BIND: what is seen there beside the system's directories and the driver.
CONTAINER = """#!/bin/sh
set -eu
export inside=/mnt
exec unshare --user --map-root-user --mount sh -c '
mount -t tmpfs none "$inside"
for one in usr etc opt dev proc home run/simulated-gpus $BIND; do
	mkdir -p "$inside/$one"
	mount --rbind "/$one" "$inside/$one"
done
mkdir -p "$inside/tmp" "$inside/run"
for one in bin sbin lib lib64; do ln -s "usr/$one" "$inside/$one"; done
exec unshare --user --map-user='"$(id -u)"' --map-group='"$(id -g)"' --root="$inside" --wd=/ -- "$@"
' sh "$@"
"""


@pytest.mark.parametrize("bound", [True, False])
def test_a_container_with_the_jobs_directory_has_mps(site: Site, bound: bool) -> None:
    """With it each rank is a client under its limits; without it, verify says so and nobody is taken for one."""
    site.machine.write("/home/alice/container", CONTAINER, mode=0o755, user="alice")
    bind = "run/slurm-mps/jobs" if bound else ""
    script = f'export BIND="{bind}"; srun ./container slurm-mps verify --timeout 5'
    job = site.cluster.sbatch("--mps-threads=25", "--mps-mem=8G", "--gres=gpu:1", "-N1", "-n2", script=script)
    info = site.cluster.wait(job)
    output = site.cluster.output(job)
    if bound:
        assert (info.state, output.count("32/132")) == ("COMPLETED", 2), output
        assert "2 ranks, all clients, each GPU's ranks share one server" in output
    else:
        assert info.state == "FAILED", output
        assert "ranks, all clients" not in output
        assert f"ranks 0-1 run without MPS: CUDA_MPS_PIPE_DIRECTORY=/run/slurm-mps/jobs/{job}/pipe does not" in output
        assert "CUDA_ERROR_DEVICE_UNAVAILABLE" in output  # EXCLUSIVE_PROCESS: nothing runs without, unnoticed
