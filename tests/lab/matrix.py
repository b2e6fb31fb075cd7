"""``make test-matrix``: the tests that need a Slurm, on every release of the table in tests/harness/release.py.

Each release runs the same tests unchanged, all of TESTS, or with ``--short``, as part of ``make test``, those marked
every_release, and not alone, on the releases that this machine has not itself. Once all have run in full on one commit
of slurm-mps, in one go or release by release, the table of docs/support.md is written anew from what they said.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
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

#: What a commit has to share with another to be the same slurm-mps.
PRODUCT = ("slurm_mps", "spank", "prolog", "epilog", "etc", "packaging", "setup.py", "pyproject.toml")
#: The folders below tests, and what the page calls them.
SUITES = {
    "node": "prolog and epilog",
    "slurm": "jobs",
    "verify": "ranks",
    "doctor": "doctor",
    "install": "install",
    "attacks": "attacks through Slurm",
}
#: Of the attacks those that come by Slurm; the others need none.
TESTS = (
    *("tests/node", "tests/slurm", "tests/verify", "tests/doctor", "tests/install"),
    *("tests/attacks/test_slurm.py", "tests/attacks/test_suspect.py"),
)
RESULTS = CACHE / "matrix"
PAGE = REPOSITORY / "docs/support.md"
_WRITTEN = re.compile(r"(?<=<!-- written by make test-matrix -->\n).*(?=<!-- end of what)", re.DOTALL)
FULL_TIMEOUT_SECONDS, SHORT_TIMEOUT_SECONDS = 3600.0, 600.0
_PRINTING = threading.Lock()


@dataclass
class Outcome:
    """How the tests of one release ended; counts by folder, then by what became of a test."""

    commit: str
    """Of slurm-mps, as 12 digits; empty where there is no git, or where it was another at the end."""
    clean: bool
    """Whether nothing was there that is not in the commit."""
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


def commit_of(checkout: Path) -> tuple[str, bool]:
    """The commit that is checked out, as 12 digits, and whether all is as in it but for what this program writes."""
    git = ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "", False
    written = f":(exclude){PAGE.relative_to(REPOSITORY)}"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", written], capture_output=True, text=True, check=True
    )
    return head.stdout.strip(), not changed.stdout


def read_report(path: Path) -> tuple[dict[str, dict[str, int]], list[str], dict[str, int]]:
    """Count what a JUnit report says, by folder below tests; name what failed, and why others were left out."""
    counts: dict[str, Counter[str]] = {suite: Counter() for suite in SUITES}
    skips: Counter[str] = Counter()
    failures = []
    for case in ET.parse(path).getroot().iter("testcase"):
        # A file that cannot be collected is a case without a class, whose name is the file's.
        place = (case.get("classname") or case.get("name") or "").split(".")
        suite = place[1] if len(place) > 1 else ""
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts.setdefault(suite, Counter())[kind] += 1
        skips.update(child.get("message", "") for child in case if child.tag == "skipped")
        if kind == "failed":
            failures.append(f"{'/'.join(place)}.py" + (f"::{case.get('name')}" if case.get("classname") else ""))
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
    line += ["-m", "every_release and not alone"] if short else []
    began, before = time.monotonic(), commit_of(REPOSITORY)
    limit = SHORT_TIMEOUT_SECONDS if short else FULL_TIMEOUT_SECONDS
    status = stream(one.name, [*line, *TESTS], environment, limit)
    counts, failures, skips = read_report(report) if report.exists() else ({}, [], {})
    if status and not failures:
        failures = [f"pytest did not come to its end (exit {status})"]
    commit, clean = commit_of(REPOSITORY)
    return Outcome(
        commit if commit == before[0] else "",
        clean and before == (commit, clean),
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


def same_product(repository: Path, one: str, other: str) -> bool:
    """Whether two commits install the same: nothing but tests and documents changed from one to the other."""
    git = ["git", "-c", f"safe.directory={repository}", "-C", str(repository)]
    line = [*git, "diff", "--quiet", one, other, "--", *PRODUCT]
    return one == other or subprocess.run(line, stderr=subprocess.DEVNULL, check=False).returncode == 0


def to_be_run_again(outcomes: list[Outcome], commit: str, repository: Path = REPOSITORY) -> dict[str, str]:
    """The releases whose results are no part of a page about `commit`, and why."""
    found = {one.release: one for one in outcomes}
    why = {}
    for name in RELEASES:
        one = found.get(name)
        if one is None:
            why[name] = "it has not run"
        elif not one.commit or not commit:
            why[name] = "nobody knows which commit of slurm-mps ran"
        elif not same_product(repository, one.commit, commit):
            why[name] = f"commit {one.commit} ran, and this is {commit}"
        elif not one.clean:
            why[name] = "it ran with changes that are in no commit"
    return why


def commits_of(outcomes: list[Outcome]) -> str:
    """``slurm-mps at commit X``, and where another ran of the same product, on which releases."""
    first, *others = dict.fromkeys(one.commit for one in outcomes)
    ran = [f"slurm-mps at commit {first}"]
    for commit in others:
        on = " and ".join(one.slurm for one in outcomes if one.commit == commit)
        ran.append(f"on {on} at {commit}, from which it differs in tests and documents only")
    return ", ".join(ran)


def page_of(outcomes: list[Outcome]) -> str:
    """What docs/support.md has between its marks."""
    head = ["Slurm", "Debian", "Python", *SUITES.values(), "CUDA_VISIBLE_DEVICES in the prolog", "run on"]
    rows = [
        [
            *(one.slurm, one.suite, one.python),
            *(described(one.counts.get(suite, {})) for suite in SUITES),
            *(_prolog_sees(RELEASES[one.release]), one.date),
        ]
        for one in outcomes
    ]
    lines = [f"| {' | '.join(row)} |" for row in zip(head, *rows, strict=True)]
    lines.insert(1, "| --- " * (len(rows) + 1) + "|")
    failed = [f"- Slurm {one.slurm} failed `{name}`." for one in outcomes for name in sorted(set(one.failures))]
    skipped = [
        f"- Slurm {one.slurm}, {count} skipped: {why}." for one in outcomes for why, count in sorted(one.skips.items())
    ]
    return "\n".join(["", f"{commits_of(outcomes)}:", "", *lines, "", *failed, *skipped, "", ""])


def write_page(outcomes: list[Outcome]) -> None:
    """Write docs/support.md, between its marks."""
    page, times = _WRITTEN.subn(lambda _: page_of(outcomes), PAGE.read_text())
    assert times == 1
    PAGE.write_text(page)
    print(f"matrix: wrote {PAGE.relative_to(REPOSITORY)}")


def read_results() -> list[Outcome]:
    """The last full run of each release that has one."""
    kept = [RESULTS / f"{name}.json" for name in RELEASES]
    return [Outcome(**json.loads(path.read_text())) for path in kept if path.exists()]


def other_releases() -> list[str]:
    """Those that this machine has not itself."""
    return [name for name in RELEASES if name != release.own_release()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-matrix")
    parser.add_argument("--short", action="store_true", help="what `make test` adds to this machine's own release")
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(RELEASES)}; all unless named")
    arguments = parser.parse_args()
    names = arguments.releases or (other_releases() if arguments.short else list(RELEASES))
    if not arguments.short and not commit_of(REPOSITORY)[1]:
        print(f"matrix: there are changes that are in no commit (git status): {PAGE.name} will not be written")
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
        last = read_results()
        again = to_be_run_again(last, commit_of(REPOSITORY)[0])
        for name, why in again.items():
            print(f"matrix: {PAGE.name} is not written before Slurm {name} is run again: {why}")
        if not again:
            write_page(last)
    return 0 if all(not one.failures if arguments.short else one.good for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
