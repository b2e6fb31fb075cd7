"""``python3 -m tests.lab.hardware.monitors``: what NVIDIA's monitors say of an MPS server and of its clients.

Two programs keep the first GPU busy: without MPS, with MPS, and with MPS while one of them sleeps. For each of the
three it prints what every monitor says of each pid. Takes half a minute, and never more than a minute. Nothing is set
on the GPU: the accounting mode is read, and where it is off its figures are left out. Needs no Slurm.

Slurm's ``gres/gpuutil`` asks nvmlDeviceGetProcessUtilization by pid, and ``gres/gpumem`` the running processes, so
these two rows are what Slurm would have.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pynvml

from tests.harness.cluster import REPOSITORY

from .site import measured_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_SECONDS = 60
WARM_SECONDS = 3.0  # from the start of the load to the first question
LOAD_SECONDS = 8.0
COMMAND_SECONDS = 6.0
CONTROL = "nvidia-cuda-mps-control"
BUSY = "flood:2112:10000:4"  # blocks for each multiprocessor of any card
PACED = "pace:16:4000:500"  # a short kernel, twice a second
PHASES = {"without MPS": ("", BUSY, BUSY), "with MPS": ("mps", BUSY, BUSY), "one busy": ("mps", BUSY, PACED)}


@contextlib.contextmanager
def control_daemon(scratch: Path) -> Iterator[dict[str, str]]:
    """A control daemon of our own in `scratch`; gives the environment of its clients."""
    where = {"CUDA_MPS_PIPE_DIRECTORY": f"{scratch}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{scratch}/log"}
    for directory in where.values():
        os.mkdir(directory)
    environment = {**os.environ, **where}
    subprocess.run([CONTROL, "-d"], env=environment, check=True, timeout=COMMAND_SECONDS)
    try:
        yield environment
    finally:
        ask(environment, "quit -t 1")


def ask(environment: dict[str, str], line: str) -> str:
    """What the control program prints."""
    done = subprocess.run(
        [CONTROL],
        env=environment,
        input=f"{line}\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS,
    )
    return done.stdout.strip()


def told(question: Callable[[], object]) -> str:
    """What NVML answers, or why it does not."""
    try:
        return str(question())
    except pynvml.NVMLError as error:
        return f"NVML: {error}"


class Monitors:
    """All monitors of one GPU; `names` has the pids that we know."""

    def __init__(self, gpu: object, names: dict[int, str]) -> None:
        self._gpu = gpu
        self._names = names

    def _name(self, pid: int) -> str:
        return self._names.get(pid, f"pid {pid}")

    def utilisation(self) -> str:
        rates = pynvml.nvmlDeviceGetUtilizationRates(self._gpu)
        return f"gpu {rates.gpu} %, memory {rates.memory} %"

    def processes(self) -> str:
        """Memory, which Slurm calls gres/gpumem."""
        listed = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(self._gpu)
        return ", ".join(f"{self._name(one.pid)} {(one.usedGpuMemory or 0) >> 20} MiB" for one in listed) or "nobody"

    def mps_processes(self) -> str:
        listed = pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3(self._gpu)
        return ", ".join(f"{self._name(one.pid)} {(one.usedGpuMemory or 0) >> 20} MiB" for one in listed) or "nobody"

    def process_utilisation(self) -> str:
        """Of the last two seconds, which Slurm calls gres/gpuutil; each process's newest sample."""
        since = int((time.time() - 2) * 1e6)
        samples = pynvml.nvmlDeviceGetProcessUtilization(self._gpu, since)
        newest = {one.pid: one for one in sorted(samples, key=lambda one: one.timeStamp)}
        return ", ".join(f"{self._name(pid)} SM {one.smUtil} %" for pid, one in newest.items()) or "nobody"

    def accounting(self) -> str:
        if not pynvml.nvmlDeviceGetAccountingMode(self._gpu):
            return "off on this GPU; not switched on"
        said = []
        for pid in pynvml.nvmlDeviceGetAccountingPids(self._gpu):
            if pid in self._names:
                stats = pynvml.nvmlDeviceGetAccountingStats(self._gpu, pid)
                most = stats.maxMemoryUsage >> 20
                said.append(f"{self._name(pid)} gpu {stats.gpuUtilization} %, at most {most} MiB, {stats.time} ms")
        return ", ".join(said) or "on, and none of our pids is there"

    def show(self) -> None:
        for name, question in (
            ("GPU utilisation", self.utilisation),
            ("running processes", self.processes),
            ("MPS running processes", self.mps_processes),
            ("process utilisation", self.process_utilisation),
            ("accounting", self.accounting),
        ):
            print(f"{name + ':':<24}{told(question)}")

    def pmon(self, uuid: str) -> None:
        """Three rows of nvidia-smi pmon, with our names behind the pids that we know."""
        line = ["nvidia-smi", "pmon", "-i", uuid, "-s", "um", "-c", "3"]
        try:
            said = subprocess.run(line, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            print("nvidia-smi pmon: no answer in time")
            return
        for row in (said.stdout + said.stderr).splitlines():
            words = row.split()
            pid = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
            print(f"  {row}" + (f"  <- {self._name(pid)}" if pid else ""))


def load(number: int, scratch: Path, phase: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a program that keeps the first GPU as busy as `phase` says, once both are there."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.lab.hardware.load", "2", str(scratch), str(LOAD_SECONDS), phase],
        cwd=REPOSITORY,
        env={**environment, "SLURM_PROCID": str(number)},
        stdout=subprocess.PIPE,
        text=True,
    )


