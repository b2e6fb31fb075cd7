"""One GPU node without Slurm: prolog and epilog run as slurmd runs them, which makes tests quick.

Its GPUs are simulated unless told otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import bundle
from .machine import USERS, Throwaway
from .site import STATE_DIRECTORY, gpu_machine, install_hooks, show_gpus_in_proc, simulated_gpus

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from .machine import Process, Result

PROLOG = "/etc/slurm/prolog.d/10-slurm-mps.sh"
EPILOG = "/etc/slurm/epilog.d/95-slurm-mps.sh"


@dataclass(frozen=True)
class NodeSnapshot:
    """What prolog and epilog must leave as they found it."""

    processes: tuple[str, ...]
    files: tuple[str, ...]
    compute_modes: tuple[int, ...]


def job_environment(job_id: int, *, user: str = "alice", gpus: str = "0,1", **spank: str) -> dict[str, str]:
    """What slurmd gives prolog and epilog of a job; `spank` are its SPANK_* variables."""
    gpu_variables = {"SLURM_JOB_GPUS": gpus, "CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    return {
        "SLURM_JOB_ID": str(job_id),
        "SLURM_JOB_UID": str(USERS[user]),
        "SLURM_JOB_USER": user,
        "SLURMD_NODENAME": "n1",
        **gpu_variables,
        **spank,
    }


def asked(threads: str | None = None, mem: str | None = None) -> dict[str, str]:
    """The SPANK variables of a job that asks for MPS."""
    given = {"SPANK_MPS": "1", "SPANK_MPS_THREADS": threads, "SPANK_MPS_MEM": mem}
    return {name: value for name, value in given.items() if value is not None}


#: Always part of the configuration where the GPUs are real: what they are set to is not ours.
UNCHANGED = '[gpus]\ncompute_mode = "unchanged"\n'


class GpuNode(Throwaway):
    """A machine with slurm-mps and simulated GPUs, or the host's own; use it as a context manager."""

    def __init__(self, *, gpus: int = 4, driver: int = 580, programs: Path | None = None, real: bool = False) -> None:
        self.machine = gpu_machine(real=real, programs=programs)
        self._driver = driver
        self._real = real
        self._gpu_count = gpus
        self._running: list[int] = []

    def begin(self) -> None:
        self.machine.begin()
        if self._real:
            bundle.settle(self.machine)
        else:
            self.have_driver(self._driver)
            show_gpus_in_proc(self.machine, self.gpus())
        install_hooks(self.machine)
        self.configure("")

    def close(self) -> None:
        self.machine.close()

    def run(
        self, *argv: str, user: str | None = None, env: dict[str, str] | None = None, text: str | None = None
    ) -> Result:
        return self.machine.run(argv, user=user, env=env, input=text, timeout=60)

    def start(self, *argv: str, user: str | None = None, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        return self.machine.popen(argv, user=user, env=env)

    def configure(self, text: str) -> None:
        self.machine.write("/etc/slurm/mps.toml", text + (UNCHANGED if self._real else ""))

    def confine_devices(
        self, cgroup_conf: str = "ConstrainDevices=yes\n", slurm_conf: str = "TaskPlugin=task/cgroup\n"
    ) -> None:
        """Have Slurm's files say that jobs are confined to their GPUs, or what is given."""
        self.machine.write("/etc/slurm/cgroup.conf", cgroup_conf)
        self.machine.write("/etc/slurm/slurm.conf", slurm_conf)

    def fault(self, *settings: str) -> None:
        """Tell the simulated driver to misbehave; nothing for well again."""
        self.run("simulated-gpus", "fault", "--clear").check()
        if settings:
            self.run("simulated-gpus", "fault", *settings).check()

    def have_driver(self, branch: int, *options: str) -> None:
        """Simulate another driver from now on; what runs already goes on as it was started."""
        self.run("simulated-gpus", "create", str(self._gpu_count), "--driver", str(branch), *options).check()

    @property
    def package(self) -> str:
        """Where the package is that prolog and epilog run."""
        lines = self.machine.read(PROLOG).splitlines()
        return next(line.removeprefix("package=") for line in lines if line.startswith("package="))

    def prolog(self, job_id: int, *, user: str = "alice", gpus: str = "0,1", **spank: str) -> Result:
        """Run the prolog; a job that gives no SPANK variable asks for plain MPS."""
        environment = job_environment(job_id, user=user, gpus=gpus, **(spank or asked()))
        result = self.run(PROLOG, env=environment)
        if result.returncode == 0 and job_id not in self._running:
            self._running.append(job_id)
        return result

    def epilog(self, job_id: int) -> Result:
        result = self.run(EPILOG, env=job_environment(job_id))
        if result.returncode == 0 and job_id in self._running:
            self._running.remove(job_id)
        return result

    def run_job(self, job_id: int, *, gpus: str = "0,1", **spank: str) -> None:
        """A job that comes and goes."""
        self.prolog(job_id, gpus=gpus, **spank).check()
        self.epilog(job_id).check()

    def end_jobs(self) -> None:
        """Run the epilog of each job whose prolog() was good and whose epilog() has not been yet."""
        running, self._running = self._running, []
        for job_id in running:
            self.epilog(job_id).check()

    @property
    def uuids(self) -> list[str]:
        return self.run("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader").check().stdout.split()

    def clean(self) -> None:
        """Take down what a failed test left."""
        for path in self.files():
            job = path.removeprefix(f"{STATE_DIRECTORY}/jobs/")
            if job.isdigit():
                self.epilog(int(job))

    def verdict(self, job_id: int) -> dict[str, str]:
        """What the job's tasks would read; empty without a verdict. Several lines of one key: the last."""
        path = self.machine.path(f"{STATE_DIRECTORY}/jobs/{job_id}/verdict")
        if not path.exists():
            return {}
        return dict(line.partition(" ")[::2] for line in path.read_text().splitlines()[1:-1])

    def pipe_directory(self, job_id: int) -> str:
        return f"{STATE_DIRECTORY}/jobs/{job_id}/pipe"

    def control(self, job_id: int, command: str, user: str | None = None) -> Result:
        """Send a command to a job's control daemon."""
        environment = {"CUDA_MPS_PIPE_DIRECTORY": self.pipe_directory(job_id)}
        return self.run("nvidia-cuda-mps-control", user=user, env=environment, text=f"{command}\n")

    def client(self, job_id: int | None, *options: str, user: str = "alice", **env: str) -> Result:
        """Run a small CUDA program, as a client of a job's daemon or of none."""
        if job_id is not None:
            env["CUDA_MPS_PIPE_DIRECTORY"] = self.pipe_directory(job_id)
        return self.run("simulated-gpus", "client", *options, user=user, env=env)

    def gpus(self) -> list[dict[str, Any]]:
        """The GPUs as the simulated driver has them."""
        return simulated_gpus(self.machine)

    def compute_modes(self) -> list[int]:
        return [gpu["compute_mode"] for gpu in self.gpus()]

    def set_compute_modes(self, *modes: int) -> None:
        for index, mode in enumerate(modes):
            self.run("simulated-gpus", "set-mode", str(index), str(mode)).check()

    def mps_processes(self) -> list[Process]:
        return [p for p in self.machine.processes() if p.comm.startswith("nvidia-cuda-mps")]

    def files(self) -> list[str]:
        """Everything of slurm-mps on the node that belongs to a job or a GPU."""
        found = self.run("find", f"{STATE_DIRECTORY}/jobs", f"{STATE_DIRECTORY}/gpus", "-mindepth", "1")
        return sorted(found.stdout.splitlines())

    def snapshot(self) -> NodeSnapshot:
        processes = sorted(f"{p.comm} {p.uid}" for p in self.machine.processes())
        return NodeSnapshot(tuple(processes), tuple(self.files()), tuple(self.compute_modes()))
