"""``python3 -m tests.lab.hardware.worth``: what MPS is worth on real GPUs, all of it submitted through Slurm.

- *throughput*: 1 to 48 ranks on one GPU with small, medium and large kernels, and with one that reads memory;
  time-slicing (no MPS), MPS, and MPS with ``--mps-threads=auto``.
- *latency*: a light rank that asks for a small kernel every millisecond beside a heavy one that floods the GPU; without
  MPS, with it, with limits on the heavy one, with priority.
- *inference*: ranks that serve a small transformer with PyTorch, as throughput.

What it writes is what the plots are drawn from (tests/lab/hardware/plot.py). Rows that did not work say why.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from tests.harness.cluster import SlurmError
from tests.lab.measured import write

from .site import PLACE, RealSite, data_file, failed, measured_on, reports, torch_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Row = dict[str, Any]
Rows = list[Row]

MODES = {"time-slicing": [], "MPS": ["--mps"], "MPS, auto threads": ["--mps-threads=auto"]}
#: As load.py takes them: blocks of 256 threads, iterations, launches at a time (about a millisecond). `memory` reads
#: half a gigabyte, ten times what the H200's cache holds.
FLOODS = {
    "small": "flood:16:4000:64",
    "medium": "flood:132:10000:32",
    "large": "flood:2112:10000:4",
    "memory": "stream:1056:128:8",
}
LIGHT = "pace:16:4000:1"
RANKS = (1, 2, 4, 8, 16, 32, 48)
SERVERS = (1, 2, 4, 8, 16)
LATENCIES = {  # the job's options; what the heavy step has besides; is there a heavy step
    "alone, no MPS": ([], [], False),
    "alone, MPS": (["--mps"], [], False),
    "time-slicing": ([], [], True),
    "MPS": (["--mps"], [], True),
    "MPS, heavy at 75 %": (["--mps"], ["--mps-threads=75"], True),
    "MPS, heavy at 50 %": (["--mps"], ["--mps-threads=50"], True),
    "MPS, heavy at 25 %": (["--mps"], ["--mps-threads=25"], True),
    "MPS, heavy at low priority": (["--mps"], ["--mps-priority=low"], True),
    "MPS, heavy at 50 % and low priority": (["--mps"], ["--mps-threads=50", "--mps-priority=low"], True),
}
_STEP_SECONDS = 150.0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Microseconds."""
    if len(values) < 2:
        return {}
    cuts = quantiles(values, n=1000, method="inclusive")
    return {name: round(cuts[at], 1) for name, at in (("p50", 499), ("p90", 899), ("p99", 989), ("p99_9", 998))}


class RowError(Exception):
    """A row that did not work; the text says why."""


def _srun(site: RealSite, ranks: int, options: list[str], *command: str) -> list[dict[str, Any]]:
    """What the ranks said. Raises: RowError when any of them, or the step, did not work, or its limits did not take."""
    result = site.cluster.srun(f"-n{ranks}", "--gres=gpu:1", *options, *command, timeout=_STEP_SECONDS)
    said = reports(result.stdout)
    error = next((one["error"] for one in said if "error" in one), "")
    if result.returncode or len(said) != ranks or error:
        raise RowError(error or failed(result))
    least = min(one["sms"] for one in said)
    limited = "--mps-threads=auto" in options and ranks > 1
    if any(one["sms"] != least for one in said) or limited != (least < site.multiprocessors):
        raise RowError(f"ranks with {sorted({one['sms'] for one in said})} of {site.multiprocessors} multiprocessors")
    return said


def _each(
    site: RealSite, counts: Sequence[int], rounds: int, measure: Callable[[int, list[str]], Rows]
) -> Iterator[Row]:
    """Every count in every mode, the modes taking turns; a row that fails says why."""
    for number in range(rounds):
        for ranks in counts:
            modes = list(MODES)
            for mode in modes[number % 3 :] + modes[: number % 3]:
                try:
                    found = measure(ranks, MODES[mode])
                except (RowError, SlurmError, TimeoutError, KeyError, ValueError) as error:
                    found = [{"failed": f"{type(error).__name__}: {error}"[:500]}]
                    for job in site.machine.run(["squeue", "-h", "-o", "%A"]).stdout.split():
                        site.machine.run(["scancel", job])
                site.cluster.wait_idle()
                yield from ({"ranks": ranks, "mode": mode, "round": number, **row} for row in found)
                say(f"{ranks} ranks, {mode}: {[{k: v for k, v in row.items() if k != 'shares'} for row in found]}")


