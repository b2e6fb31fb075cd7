"""An MPI program whose ranks find out what they really have, and agree on who shares which GPU.

Each rank asks the CUDA driver for its GPU, its SMs and its memory, and the control daemon whether it is a client and
of which server. Rank 0 prints a table (or JSON with --json). Exit status 1 if a rank is not what it was asked to be:
no client, another thread or memory limit, or ranks on one GPU with different servers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from mpi4py import MPI

from slurm_mps.node.cuda import Cuda, CudaError

MIB = 1024**2
ASKED_TIMES = 10


def servers_by_client() -> dict[int, int]:
    """The server of each client process of this node, asked of the control daemon; nothing without MPS.

    The daemon talks to one at a time and turns others away (O40), so this is asked once a node, and again for a second.
    """
    for _ in range(ASKED_TIMES):
        answer = subprocess.run(
            ["/usr/bin/nvidia-cuda-mps-control"], input="ps\n", capture_output=True, text=True, timeout=10, check=False
        )
        if answer.returncode == 0:
            rows = [line.split() for line in answer.stdout.splitlines()[1:]]
            return {int(row[0]): int(row[2]) for row in rows if row}
        if "Cannot find" in answer.stderr:
            break
        time.sleep(1 / ASKED_TIMES)
    return {}


def look(local_rank: int) -> dict[str, Any]:
    """What this rank has."""
    report: dict[str, Any] = {
        "host": os.environ.get("SLURMD_NODENAME", os.uname().nodename),
        "pid": os.getpid(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "pipe_directory": os.environ.get("CUDA_MPS_PIPE_DIRECTORY"),
    }
    try:
        cuda = Cuda()
        count = cuda.device_count()
        device = cuda.open_device(local_rank % count)
    except CudaError as error:
        return {**report, "error": str(error)}
    return {
        **report,
        "devices": count,
        "gpu": device.uuid,
        "multiprocessors": device.multiprocessors,
        "free_mib": device.free_bytes // MIB,
        "total_mib": device.total_bytes // MIB,
    }


def problems(ranks: list[dict[str, Any]], multiprocessors: int | None, limit_mib: int | None) -> list[str]:
    """What is not as it was asked for, in words."""
    found = [f"rank {r['rank']} has no GPU: {r['error']}" for r in ranks if "error" in r]
    ranks = [r for r in ranks if "error" not in r]
    found += [f"rank {r['rank']} runs without MPS" for r in ranks if r["server"] is None]
    if multiprocessors is not None:
        found += [
            f"rank {r['rank']} has {r['multiprocessors']} SMs instead of {multiprocessors}"
            for r in ranks
            if r["multiprocessors"] != multiprocessors
        ]
    if limit_mib is not None:
        found += [
            f"rank {r['rank']} may take {r['free_mib']} MiB, which is more than {limit_mib}"
            for r in ranks
            if r["free_mib"] > limit_mib
        ]
    for gpu in {(r["host"], r["gpu"]) for r in ranks}:
        servers = {r["server"] for r in ranks if (r["host"], r["gpu"]) == gpu}
        if len(servers) > 1:
            found.append(f"the ranks on {gpu[1]} of {gpu[0]} do not share one server: {servers}")
    return found


def table(ranks: list[dict[str, Any]]) -> str:
    lines = [f"{'NODE':<6} {'GPU':<18} {'RANK':>4} {'PID':>8} {'SERVER':>8} {'SMS':>4} {'FREE MIB':>9} {'CARD MIB':>9}"]
    lines += [
        f"{r['host']:<6} {r.get('gpu', 'none')[:17]:<18} {r['rank']:>4} {r['pid']:>8} {r.get('server') or 'none':>8} "
        f"{r.get('multiprocessors', 0):>4} {r.get('free_mib', 0):>9} {r.get('total_mib', 0):>9}"
        for r in sorted(ranks, key=lambda r: (r["host"], r.get("gpu", ""), r["rank"]))
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--multiprocessors", type=int, help="SMs every rank should see")
    parser.add_argument("--limit-mib", type=int, help="memory no rank should be able to exceed")
    options = parser.parse_args()

    world = MPI.COMM_WORLD
    mine = {"rank": world.rank, **look(int(os.environ.get("SLURM_LOCALID", world.rank)))}
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    node.barrier()  # all of this node's ranks are clients by now, or will not be
    servers = node.bcast(servers_by_client() if node.rank == 0 else None)
    mine["server"] = servers.get(os.getpid())
    ranks = world.allgather(mine)  # nobody leaves before all have looked
    found = problems(ranks, options.multiprocessors, options.limit_mib)
    if world.rank == 0:
        print(json.dumps({"ranks": ranks, "problems": found}) if options.json else table(ranks))
        if not options.json:
            print("\n".join(found) or f"{len(ranks)} ranks, all clients, each GPU's ranks share one server")
    world.barrier()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
