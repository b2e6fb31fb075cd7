"""MPI ranks under srun, asking the CUDA driver and the control daemon what they really have (ranks.py)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.runtime import mpi_environment
from tests.harness.site import PYTHON

if TYPE_CHECKING:
    from tests.harness.site import Site

PROGRAM = "/opt/ranks.py"
LAYOUT = ["-N2", "-n8", "--ntasks-per-node=4"]


def run_ranks(
    site: Site, *options: str, checks: str = "", env: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Run the program in a batch job's step. Returns the job's exit code and what rank 0 printed."""
    site.machine.write(PROGRAM, (Path(__file__).parent / "ranks.py").read_text(), mode=0o755)
    script = f"srun --mpi=pmi2 {PYTHON} {PROGRAM} --json {checks}"
    job = site.cluster.sbatch(*LAYOUT, *options, script=script, env={**mpi_environment(), **(env or {})})
    info = site.cluster.wait(job)
    output = site.cluster.output(job)
    try:
        report: dict[str, Any] = json.loads(output.splitlines()[0])
    except (IndexError, ValueError):
        pytest.fail(f"the job printed no report: {output}")
    return info.exit_code, report


@pytest.mark.every_release
def test_ranks_share_their_gpus_through_one_server_a_node_within_the_limits(any_site: Site) -> None:
    code, report = run_ranks(
        any_site,
        "--gres=gpu:2",
        "--mps-threads=25",
        "--mps-mem=8G",
        checks="--multiprocessors 32 --limit-mib 8192",
    )
    ranks = report["ranks"]
    assert (code, report["problems"]) == (0, [])
    uuids = {node: [gpu["uuid"] for gpu in any_site.gpus(node)[:2]] for node in any_site.nodes}
    assert Counter((r["host"], r["gpu"]) for r in ranks) == {(n, u): 2 for n in uuids for u in uuids[n]}
    assert {(r["multiprocessors"], r["free_mib"], r["total_mib"]) for r in ranks} == {(32, 8047, 143155)}
    servers = {r["host"]: {x["server"] for x in ranks if x["host"] == r["host"]} for r in ranks}
    assert all(len(found) == 1 for found in servers.values())
    assert servers["n1"] != servers["n2"]


def test_ranks_without_mps_are_told_from_clients(site: Site) -> None:
    """The proof is worth something only if it fails where there is no MPS."""
    code, report = run_ranks(site, "--gres=gpu:2", checks="--multiprocessors 32 --limit-mib 8192")
    assert code == 1
    assert [f"rank {n} runs without MPS" for n in range(8)] == report["problems"][:8]
    assert "rank 0 has 132 SMs instead of 32" in report["problems"]
    assert any(p.startswith("rank 0 may take 14") and p.endswith("more than 8192") for p in report["problems"])


def test_bound_ranks_find_one_gpu_each_and_still_share_the_server(any_site: Site) -> None:
    code, report = run_ranks(any_site, "--gpus-per-task=1", "--mps-threads=50", checks="--multiprocessors 66")
    assert (code, report["problems"]) == (0, [])
    ranks = report["ranks"]
    assert {r["devices"] for r in ranks} == {1}
    assert len({(r["host"], r["gpu"]) for r in ranks}) == 8
    assert len({(r["host"], r["server"]) for r in ranks}) == 2
