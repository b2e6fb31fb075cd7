"""``python3 -m tests.hardware``: automatic limits, a daemon per GPU, faults and killed steps, as jobs on real GPUs.

As root, on a machine with an NVIDIA driver and the packages that ``make test`` installs. Prints what a user would see,
and what is left at the end; exits 1 when anything is. The GPUs' compute mode is left alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.cluster import REPOSITORY, SlurmError
from tests.harness.site import Site

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness.cluster import Job

CONFIG = '[gpus]\ncompute_mode = "unchanged"\n'
CLIENT = "/usr/bin/python3 /opt/hardware/client.py"
VERIFY = "/opt/slurm-mps/bin/slurm-mps verify"


def _gpu_count() -> int:
    listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout
    return len(listed.splitlines())


class Show:
    """Runs things on a site and prints them as a session of a user."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def srun(self, options: str, command: str) -> None:
        began = time.monotonic()
        result = self._site.cluster.srun(*options.split(), *command.split(), timeout=120)
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


def main() -> int:
    gpus = _gpu_count()
    with Site(real=True, nodes=1, gpus_per_node=gpus, cpus_per_node=64, config=CONFIG) as site:
        for name in ("client.py", "tests/contract/cuda_client.py"):  # where ordinary users can read it
            source = REPOSITORY / name if "/" in name else Path(__file__).with_name(name)
            site.machine.write(f"/opt/hardware/{name}", source.read_text(), mode=0o755)
        before = site.snapshot()
        show = Show(site)
        show.srun(f"-n{4 * gpus} --gres=gpu:{gpus} --mps-threads=auto --mps-mem=auto", VERIFY)
        show.srun(f"-n{4 * gpus} --ntasks-per-gpu=4 --mps=per-gpu --mps-threads=25 --mps-mem=0:8G", VERIFY)
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
            step = f"srun -n{gpus} --gpus-per-task=1 --kill-on-bad-exit=0 sh -c '{fault}'\n"
            show.sbatch(f"-n{gpus} --gres=gpu:{gpus} {mode}", step + next_step)
        after = site.snapshot()
    print(f"as before: {after == before}")
    return 0 if after == before else 1


if __name__ == "__main__":
    sys.exit(main())
