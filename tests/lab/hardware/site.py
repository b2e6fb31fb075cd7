"""A site on this machine's own GPUs, for what is measured there: its programs in place, its settings left alone.

``python3 -m tests.lab.hardware.site KIND`` prints where data of a kind are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.harness.cluster import REPOSITORY, SlurmError
from tests.harness.gpunode import UNCHANGED
from tests.harness.site import STATE_DIRECTORY, Site
from tests.lab.bench.__main__ import cpu_model
from tests.lab.measured import write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tests.harness.cluster import Job
    from tests.harness.machine import Result

NODE = "n1"
CPUS = 64
PLACE = "/opt/hardware"
_PROGRAMS = ("client.py", "load.py", "inference.py", "first_context.py", "neighbour.py")
_MODULES = ("tests/contract/cuda_client.py", "tests/lab/hardware/load.py", "tests/lab/hardware/meeting.py")

Row = dict[str, Any]


def cards() -> list[str]:
    """The GPUs of this machine: name and driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()


def data_file(kind: str) -> Path:
    """Where docs/benchmarks has what is measured on these GPUs today: ``2026-11-23-1xH200-worth.json``."""
    words = cards()[0].partition(",")[0].split()
    card = next((word for word in words if word[-1].isdigit()), words[-1])  # of NVIDIA H100 80GB HBM3
    return REPOSITORY / "docs/benchmarks/data" / f"{time.strftime('%Y-%m-%d')}-{len(cards())}x{card}-{kind}.json"


def host_traces() -> set[str]:
    """What a throw-away machine may leave on its host: programs, files in the usual places, cgroups."""
    found = set()
    for process in Path("/proc").iterdir():
        try:
            name = (process / "comm").read_text().strip() if process.name.isdigit() else ""
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith(("nvidia-cuda-mps", "slurm", "munge")) and "Z" not in _state(process):
            found.add(f"{name} {process.name}")
    for place in ("/run", "/tmp", "/dev/shm", "/var/log", "/etc/slurm", "/sys/fs/cgroup"):
        if os.path.isdir(place):
            found.update(f"{place}/{name}" for name in os.listdir(place))
    return found


