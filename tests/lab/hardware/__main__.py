"""``python3 -m tests.lab.hardware``: jobs on real GPUs, from sbatch to nothing left, as their users see them.

The demo's job, automatic limits, a daemon per GPU, faults and killed steps; tasks confined to their GPUs, ranks that
MPI started. As root, on a machine with an NVIDIA driver and Slurm, or with a bundle (tests/harness/bundle.py). Prints a
page of docs/hardware, with what is left at the end; exits 1 when anything is, or the demo's job is not as it should be.
The GPUs' compute mode is left alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.harness.cluster import REPOSITORY, SlurmError
from tests.harness.runtime import mpi_environment
from tests.lab.demo import Demo, run_job

from .site import NODE, PLACE, RealSite, host_traces, measured_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness.cluster import Job
    from tests.harness.site import Site

CLIENT = f"/usr/bin/python3 {PLACE}/client.py"
VERIFY = "/opt/slurm-mps/bin/slurm-mps verify"
MPI = "--mpi=pmi2 "


class Show:
    """Runs things on a site, prints them as a session of a user, and holds them to what must come of them."""

    def __init__(self, site: RealSite, problems: list[str]) -> None:
        self._site = site
        self._problems = problems

    def _judge(self, what: str, said: str, expected: str) -> None:
        if not re.search(expected, said, re.DOTALL):
            self._problems.append(f"{what}: expected {expected!r}")

    def srun(self, options: str, command: str, expected: str) -> None:
        """`expected` is a pattern of the output with its last line, ``[exit 0, ...]``."""
        began = time.monotonic()
        result = self._site.cluster.srun(*options.split(), *command.split(), timeout=120, env=mpi_environment())
        print(f"alice$ srun {options} {command.replace('/opt/slurm-mps/bin/', '')}")
        end = f"[exit {result.returncode}, {time.monotonic() - began:.1f} s]"
        said = f"{result.stdout}{result.stderr}{end}\n"
        print(said, flush=True)
        self._judge(f"srun {options}", said, expected)

    def sbatch(self, options: str, script: str, expected: str, until: Callable[[str], bool] | None = None) -> None:
        """Run a script; once `until` holds of its output its first step is cancelled."""
        cluster = self._site.cluster
        job = cluster.sbatch(*options.split(), script=script)
        print(f"alice$ sbatch {options} <<'END'\n{script}END")
        try:
            if until:
                cluster.until("the step", lambda: until(cluster.output(job)) or None, 60)
                self._cancel_step(job)
            state = cluster.wait(job, 90).state
        except SlurmError:
            state = "still there; cancelled"
            cluster.scancel(job)
        said = f"{cluster.output(job)}[{state}]\n"
        print(said, flush=True)
        self._judge(f"sbatch {options}", said, expected)

    def _cancel_step(self, job: Job) -> None:
        print(f"alice$ scancel {job}.0")
        self._site.machine.run(["scancel", f"{job}.0"], user=job.user).check()


def _heading(site: Site) -> None:
    on = measured_on()
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    slurm = site.node(NODE, "slurmd", "-V").stdout.strip()
    plugin = site.machine.read("/etc/slurm/cgroup.conf").partition("CgroupPlugin=")[2].split()[0]
    print(f"# Jobs on real GPUs: {len(on['gpus'])} x {on['gpus'][0].replace(', ', ', driver ')}\n")
    print(
        f"{on['date']}, commit {commit.stdout.strip() or 'unknown'}, {slurm}, {on['cpu']}, {on['cores']} cores, tasks "
        f"confined to their GPUs ({plugin}), compute mode left alone. Each client is an ordinary CUDA program with "
        "kernels of its own; error 700 is CUDA_ERROR_ILLEGAL_ADDRESS. What `make hardware` printed:\n"
    )


def _jobs(show: Show, site: RealSite, gpus: int) -> None:
    """One after another; `gpus` of each node, two ranks on each where there are faults."""
    clients = "8 ranks, all clients, each GPU's ranks share one server.*\\[exit 0"
    for number in sorted({1, gpus}):
        show.srun(f"{MPI}-n8 --gres=gpu:{number} --mps-threads=auto --mps-mem=auto", VERIFY, clients)
    per_gpu = f"-n{4 * gpus} --ntasks-per-gpu=4 --mps=per-gpu --mps-threads=25 --mps-mem=0:8G"
    show.srun(MPI + per_gpu, VERIFY, clients.replace("8 ranks", f"{4 * gpus} ranks"))
    filled = "(filled.*: error 0.*){8}(ended with error 0.*){8}\\[exit 0"
    show.srun("-n8 --gres=gpu:1 --mps-threads=auto --mps-mem=auto", f"{CLIENT} fill 4", filled)
    show.srun("-n50 -O --gres=gpu:1 --mps", "echo ran", "^(?!.*ran\n).*50 tasks of this step.*takes 48.*\\[exit 1")
    next_step = f"srun -n{gpus} --gpus-per-task=1 {CLIENT} hold\n"
    next_works = f"Killed.*(ended with error 0.*){{{gpus}}}\\[COMPLETED"
    spin = f"srun -n{gpus} --gpus-per-task=1 {CLIENT} spin\n{next_step}"
    for mode in ("--mps", "--mps=per-gpu"):
        options = f"-n{gpus} --gres=gpu:{gpus} {mode}"
        show.sbatch(options, spin, next_works, lambda said: said.count("launched") == gpus)
    crowd = f"srun -n4 {CLIENT} spin\nsrun -n4 {CLIENT} hold\n"
    crowd_works = "Killed.*(ended with error 0.*){4}\\[COMPLETED"
    show.sbatch("-n4 --gres=gpu:1 --mps", crowd, crowd_works, lambda said: said.count("launched") == 4)
    ranks = 2 * gpus
    for mode in ("--mps", "--mps=per-gpu"):
        meeting = f"{site.meeting()}/all {ranks}"  # the one that faults waits until the others are there to be hit
        fault = f"[ $SLURM_PROCID = 0 ] && exec {CLIENT} fault 0 {meeting}; exec {CLIENT} hold 3 {meeting}"
        step = f"srun -n{ranks} --ntasks-per-gpu=2 --kill-on-bad-exit=0 sh -c '{fault}'\n"
        spared = f"(ended with error 0.*){{{ranks - 2}}}" if gpus > 1 else ""
        contained = f"(?=.*rank 0 hit a GPU fault.*took rank).*{spared}(ended with error 0.*){{{gpus}}}\\[COMPLETED"
        show.sbatch(f"-n{ranks} --gres=gpu:{gpus} {mode}", step + next_step, contained)
    site.end_meetings()


def main() -> int:
    demo = Demo()
    on_host = host_traces()
    with RealSite() as site:
        before = site.snapshot()
        _heading(site)
        print("```console", flush=True)
        run_job(demo, site, site.gpus_per_node, exclusive=False)
        _jobs(Show(site, demo.problems), site, site.gpus_per_node)
        after = site.snapshot()
    left = sorted(host_traces() - on_host)
    print("```\n")
    print(f"Processes, files and compute modes as before: {after == before}. Left on the host: {left or 'nothing'}.")
    for problem in demo.problems:
        print(f"NOT AS IT SHOULD BE: {problem}")
    return 0 if after == before and not demo.problems and not left else 1


if __name__ == "__main__":
    sys.exit(main())
