"""The check that comes first: whether slurm-mps is in this host's Slurm at all."""

from __future__ import annotations

from collections.abc import Iterator

from ...slurm.host import NotKnownError
from ..facts import Facts
from ..finding import Finding, check, problem


def install_command(facts: Facts) -> str:
    """The command that puts plugin and line there."""
    return "slurm-mps install" if facts.is_compute else "slurm-mps install --login-node"


@check(
    "installed",
    "slurm-mps is installed on this host",
    why="Until then srun, sbatch and salloc on this host know no --mps option, and jobs on this node get no MPS.",
)
def installed(facts: Facts) -> Iterator[Finding]:
    if facts.is_installed:
        return
    if facts.is_controller_alone:
        raise NotKnownError("no job runs on this host, and a controller needs no plugin")
    where = "node" if facts.is_compute else "host"
    yield problem(f"slurm-mps is not installed on this {where}", f"as root: {install_command(facts)}")
