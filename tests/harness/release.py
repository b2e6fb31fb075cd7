"""The Slurm releases that the tests run on, and what is each one's own.

A machine's own Slurm is one of them; of the others this module makes root file systems, once, with debootstrap, in
the cache directory. ``SLURM_MPS_RELEASE=26.05`` in the environment chooses; ``python3 -m tests.harness.release`` makes
them ahead. Whatever differs between releases stands in RELEASES and nowhere else.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIABLE = "SLURM_MPS_RELEASE"
BUNDLE_VARIABLE = "SLURM_MPS_BUNDLE"
ROOT_ARCHIVE = "root.tar.xz"
"""In a bundle that has a whole root file system (bundle.py)."""
DEFAULT_MIRROR = "http://deb.debian.org/debian"
PACKAGES = (
    *("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libslurm-dev", "munge"),
    *("gcc", "libc6-dev", "make", "python3", "strace"),
)
_LAYOUT = "1"  # to be raised when this module makes a root in another way
_TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True)
class Release:
    """One Slurm release, by year and month, as a Debian suite has it."""

    name: str
    suite: str
    debootstrap_script: str
    """Debootstrap's own name of how to make it, for suites that came after the debootstrap of Debian 12."""
    said_on_a_node: str
    """Matches a message of ours in a job's output: the `node` that it is from, and its words, `first` and `last`."""
    epilog_ran: str
    """Matches what slurmd logs of a slow epilog of {job}."""
    autodetect: str
    """A value of gres.conf's AutoDetect that finds GPUs through /proc/driver/nvidia; empty where there is none."""
    prolog_sees: str
    """What CUDA_VISIBLE_DEVICES names GPUs by in prolog and epilog with AutoDetect: indices or UUIDs (S17)."""
    no_run_in_job: str = ""
    """Why PrologFlags=RunInJob cannot be used; empty where it can."""
    knows_run_in_job: bool = True
    """Whether Slurm takes the word at all."""
    upgrades_from: str = ""
    """A release of this table whose running jobs Slurm lets this one take over; empty where there is none."""
    own_timeouts: tuple[str, ...] = ()
    """What slurm.conf has beside PrologEpilogTimeout: a timeout of the prolog's, and one of the epilog's."""
    no_init_failure_mode: str = ""
    """Why a plugin's slurm_spank_init_failure_mode is not looked at; empty where it is."""
    pyslurm: str = ""
    """The tag of pyslurm's repository that builds against this Slurm and has what status --cluster asks of it."""
    no_pyslurm: str = ""
    """Why there is none."""

    @property
    def no_packages(self) -> str:
        """Why `make deb` and `make rpm` cannot be tried: they build for the Slurm of the machine they run on."""
        return "" if self.name == own_release() else "packages are built on a machine that has this Slurm itself"

    @property
    def no_bare_debian(self) -> str:
        """Why there is no Debian to type README's commands in, with a registry of wheels beside it."""
        return "" if self.name == own_release() else "README's commands are typed on this machine's own Debian"


_BY_NAME = r"^slurmstepd-(?P<node>[^:]+): error: mps: (?P<first>)(?P<last>.*)"
_BY_TIME = r"^\[[^]]+\] error: mps: (?P<first>[^:]*) on (?P<node>[^: ]+)(?P<last>: .*)"
_SINCE_25_05 = "Slurm has it from 25.05 on"

RELEASES = {
    one.name: one
    for one in (
        Release(
            name="22.05",
            suite="bookworm",
            debootstrap_script="bookworm",
            said_on_a_node=_BY_NAME,
            epilog_ran="epilog for job {job} ran for",
            autodetect="",
            prolog_sees="indices",
            no_run_in_job="Slurm has it from 24.05 on",
            knows_run_in_job=False,
            no_init_failure_mode=_SINCE_25_05,
            pyslurm="v22.5.3",
        ),
        Release(
            name="24.11",
            suite="trixie",
            debootstrap_script="trixie",
            said_on_a_node=_BY_NAME,
            epilog_ran="epilog for job {job} ran for",
            autodetect="nvidia",
            prolog_sees="indices",
            no_run_in_job="slurmstepd of 24.05 to 25.11 runs an epilog as the job's user at times",
            no_init_failure_mode=_SINCE_25_05,
            pyslurm="v24.11.0",
        ),
        Release(
            name="26.05",
            suite="forky",
            debootstrap_script="sid",
            said_on_a_node=_BY_TIME,
            epilog_ran="epilog for JobId={job} SLUID=.* ran for",
            autodetect="nvidia",
            prolog_sees="UUIDs",
            upgrades_from="24.11",
            own_timeouts=("PrologTimeout", "EpilogTimeout"),
            no_pyslurm="pyslurm's newest is for Slurm 25.11",
        ),
    )
}

