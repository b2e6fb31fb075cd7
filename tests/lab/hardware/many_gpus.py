"""``python3 -m tests.lab.hardware.many_gpus``: a node of several real GPUs, one control daemon for all or one each.

- *crowd*: 48 ranks on each GPU: whether all have their limits, when the last has its context, kernels a second.
- *fault*: one rank has an illegal access, and another on its GPU stays for seconds: who else suffers, and what new
  programs on that GPU and on the others meet meanwhile.
- *stuck*: an endless kernel on each GPU, then scancel: the epilog's seconds, and what is left.

Less than three minutes on four GPUs. Rows that did not work say why.
"""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from tests.harness.cluster import waits_for

from .site import NODE, PLACE, RealSite, Row, cards, measure_parts, parser_of_parts, reports

if TYPE_CHECKING:
    from collections.abc import Iterator

Rows = list[Row]

MODES = {"one for all": "--mps", "one for each GPU": "--mps=per-gpu"}
RANKS = 48
FLOODS = {"small": "flood:16:4000:64", "medium": "flood:132:10000:32"}
LIMITS = ("--mps-threads=25", "--mps-mem=2G")
CLIENT = f"/usr/bin/python3 {PLACE}/client.py"
VERIFY = "/opt/slurm-mps/bin/slurm-mps verify --timeout=30"
STAYS = 4.0
"""Seconds for which the rank that was hit does not notice."""
EPILOG_CLOCK = "/tmp/epilog"


def crowd(site: RealSite, ranks: int, seconds: float) -> Iterator[Row]:
    """Two steps of so many ranks on each GPU: `verify`, and the load."""
    count = ranks * site.gpus_per_node

    def measure(option: str) -> Row:
        load = f"/usr/bin/python3 {PLACE}/load.py {count} {site.meeting()} {seconds} {' '.join(FLOODS.values())}"
        step = f"srun -n{count} --ntasks-per-gpu={ranks}"
        clock = "date +began=%s.%N"
        script = f"{clock}\n{step} {VERIFY}\necho verify=$?\n{clock}\n{step} {load}\necho load=$?\n"
        ask = [f"-n{count}", f"--gres=gpu:{site.gpus_per_node}", option, *LIMITS]
        (said,) = site.ended(site.cluster.sbatch(*ask, script=script), seconds=100)
        verified, began = map(float, re.findall(r"began=([\d.]+)", said))
        found = reports(said)
        row: Row = {
            "verified": f"{count} ranks, all clients" in said and "verify=0" in said,
            "verify": re.findall(r".*ranks,.*", said)[-1:],
            "verify_s": round(began - verified, 2),
            "sms": sorted({one.get("sms", 0) for one in found}),
        }
        errors = sorted({one["error"] for one in found if "error" in one})
        if len(found) != count or errors:
            raise ValueError(f"{row} {len(found)} of {count} ranks: {errors} {said[-500:]}")
        contexts = [one["context"] - began for one in found]
        row |= {"last_context_s": round(max(contexts), 2), "median_context_s": round(median(contexts), 2)}
        for at, kernel in enumerate(FLOODS):
            shares = [round(one["phases"][at]["kernels"] / seconds) for one in found]
            row[kernel] = {"kernels_per_second": sum(shares), "least": min(shares), "most": max(shares)}
        return row

    for mode, option in MODES.items():
        yield site.attempt({"mode": mode, "ranks": count}, partial(measure, option))


def fault(site: RealSite) -> Iterator[Row]:
    """Two ranks on each GPU, of which the first has an illegal access, and what new programs meet meanwhile."""
    gpus, cluster = site.gpus_per_node, site.cluster

    def measure(option: str) -> Row:
        ranks = 2 * gpus
        meeting = f"{site.meeting()}/all {ranks}"
        rank = f"[ $SLURM_PROCID = 0 ] && exec {CLIENT} fault 0 {meeting}; exec {CLIENT} hold {STAYS} {meeting}"
        script = (
            # A step that shares its GPU with nobody but for --overlap: steps without that get the other GPUs.
            "srun --exact -n1 --gres=gpu:1 sleep 60 & first=$!\n"
            f"srun --overlap -n{ranks} --ntasks-per-gpu=2 --kill-on-bad-exit=0 sh -c '{rank}'\n"
            f"date +over=%s.%N\n{waits_for()}\nkill $first\n"
        )
        job = cluster.sbatch(f"-n{2 * ranks}", f"--gres=gpu:{gpus}", option, script=script)
        cluster.until_output(job, "ended with error", site.within(40))
        began = time.time()
        places = {
            "its GPU": ["--overlap", "-n1", "--gres=gpu:1"],
            "the others": ["--exact", f"-n{gpus - 1}", "--gpus-per-task=1"],
        }
        with ThreadPoolExecutor(len(places)) as pool:
            asks = [[f"--jobid={job}", *ask] for ask in places.values()]
            new = dict(zip(places, pool.map(partial(_new_programs, site, began), asks), strict=True))
        cluster.let_go(job)
        (said,) = site.ended(job, seconds=30)
        return {
            "ended_well": said.count("ended with error 0"),
            "errors": re.findall(r"ended with error ([1-9]\d*)", said),
            "told": re.findall(r".*mps: job.*", said),
            "over_s": round(float(said.partition("over=")[2].split()[0]) - began, 2),
            "new": new,
        }

    for mode, option in MODES.items():
        yield site.attempt({"mode": mode, "ranks": 2 * gpus}, partial(measure, option))


