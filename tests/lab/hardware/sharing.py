"""``python3 -m tests.lab.hardware.sharing``: several jobs on one real GPU, in each way that there is.

- *throughput*: four jobs of ``--gres=mps:25`` that share a daemon (joined), the same of two users, four with a daemon
  each (separate), one job of four ranks with the same thread limit, four ranks without MPS. All do the same within the
  same window.
- *fault*: one of two jobs has an illegal access; does the other's program go on?
- *cancelled*: one of two joined jobs is cancelled while it is busy (PyTorch, short and long kernels, an endless one);
  does the other's program go on, and when can the next start?

Three minutes, and as much for *cancelled*. Rows that did not work say why.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from tests.harness.cluster import TERMINAL_STATES, SlurmError
from tests.harness.gpunode import UNCHANGED
from tests.harness.site import Site

from .site import PLACE, RealSite, Row, measure_parts, parser_of_parts, reports, torch_python

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.harness.cluster import Job

JOBS = 4
PART = 100 // JOBS
FLOODS = {"small": "flood:16:4000:64", "medium": "flood:132:10000:32"}
ALL_USERS = "joined, two users"
#: gpus.sharing; whose jobs; what each asks for
WAYS = {
    "joined": ("joined", ["alice"] * JOBS, [f"--gres=mps:{PART}", "-n1"]),
    ALL_USERS: (ALL_USERS, ["alice", "bob"] * (JOBS // 2), [f"--gres=mps:{PART}", "-n1"]),
    "separate": ("separate", ["alice"] * JOBS, [f"--gres=mps:{PART}", "-n1"]),
    "one job": ("refuse", ["alice"], ["--gres=gpu:1", f"-n{JOBS}", f"--mps-threads={PART}"]),
    "without MPS": ("refuse", ["alice"], ["--gres=gpu:1", f"-n{JOBS}"]),
}
PYTHON = "/usr/bin/python3"
#: What neighbour.py is told. At 25 % of an H200's threads a product of 4096 takes about 10 ms, of 12288 about 300.
CULPRITS = ("matmul 4096", "matmul 12288", "training", "kernels 10", "kernels 100", "persistent")
OF_TORCH = ("matmul", "training")
READY = 3  # culprits at a time, each with PART of the GPU; who looks on and the next program have what is left
WATCHES, NEXT = 20, 5


class SharedSite(RealSite):
    """The first GPU of this machine alone, in a hundred parts."""

    def __init__(self) -> None:
        Site.__init__(
            self, real=True, nodes=1, gpus_per_node=1, mps_per_node=100, config=UNCHANGED, constrain_devices=True
        )
        self._meetings = 0

    def share(self, way: str) -> None:
        all_users = 'joined_users = "all"\n[limits.memory]\nmax = "16G"\n' if way == ALL_USERS else ""
        self.configure(f'{UNCHANGED}sharing = "{way.partition(",")[0]}"\n{all_users}')


def throughput(site: SharedSite, seconds: float, rounds: int) -> Iterator[Row]:
    """Kernels a second over all ranks, by kernel; the ways take turns."""
    for number in range(rounds):
        ways = list(WAYS)
        for name in ways[number % len(ways) :] + ways[: number % len(ways)]:
            way, users, ask = WAYS[name]
            site.cluster.wait_idle()
            site.share(way)
            load = f"{PLACE}/load.py {JOBS} {site.meeting()} {seconds} {' '.join(FLOODS.values())}"
            script = f"srun /usr/bin/python3 {load}"

            def measure(users: list[str] = users, ask: list[str] = ask, script: str = script) -> Row:
                jobs = [site.cluster.sbatch(*ask, script=script, user=user) for user in users]
                return _figures(site.ended(*jobs), seconds)

            yield site.attempt({"way": name, "round": number}, measure)


def _figures(texts: list[str], seconds: float) -> Row:
    """What the ranks of all jobs said. Raises: ValueError, KeyError."""
    said = [one for text in texts for one in reports(text)]
    if len(said) != JOBS or any("error" in one for one in said):
        raise ValueError(" | ".join(text[-300:] for text in texts))
    row: Row = {"sms": sorted({one["sms"] for one in said})}
    for at, kernel in enumerate(FLOODS):
        shares = sorted(round(one["phases"][at]["kernels"] / seconds) for one in said)
        row[kernel] = {"kernels_per_second": sum(shares), "shares": shares}
    return row


def faults(site: SharedSite) -> Iterator[Row]:
    """Whether a job's program goes on when another job's has an illegal access, and what its user is told."""
    client = f"{PYTHON} {PLACE}/client.py"

    def measure() -> Row:
        both = f"{site.meeting()}/both 2"  # the one that faults waits until the other is there to be hit
        scripts = [f"srun {client} hold 2 {both}", f"srun {client} fault 0 {both}"]
        jobs = [site.cluster.sbatch("-n1", f"--gres=mps:{PART}", script=text) for text in scripts]
        victim, culprit = (text[-700:] for text in site.ended(*jobs))
        return {"culprit": culprit, "goes_on": "ended with error 0" in victim, "victim": victim}

    for way in ("joined", "separate"):
        site.cluster.wait_idle()
        site.share(way)
        yield site.attempt({"way": way}, measure)


def cancelled(site: SharedSite, tries: int, culprits: Sequence[str] = CULPRITS) -> Iterator[Row]:
    """Whether a job's program goes on when another job is cancelled while it is busy, and how soon the next can start.

    All are of one user and joined. The first row is without a culprit.
    """
    if torch_python() is None:
        culprits = [name for name in culprits if name.partition(" ")[0] not in OF_TORCH]
        print("cancelled: no PyTorch here", file=sys.stderr)
    site.share("joined")
    scene = _Scene(site, [*culprits] * tries)
    yield site.attempt({"culprit": "nobody"}, lambda: scene.next_program(time.time()))
    for number, name in enumerate(scene.culprits):
        row = site.attempt({"culprit": name, "round": number // len(culprits)}, partial(scene.cancel, number))
        if "failed" in row:  # nothing runs then
            scene = _Scene(site, scene.culprits)
        yield row
    site.cancel_all()


class _Scene:
    """A program that looks on, and others to be cancelled beside it, one at a time.

    PyTorch takes seconds to start: the next ones make themselves ready, off the GPU, while one is cancelled. All jobs
    have their parts of the GPU at the same time: none that waits for them holds up the others.
    """

    def __init__(self, site: SharedSite, culprits: list[str]) -> None:
        self.culprits = culprits
        self._site = site
        self._ready: dict[int, Job] = {}
        self._watcher: Job | None = None

    def cancel(self, number: int) -> Row:
        """Raises: SlurmError, ValueError."""
        cluster = self._site.cluster
        for soon, name in enumerate(self.culprits[number : number + READY], number):
            if soon not in self._ready:
                self._ready[soon] = self._start(name, PART)
        if self._watcher is None:
            self._watcher = self._start("watch", WATCHES)
            self._heard(self._watcher, "kernels", 30)
        job = self._ready.pop(number)
        self._heard(job, "ready", 60)
        cluster.let_go(job)
        busy = self._heard(job, "busy", 40)[-1]
        at = time.time()
        cluster.scancel(job)
        row = {"ms": busy["ms"], **self.next_program(at)}
        cluster.wait(job, self._site.within(40))
        gone = time.time()
        return {
            **row,
            "gone_s": round(gone - at, 2),
            "culprit_told": _prose(cluster.output(job)),
            **self._seen(at, gone),
        }

    def next_program(self, since: float) -> Row:
        """Start programs until one works; what those before were told, and the seconds until that one's context."""
        refused: list[list[object]] = []
        cluster, program = self._site.cluster, [PYTHON, f"{PLACE}/first_context.py"]
        while time.time() < since + 25:
            began = round(time.time() - since, 2)
            try:
                result = cluster.srun("-n1", "-Jnext", f"--gres=mps:{NEXT}", *program, timeout=self._site.within(15))
            except SlurmError:
                self._site.machine.run(["scancel", "--name=next"])
                refused.append([began, "nothing in 15 s"])
                continue
            said = reports(result.stdout)
            if result.returncode == 0 and not any(said[0]["errors"]):
                return {"next_s": round(said[0]["context"] - since, 2), "refused": refused}
            refused.append([began, f"{result.stdout}{result.stderr}"[-400:]])
        return {"next_s": None, "refused": refused}

    def _start(self, what: str, part: int) -> Job:
        python = torch_python() if what.partition(" ")[0] in OF_TORCH else PYTHON
        script = f"srun {python} {PLACE}/neighbour.py {what}"
        return self._site.cluster.sbatch("-n1", f"--gres=mps:{part}", script=script)

    def _heard(self, job: Job, word: str, seconds: float) -> list[Row]:
        """The reports of a job, once `word` is in its output. Raises: SlurmError, ValueError when it ends before."""
        cluster = self._site.cluster

        def look() -> list[Row] | None:
            ended = cluster.job_info(job).state in TERMINAL_STATES
            said = cluster.output(job).rpartition("\n")[0]
            if word in said:
                return reports(said)
            if ended:
                raise ValueError(f"ended: {said[-1000:]}")
            return None

        return cluster.until(f"{word!r} of job {job}", look, self._site.within(seconds))

    def _seen(self, cancelled: float, gone: float) -> Row:
        """What became of the program that looks on, half a second after the culprit was gone."""
        assert self._watcher is not None
        watcher, cluster = self._watcher, self._site.cluster

        def look() -> list[Row] | None:
            said = reports(cluster.output(watcher).rpartition("\n")[0])
            return said if "error" in said[-1] or said[-1]["time"] > gone + 0.5 else None

        try:
            said = cluster.until("a word of who looks on", look, self._site.within(10))
        except SlurmError:
            return {"goes_on": False, "victim_error": "stands still", **self._replaced(watcher)}
        row: Row = {
            "longest_ms": max(
                (one["longest_ms"] for one in said if one["time"] > cancelled and "longest_ms" in one), default=None
            )
        }
        if "error" not in said[-1]:
            return {"goes_on": True, **row}
        row |= {
            "goes_on": False,
            "victim_error": said[-1]["error"],
            "victim_after_s": round(said[-1]["time"] - cancelled, 2),
        }
        return row | self._replaced(watcher)

    def _replaced(self, watcher: Job) -> Row:
        self._watcher = None
        with suppress(SlurmError):
            self._site.cluster.wait(watcher, 3)
        self._site.machine.run(["scancel", str(watcher)])
        return {"victim_told": _prose(self._site.cluster.output(watcher))}


