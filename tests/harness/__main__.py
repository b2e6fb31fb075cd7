"""``python3 -m tests.harness``: a throw-away Slurm cluster to try things in, gone when the command ends.

The command (an interactive shell when none is given) runs inside as root, on the "login node", with the
caller's terminal. Nothing that it writes reaches the host, the checkout included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from .cluster import REPOSITORY, Cluster
from .machine import USERS, Machine
from .release import chosen, ensure_root
from .runtime import MOUNT_POINT, ensure_runtime, install_project, mpi_environment


def _parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; what follows ``--`` is the command."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.harness", description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=4, help="GPUs of each node, at most 8")
    parser.add_argument("--constrain-devices", action="store_true", help="confine tasks to their GPUs with cgroups")
    parser.add_argument("--prolog", help="path, inside, of the prolog")
    parser.add_argument("--epilog", help="path, inside, of the epilog")
    parser.add_argument("--plugstack", default="", help="text of plugstack.conf")
    parser.add_argument("--overlay", action="append", default=[], metavar="INSIDE=DIR", help="lay DIR over INSIDE")
    parser.add_argument("--runtime", type=Path, metavar="CACHE", help=f"build there, and bind at {MOUNT_POINT}")
    parser.add_argument("--project", type=Path, metavar="CHECKOUT", help="install into the runtime (needs --runtime)")
    parser.add_argument("command", nargs="*", default=["/bin/bash"])
    return parser.parse_args(argv)


def _machine(options: argparse.Namespace) -> Machine:
    """The machine that the options ask for."""
    overlays: dict[str, list[str]] = {}
    for pair in options.overlay:
        inside, _, directory = pair.partition("=")
        overlays.setdefault(inside, []).append(directory)
    binds: dict[str | Path, str] = {}
    root = ensure_root(chosen(), options.runtime or REPOSITORY / ".cache")
    if options.runtime is not None:
        runtime = ensure_runtime(options.runtime, root)
        if options.project is not None:
            install_project(runtime, options.project, root)
        binds[runtime] = MOUNT_POINT
    return Machine(overlays=overlays, binds=binds, root=root, shown=[REPOSITORY])


def main(argv: list[str]) -> int:
    """Bring a cluster up, run the command in it, take it down; the command's exit status."""
    options = _parse(argv)
    began = time.monotonic()
    with _machine(options) as machine:
        cluster = Cluster(
            machine,
            nodes=options.nodes,
            gpus_per_node=options.gpus,
            constrain_devices=options.constrain_devices,
            plugstack=options.plugstack,
            prolog=options.prolog,
            epilog=options.epilog,
        )
        with cluster:
            nodes = ", ".join(cluster.node_names)
            print(f"harness: {nodes} with {options.gpus} GPUs each, up in {time.monotonic() - began:.1f} s")
            print(f"harness: users {', '.join(USERS)} (su - alice); logs in /var/log/slurm")
            for name, node in machine.nodes.items():
                print(f"harness: {name} (its own /run, /tmp, /var/log): nsenter -t {node.pid} -m")
            print(f"harness: running {' '.join(options.command)}", flush=True)
            environment = {"TERM": "xterm", **(mpi_environment() if options.runtime else {})}
            code = subprocess.call(machine.command(options.command), env=machine.environment(env=environment))
            print("harness: taking everything down", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