def _state(process: Path) -> str:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def measured_on() -> dict[str, Any]:
    """What a figure is to be read with."""
    return {
        "gpus": cards(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%d"),
    }


class RealSite(Site):
    """One node with all GPUs of this machine; programs that ranks run lie in PLACE, where users can read them."""

    #: On the clock of time.monotonic(): nothing is waited for beyond it, and no row begins.
    ends = math.inf

    def __init__(self, *, constrain_devices: bool = True, cpus: int = CPUS) -> None:
        super().__init__(
            real=True,
            nodes=1,
            gpus_per_node=len(cards()),
            cpus_per_node=cpus,
            config=UNCHANGED,
            constrain_devices=constrain_devices,
        )
        self._meetings = 0

    def begin(self) -> None:
        super().begin()
        for name in _PROGRAMS:
            self.machine.write(f"{PLACE}/{name}", (REPOSITORY / "tests/lab/hardware" / name).read_text(), mode=0o755)
        for name in _MODULES:
            self.machine.write(f"{PLACE}/{name}", (REPOSITORY / name).read_text())

    @cached_property
    def multiprocessors(self) -> int:
        """Of the first GPU, as a program without MPS has it."""
        program = ["/usr/bin/python3", f"{PLACE}/load.py", "1", self.meeting(), "0"]
        said = reports(self.node(NODE, *program, env={"CUDA_VISIBLE_DEVICES": "0"}).check().stdout)
        return int(said[0]["sms"])

    def meeting(self) -> str:
        """A fresh directory on the node, in which the ranks of a step can meet."""
        self._meetings += 1
        place = f"/tmp/meeting-{self._meetings}"
        self.node(NODE, "mkdir", "-m", "777", place).check()
        return place

    def within(self, seconds: float) -> float:
        """So many seconds, or what is left until `ends`. Raises: SlurmError when nothing is."""
        left = min(seconds, self.ends - time.monotonic())
        if left <= 0:
            raise SlurmError("no time left")
        return left

    def attempt(self, known: Row, measure: Callable[[], Row]) -> Row:
        """A row of what is known and what is measured, or of why that failed; in which case nothing runs on return."""
        try:
            row = {**known, **measure()}
        except (SlurmError, LookupError, TimeoutError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"  # a SlurmError brings along the end of the daemons' logs
            text = text if len(text) < 3000 else f"{text[:1000]}\n…\n{text[-2000:]}"
            row = {**known, "failed": text, "last_fault": self.repaired()}
            with suppress(SlurmError):
                self.cancel_all()
        print(", ".join(f"{name} {str(value)[:300]}" for name, value in row.items()), file=sys.stderr, flush=True)
        return row

    def cancel_all(self) -> None:
        """Raises: SlurmError when something still runs after half a minute."""
        for job in self.machine.run(["squeue", "-h", "-o", "%A"]).stdout.split():
            self.machine.run(["scancel", job])
        self.cluster.wait_idle()

    def repaired(self) -> str:
        """Take the node back into service if it was drained. Returns: what drained it last, or nothing."""
        fault = self.node(NODE, "cat", f"{STATE_DIRECTORY}/last-fault").stdout
        if any(state.drained for state in self.cluster.node_states().values()):
            self.machine.run(["scontrol", "update", f"NodeName={NODE}", "State=RESUME"]).check()
        return fault

    def ended(self, *jobs: Job, seconds: float = 90) -> list[str]:
        """What these jobs said. Raises: SlurmError, with that."""
        try:
            for job in jobs:
                self.cluster.wait(job, self.within(seconds))
        except SlurmError as error:
            raise SlurmError("\n".join([*(self.cluster.output(job)[-300:] for job in jobs), str(error)])) from error
        return [self.cluster.output(job) for job in jobs]

    def end_meetings(self) -> None:
        for number in range(1, self._meetings + 1):
            self.node(NODE, "rm", "-rf", f"/tmp/meeting-{number}")


def reports(text: str) -> list[dict[str, Any]]:
    """The lines of JSON that ranks printed."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def failed(result: Result) -> str:
    """What is to be said of a step that did not work."""
    return f"exit {result.returncode}: {(result.stderr or result.stdout)[-400:].strip()}"


def write_rows(target: Path, kept: dict[str, Any], part: str, site: RealSite, rows: Iterable[Row]) -> None:
    """Keep rows in `kept[part]`, and write the file with each: time on such a machine is short."""
    kept[part] = []
    for row in rows:
        kept[part].append(row)
        write(target, kept)
        if time.monotonic() > site.ends:
            print(f"{part}: no time left", file=sys.stderr)
            break


def parser_of_parts(module: str, doc: str, parts: Iterable[str]) -> argparse.ArgumentParser:
    """What commands understand that measure in parts."""
    parser = argparse.ArgumentParser(prog=f"python3 -m {module}", description=doc.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: docs/benchmarks/data; parts not run stay")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each kernel's window")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="no row begins later")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all, if none is named")
    return parser


def measure_parts(
    kind: str, site: RealSite, options: argparse.Namespace, runs: Mapping[str, Callable[[], Iterable[Row]]]
) -> tuple[dict[str, Any], int]:
    """Run the parts that were named on a site. Returns: all that is kept; 1 when a row did not work."""
    target: Path = options.json or data_file(kind)
    parts = options.parts or list(runs)
    kept: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    kept |= {"measured_on": measured_on(), "seconds": options.seconds}
    ends = time.monotonic() + options.limit
    with site:
        site.ends = ends
        for part in parts:
            write_rows(target, kept, part, site, runs[part]())
        site.end_meetings()
    return kept, int(any("failed" in row for part in parts for row in kept[part]))


@cache
def torch_python() -> str | None:
    """An interpreter with PyTorch: the one that stands first on PATH, if it has it."""
    python = shutil.which("python3")
    has = python and subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0
    return python if has else None


if __name__ == "__main__":
    print(data_file(sys.argv[1]))