def _prose(text: str) -> str:
    """What a job's user reads, without the reports."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("{"))[-900:]


def show(rows: list[Row]) -> None:
    """A table of what was cancelled."""
    print(f"{'cancelled while busy':<22}{'ms each':>9}{'victims':>9}  {'gone after':>12}  {'next after':>12}  error")
    for name in dict.fromkeys(row["culprit"] for row in rows):
        good = [row for row in rows if row["culprit"] == name and "failed" not in row]
        hit = [row for row in good if not row.get("goes_on", True)]
        errors = ", ".join(sorted({row["victim_error"] for row in hit}))
        ms = next((row["ms"] for row in good if row.get("ms")), "-")
        print(
            f"{name:<22}{ms:>9}{f'{len(hit)} of {len(good)}':>9}  {_span(good, 'gone_s'):>12}  "
            f"{_span(good, 'next_s'):>12}  {errors}"
        )


def _span(rows: list[Row], key: str) -> str:
    values = sorted(row[key] for row in rows if row.get(key) is not None)
    return f"{values[0]:.1f}-{values[-1]:.1f} s" if values else "-"


PARTS = ("throughput", "fault", "cancelled")


def main() -> int:
    """Measure and write; 1 when a row did not work."""
    parser = parser_of_parts("tests.lab.hardware.sharing", __doc__, PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of throughput, and tries of each that is cancelled")
    options = parser.parse_args()
    site = SharedSite()
    runs = {
        "throughput": partial(throughput, site, options.seconds, options.rounds),
        "fault": partial(faults, site),
        "cancelled": partial(cancelled, site, options.rounds),
    }
    kept, status = measure_parts("sharing", site, options, runs)
    if "cancelled" in kept:
        show(kept["cancelled"])
    return status


if __name__ == "__main__":
    sys.exit(main())
