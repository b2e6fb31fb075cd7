"""``make test-matrix``: the tests that need a Slurm, on every release of the table in tests/harness/release.py.

Each release runs the same tests unchanged, all of tests/integration and tests/colocation, or with ``--short``, as part
of ``make test``, those marked every_release on the releases that this machine has not itself. Where all have run in
full, docs/support.md is written anew from what they said.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tests.harness import release
from tests.harness.cluster import REPOSITORY
from tests.harness.release import RELEASES, Release
from tests.harness.runtime import python_version
from tests.harness.site import CACHE

if TYPE_CHECKING:
    from pathlib import Path

SUITES = ("integration", "colocation")
RESULTS = CACHE / "matrix"
PAGE = REPOSITORY / "docs/support.md"
FULL_TIMEOUT_SECONDS, SHORT_TIMEOUT_SECONDS = 3600.0, 420.0
_PRINTING = threading.Lock()

PAGE_HEAD = """# Which Slurm this runs on

Written by `make test-matrix`: on each release the same tests, with its own slurmctld, slurmd, srun, compiler and
Python, the plugin built there against its headers, on simulated GPUs. CI runs a part of them on every release.

"""
PAGE_TAIL = """
- **The plugin** is loaded by the Slurm of the year and month that it was built for, whatever its patch, and by no
  other: build it on each upgrade of Slurm (docs/decisions/0010). Prolog and epilog are the same for all.
- **cgroups.** Devices are confined through cgroup v1 in these runs. With cgroup v2 it ran on real GPUs (docs/hardware),
  on Slurm 22.05.
- **An upgrade of Slurm under running jobs** is tested from 24.11 to 26.05, one of slurm-mps on each release.
- **GPUs** have been real ones with Slurm 22.05 only (docs/hardware).
- **pyslurm** is no part of these runs, for no registry has one that fits a Slurm of Debian's: v24.11.0 from its own
  repository was tried with Slurm 24.11.5 by hand (docs/decisions/0010), none with the others.
"""


@dataclass
class Outcome:
    """How the tests of one release ended; counts by folder, then by what became of a test."""

    release: str
    slurm: str
    suite: str
    python: str
    date: str
    seconds: float
    counts: dict[str, dict[str, int]]
    failures: list[str]
    skips: dict[str, int]
    """How many tests were left out for a reason."""

    @property
    def good(self) -> bool:
        return not self.failures and all(self.counts.get(suite, {}).get("passed") for suite in SUITES)


def say(name: str, text: str) -> None:
    with _PRINTING:
        print(f"[{name}] {text}", flush=True)


def stream(name: str, line: list[str | Path], environment: dict[str, str], timeout_seconds: float) -> int:
    """Run a command and print what it says line by line; past its time it is killed with all that it started."""
    child = subprocess.Popen(
        line,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def end() -> None:
        say(name, f"not done after {timeout_seconds:g} s")
        os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(timeout_seconds, end)
    timer.start()
    try:
        assert child.stdout is not None
        for text in child.stdout:
            say(name, text.rstrip())
        return child.wait()
    finally:
        timer.cancel()


def read_report(path: Path) -> tuple[dict[str, dict[str, int]], list[str], dict[str, int]]:
    """Count what a JUnit report says, by folder below tests; name what failed, and why others were left out."""
    counts: dict[str, Counter[str]] = {suite: Counter() for suite in SUITES}
    skips: Counter[str] = Counter()
    failures = []
    for case in ET.parse(path).getroot().iter("testcase"):
        place = case.get("classname", "").split(".")
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[place[1]][kind] += 1
        skips.update(child.get("message", "") for child in case if child.tag == "skipped")
        if kind == "failed":
            failures.append(f"{'/'.join(place)}.py::{case.get('name')}")
    return {suite: dict(one) for suite, one in counts.items()}, failures, dict(skips)


def run(one: Release, *, short: bool) -> Outcome:
    """Make the release's root where there is none, then run its tests."""
    environment = {**os.environ, release.VARIABLE: one.name, "PYTHONUNBUFFERED": "1"}
    root_line: list[str | Path] = [sys.executable, "-m", "tests.harness.release", one.name]
    if stream(one.name, root_line, environment, FULL_TIMEOUT_SECONDS):
        raise SystemExit(f"there is no root file system with Slurm {one.name}")
    root = release.ensure_root(one, CACHE)
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS / f"{one.name}.xml"
    report.unlink(missing_ok=True)
    line: list[str | Path] = [sys.executable, "-m", "pytest", "--no-header", f"--junitxml={report}"]
    line += ["-m", "every_release"] if short else []
    began = time.monotonic()
    limit = SHORT_TIMEOUT_SECONDS if short else FULL_TIMEOUT_SECONDS
    status = stream(one.name, [*line, *(f"tests/{suite}" for suite in SUITES)], environment, limit)
    counts, failures, skips = read_report(report) if report.exists() else ({}, [], {})
    if status and not failures:
        failures = [f"pytest did not come to its end (exit {status})"]
    return Outcome(
        one.name,
        release.version_in(root),
        one.suite,
        python_version(root),
        dt.datetime.now(dt.UTC).date().isoformat(),
        round(time.monotonic() - began, 1),
        counts,
        failures,
        skips,
    )


