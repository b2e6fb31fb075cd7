"""A page of docs/hardware: its heading, what a user types with what comes of it, and what is left at the end."""

from __future__ import annotations

import re
import subprocess
import time
from typing import TYPE_CHECKING

from tests.harness.cluster import REPOSITORY, TERMINAL_STATES, SlurmError
from tests.harness.runtime import mpi_environment

from .site import NODE, host_traces, measured_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.harness.cluster import Job
    from tests.harness.site import Site

    from .site import RealSite


class Show:
    """Runs things on a site, prints them as a session of a user, and holds them to what must come of them."""

    def __init__(self, site: RealSite, problems: list[str]) -> None:
        self._site = site
        self._problems = problems

    def judge(self, what: str, said: str, expected: str) -> None:
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
        self.judge(f"srun {options}", said, expected)

    def sbatch(
        self,
        options: str,
        script: str,
        expected: str,
        until: Callable[[str], bool] | None = None,
        then: Callable[[Job], None] | None = None,
    ) -> None:
        """Run a script; once `until` holds of its output, `then` is done: without it, its first step is cancelled."""
        cluster = self._site.cluster
        job = cluster.sbatch(*options.split(), script=script)
        print(f"alice$ sbatch {options} <<'END'\n{script}END")
        try:
            if until and self._comes(job, until):
                (then or self._cancel_step)(job)
            state = cluster.wait(job, 90).state
        except SlurmError:
            state = "still there; cancelled"
            cluster.scancel(job)
        said = f"{cluster.output(job)}[{state}]\n"
        print(said, flush=True)
        self.judge(f"sbatch {options}", said, expected)

    def _comes(self, job: Job, until: Callable[[str], bool]) -> bool:
        """Wait until it holds of the job's output, or the job has ended. Returns: whether it holds."""
        cluster = self._site.cluster

        def look() -> bool | None:
            holds = until(cluster.output(job))
            return holds if holds or cluster.job_info(job).state in TERMINAL_STATES else None

        return cluster.until("the step", look, 60)

    def _cancel_step(self, job: Job) -> None:
        print(f"alice$ scancel {job}.0")
        self._site.machine.run(["scancel", f"{job}.0"], user=job.user).check()


def heading(site: Site, title: str, command: str) -> None:
    """What the page is of: `command` printed it."""
    on = measured_on()
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    slurm = site.node(NODE, "slurmd", "-V").stdout.strip()
    plugin = site.machine.read("/etc/slurm/cgroup.conf").partition("CgroupPlugin=")[2].split()[0]
    print(f"# {title}: {len(on['gpus'])} x {on['gpus'][0].replace(', ', ', driver ')}\n")
    print(
        f"{on['date']}, commit {commit.stdout.strip() or 'unknown'}, {slurm}, {on['cpu']}, {on['cores']} cores, tasks "
        f"confined to their GPUs ({plugin}), compute mode left alone. Each client is an ordinary CUDA program with "
        f"kernels of its own; error 700 is CUDA_ERROR_ILLEGAL_ADDRESS. What `{command}` printed:\n"
    )
    print("```console", flush=True)


def conclude(as_before: bool, on_host: set[str], problems: list[str]) -> int:
    """Say what is left, of a site that has ended, on it and on the host since `on_host`. Returns: the exit status."""
    left = sorted(host_traces() - on_host)
    print("```\n")
    print(f"Processes, files and compute modes as before: {as_before}.\nLeft on the host: {left or 'nothing'}.")
    for problem in problems:
        print(f"NOT AS IT SHOULD BE: {problem}")
    return 0 if as_before and not problems and not left else 1
