"""``make test`` and ``make check``: pytest in parallel, then alone what measures time; other Slurm releases beside it.

What the run leaves on this machine is named and makes it fail: processes, which are ended, mounts, cgroups, and files
that are new or changed. Whatever outlives its parent comes to this process, so that no one else's is taken for it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab import matrix

from .cluster import REPOSITORY
from .inside import cgroup_prefix
from .release import VARIABLE
from .site import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PR_SET_CHILD_SUBREAPER = 36
NO_TESTS = 5
#: Where every file counts, and where only those count whose name says that they may be of a test.
WATCHED = ("/etc", "/usr", "/opt")
SHARED = ("/run", "/var/lib", "/var/log", "/var/spool", "/dev/shm")
OURS = re.compile(r"slurm|munge|mps|nvidia|simulated")
_LEAVING_SECONDS = 5.0


def files() -> dict[str, tuple[int, int, int]]:
    """What tests might write to by mistake: mode, size and time of each file; of a directory its mode alone."""
    found = {}
    for top in (*WATCHED, *SHARED):
        for directory, inner, names in os.walk(top):
            inner[:] = [name for name in inner if f"{directory}/{name}" != str(REPOSITORY)]
            for name in [*names, *inner]:
                path = f"{directory}/{name}"
                if top in WATCHED or OURS.search(path):
                    try:
                        seen = os.lstat(path)
                    except FileNotFoundError:
                        continue
                    found[path] = (seen.st_mode, *((0, 0) if name in inner else (seen.st_size, seen.st_mtime_ns)))
    return found


def mounts() -> set[str]:
    lines = (line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return {f"{words[4]} ({words[words.index('-') + 1]})" for words in lines}


def dead_cgroups() -> list[str]:
    """The cgroups of throw-away machines whose keeper has ended."""
    found = [path for above in ("", "*/") for path in Path("/sys/fs/cgroup").glob(f"{above}{cgroup_prefix()}*")]
    return [str(path) for path in found if not Path("/proc", path.suffix[1:]).exists()]


def children(pid: int) -> Iterator[int]:
    """All processes below one, those started last first."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                yield from children(child)
                yield child


class Run:
    """Starts programs, waits for them, and ends what they left."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._ended: dict[int, int] = {}
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)

    def start(self, module: str, *words: str, out: int | None = None, release: str = "") -> int:
        """Start a module of Python's, on another Slurm if `release` names one; returns its pid."""
        line = [sys.executable, "-m", module, *words]
        environment = {**self.environment, **({VARIABLE: release} if release else {})}
        return subprocess.Popen(line, cwd=REPOSITORY, env=environment, stdout=out, stderr=out).pid

    def wait(self, pid: int) -> int:
        """Reap whatever ends until this one has; returns its exit status."""
        while pid not in self._ended:
            ended, status = os.waitpid(-1, 0)
            self._ended[ended] = os.waitstatus_to_exitcode(status)
        return self._ended[pid]

    def end_what_is_left(self) -> list[str]:
        """Give processes a moment to end, then end them. Returns their command lines."""
        deadline = time.monotonic() + _LEAVING_SECONDS
        while time.monotonic() < deadline:
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    time.sleep(0.05)
            except ChildProcessError:
                return []
        left = []
        for pid in list(children(os.getpid())):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                line = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                os.kill(pid, signal.SIGKILL)
                left.append(f"process {pid} ({line.replace(chr(0), ' ').strip()})")
        return left


def run_tests(run: Run, options: argparse.Namespace, words: list[str]) -> list[str]:
    """Run all that is asked for; returns what failed."""
    failed = []
    log = CACHE / "releases.log"
    releases = None
    if options.releases:
        with log.open("w") as out:
            releases = run.start("tests.lab.matrix", "--short", out=out.fileno())
        print(f"make: the other releases of Slurm run beside these tests, into {log.relative_to(REPOSITORY)}")
    parallel = ["-n", str(options.jobs), "--dist", "worksteal", "--durations=10", "--durations-min=1"]
    if run.wait(run.start("pytest", *parallel, "-m", "not alone", *words)) not in (0, NO_TESTS):
        failed.append("tests")
    if releases is not None:
        print("make: waiting for the other releases of Slurm", flush=True)
        status = run.wait(releases)
        told = log.read_text().splitlines()
        print("\n".join(told if status else [line for line in told if line.startswith("matrix: ")]), flush=True)
        if status:
            failed.append("tests on other releases of Slurm")
    if "--quick" in words:
        return failed
    print("make: what measures time, alone", flush=True)
    alone = [run.wait(run.start("pytest", "-q", "-m", "alone", *words))]
    for name in matrix.other_releases() if options.releases else ():
        print(f"make: the same on Slurm {name}", flush=True)
        marked = ["-m", "alone and every_release", *matrix.TESTS]
        alone.append(run.wait(run.start("pytest", "-q", *marked, release=name)))
    if not set(alone) <= {0, NO_TESTS}:
        failed.append("tests that measure time")
    return failed


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.harness.suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="tests at a time")
    parser.add_argument("--releases", action="store_true", help="also the short matrix of the other Slurm releases")
    options, words = parser.parse_known_args(argv)  # the others are pytest's
    began = time.monotonic()
    place = tempfile.mkdtemp(prefix="tests-")
    os.chmod(place, 0o755)
    CACHE.mkdir(exist_ok=True)
    before, mounted, stale = files(), mounts(), dead_cgroups()
    run = Run({**os.environ, "TMPDIR": place})
    try:
        failed = run_tests(run, options, words)
    except KeyboardInterrupt:
        failed = ["interrupted"]
    left = run.end_what_is_left()
    left += [f"mount {mount}" for mount in sorted(mounts() - mounted)]
    left += [f"cgroup {path}" for path in dead_cgroups() if path not in stale]
    left += [f"temporary file {path}" for path in Path(place).iterdir() if not path.name.startswith("pytest-of-")]
    after = files()
    left += [f"file {path}" for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
    shutil.rmtree(place, ignore_errors=True)
    for one in left:
        print(f"make: left on this machine, or changed: {one}")
    failed += ["something was left on this machine"] if left else []
    print(f"make: {'FAILED: ' + ', '.join(failed) if failed else 'all passed'}, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
