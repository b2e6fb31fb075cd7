"""``make bench``: what slurm-mps costs in front of and behind a job, on one GPU node, simulated or (--real-gpu) not.

A table for a person on standard output, ``--json FILE`` with every sample for a program. Nothing here passes or fails:
it ends with 1 only when something did not work, so that there was nothing to measure. What is measured is how much is
added to the vendor's programs, which the simulated driver makes as slow as they were on an H200.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.machine import USERS
from tests.harness.site import PYTHON, STATE_DIRECTORY
from tests.lab.measured import write

from .inside import LATENCY, Samples, Spec
from .report import make_rows, print_table

_HERE = Path(__file__).parent
_PLACE = "/etc/slurm/bench"  # beside the project's own scripts, so that all are read from the same file system
_SCRIPTS = (
    *("nothing.sh", "hand-written-prolog.sh", "hand-written-epilog.sh", "sample-prolog.sh"),
    *("recorder.sh", "inside.py"),
)
_ASKED = asked(threads="25", mem="8G")
_RECORDED_JOB = 999_999
_COMMANDS = "/run/bench-commands"  # recorder.sh writes it
_LOG_DIRECTORY = "/var/log/slurm-mps"
_GPUS = 2
_TIMEOUT_SECONDS = 1800.0


def _parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench BENCH=...", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="how often each contender runs (%(default)s)")
    parser.add_argument(
        "--before", type=int, default=1000, metavar="JOBS", help="jobs to run before the last part; 0 skips it (1000)"
    )
    parser.add_argument("--real-gpu", action="store_true", help="on all GPUs of this machine; implies --before 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything, each sample included")
    options = parser.parse_args(argv)
    if options.real_gpu:
        options.before = 0
    if options.rounds < 2 or options.before < 0 or options.before % 2:
        parser.error("at least two rounds, and an even number of jobs")
    return options


def _slurm_environment(**more: str) -> dict[str, str]:
    """What slurmd gives a prolog, as seen in Slurm 22.05 (without the job's id, which the loop fills in)."""
    return {
        "SLURM_CLUSTER_NAME": "bench",
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "SLURM_JOB_GID": str(USERS["alice"]),
        "SLURM_JOB_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_RESTART_COUNT": "0",
        "SLURM_JOB_STDOUT": "/home/alice/slurm.out",
        "SLURM_JOB_WORK_DIR": "/home/alice",
        "SLURM_NODELIST": "n1",
        "SLURM_SCRIPT_CONTEXT": "prolog_slurmd",
        **more,
    }


def _commands(node: GpuNode) -> tuple[str, str]:
    """What slurm-mps tells the control daemon of the job that is measured: its prolog, its epilog."""
    node.configure(f'[paths]\ncontrol_program = "{_PLACE}/recorder.sh"\n')
    node.prolog(_RECORDED_JOB, gpus="0", **_ASKED).check()
    in_prolog = node.machine.read(_COMMANDS)
    node.epilog(_RECORDED_JOB).check()
    in_epilog = node.machine.read(_COMMANDS).removeprefix(in_prolog)
    node.configure("")
    if "start_server" not in in_prolog or "quit" not in in_epilog:
        raise RuntimeError(f"these are not the commands of a job: {in_prolog!r} and {in_epilog!r}")
    return in_prolog, in_epilog


def _spec(node: GpuNode, options: argparse.Namespace) -> Spec:
    listed = node.run("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader").check().stdout.split()
    numbers = ",".join(map(str, range(len(listed))))
    in_prolog, in_epilog = _commands(node)
    code = "import os, slurm_mps; print(os.path.dirname(slurm_mps.__path__[0]))"
    return Spec(
        rounds=options.rounds,
        jobs_before=options.before,
        scripts=_PLACE,
        prolog=PROLOG,
        epilog=EPILOG,
        plain=_slurm_environment(**job_environment(0, gpus="")),
        asking=_slurm_environment(**job_environment(0, gpus=numbers), **_ASKED),
        gpus=listed,
        prolog_commands=in_prolog,
        epilog_commands=in_epilog,
        python=PYTHON,
        packages=node.run(PYTHON, "-I", "-c", code).check().stdout.strip(),
        state_directory=STATE_DIRECTORY,
        log_directory=_LOG_DIRECTORY,
    )


def cpu_model() -> str:
    """What this machine computes with."""
    models = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return (models or ["unknown CPU"])[0].strip()


def _measured_on(node: GpuNode, real: bool) -> dict[str, str | int | float]:
    simulated = f"a simulated GPU node, {_GPUS} GPUs, latencies as observed on an H200"
    return {
        "node": ", ".join(_cards(node)) if real else simulated,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": node.run(PYTHON, "-I", "-S", "-V").check().stdout.split()[-1],
        "load_at_start": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
    }


def _cards(node: GpuNode) -> list[str]:
    """The GPUs that are used, and their driver."""
    listed = node.run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").check().stdout
    return [line.replace(", ", " with driver ") for line in listed.splitlines()]


def _measure(node: GpuNode, spec: Spec) -> Samples | None:
    """Run the loop inside the node; None when it said, on standard error, what did not work."""
    loop = node.machine.popen(
        ["/usr/bin/python3", "-I", f"{_PLACE}/inside.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None,
    )
    answer, _ = loop.communicate(json.dumps(asdict(spec)).encode(), _TIMEOUT_SECONDS)
    if loop.returncode:
        return None
    samples: Samples = json.loads(answer)
    return samples


def main(argv: list[str]) -> int:
    """Measure, print, write; 1 when something did not work."""
    options = _parse(argv)
    with GpuNode(gpus=_GPUS, real=options.real_gpu) as node:
        measured_on = _measured_on(node, options.real_gpu)
        for name in _SCRIPTS:
            node.machine.write(f"{_PLACE}/{name}", (_HERE / name).read_text(), mode=0o755)
        if not options.real_gpu:
            node.fault(LATENCY)
        samples = _measure(node, _spec(node, options))
    if samples is None:
        print("bench: something did not work, so there is nothing to compare", file=sys.stderr)
        return 1
    rows = make_rows(samples, options.before, real=options.real_gpu)
    print_table(measured_on, options.rounds, rows)
    if options.json is not None:
        written = {
            "measured_on": measured_on,
            "rounds": options.rounds,
            "jobs_before": options.before,
            "rows": [{**asdict(row), "ok": row.ok} for row in rows],
            "samples_ms": samples,
        }
        write(options.json, written)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