# Makes a root at $1 of suite $2 from mirror $3 by script $4, with the packages that follow. In a mount namespace of
# its own, which ends with it whatever happens.
_MAKE_ROOT = r"""set -eu
root=$1 suite=$2 mirror=$3 script=$4; shift 4
debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$mirror" \
	"/usr/share/debootstrap/scripts/$script"
apt-config dump | grep -E '^Acquire::(http|https|Check)' >"$root/etc/apt/apt.conf.d/90machine" || :
printf 'path-exclude=/usr/share/%s/*\n' doc man locale info >"$root/etc/dpkg/dpkg.cfg.d/small"
echo force-unsafe-io >>"$root/etc/dpkg/dpkg.cfg.d/small"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
apt="chroot $root env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 apt-get -qq -o Acquire::Retries=3"
$apt update
$apt install -y --no-install-recommends "$@" >/dev/null
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
"""


@cache
def own_release() -> str:
    """The release of this machine's Slurm of Debian's, or of the one in its bundle (bundle.py), as year and month.

    Empty where there is none: a Slurm from elsewhere has its files in other places.
    """
    bundle = os.environ.get(BUNDLE_VARIABLE)
    if bundle:
        return (Path(bundle) / "release").read_text().strip()
    line = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", "slurmd"]
    status, _, version = subprocess.run(line, capture_output=True, text=True, check=False).stdout.partition(" ")
    return _year_and_month(version) if status == "installed" else ""


def chosen() -> Release:
    """The release to run on: what the environment says, else this machine's own."""
    name = os.environ.get(VARIABLE) or own_release()
    if name not in RELEASES:
        found = f"Slurm {name} has no row in {__file__}" if name else "this machine has no Slurm of Debian's"
        raise SystemExit(f"{found}; {VARIABLE} can be {', '.join(RELEASES)}")
    return RELEASES[name]


def ensure_root(release: Release, cache_dir: Path) -> Path | None:
    """The root file system with this release, made first where there is none; None for the machine's own."""
    carried = carried_root() if release.name == own_release() else None
    if release.name == own_release() and carried is None:
        return None
    cache_dir.mkdir(parents=True, exist_ok=True)
    made_of = carried.read_bytes() if carried else "\n".join((_LAYOUT, *PACKAGES)).encode()
    root = cache_dir / f"root-{release.suite}-{hashlib.sha256(made_of).hexdigest()[:8]}"
    with (cache_dir / f"root-{release.suite}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not root.is_dir():
            _unpack(carried, root) if carried else make_root(root, release)
    found = version_in(root)
    if _year_and_month(found) != release.name:
        _say(f"Debian's {release.suite} has Slurm {found} now; the tests run on it with the data of {release.name}")
    return root


def carried_root() -> Path | None:
    """The whole root file system of a release in a bundle; None where there is no bundle, or one without it."""
    bundle = os.environ.get(BUNDLE_VARIABLE)
    carried = Path(bundle, ROOT_ARCHIVE) if bundle else None
    return carried if carried and carried.exists() else None


def _unpack(archive: Path, root: Path) -> None:
    """Beside its place, then renamed, as make_root does it."""
    partial = root.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extraction_filter = lambda member, _: member  # the same whatever Python's own default is
        packed.extractall(partial, numeric_owner=True)
    partial.rename(root)
    _say(f"unpacked {archive} as {root.name}")


def make_root(root: Path, release: Release, packages: Sequence[str] = PACKAGES) -> None:
    """Make it beside its place and rename it, so that a root is whole or absent."""
    began = time.monotonic()
    partial = root.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    mirror = mirror_of_this_machine()
    _say(f"making {root.name} with debootstrap from {mirror} (once, about a minute)")
    line = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", _MAKE_ROOT, "sh"]
    line += [str(partial), release.suite, mirror, release.debootstrap_script, *packages]
    environment = {**os.environ, **_proxies()}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{release.suite}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    partial.rename(root)
    _say(f"{root.name} took {time.monotonic() - began:.0f} s")


def version_in(root: Path | None) -> str:
    """The version of the Slurm in a root, such as 24.11.5."""
    line = [*(["chroot", str(root)] if root else []), "slurmd", "-V"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1]


def mirror_of_this_machine() -> str:
    """Where this machine's apt has Debian from."""
    targets = ["Created-By: Packages", "Origin: Debian", "Label: Debian", "Component: main"]
    line = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *targets]
    found = subprocess.run(line, capture_output=True, text=True, check=False).stdout.split()
    return found[0] if found else DEFAULT_MIRROR


def _proxies() -> dict[str, str]:
    """The proxy of this machine's apt, for debootstrap."""
    line = ["apt-config", "shell", "proxy", "Acquire::http::Proxy"]
    found = re.search(r"'(.+)'", subprocess.run(line, capture_output=True, text=True, check=False).stdout)
    return {"http_proxy": found[1]} if found else {}


def _year_and_month(version: str) -> str:
    return ".".join(version.rsplit(maxsplit=1)[-1].split(".")[:2])


def _say(text: str) -> None:
    print(f"harness: {text}", flush=True)


def main(names: list[str]) -> int:
    """Make the roots of the named releases, or of all."""
    from .site import CACHE

    for name in names or RELEASES:
        ensure_root(RELEASES[name], CACHE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
