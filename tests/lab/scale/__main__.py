"""``make scale``: many nodes, 48 ranks on each of eight GPUs, many jobs, and what they leave. No GPU needed.

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


def _many_ranks(gpus: int, ranks_per_gpu: int, *options: str) -> bool:
    """`slurm-mps verify` under so many ranks on each GPU of one node."""
    count = gpus * ranks_per_gpu
    with Site(nodes=1, gpus_per_node=gpus, cpus_per_node=count) as site:
        before = site.snapshot()
        began = time.monotonic()
        bound = [f"-n{count}", f"--gres=gpu:{gpus}", f"--ntasks-per-gpu={ranks_per_gpu}"]
        result = site.cluster.srun(*bound, *options, *VERIFY, "--timeout=300", timeout=300)
        took = time.monotonic() - began
        site.cluster.wait_idle()
        clean = site.snapshot() == before
    well = f"{count} ranks, all clients" in result.stdout
    print(
        f"verify with {ranks_per_gpu} ranks on each of {gpus} GPUs, {' '.join(options)}: {took:.1f} s, "
        f"all clients: {well}, clean: {clean}"
    )
    return well and clean


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
    good &= _many_ranks(2, 32, "--mps-threads=auto", "--mps-mem=auto")
    for daemons in ("per-node", "per-gpu"):
        good &= _many_ranks(8, 48, f"--mps={daemons}", "--mps-mem=2G")
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
