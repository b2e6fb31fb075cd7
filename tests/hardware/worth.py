"""``python3 -m tests.hardware.worth``: what MPS is worth on real GPUs, all of it submitted through Slurm.

- *throughput*: 1 to 48 ranks on one GPU with small, medium and large kernels; time-slicing (no MPS), MPS, and MPS with
  ``--mps-threads=auto``.
- *latency*: a light rank that asks for a small kernel every millisecond beside a heavy one that floods the GPU; without
  MPS, with it, with limits on the heavy one, with priority.
- *inference*: ranks that serve a small transformer with PyTorch, as throughput.

``--json FILE`` is what the plots are drawn from (tests/hardware/plot.py). Rows that did not work say why.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from tests.harness.cluster import SlurmError

from .site import PLACE, RealSite, failed, measured_on, reports, torch_python

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Rows = list[dict[str, Any]]

MODES = {"time-slicing": [], "MPS": ["--mps"], "MPS, auto threads": ["--mps-threads=auto"]}
KERNELS = {"small": (16, 4000), "medium": (132, 10_000), "large": (2112, 10_000)}  # blocks of 256, iterations
LIGHT = "16:4000:1"
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


def _srun(site: RealSite, ranks: int, options: list[str], *command: str) -> list[dict[str, Any]]:
    """What the ranks said. Raises: SlurmError when any of them, or the step, did not work."""
    result = site.cluster.srun(f"-n{ranks}", "--gres=gpu:1", *options, *command, timeout=_STEP_SECONDS)
    said = reports(result.stdout)
    wrong = next((one["error"] for one in said if "error" in one), "")
    if result.returncode or len(said) != ranks or wrong:
        raise SlurmError(wrong or failed(result))
    return said


def _each(site: RealSite, counts: Sequence[int], measure: Callable[[int, list[str]], Rows]) -> Rows:
    """Every count in every mode; a row that fails says why."""
    rows: Rows = []
    for ranks in counts:
        for mode, options in MODES.items():
            try:
                found = measure(ranks, options)
            except (SlurmError, TimeoutError) as error:
                found = [{"failed": str(error)[:500]}]
                for job in site.machine.run(["squeue", "-h", "-o", "%A"]).stdout.split():
                    site.machine.run(["scancel", job])
                site.cluster.wait_idle()
            rows += [{"ranks": ranks, "mode": mode, **row} for row in found]
            say(f"{ranks} ranks, {mode}: {[{k: v for k, v in row.items() if k != 'shares'} for row in found]}")
    return rows


def throughput(site: RealSite, seconds: float) -> Rows:
    """Kernels a second over all ranks, by kernel."""

    def measure(ranks: int, options: list[str]) -> Rows:
        phases = [f"{blocks}:{iterations}" for blocks, iterations in KERNELS.values()]
        load = ("/usr/bin/python3", f"{PLACE}/load.py", str(ranks), site.meeting(), str(seconds), *phases)
        said = _srun(site, ranks, options, *load)
        rows = []
        for number, kernel in enumerate(KERNELS):
            done = [one["phases"][number] for one in said]
            rates = [one["kernels"] / one["seconds"] if one["kernels"] else 0.0 for one in done]
            shares = sorted(round(rate) for rate in rates)
            rows.append({"kernel": kernel, "sms": said[0]["sms"], "kernels_per_second": sum(shares), "shares": shares})
        return rows

    return _each(site, RANKS, measure)


def inference(site: RealSite, seconds: float) -> Rows:
    """Requests a second over all ranks, and their latencies."""
    python = torch_python()
    if python is None:
        say("inference: no PyTorch here")
        return []

    def measure(ranks: int, options: list[str]) -> Rows:
        said = _srun(site, ranks, options, python, f"{PLACE}/inference.py", str(ranks), site.meeting(), str(seconds))
        middle = {name: round(median(one[name] for one in said), 1) for name in ("p50", "p90", "p99")}
        rate = sum(one["requests"] for one in said) / seconds
        return [{"sms": said[0]["sms"], "requests_per_second": round(rate, 1), "us": middle}]

    return _each(site, SERVERS, measure)


def latency(site: RealSite, seconds: float) -> Rows:
    """Latencies of the light rank, and what the heavy one got done."""
    rows: Rows = []
    for name, (job_options, heavy_options, heavy) in LATENCIES.items():
        place = site.meeting()
        load = f"/usr/bin/python3 {PLACE}/load.py {2 if heavy else 1} {place} {seconds}"
        blocks, iterations = KERNELS["large"]
        script = f"srun --overlap -n1 {load} {LIGHT} > light-{place[5:]} &\n"
        if heavy:
            script += f"srun --overlap -n1 {' '.join(heavy_options)} {load} {blocks}:{iterations}\n"
        script += f"wait\ncat light-{place[5:]}\n"
        job = site.cluster.sbatch("-n2", "--gres=gpu:1", *job_options, script=script)
        try:
            site.cluster.wait(job, _STEP_SECONDS)
        except SlurmError:
            site.cluster.scancel(job)
        said = reports(site.cluster.output(job))
        row: dict[str, Any] = {"case": name}
        if len(said) == (2 if heavy else 1) and not any("error" in one for one in said):
            light = said[-1]["phases"][0]
            row |= {"us": _percentiles(light["latencies_us"]), "requests": light["kernels"], "sms": said[-1]["sms"]}
            if heavy:
                done = said[0]["phases"][0]
                row |= {"heavy_sms": said[0]["sms"], "heavy_per_second": round(done["kernels"] / done["seconds"])}
        else:
            row["failed"] = site.cluster.output(job)[-500:]
        rows.append(row)
        say(f"{name}: {row}")
    return rows


PARTS = {"throughput": (throughput, 1.5), "latency": (latency, 5.0), "inference": (inference, 3.0)}


def main() -> int:
    """Measure and write; 1 when a row did not work."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.hardware.worth", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="parts that it holds and are not run stay"
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with RealSite() as site:
        for part in options.parts:
            run, seconds = PARTS[part]
            kept[part] = {"measured_on": measured_on(), "seconds": seconds, "rows": run(site, seconds)}
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
        site.end_meetings()
    return int(any("failed" in row for part in options.parts for row in kept[part]["rows"]))


if __name__ == "__main__":
    sys.exit(main())