def _new_programs(site: RealSite, began: float, ask: list[str]) -> Rows:
    """Steps of programs, each on a GPU of its own, until all of one work: what each GPU's was told, and when."""
    steps: Rows = []
    while time.time() < began + 15:
        at = time.time()
        program = ["/usr/bin/python3", f"{PLACE}/first_context.py"]
        result = site.cluster.srun(*ask, "--kill-on-bad-exit=0", *program, timeout=site.within(40))
        programs = [
            {
                "gpu": one["gpu"],
                **{f"{what}_s": round(one[what] - began, 2) for what in ("began", "initialised", "context")},
                "error": max(one["errors"]),
            }
            for one in reports(result.stdout)
        ]
        steps.append({"at_s": round(at - began, 2), "programs": programs, "said": result.stderr[-500:]})
        if result.returncode == 0 and programs and not any(one["error"] for one in programs):
            break
    return steps


def stuck(site: RealSite) -> Iterator[Row]:
    """An endless kernel on each GPU, and scancel."""
    gpus, cluster = site.gpus_per_node, site.cluster
    for name, word in (("00-clock", "began"), ("99-clock", "ended")):
        clock = f"#!/bin/sh\ndate +{word}=%s.%N >>{EPILOG_CLOCK}.$SLURM_JOB_ID\n"
        site.machine.write(f"/etc/slurm/epilog.d/{name}.sh", clock, mode=0o755)

    def measure(option: str) -> Row:
        script = f"srun -n{gpus} --gpus-per-task=1 {CLIENT} spin\n"
        job = cluster.sbatch(f"-n{gpus}", f"--gres=gpu:{gpus}", option, script=script)
        cluster.until_output(job, "launched", site.within(40), times=gpus)
        cancelled = time.time()
        cluster.scancel(job)
        cluster.wait(job, site.within(60))
        gone = time.time()
        cluster.wait_idle()
        clock = f"{EPILOG_CLOCK}.{job}"
        began, ended = re.findall(r"=([\d.]+)", site.node(NODE, "cat", clock).check().stdout)
        site.node(NODE, "rm", clock).check()
        query = ["nvidia-smi", "--query-compute-apps=pid,name", "--format=csv,noheader"]
        left = [*site.mps_processes(), *site.state_files(NODE), *site.node(NODE, *query).stdout.splitlines()]
        return {
            "epilog_s": round(float(ended) - float(began), 2),
            "processes_gone_s": round(float(began) - cancelled, 2),
            "gone_s": round(gone - cancelled, 2),
            "left": left,
            "node": cluster.node_states()[NODE].state,
        }

    for mode, option in MODES.items():
        yield site.attempt({"mode": mode, "gpus": gpus}, partial(measure, option))


def show(kept: dict[str, Any]) -> None:
    """What was kept and did not fail."""
    for part, tell in SHOWN.items():
        for row in kept.get(part, ()):
            if "failed" not in row:
                tell(row)


def _show_crowd(row: Row) -> None:
    rates = ", ".join(f"{name} {row[name]['kernels_per_second']:,}" for name in FLOODS)
    print(
        f"crowd, {row['mode']}: {row['ranks']} ranks, limits hold: {row['verified']} (multiprocessors "
        f"{row['sms']}), last context {row['last_context_s']} s after srun, kernels a second: {rates}"
    )


def _show_fault(row: Row) -> None:
    print(
        f"fault, {row['mode']}: {row['ended_well']} of {row['ranks']} ranks ended well, the others with "
        f"{row['errors']}, all after {row['over_s']} s"
    )
    for where, steps in row["new"].items():
        for step in steps:
            each = ", ".join(f"{one['context_s']} s ({one['error'] or 'works'})" for one in step["programs"])
            print(f"  a new program on {where} at {step['at_s']} s: {each} {step['said'].strip()}")


def _show_stuck(row: Row) -> None:
    print(
        f"stuck, {row['mode']}: {row['gpus']} GPUs, epilog {row['epilog_s']} s, all over {row['gone_s']} s "
        f"after scancel, left: {row['left'] or 'nothing'}, node {row['node']}"
    )


SHOWN = {"crowd": _show_crowd, "fault": _show_fault, "stuck": _show_stuck}


def main() -> int:
    """Measure, write, print; 1 when a row did not work."""
    parser = parser_of_parts("tests.lab.hardware.many_gpus", __doc__, SHOWN)
    parser.add_argument("--ranks", type=int, default=RANKS, help="on each GPU")
    options = parser.parse_args()
    site = RealSite(cpus=options.ranks * len(cards()))
    runs = {
        "crowd": partial(crowd, site, options.ranks, options.seconds),
        "fault": partial(fault, site),
        "stuck": partial(stuck, site),
    }
    kept, status = measure_parts("many-gpus", site, options, runs)
    show(kept)
    return status


if __name__ == "__main__":
    sys.exit(main())
