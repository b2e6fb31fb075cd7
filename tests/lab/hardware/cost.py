"""``python3 -m tests.lab.hardware.cost``: what slurm-mps costs a user on real GPUs, contenders taking turns.

- *start*: from `srun` and from the program's first line to its first CUDA context, with MPS and without; of several
  GPUs each has a program, and the last counts.
- *launch*: an `srun` of N tasks of `true` in an allocation that stands: without the plugin, with it in a job that does
  not ask, and with it in one that does.

What prolog and epilog cost is ``python3 -m tests.lab.bench --real-gpu``. Prints tables, and keeps all samples.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

from tests.harness.cluster import SAMPLES, SlurmError
from tests.lab.measured import write

from .site import PLACE, RealSite, cards, data_file, failed, measured_on, reports

if TYPE_CHECKING:
    from collections.abc import Sequence

PLUGSTACK = "/etc/slurm/plugstack.conf"
GOAL_START = 0.6
TASKS = (1, 16)

Samples = dict[str, list[float]]


def _add(samples: Samples, name: str, seconds: float) -> None:
    samples.setdefault(name, []).append(round(seconds * 1000, 2))


def start(site: RealSite, rounds: int, gpus: int) -> Samples:
    """Milliseconds until a program on each of so many GPUs has its context."""
    samples: Samples = {}
    every = [f"-n{gpus}", f"--gres=gpu:{gpus}", "--ntasks-per-gpu=1"]
    asks = {"without": every, "mps": [*every, "--mps"]}
    if gpus > 1:
        asks["per-gpu"] = [*every, "--mps=per-gpu"]
    for number in range(rounds + 1):
        for name in list(asks) if number % 2 else list(asks)[::-1]:
            site.cluster.wait_idle()  # one job's epilog is not to be paid by the next
            submitted = time.time()
            program = ["/usr/bin/python3", f"{PLACE}/first_context.py"]
            result = site.cluster.srun(*asks[name], *program, timeout=site.within(60))
            said = reports(result.stdout)
            if result.returncode or len(said) != gpus or any(any(one["errors"]) for one in said):
                raise SlurmError(failed(result))
            if number:  # the first warms up
                _add(samples, f"{name} from srun", max(one["context"] for one in said) - submitted)
                started = max(one["context"] - one["began"] for one in said)
                _add(samples, f"{name} from the program's start", started)
    return samples


def launch(site: RealSite, rounds: int) -> Samples:
    """Milliseconds of an srun within an allocation."""
    samples: Samples = {}
    jobs = {
        name: site.cluster.sbatch(*options, f"-n{max(TASKS)}", script="sleep 600\n")
        for name, options in (("plain", []), ("mps", ["--gres=gpu:1", "--mps"]))
    }
    for job in jobs.values():
        site.cluster.wait_running(job)
    plugin = (SAMPLES / "plugstack.conf").read_text()
    contenders = {"no plugin": ("plain", ""), "does not ask": ("plain", plugin), "asks": ("mps", plugin)}
    try:
        for number in range(rounds + 1):
            for tasks in TASKS:
                names = list(contenders)
                for name in names[number % 3 :] + names[: number % 3]:
                    which, text = contenders[name]
                    site.machine.write(PLUGSTACK, text)
                    began = time.perf_counter()
                    result = site.cluster.srun(f"--jobid={jobs[which]}", "--overlap", f"-n{tasks}", "true")
                    if result.returncode:
                        raise SlurmError(failed(result))
                    if number:
                        _add(samples, f"{name} {tasks}", time.perf_counter() - began)
    finally:
        site.machine.write(PLUGSTACK, plugin)
        for job in jobs.values():
            site.cluster.scancel(job)
    return samples


def _figure(values: Sequence[float]) -> str:
    return f"{median(values):8.1f} ({quantiles(values, n=10, method='inclusive')[8]:.1f})"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def show(samples: Samples) -> None:
    print("Milliseconds, median (90th percentile); ratio is the median of the rounds' own.\n")
    print(f"{'to the first CUDA context':<34}{'with MPS':>18}{'without':>18}  ratio")
    for what in ("from the program's start", "from srun"):
        ours, theirs = samples[f"mps {what}"], samples[f"without {what}"]
        goal = f"  at most {GOAL_START}" if what != "from srun" else ""
        print(f"{what:<34}{_figure(ours):>18}{_figure(theirs):>18}  {_ratio(ours, theirs):.2f}{goal}")
    print(f"\n{'srun in an allocation':<34}{'no plugin':>18}{'does not ask':>18}{'asks':>18}  more per task")
    for tasks in TASKS:
        bare, plain, mps = (samples[f"{name} {tasks}"] for name in ("no plugin", "does not ask", "asks"))
        more = [median(b - a for a, b in zip(bare, one, strict=True)) / tasks for one in (plain, mps)]
        shown = "".join(f"{_figure(one):>18}" for one in (bare, plain, mps))
        print(f"{f'{tasks} tasks':<34}{shown}  {more[0]:+.2f}, {more[1]:+.2f} ms")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.lab.hardware.cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: docs/benchmarks/data")
    options = parser.parse_args()
    target: Path = options.json or data_file("start")
    samples: Samples = {}
    with RealSite() as site:
        for part in (partial(start, gpus=len(cards())), launch):
            samples |= part(site, options.rounds)
            kept = {"measured_on": measured_on(), "rounds": options.rounds, "samples_ms": samples}
            write(target, kept)
    show(samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
