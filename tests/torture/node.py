"""A simulated GPU node to be mistreated: its Slurm says what it is told to, it reboots, and it can be repaired."""

from __future__ import annotations

import shlex
from time import monotonic, sleep
from typing import TYPE_CHECKING

from tests.harness.gpunode import GpuNode
from tests.harness.reports import report as checked
from tests.harness.site import STATE_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.gpunode import NodeSnapshot
    from tests.harness.machine import Process, Result

COMMAND = "/opt/slurm-mps/bin/slurm-mps"
SQUEUE, ASKED = "/usr/local/bin/squeue", "/run/squeue.asked"
BOOT_ID, REAL_BOOT_ID = "/run/boot-id", "/proc/sys/kernel/random/boot_id"


class MistreatedNode(GpuNode):
    """A GpuNode with a stand-in for Slurm's controller, which has no job until it is told of one."""

    def __init__(self, *, gpus: int = 4) -> None:
        super().__init__(gpus=gpus)
        self._boots = 0
        self.slurm_jobs: dict[int, str] = {}

    def slurm_says(self, jobs: dict[int, str] | None, *, before: str = "true") -> None:
        """Have squeue know these jobs, each with ``state|end|nodes``, or fail for None; `before` runs first."""
        lines = [f"{job}|{rest}" for job, rest in (jobs or {}).items()]
        said = f"printf '%s\\n' {shlex.join(lines)}" if lines else "true"
        failed = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
        text = f'#!/bin/sh\necho "$*" >>{ASKED}\n{before} >/dev/null\n{failed if jobs is None else said}\n'
        self.machine.write(SQUEUE, text, mode=0o755)
        self.machine.path(ASKED).unlink(missing_ok=True)

    def asked(self) -> bool:
        """Whether anybody asked Slurm since it was told what to say."""
        return self.machine.path(ASKED).exists()

    def reconcile(self, *options: str) -> Result:
        return self.run(COMMAND, "reconcile", *options)

    def repairs(self, *options: str, status: int = 0) -> dict[str, str]:
        """What reconcile found, by thing; it must end with this status."""
        result = self.reconcile("--json", *options)
        assert result.returncode == status, f"exit {result.returncode}: {result.stdout}{result.stderr}"
        report = checked(result.stdout, result.returncode)
        assert report["status"] == status
        return {repair["thing"]: repair["outcome"] for repair in report["repairs"]}

    def reboot(self, *modes: int) -> None:
        """End all of MPS, lose the compute modes, and be another boot; the state directory outlives it, the worst case.

        `modes` are what the node's own scripts then set, from the first GPU on.
        """
        self.kill(*self.mps_processes())
        count = len(self.compute_modes())
        self.set_compute_modes(*modes, *[0] * (count - len(modes)))
        self._boots += 1
        self.machine.write(f"{BOOT_ID}.{self._boots}", f"00000000-0000-4000-8000-{self._boots:012}\n")
        self.run("mount", "--bind", f"{BOOT_ID}.{self._boots}", REAL_BOOT_ID).check()

    def kill(self, *processes: Process) -> None:
        """SIGKILL, and wait until they are gone."""
        if processes:
            self.run("kill", "-9", *(str(process.pid) for process in processes))
        while {process.pid for process in processes} & {process.pid for process in self.machine.processes()}:
            pass

    def environment_of(self, process: Process) -> str:
        """The environment that a process was started with; empty when it is gone."""
        try:
            return self.machine.path(f"/proc/{process.pid}/environ").read_text(errors="replace")
        except OSError:
            return ""

    def control_daemons(self) -> list[tuple[Process, str]]:
        """Each with its pipe directory; neither what one has just forked nor the program that commands one."""
        roots = [p for p in self.mps_processes() if p.uid == 0 and "-d" in p.cmdline]
        pids = {p.pid for p in roots}
        found = [(p, self.environment_of(p).split("\0")) for p in roots if p.ppid not in pids]
        name = "CUDA_MPS_PIPE_DIRECTORY="
        return [(p, word.removeprefix(name)) for p, words in found for word in words if word.startswith(name)]

    def mps_processes(self) -> list[Process]:
        """As ever, without those that have ended and are about to be reaped."""
        return [process for process in super().mps_processes() if process.cmdline]

    def settled(self, before: NodeSnapshot) -> NodeSnapshot:
        """The node as it is, once what has ended is reaped, if it is then as before."""
        end = monotonic() + 2
        while (now := self.snapshot()) != before and monotonic() < end:
            sleep(0.02)
        return now

    def tree(self) -> str:
        """Everything of slurm-mps on the node, with content: to see that nothing changed. Not what is the daemons' own,
        who write when they like: their pipe directories, and the logs of the jobs 47xx.
        """
        places = f"{STATE_DIRECTORY} /var/log/slurm-mps"
        prune = r"\( -name 'pipe' -o -name 'gpu-*' -o -path '*/log/slurm-mps/47*' \) -prune -o"
        show = f"find {places} {prune} -printf '%p %m %U %s %T@\\n'; find {places} {prune} -type f -exec cat {{}} +"
        return self.run("sh", "-c", f"{{ {show}; }} | sort").stdout
