"""``python3 -m tests.hardware``: jobs on real GPUs, from sbatch to nothing left, as their users see them.

The demo's job, automatic limits, a daemon per GPU, faults and killed steps; tasks confined to their GPUs, ranks that
MPI started. As root, on a machine with an NVIDIA driver and Slurm, or with a bundle (tests/harness/bundle.py). Prints a
page of docs/hardware, with what is left at the end; exits 1 when anything is, or the demo's job is not as it should be.
The GPUs' compute mode is left alone.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from tests.demo import Demo, run_job
from tests.harness.cluster import SlurmError
from tests.harness.runtime import mpi_environment

from .site import NODE, PLACE, RealSite, measured_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness.cluster import Job
    from tests.harness.site import Site

CLIENT = f"/usr/bin/python3 {PLACE}/client.py"
VERIFY = "/opt/slurm-mps/bin/slurm-mps verify"
MPI = "--mpi=pmi2 "


class Show:
    """Runs things on a site and prints them as a session of a user."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def srun(self, options: str, command: str) -> None:
        began = time.monotonic()
        result = self._site.cluster.srun(*options.split(), *command.split(), timeout=120, env=mpi_environment())
        print(f"alice$ srun {options} {command.replace('/opt/slurm-mps/bin/', '')}")
        print(
            f"{result.stdout}{result.stderr}[exit {result.returncode}, {time.monotonic() - began:.1f} s]\n", flush=True
        )

    def sbatch(self, options: str, script: str, until: Callable[[str], bool] | None = None) -> None:
        """Run a script; once `until` holds of its output its first step is cancelled."""
        cluster = self._site.cluster
        job = cluster.sbatch(*options.split(), script=script)
        print(f"alice$ sbatch {options} <<'END'\n{script}END")
        if until:
            cluster.until("the step", lambda: until(cluster.output(job)) or None, 60)
            self._cancel_step(job)
        try:
            state = cluster.wait(job, 90).state
        except SlurmError:
            state = "still there; cancelled"
            cluster.scancel(job)
        print(f"{cluster.output(job)}[{state}]\n", flush=True)

    def _cancel_step(self, job: Job) -> None:
        print(f"alice$ scancel {job}.0")
        self._site.machine.run(["scancel", f"{job}.0"], user=job.user).check()


def _heading(site: Site) -> None:
    on = measured_on()
    slurm = site.node(NODE, "slurmd", "-V").stdout.strip()
    plugin = site.machine.read("/etc/slurm/cgroup.conf").partition("CgroupPlugin=")[2].split()[0]
    print(f"# Jobs on real GPUs: {len(on['gpus'])} x {on['gpus'][0].replace(', ', ', driver ')}\n")
    print(
        f"{on['date']}, {slurm}, {on['cpu']}, {on['cores']} cores, tasks confined to their GPUs ({plugin}), compute "
        "mode left alone. Each client is an ordinary CUDA program with kernels of its own; error 700 is "
        "CUDA_ERROR_ILLEGAL_ADDRESS. What `make hardware` printed:\n"
    )


def main() -> int:
    demo = Demo()
    with RealSite() as site:
        gpus = site.gpus_per_node
        before = site.snapshot()
        _heading(site)
        print("```console", flush=True)
        run_job(demo, site, gpus, exclusive=False)
        show = Show(site)
        for number in sorted({1, gpus}):
            show.srun(f"{MPI}-n8 --gres=gpu:{number} --mps-threads=auto --mps-mem=auto", VERIFY)
        show.srun(f"{MPI}-n8 --ntasks-per-gpu={8 // gpus} --mps=per-gpu --mps-threads=25 --mps-mem=0:8G", VERIFY)
        show.srun("-n8 --gres=gpu:1 --mps-threads=auto --mps-mem=auto", f"{CLIENT} fill 4")
        show.srun("-n50 -O --gres=gpu:1 --mps", "echo ran")
        next_step = f"srun -n{gpus} --gpus-per-task=1 {CLIENT} hold\n"
        spin = f"srun -n{gpus} --gpus-per-task=1 {CLIENT} spin\n{next_step}"
        for mode in ("--mps", "--mps=per-gpu"):
            show.sbatch(f"-n{gpus} --gres=gpu:{gpus} {mode}", spin, lambda said: said.count("launched") == gpus)
        crowd = f"srun -n4 {CLIENT} spin\nsrun -n4 {CLIENT} hold\n"
        show.sbatch("-n4 --gres=gpu:1 --mps", crowd, lambda said: said.count("launched") == 4)
        fault = f"if [ $SLURM_LOCALID = 0 ]; then exec {CLIENT} fault; else exec {CLIENT} hold 3; fi"
        for mode in ("--mps", "--mps=per-gpu"):
            step = f"srun -n{2 * gpus} --ntasks-per-gpu=2 --kill-on-bad-exit=0 sh -c '{fault}'\n"
            show.sbatch(f"-n{2 * gpus} --gres=gpu:{gpus} {mode}", step + next_step)
        after = site.snapshot()
    print("```\n")
    print(f"Processes, files and compute modes as before: {after == before}")
    for problem in demo.problems:
        print(f"NOT AS IT SHOULD BE: {problem}")
    return 0 if after == before and not demo.problems else 1


if __name__ == "__main__":
    sys.exit(main())