def described(counts: dict[str, int]) -> str:
    """``212 of 212``, and what was skipped."""
    total = counts.get("passed", 0) + counts.get("failed", 0)
    skipped = f", {counts['skipped']} skipped" if counts.get("skipped") else ""
    return f"{counts.get('passed', 0)} of {total} passed{skipped}"


def _prolog_sees(one: Release) -> str:
    return one.prolog_sees if one.autodetect else f"{one.prolog_sees} (no AutoDetect there)"


def write_page(outcomes: list[Outcome]) -> None:
    """Write docs/support.md."""
    head = [
        "Slurm",
        "Debian",
        "Python",
        "integration",
        "ranks",
        "CUDA_VISIBLE_DEVICES in the prolog",
        "run on",
    ]
    rows = [
        [
            *(one.slurm, one.suite, one.python),
            *(described(one.counts[suite]) for suite in SUITES),
            *(_prolog_sees(RELEASES[one.release]), one.date),
        ]
        for one in outcomes
    ]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    failed = [f"- Slurm {one.slurm} failed `{name}`." for one in outcomes for name in sorted(set(one.failures))]
    skipped = [
        f"- Slurm {one.slurm}, {count} skipped: {why}." for one in outcomes for why, count in sorted(one.skips.items())
    ]
    PAGE.write_text(PAGE_HEAD + "\n".join([*lines, "", *failed, *skipped]) + "\n" + PAGE_TAIL)
    print(f"matrix: wrote {PAGE.relative_to(REPOSITORY)}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-matrix")
    parser.add_argument("--short", action="store_true", help="what `make test` adds to this machine's own release")
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(RELEASES)}; all unless named")
    arguments = parser.parse_args()
    names = arguments.releases or [name for name in RELEASES if not (arguments.short and name == release.own_release())]
    with ThreadPoolExecutor(2 if arguments.short else 1) as pool:
        outcomes = list(pool.map(lambda name: run(RELEASES[name], short=arguments.short), names))
    for one in outcomes:
        shown = ", ".join(f"{suite} {described(one.counts.get(suite, {}))}" for suite in SUITES)
        print(f"matrix: Slurm {one.slurm} ({one.suite}, Python {one.python}): {shown}, {one.seconds:.0f} s")
        for name in one.failures:
            print(f"matrix: Slurm {one.slurm} FAILED {name}")
    if not arguments.short:
        for one in outcomes:
            (RESULTS / f"{one.release}.json").write_text(json.dumps(asdict(one), indent=1) + "\n")
        last = [RESULTS / f"{name}.json" for name in RELEASES]
        if all(path.exists() for path in last):
            write_page([Outcome(**json.loads(path.read_text())) for path in last])
    return 0 if all(one.good for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