def look(title: str, phases: tuple[str, str], environment: dict[str, str], *, mps: bool) -> None:
    """Run two programs, ask every monitor while they run, print."""
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    uuid = pynvml.nvmlDeviceGetUUID(gpu)
    print(f"\n## {title}\n", flush=True)
    with tempfile.TemporaryDirectory() as meeting:
        seen = {**environment, "CUDA_VISIBLE_DEVICES": uuid}
        programs = [load(number, Path(meeting), phase, seen) for number, phase in enumerate(phases)]
        try:
            _await_load(Path(meeting) / "0")
            names = {one.pid: f"program {number} ({one.pid})" for number, one in enumerate(programs)}
            if mps:
                names |= {int(pid): f"server ({pid})" for pid in ask(environment, "get_server_list").split()}
            monitors = Monitors(gpu, names)
            print(f"{'our pids:':<24}{', '.join(names.values())}")
            monitors.show()
            monitors.pmon(uuid)
            for program in programs:
                print(f"  {program.communicate(timeout=LIMIT_SECONDS)[0].strip()[:160]}")
        finally:
            for program in programs:
                program.kill()
                program.wait()


def _await_load(met: Path) -> None:
    """Wait until both programs have met, and have run for WARM_SECONDS.

    Raises: TimeoutError.
    """
    deadline = time.monotonic() + LIMIT_SECONDS / 4
    while not met.exists() or met.stat().st_size < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("the programs did not reach the GPU")
        time.sleep(0.05)
    time.sleep(WARM_SECONDS)  # a monitor's figure is of the second or two before it


def _too_long(_number: int, _frame: object) -> None:
    raise TimeoutError(f"not done in {LIMIT_SECONDS} s")


def main() -> int:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_SECONDS)
    pynvml.nvmlInit()
    on = measured_on()
    print(f"# What monitors say of MPS: {on['gpus'][0].replace(', ', ', driver ')}\n")
    print(f"{on['date']}. Two programs on one GPU, the compute mode and the accounting mode left alone.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, control_daemon(Path(scratch)) as clients:
        for title, (mps, *phases) in PHASES.items():
            look(title, (phases[0], phases[1]), clients if mps else dict(os.environ), mps=bool(mps))
    print(f"\ndcgmi: {'installed; not asked' if shutil.which('dcgmi') else 'not installed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
