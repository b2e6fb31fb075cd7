"""The pyslurm that fits a Slurm release, for the tests of ``slurm-mps status --cluster``.

``python3 -m tests.harness.pyslurm 24.11`` builds the tag that the release's row names (release.py) in the release's
root file system, keeps it in the cache directory, and writes what it says of two jobs on a cluster of that release,
beside what squeue says, into tests/slurm/data: the tests without a pyslurm go by that. It takes some minutes and
is no part of ``make test``, since no registry has a pyslurm that fits a Slurm of Debian's. ``--source DIRECTORY`` takes
a checkout of that tag where github.com cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.lab.measured import write

from .cluster import REPOSITORY
from .machine import PATH
from .release import RELEASES, VARIABLE, ensure_root, version_in
from .site import CACHE, PYTHON, MarkedSite

if TYPE_CHECKING:
    from .release import Release
    from .site import Site

URL = "https://github.com/PySlurm/pyslurm"
DATA = REPOSITORY / "tests/slurm/data"
#: Where a machine has it, for PYTHONPATH.
INSIDE = "/opt/pyslurm"
NEEDED = ("python3-dev", "cython3", "python3-setuptools", "python3-packaging", "python3-wheel", "python3-pip")
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
_TIMEOUT_SECONDS = 1800.0

# Builds the sources $2 in the root file system $1, which stays as it is, into $3, with the packages that follow.
_BUILD = r"""set -eu
root=$1 source=$2 out=$3; shift 3
mount -t tmpfs -o mode=755 none /media
mkdir /media/upper /media/work /media/root
mount -t overlay none -o "lowerdir=$root,upperdir=/media/upper,workdir=/media/work" /media/root
mkdir /media/root/src /media/root/out
cp -r "$source/." /media/root/src
mount --bind "$out" /media/root/out
mount --rbind /dev /media/root/dev
mount -t proc proc /media/root/proc
apt="chroot /media/root env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 apt-get -qq -o Acquire::Retries=3"
$apt update
$apt install -y --no-install-recommends "$@" >/dev/null
exec chroot /media/root env -C /src SLURM_LIB_DIR="$LIBRARIES" SLURM_INCLUDE_DIR=/usr/include \
	python3 -m pip wheel --quiet --no-build-isolation --no-deps --no-index --wheel-dir /out .
"""

# What pyslurm has of what the adapter asks of a job, and what both adapters make of the same jobs.
_SHOW = """import dataclasses, json, sys
import pyslurm
from slurm_mps.slurm.cluster import Pyslurm, Squeue
names = ("id", "user_name", "user_id", "state", "allocated_nodes", "admin_comment",
    "array_id", "array_task_id", "array_tasks_waiting", "heterogeneous_id", "heterogeneous_offset")
jobs = [{name: getattr(job, name) for name in names} for job in pyslurm.Jobs.load().values()]
plain = lambda one: [one.job_id, one.user, one.state, one.nodes, one.admin_comment, one.name]
by_pyslurm, by_squeue = ([plain(one) for one in source.jobs(10)] for source in (Pyslurm(pyslurm), Squeue()))
print(json.dumps({"version": pyslurm.__version__, "jobs": jobs, "by_pyslurm": by_pyslurm, "by_squeue": by_squeue}))"""


def built(release: Release) -> Path | None:
    """The directory that has the package pyslurm for a release; None where nobody built it."""
    place = CACHE / f"pyslurm-{release.name}-{release.pyslurm}"
    return place if release.pyslurm and place.is_dir() else None


def build(release: Release, source: Path | None) -> Path:
    """Build it, unless it is there."""
    there = built(release)
    if there:
        return there
    if not release.pyslurm:
        raise SystemExit(f"Slurm {release.name}: {release.no_pyslurm}")
    root = ensure_root(release, CACHE) or Path("/")
    with tempfile.TemporaryDirectory(prefix="pyslurm-", dir=CACHE) as scratch:
        if source is None:
            source = Path(scratch) / "source"
            subprocess.run(["git", "clone", "-q", "--depth=1", "-b", release.pyslurm, URL, str(source)], check=True)
        out = Path(scratch) / "out"
        out.mkdir()
        line = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", _BUILD, "sh"]
        line += [str(root), str(source), str(out), *NEEDED]
        subprocess.run(line, check=True, timeout=_TIMEOUT_SECONDS, env={"PATH": PATH, "LIBRARIES": LIBRARIES})
        (wheel,) = out.glob("pyslurm-*.whl")
        unpack(wheel, Path(scratch) / "package").rename(CACHE / f"pyslurm-{release.name}-{release.pyslurm}")
    place = built(release)
    assert place
    return place


def unpack(wheel: Path, place: Path) -> Path:
    """What of a wheel is loaded: no sources of it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place, [name for name in archive.namelist() if name.endswith((".py", ".so"))])
    return place


def told_of_jobs(site: Site, package: Path) -> dict[str, Any]:
    """What pyslurm and squeue say while a job with MPS runs on both nodes of a site and one without waits.

    Of these two: pyslurm names jobs that are over as well, while slurmctld has them.
    """
    shutil.copytree(package, site.machine.path(INSIDE), dirs_exist_ok=True)
    runs = site.cluster.sbatch("--mps-threads=25", "--mps=per-gpu", "--gres=gpu:1", "-N2", script="sleep 60")
    waits = site.cluster.sbatch("--begin=now+1hour", "--gres=gpu:1", script="true", user="bob")
    site.cluster.wait_running(runs)
    told = site.machine.run([PYTHON, "-c", _SHOW], env={"PYTHONPATH": INSIDE})
    for job in (runs, waits):
        site.cluster.scancel(job)
    site.cluster.wait_idle()
    found: dict[str, Any] = json.loads(told.check().stdout)
    found["jobs"] = [job for job in found["jobs"] if job["id"] in (runs.id, waits.id)]
    for source in ("by_pyslurm", "by_squeue"):
        found[source] = [job for job in found[source] if job[0] in (runs.id, waits.id)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.harness.pyslurm")
    parser.add_argument("release", choices=[one.name for one in RELEASES.values() if one.pyslurm])
    parser.add_argument("--source", type=Path, help=f"a checkout of the tag, rather than one of {URL}")
    options = parser.parse_args()
    release = RELEASES[options.release]
    package = build(release, options.source)
    os.environ[VARIABLE] = release.name
    with MarkedSite() as site:
        told = {"slurm": version_in(ensure_root(release, CACHE)), **told_of_jobs(site, package)}
    record = DATA / f"pyslurm-{release.name}.json"
    write(record, told)
    print(f"harness: {package.name} tried, {record.relative_to(REPOSITORY)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
