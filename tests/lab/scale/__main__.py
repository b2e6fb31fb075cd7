"""``make scale``: one job on many nodes, many jobs back to back and many at a time, and what they leave. No GPU needed.

Prints figures; exits 1 when anything was left behind, a call to slurmctld was made, or a client had other limits.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.harness.site import Site

from .load import MPS, PATIENT, Run, rpcs_of, run_jobs, run_on_all_nodes

VERIFY = ("/opt/slurm-mps/bin/slurm-mps", "verify")


def _many_nodes(count: int) -> bool:
    with Site(nodes=count, gpus_per_node=1, cpus_per_node=2, config=PATIENT) as site:
        before = site.snapshot()
        began = time.monotonic()
        clients = run_on_all_nodes(site)
        took = time.monotonic() - began
        clean = site.snapshot() == before
    print(f"one job on {count} nodes: {clients} of {count} clients with their limits, {took:.1f} s, clean: {clean}")
    return clean and clients == count


def _many_ranks(count: int) -> bool:
    """`slurm-mps verify` under so many ranks on one node of two GPUs."""
    with Site(nodes=1, gpus_per_node=2, cpus_per_node=count) as site:
        site.cluster.srun("-n2", "--gres=gpu:2", "--mps", *VERIFY).check()
        began = time.monotonic()
        result = site.cluster.srun(f"-n{count}", "--gres=gpu:2", "--mps-threads=auto", "--mps-mem=auto", *VERIFY)
        took = time.monotonic() - began
    well = f"{count} ranks, all clients" in result.stdout
    print(f"verify with {count} ranks on one node: {took:.1f} s, all clients: {well}")
    return well


def _tell(what: str, run: Run) -> bool:
    clean = run.after == run.before
    grown = run.descriptors_after - run.descriptors_before
    print(
        f"{len(run.seconds)} jobs {what}: last tenth / first tenth {run.last_to_first:.2f}, "
        f"slurmd's open files {grown:+d}, clean: {clean}"
    )
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(prog="make scale")
    parser.add_argument("--nodes", type=int, default=64, help="slurmds for the one job on all of them")
    parser.add_argument("--jobs", type=int, default=500, help="half of them back to back, half 16 at a time")
    arguments = parser.parse_args()
    good = _many_nodes(arguments.nodes)
    good &= _many_ranks(64)
    with Site(nodes=2, gpus_per_node=8) as site:
        plain, mps = rpcs_of(site, 10), rpcs_of(site, 10, *MPS)
        more = mps - plain
        print(f"calls to slurmctld that ten MPS jobs made and ten others did not: {sum(more.values())} {dict(more)}")
        good &= not more
        good &= _tell("back to back", run_jobs(site, arguments.jobs // 2, 1))
        good &= _tell("16 at a time", run_jobs(site, arguments.jobs // 2, 16))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
