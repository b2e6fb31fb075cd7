"""``make check-clones``: ``make demo`` as somebody new would run it, on Debian systems with nothing on them.

Each is a root file system by debootstrap with make and git, entered as the root of its own namespaces. The demo runs
from clones at unlike places, twice, without a network the second time, and by an ordinary user, who is refused. It
must harm nothing: no service is enabled or started, and what it needs is packages and .cache.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time

from tests.harness.cluster import REPOSITORY
from tests.harness.machine import PATH
from tests.harness.release import RELEASES, make_root
from tests.harness.site import CACHE

SUITES = {"12": "bookworm", "13": "trixie"}
PACKAGES = ("make", "git")
SPACED = "/root/some where/slurm-mps"
#: Where a throw-away machine has directories of its own, and by a link.
PLACES = ("/home/user/x", "/tmp/x", "/run/x", "/var/log/x", "/var/lib/slurm/x", "/dev/shm/x", "/opt/x")
REFUSED = ("/opt/slurm-mps/x", "/media/x")
WELL = "all as it should be"
#: Of this machine's environment: how to reach a registry.
NETWORK = re.compile(r"(https?|no)_proxy|PIP_(CERT|INDEX_URL|EXTRA_INDEX_URL|TIMEOUT|DEFAULT_TIMEOUT)", re.IGNORECASE)
_TIMEOUT_SECONDS = 600.0

# Runs the script $2 in the root $1, as the root of its namespaces.
ENTER = """set -eu
root=$1 script=$2
mount --bind "$root" "$root"
for place in etc/ssl etc/resolv.conf etc/hosts sys; do
	[ -e "$root/$place" ] || : >"$root/$place"
	mount --rbind "/$place" "$root/$place"
done
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 none "$root/run"
mount -t tmpfs -o mode=755 none "$root/dev"
for device in null zero full random urandom tty; do
	touch "$root/dev/$device"
	mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -p "$root/dev/shm" "$root/old"
mount -t tmpfs -o mode=1777 none "$root/dev/shm"
cd "$root"
pivot_root . old
exec chroot . sh -c "umount -l /old; rmdir /old; $script"
"""
ENABLED = "find /etc/systemd/system/*.wants /etc/rc?.d -name 'S*munge' -o -name 'S*slurm*' -o -name '[sm][lu]*.service'"
SIZES = "dpkg-query -W -f '.' | wc -c; du -sxm --exclude=/root / | cut -f1; du -sm /root | cut -f1"


class Debian:
    """A bare Debian."""

    def __init__(self, number: str) -> None:
        self._name = f"Debian {number}"
        suite = SUITES[number]
        bare = CACHE / f"bare-{suite}"
        if not bare.is_dir():
            make_root(bare, next(one for one in RELEASES.values() if one.suite == suite), PACKAGES)
        self.root = CACHE / f"clones-{suite}"
        shutil.rmtree(self.root, ignore_errors=True)
        subprocess.run(["cp", "-a", bare, self.root], check=True)  # an overlay would be one more than the kernel takes
        (self.root / "usr/sbin/policy-rc.d").unlink()
        git = ["git", "-c", f"safe.directory={REPOSITORY}", "clone", "-q", "--bare", "--no-hardlinks"]
        subprocess.run([*git, REPOSITORY, self.root / "srv/slurm-mps.git"], check=True)
        self.wrong: list[str] = []

    def run(self, script: str, *, network: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a script of sh's as root, where nothing is left of what another had in /run, /dev and among processes."""
        line = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        line += [*([] if network else ["--net"]), "sh", "-c", ENTER, "sh", str(self.root), script]
        given = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
        given |= {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        return subprocess.run(line, env=given, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)

    def check(self, what: str, script: str, wanted: str, *, status: int = 0, network: bool = True) -> None:
        """Run it; print how long it took, or all that it said where that is not what is wanted."""
        began = time.monotonic()
        done = self.run(script, network=network)
        good = done.returncode == status and wanted in done.stdout + done.stderr
        took = f"{time.monotonic() - began:.0f} s"
        print(f"clones: {self._name}: {what}: {took if good else 'WRONG'}", flush=True)
        if not good:
            print(f"exit {done.returncode}\n{done.stdout}{done.stderr}", flush=True)
            self.wrong.append(f"{self._name}: {what}")

    def check_beside_another_slurm(self) -> None:
        """What the refusal on a machine with a Slurm of its own advises."""
        clone = "git clone -q /srv/slurm-mps.git /srv/x; cd /srv/x"
        own = "ln -s /bin/true /usr/local/sbin/slurmd"
        self.check(
            "refused beside a Slurm of its own", f"{clone}; {own}; make demo", "has a Slurm of its own", status=2
        )
        self.check("with SLURM_MPS_RELEASE there", "cd /srv/x; make demo SLURM_MPS_RELEASE=24.11", WELL)
        self.check("which installs no Slurm", "dpkg-query -W munge slurmd", "no packages found", status=1)

    def check_places(self) -> None:
        sizes = self._sizes()
        first = f"git clone -q /srv/slurm-mps.git '{SPACED}' && make -C '{SPACED}' demo"
        self.check("a first demo, in a place with a blank", first, WELL)
        packages, system, home = (after - before for before, after in zip(sizes, self._sizes(), strict=True))
        print(f"clones: {self._name}: it took {packages} packages, {system} MB, and {home} MB in the clone", flush=True)
        self.check("nothing starts at boot", f'[ -z "$({ENABLED})" ] && [ ! -e /usr/sbin/policy-rc.d ]', "")
        self.check("again, without a network", f"cd '{SPACED}' && make demo", WELL, network=False)
        self.check("by a link", f"ln -s '{SPACED}' /srv/link && cd /srv/link && make demo", WELL, network=False)
        for place in PLACES:
            copied = f"mkdir -p {place} && cp -a '{SPACED}/.' {place} && make -C {place} demo && rm -r {place}"
            self.check(f"in {place}", copied, WELL, network=False)
        moved = "mkdir -p {0} && cp -a '" + SPACED + "/.' {0} && cd {0} && {1} make demo"
        for place in REFUSED:
            self.check(f"refused in {place}", moved.format(place, ""), "move this checkout", status=2)
        user = "setpriv --reuid=1000 --regid=1000 --clear-groups"
        self.check("refused to a user", moved.format("/srv/x", user), "This needs root", status=2)
        powerless = "setpriv --bounding-set=-sys_admin"
        self.check("refused without capabilities", moved.format("/srv/y", powerless), "make namespaces", status=2)

    def _sizes(self) -> list[int]:
        return [int(word) for word in self.run(SIZES).stdout.split()]


def main(numbers: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make check-clones", description=__doc__.partition("\n")[0])
    parser.add_argument("debian", nargs="*", default=list(SUITES), help=f"of {', '.join(SUITES)}; all unless named")
    wrong: list[str] = []
    for number in parser.parse_args(numbers).debian:
        for check in (Debian.check_places, Debian.check_beside_another_slurm):
            debian = Debian(number)
            try:
                check(debian)
            finally:
                shutil.rmtree(debian.root, ignore_errors=True)
            wrong += debian.wrong
    print(f"clones: {'WRONG: ' + '; '.join(wrong) if wrong else 'all as they should be'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
