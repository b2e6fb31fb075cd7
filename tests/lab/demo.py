"""``make demo``: one MPS job from sbatch to nothing left, on a throw-away Slurm.

Two nodes with simulated GPUs; with ``--real`` (the default where the NVIDIA driver finds GPUs) one node with the
machine's own, whose compute mode is left alone unless ``--allow-compute-mode`` is given. Exit status 1 if anything is
not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from tests.harness.cluster import REPOSITORY, SlurmError
from tests.harness.runtime import mpi_environment
from tests.harness.site import PYTHON, Site, Snapshot

RANKS = "/opt/ranks.py"
GO = "/home/alice/go"
JOB_SCRIPT = f"""#!/bin/bash
srun --mpi=pmi2 {PYTHON} {RANKS} $CHECKS
status=$?
echo ranks done
for _ in $(seq 300); do [ -e {GO} ] && break; sleep 0.1; done
exit $status
"""


class Demo:
    """Says what it does, and collects what was not as it should be."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f} s] {text}", flush=True)

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)

    def show_modes(self, site: Site, when: str) -> dict[str, list[str]]:
        modes = {node: site.compute_modes(node) for node in site.nodes}
        for node, found in modes.items():
            self.say(f"compute modes {when} on {node}: {', '.join(found)}")
        return modes


def real_gpu_count() -> int:
    """How many GPUs the NVIDIA driver of this machine finds; none without a driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def run_job(demo: Demo, site: Site, gpus: int, exclusive: bool) -> None:
    """Submit as alice, look while it runs, let it end."""
    before = demo.show_modes(site, "before")
    options = ["--mps-threads=25", "--mps-mem=8G", f"--gres=gpu:{gpus}", f"-N{len(site.nodes)}", "-n8"]
    site.machine.write(RANKS, (REPOSITORY / "tests/verify/ranks.py").read_text(), mode=0o755)
    demo.say(f"alice$ sbatch {' '.join(options)} job.sh")
    job = site.cluster.sbatch(
        *options, script=JOB_SCRIPT, env={**mpi_environment(), "CHECKS": "--multiprocessors 32 --limit-mib 8192"}
    )
    try:
        site.cluster.until("the ranks' report", lambda: "ranks done" in site.cluster.output(job) or None, 60)
    except SlurmError as error:
        print(error, site.cluster.output(job), file=sys.stderr)
        demo.problems.append("the ranks never reported")
        site.cluster.scancel(job)
        return
    during = demo.show_modes(site, "during")
    daemons = site.mps_processes()
    site.machine.write(GO, "")
    info = site.cluster.wait(job)
    demo.say(f"job {job.id} {info.state}; its output:")
    print(site.cluster.output(job).replace("ranks done\n", ""), flush=True)
    site.cluster.wait_idle()
    after = demo.show_modes(site, "after")

    demo.check(info.state == "COMPLETED", f"the job ended as {info.state}")
    demo.check(len(daemons) == 2 * len(site.nodes), f"expected a daemon and a server a node, found {daemons}")
    wanted = "Exclusive_Process" if exclusive else None
    for node in site.nodes:
        expected = [wanted or mode for mode in before[node][:gpus]] + before[node][gpus:]
        demo.check(during[node] == expected, f"{node}: modes during the job {during[node]}, expected {expected}")
    demo.check(after == before, f"modes after the job {after}, before {before}")


def refuse_a_typo(demo: Demo, site: Site) -> None:
    """What the user with the typo sees, and the one who forgot the GPU."""
    demo.say("alice$ sbatch --mps-threads=250 job.sh")
    refused = site.cluster.try_sbatch("--mps-threads=250", script=JOB_SCRIPT)
    print(refused.stderr, end="", flush=True)
    demo.check(refused.returncode != 0, "a percentage of 250 was taken")
    demo.say("alice$ srun --mps hostname")
    refused = site.cluster.srun("-N1", "--mps", "hostname")
    print(refused.stderr, end="", flush=True)
    demo.check(refused.returncode != 0, "a job without a GPU ran")


def compare(demo: Demo, site: Site, before: Snapshot) -> None:
    """Nothing left, and every node in service."""
    after = site.snapshot()
    demo.check(after == before, f"left behind: {after} instead of {before}")
    states = {name: state.state for name, state in site.cluster.node_states().items()}
    demo.check(all(state == "IDLE" for state in states.values()), f"node states {states}")
    demo.say(f"left on the nodes: {'nothing' if after == before else after}; states {json.dumps(states)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--real", action="store_true", help="use this machine's GPUs")
    kind.add_argument("--simulated", action="store_true", help="use simulated GPUs even where there are real ones")
    parser.add_argument("--allow-compute-mode", action="store_true", help="let the job set a real GPU's compute mode")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("a throw-away Slurm needs root (namespaces, slurmd)")

    demo = Demo()
    found = 0 if options.simulated else real_gpu_count()
    if options.real and not found:
        parser.error("the NVIDIA driver finds no GPU on this machine")
    exclusive = options.allow_compute_mode or not found
    config = "" if exclusive else '[gpus]\ncompute_mode = "unchanged"\n'
    site = Site(real=True, nodes=1, gpus_per_node=found, config=config) if found else Site(cpus_per_node=4)
    demo.say("bringing up a throw-away Slurm")
    with site:
        what = f"{found} real GPUs" if found else "4 simulated GPUs each"
        demo.say(f"up: {', '.join(site.nodes)} with {what}; slurm-mps is installed")
        before = site.snapshot()
        run_job(demo, site, min(2, found or 2), exclusive)
        if not demo.problems:
            refuse_a_typo(demo, site)
            compare(demo, site, before)
    for problem in demo.problems:
        print(f"demo: NOT AS IT SHOULD BE: {problem}", file=sys.stderr)
    demo.say("FAILED" if demo.problems else "all as it should be")
    return 1 if demo.problems else 0


if __name__ == "__main__":
    sys.exit(main())