def throughput(site: RealSite, seconds: float, rounds: int) -> Iterator[Row]:
    """Kernels a second over all ranks, by kernel."""

    def measure(ranks: int, options: list[str]) -> Rows:
        load = ("/usr/bin/python3", f"{PLACE}/load.py", str(ranks), site.meeting(), str(seconds), *FLOODS.values())
        said = _srun(site, ranks, options, *load)
        rows = []
        for number, kernel in enumerate(FLOODS):
            shares = sorted(round(one["phases"][number]["kernels"] / seconds) for one in said)
            rows.append({"kernel": kernel, "sms": said[0]["sms"], "kernels_per_second": sum(shares), "shares": shares})
        return rows

    yield from _each(site, RANKS, rounds, measure)


def inference(site: RealSite, seconds: float, rounds: int) -> Iterator[Row]:
    """Requests a second over all ranks, and the median of the ranks' own percentiles of latency."""
    python = torch_python()
    if python is None:
        say("inference: no PyTorch here")
        return

    def measure(ranks: int, options: list[str]) -> Rows:
        said = _srun(site, ranks, options, python, f"{PLACE}/inference.py", str(ranks), site.meeting(), str(seconds))
        rate = sum(one["requests"] for one in said) / seconds
        middle = {name: round(median(one[name] for one in said), 1) for name in ("p50", "p90", "p99")}
        known = {"sms": said[0]["sms"], "torch": said[0]["torch"]}
        return [{**known, "requests_per_second": round(rate, 1), "us": middle}]

    yield from _each(site, SERVERS, rounds, measure)


def latency(site: RealSite, seconds: float, rounds: int) -> Iterator[Row]:
    """Latencies of the light rank, and what the heavy one got done."""
    for number in range(rounds):
        for name, (job_options, heavy_options, heavy) in LATENCIES.items():
            row: dict[str, Any] = {"case": name, "round": number}
            try:
                row |= _beside(site, seconds, job_options, heavy_options if heavy else None)
            except (RowError, SlurmError, KeyError, ValueError) as error:
                row["failed"] = f"{type(error).__name__}: {error}"[-500:]
            yield row
            say(f"{name}: {row}")


def _beside(site: RealSite, seconds: float, job_options: list[str], heavy_options: list[str] | None) -> dict[str, Any]:
    """One job: a light rank and, unless its options are None, a heavy one."""
    place = site.meeting()
    heavy = heavy_options is not None
    load = f"/usr/bin/python3 {PLACE}/load.py {2 if heavy else 1} {place} {seconds}"
    light = f"light-{place.rpartition('-')[2]}"
    script = f"srun --overlap -n1 {load} {LIGHT} > {light} &\n"
    if heavy_options is not None:
        script += f"srun --overlap -n1 {' '.join(heavy_options)} {load} {FLOODS['large']}\n"
    script += f"wait\ncat {light}\n"
    job = site.cluster.sbatch("-n2", "--gres=gpu:1", *job_options, script=script)
    try:
        site.cluster.wait(job, _STEP_SECONDS)
    except SlurmError:
        site.cluster.scancel(job)
        raise
    said = reports(site.cluster.output(job))
    if len(said) != 1 + heavy or any("error" in one for one in said):
        raise RowError(site.cluster.output(job)[-400:])
    phase = said[-1]["phases"][0]
    row = {"us": _percentiles(phase["latencies_us"]), "requests": phase["kernels"], "sms": said[-1]["sms"]}
    if heavy:
        done = said[0]["phases"][0]["kernels"]
        row |= {"heavy_sms": said[0]["sms"], "heavy_per_second": round(done / seconds)}
    return row


PARTS = {"throughput": (throughput, 1.2), "latency": (latency, 5.0), "inference": (inference, 3.0)}


def main() -> int:
    """Measure and write; 1 when a row did not work."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.lab.hardware.worth", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: docs/benchmarks/data; parts not run stay")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all, if none is named")
    options = parser.parse_args()
    target: Path = options.json or data_file("worth")
    parts = options.parts or list(PARTS)
    kept: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    with RealSite() as site:
        for part in parts:
            run, seconds = PARTS[part]
            on = {"measured_on": measured_on(), "seconds": seconds, "rounds": options.rounds}
            rows: Rows = []
            kept[part] = {**on, "rows": rows}
            for row in run(site, seconds, options.rounds):  # time on such a machine is short: no row is lost with it
                rows.append(row)
                write(target, kept)
        site.end_meetings()
    return int(any("failed" in row for part in parts for row in kept[part]["rows"]))


if __name__ == "__main__":
    sys.exit(main())
