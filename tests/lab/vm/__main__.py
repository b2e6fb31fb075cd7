"""``make test-vm``: slurm-mps from its .deb in a virtual machine with systemd, cgroup v2 and Slurm, and simulated GPUs.

On each Debian of tests/harness/release.py that is named: the package is built there and installed as docs/admins.md
says, an MPS job runs, slurmd is restarted and the package upgraded under a job, the machine is cut off in the middle of
one and booted again, and the package is purged. What is not as it should be is named, and makes it exit 1. It needs
qemu alone, no KVM. What came of the last run of each stands in docs/support.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.harness.cluster import REPOSITORY, SAMPLES, localise
from tests.harness.machine import ADDRESS, Machine, Result, Throwaway
from tests.harness.release import RELEASES, Release, ensure_root, make_root
from tests.harness.runtime import download, python_version
from tests.harness.site import CACHE, SIMULATOR
from tests.lab.matrix import PAGE, RESULTS, commit_of
from tests.lab.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
PACKAGES = (
    *("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "python3"),
    *("systemd-sysv", "dbus", "linux-image-cloud-amd64", "iproute2", "procps"),
)
NAME = "vm"
#: What lies between them in docs/support.md is written by this program.
BEGINS, ENDS = "<!-- written by make test-vm -->\n", "<!-- end of make test-vm -->\n"
CARRIED = "/carried"
SETTINGS = "/etc/slurm/mps.toml"
BOOT_SECONDS, COMMAND_SECONDS = 400.0, 120.0
#: Starts the agent at each boot; all else that the machine needs is carried in on a second disk.
UNIT = f"""[Unit]
Description=What make test-vm asks of this machine
[Service]
ExecStart=/bin/sh -ec 'mkdir -p {CARRIED}; mount -o ro /dev/vdb {CARRIED}; exec python3 {CARRIED}/agent.py'
[Install]
WantedBy=multi-user.target
"""
BUILD_DEB = """
python3 -m venv --without-pip .cache/dev
.cache/dev/bin/python3 "$(echo /wheels/pip-*.whl)/pip" install --quiet --no-index --find-links /wheels pip "$@"
touch .cache/dev/.tools
make -s deb
"""
#: An emulated processor is slow: what an admin of such a node would write, in mps.toml and in slurm.conf.
SLOW = f"sed -i 's/^prolog = .*/prolog = 50/; s/^epilog = .*/epilog = 100/' {SETTINGS}"
PATIENCE = {"MessageTimeout": "60", "UnkillableStepTimeout": "300"}
#: The same package as of a later version.
LATER = """
dpkg-deb -R {deb} /var/tmp/later
sed -i 's/^Version: .*/Version: 99-1/' /var/tmp/later/DEBIAN/control
dpkg-deb -b /var/tmp/later /var/tmp/later.deb
rm -r /var/tmp/later
"""
#: Every file, but where packages, Slurm and the journal keep what changes all the time.
NAMES = r"""
find / -xdev | grep -vE '^/(var/lib/(dpkg|apt|systemd)|var/cache|var/log/journal|var/tmp|tmp|home)(/|$)' |
	grep -vE '^/var/(lib|spool|log)/slurm(ctld|d)?(/|$)|^/var/log/(apt|dpkg)'
find /run -name '*mps*' ! -path '/run/systemd/*'
"""
HOLD = "srun slurm-mps verify; while [ ! -e ~/go ]; do sleep 0.2; done; srun slurm-mps verify"
#: Opens each GPU's device file: the error number names who refused it, the device cgroup (1) or no driver (6).
OPEN = """python3 -c '
import os
for number in (0, 1):
    try: os.open(f"/dev/nvidia{number}", os.O_RDWR)
    except OSError as error: print(number, error.errno)'"""
VERIFIED = "2 ranks, all clients"


class Vm(Throwaway):
    """A virtual machine; a context manager, after which nothing of it runs."""

    def __init__(self, root: Path, disk: Path, carried: Path, console: Path, memory_mib: int = 2048) -> None:
        self._root, self._disk, self._carried, self._console, self._memory = root, disk, carried, console, memory_mib
        self._qemu: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._heard = b""

    def begin(self) -> None:
        """Start it and wait until its agent answers."""
        (kernel,), (initrd,) = ((self._root / "boot").glob(f"{name}*") for name in ("vmlinuz-", "initrd.img-"))
        ours, its = socket.socketpair()
        line = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]
        line += ["-m", str(self._memory), "-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"]
        line += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", "root=/dev/vda rw console=ttyS0"]
        for number, image in enumerate((self._disk, self._carried)):
            line += ["-drive", f"file={image},format=raw,if=virtio,index={number},readonly={'on' if number else 'off'}"]
        line += ["-chardev", f"file,id=console,path={self._console},append=on", "-serial", "chardev:console"]
        line += ["-chardev", f"socket,id=agent,fd={its.fileno()}", "-serial", "chardev:agent"]
        with self._console.with_suffix(".qemu").open("ab") as said:
            self._qemu = subprocess.Popen(line, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, stderr=said)
        its.close()
        self._port, self._heard = ours, b""
        self._answer(BOOT_SECONDS)

    def cut_off(self) -> None:
        """As a power cut does."""
        qemu, port, self._qemu, self._port = self._qemu, self._port, None, None
        if qemu and port:
            qemu.kill()
            qemu.wait()
            port.close()

    close = cut_off

    def _answer(self, timeout_seconds: float) -> dict[str, Any]:
        assert self._port is not None
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._heard:
            ready = select.select([self._port], [], [], max(0.0, deadline - time.monotonic()))[0]
            more = self._port.recv(65536) if ready else b""
            if not more:
                tail = self._console.read_bytes()[-3000:].decode(errors="replace")
                raise TimeoutError(f"the virtual machine gave no answer; its console:\n{tail}")
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, command: str, *, user: str = "root", timeout: float = COMMAND_SECONDS) -> Result:
        """Run a line of shell inside; what it printed on both streams is in `stdout`."""
        assert self._port is not None
        argv = ["sh", "-ec", command] if user == "root" else ["su", "-", user, "-c", command]
        self._port.sendall(json.dumps({"argv": argv, "timeout": timeout}).encode() + b"\n")
        answer = self._answer(timeout + 30)
        return Result(answer["code"], answer["out"], "")

    def until(self, what: str, command: str, holds: Callable[[str], bool], timeout: float = COMMAND_SECONDS) -> str:
        """Run it again and again until what it prints is as it should be."""
        deadline = time.monotonic() + timeout
        while True:
            said = self.run(command).stdout
            if holds(said):
                return said
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout:g} s: {what}\n{said}")
            time.sleep(0.5)


# ---------------------------------------------------------------------------------------------------- what is carried


def build_deb(root: Path | None, target: Path) -> Path:
    """Build the package of this checkout with the Slurm and Python of a release; returns where it is below `target`."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras["metrics"], "build"]
    source, wheels = target / "source", target / "wheels"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, source / name)
    download(wheels, python_version(root), *needed)
    with Machine(root=root, binds={source: "/source", wheels: "/wheels"}) as machine:
        environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels", "PYTHONDONTWRITEBYTECODE": "1"}
        line = ["sh", "-euc", BUILD_DEB, "sh", *needed]
        built = machine.run(line, cwd="/source", env=environment, timeout=400).check().stdout.splitlines()[-1]
    return source / built


def disk_of(directory: Path, image: Path, mib: int) -> None:
    image.unlink(missing_ok=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", directory, image, f"{mib}M"], check=True)


def ensure_vm_root(one: Release) -> Path:
    """The root file system of such a machine, made first where there is none."""
    root = CACHE / f"vm-{one.suite}"
    if not root.is_dir():
        make_root(root, one, PACKAGES)
    return root


def settle_root(root: Path) -> None:
    """What a machine has that a root for namespaces has not; harmless when it is done already."""
    (root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
    (root / "etc/hostname").write_text(f"{NAME}\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} {NAME}\n")
    (root / "etc/systemd/system/asked.service").write_text(UNIT)
    wanted = root / "etc/systemd/system/multi-user.target.wants/asked.service"
    if not wanted.is_symlink():
        wanted.symlink_to("/etc/systemd/system/asked.service")


def configuration() -> dict[str, str]:
    """Slurm's, from the samples: as on a cluster that does not have slurm-mps yet, all daemons log to the journal."""
    without = dict.fromkeys(("Prolog", "Epilog", "PrologFlags", "PlugStackConfig"))
    logs = dict.fromkeys(("SlurmctldLogFile", "SlurmdLogFile"))
    own = {"ClusterName": NAME, "SlurmctldHost": f"{NAME}({ADDRESS})", "KillWait": "5", **PATIENCE}
    slurm = localise((SAMPLES / "slurm.conf").read_text(), {**without, **logs, **own})
    slurm += f"NodeName={NAME} NodeAddr={ADDRESS} Gres=gpu:2 CPUs=2 RealMemory=1000 State=UNKNOWN\n"
    slurm += "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    gres = f"NodeName={NAME} Name=gpu File=/dev/nvidia[0-1]\n"
    return {"slurm.conf": slurm, "gres.conf": gres, "cgroup.conf": (SAMPLES / "cgroup.conf").read_text()}


def carry(deb: Path, target: Path) -> None:
    """Fill the directory that the second disk is made of."""
    for name in ("agent.py", "setup.sh"):
        shutil.copy2(HERE / name, target / name)
    shutil.copytree(SIMULATOR, target / "simulator", symlinks=True)
    shutil.copy2(deb, target / deb.name)
    (target / "conf").mkdir()
    for name, text in configuration().items():
        (target / "conf" / name).write_text(text)


# ------------------------------------------------------------------------------------------------------------ the test


class Test:
    """Does one thing after another, and keeps what came of each."""

    def __init__(self, vm: Vm, deb: str, progress: Progress) -> None:
        self._vm, self._deb, self._progress = vm, f"{CARRIED}/{deb}", progress
        self.passed: list[str] = []
        self.failed: list[str] = []

    def check(self, what: str, holds: object, said: str = "") -> None:
        (self.passed if holds else self.failed).append(what)
        self._progress.say(what if holds else f"FAILED: {what}\n{said}")

    def _srun(self, options: str, command: str) -> Result:
        return self._vm.run(f"srun --immediate=90 {options} {command}", user="alice")

    def _submit(self) -> str:
        """A job that says when it is verified, and then waits for `go`."""
        options = "--parsable --no-requeue -n2 --gres=gpu:1 --mps-threads=25 --output=job.out"
        job = self._vm.run(f"rm -f go job.out; sbatch {options} --wrap={shlex.quote(HOLD)}", user="alice").check()
        self._vm.until("the job's ranks", "cat ~alice/job.out || :", lambda said: VERIFIED in said)
        return job.stdout.split()[-1]

    def _idle(self) -> str:
        return self._vm.until(
            "the node idle", "squeue -h; sinfo -h -N -o '%T %E'", lambda said: said.startswith("idle"), 180
        )

    def _clean(self) -> tuple[bool, str]:
        left = self._vm.run(
            "pgrep -a nvidia-cuda-mps || :; find /run/slurm-mps/jobs /run/slurm-mps/gpus -mindepth 1 2>/dev/null || :; "
            "nvidia-smi --query-gpu=compute_mode --format=csv,noheader | grep -v Default || :"
        ).stdout
        return not left.strip(), left

    def start(self) -> None:
        vm = self._vm
        vm.run(f"sh {CARRIED}/setup.sh {CARRIED}").check()
        self._idle()
        self.check("cgroup v2 alone", vm.run("stat -fc %T /sys/fs/cgroup").stdout.strip() == "cgroup2fs")
        active = vm.run("systemctl is-active munge slurmctld slurmd || :").stdout
        self.check("munge, slurmctld and slurmd run under systemd", active.split() == ["active"] * 3, active)
        self._names = set(vm.run(NAMES).check().stdout.splitlines())

    def install(self) -> None:
        vm = self._vm
        said = vm.run(f"apt-get install -y {self._deb}").check().stdout
        self.check("apt installs the package, which is off", "not switched on" in said, said)
        said = vm.run("slurm-mps install || :").stdout
        lines = ["Prolog=/etc/slurm/prolog.d/*", "Epilog=/etc/slurm/epilog.d/*", "PrologFlags=Alloc"]
        self.check("install says which lines slurm.conf needs", all(line in said for line in lines), said)
        vm.run(f"printf '%s\\n' {shlex.join(lines)} >>/etc/slurm/slurm.conf; scontrol reconfigure").check()
        vm.run(SLOW).check()
        vm.run("systemctl enable slurm-mps-reconcile; systemctl restart slurmd").check()
        self._idle()
        doctor = vm.run("slurm-mps doctor").stdout
        self.check("doctor finds no problem", "problem: " not in doctor and " checks: " in doctor, doctor)

    def jobs(self) -> None:
        done = self._srun("-n2 --gres=gpu:1 --mps-threads=25 --mps-mem=8G", "slurm-mps verify")
        right = done.returncode == 0 and VERIFIED in done.stdout and done.stdout.count("32/132") == 2
        self.check("srun slurm-mps verify: two ranks share a server, limits hold", right, done.stdout)
        done = self._srun("-n1 --gres=gpu:1 --mps", OPEN)
        refused = re.findall(r"^\d (\d+)$", done.stdout, re.MULTILINE)
        self.check("a task may open its own GPU alone", sorted(refused) == ["1", "6"], done.stdout)
        self._idle()
        self.check("nothing is left of these jobs", *self._clean())

    def restart(self) -> None:
        """slurmd is restarted and the package is upgraded while a job has MPS."""
        vm = self._vm
        self._submit()
        group = vm.run("cat /proc/$(pgrep -o nvidia-cuda-mps)/cgroup").stdout.strip()
        before = vm.run("pgrep nvidia-cuda-mps").stdout
        vm.run("systemctl restart slurmd").check()
        after = vm.run("pgrep nvidia-cuda-mps").stdout
        said = f"{group}: {before} before, {after} after"
        self.check(f"a restart of slurmd leaves the control daemon in {group} alone", before and before == after, said)
        vm.run(LATER.format(deb=self._deb)).check()
        vm.run("apt-get install -y /var/tmp/later.deb && slurm-mps install --no-doctor").check()
        vm.run("systemctl restart slurmd && touch ~alice/go").check()
        self._idle()
        said = vm.run("cat ~alice/job.out").stdout
        self.check("the package is upgraded under a job, whose next step is verified", said.count(VERIFIED) == 2, said)
        self.check("nothing is left of the job", *self._clean())

    def power_cut(self) -> None:
        vm = self._vm
        job = self._submit()
        # slurmctld saves a job within five seconds; the id of one that it lost is given to the next.
        vm.run("sleep 8 && sync").check()
        vm.cut_off()
        vm.begin()
        vm.until("systemd has started all", "systemctl is-system-running || :", lambda said: "starting" not in said)
        times = vm.run(
            "systemctl show -P ExecMainExitTimestampMonotonic slurm-mps-reconcile; "
            "systemctl show -P ExecMainStartTimestampMonotonic slurmd; "
            "systemctl show -P Result -P ExecMainStatus slurm-mps-reconcile"
        ).stdout.split()
        self.check(
            "after a power cut slurm-mps-reconcile ends before slurmd starts",
            0 < int(times[0]) < int(times[1]) and "success" in times,
            " ".join(times),
        )
        # Slurm, which started anew as well, finds out about a lost job when it pleases.
        vm.run(f"scancel {job}").check()
        state = vm.until(
            "the job gone", "squeue -h; sinfo -h -N -o '%T %E'", lambda said: bool(re.match("idle|down", said))
        )
        if state.startswith("down"):  # ReturnToService=0
            vm.run(f"scontrol update NodeName={NAME} State=RESUME").check()
        self._idle()
        self.check("the lost job is cancelled, its epilog ends well, and the node is clean", *self._clean())
        failed = vm.run("systemctl list-units --failed --plain --no-legend").stdout
        self.check("no unit failed at boot", not failed.strip(), failed)
        done = self._srun("-n2 --gres=gpu:1 --mps-threads=25", "slurm-mps verify")
        self.check("the next job runs", done.returncode == 0 and VERIFIED in done.stdout, f"{job}: {done.stdout}")

    def journal(self) -> None:
        """What is in the journal of this boot of slurm-mps is printed; none of it is a failure."""
        said = self._vm.run("journalctl -b -o short-monotonic --no-hostname --no-pager | grep -i mps || :").stdout
        print(said, flush=True)
        bad = re.findall(r".*(?:Traceback|rror|denied|\bfail).*", said)
        self.check("the journal has no complaint of slurm-mps", not bad and said, "\n".join(bad))

    def purge(self) -> None:
        vm = self._vm
        self._idle()
        refused = vm.run("apt-get purge -y slurm-mps")
        self.check("purge is refused while slurm.conf needs the hooks", refused.returncode, refused.stdout)
        vm.run(f"cp {CARRIED}/conf/slurm.conf /etc/slurm/ && scontrol reconfigure").check()
        vm.run("systemctl restart slurmd; apt-get purge -y slurm-mps; systemctl daemon-reload").check()
        left = set(vm.run(NAMES).stdout.splitlines()) - self._names
        self.check(
            "purge leaves nothing but the mps.toml that was changed", left <= {SETTINGS}, "\n".join(sorted(left))
        )
        self._idle()
        done = self._srun("-n1 --gres=gpu:1", "true")
        self.check("a job runs without slurm-mps", done.returncode == 0, done.stdout)

    def run(self) -> None:
        """All of it; what cannot go on ends it, and is a failure."""
        try:
            for part in (self.start, self.install, self.jobs, self.restart, self.power_cut, self.journal, self.purge):
                part()
        except (AssertionError, TimeoutError) as error:
            self.check(f"{part.__name__} comes to its end", False, str(error))
            with contextlib.suppress(TimeoutError, OSError, AssertionError):
                print(self._vm.run("journalctl -b --no-pager -n 60; dmesg | tail -5").stdout, flush=True)


def try_release(one: Release) -> dict[str, Any]:
    progress = Progress(f"vm: {one.suite}")
    began, commit = time.monotonic(), commit_of(REPOSITORY)[0]
    root = ensure_vm_root(one)
    settle_root(root)
    with tempfile.TemporaryDirectory(prefix="vm-", dir=CACHE) as scratch:
        place = Path(scratch)
        deb = build_deb(ensure_root(one, CACHE), place)
        progress.say(f"built {deb.name}")
        (place / "carried").mkdir()
        carry(deb, place / "carried")
        disk_of(place / "carried", place / "carried.img", 64)
        disk_of(root, place / "disk.img", 3000)
        progress.say("made its disk; booting")
        console = RESULTS / f"vm-{one.name}.console"
        RESULTS.mkdir(parents=True, exist_ok=True)
        console.write_text("")
        with Vm(root, place / "disk.img", place / "carried.img", console) as vm:
            progress.say("up")
            test = Test(vm, deb.name, progress)
            system = vm.run("uname -r; systemctl --version | head -1; slurmd -V; systemd-detect-virt || :").stdout
            test.run()
    kernel, systemd, slurm, virtual = system.splitlines()
    outcome = {
        "commit": commit,
        "suite": one.suite,
        "slurm": slurm.split()[-1],
        "system": f"Linux {kernel}, {' '.join(systemd.split()[:2])}, {virtual}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - began),
        "passed": test.passed,
        "failed": test.failed,
    }
    (RESULTS / f"vm-{one.name}.json").write_text(json.dumps(outcome, indent=1) + "\n")
    return outcome


def section(outcomes: list[dict[str, Any]]) -> str:
    """What docs/support.md says of the last run of each."""
    lines = []
    for one in outcomes:
        total = len(one["passed"]) + len(one["failed"])
        lines.append(
            f"Slurm {one['slurm']} on Debian {one['suite']} ({one['system']}), commit {one['commit']}, {one['date']}: "
            f"{len(one['passed'])} of {total} held, in {one['seconds']} s.\n"
        )
        lines += [f"- {what}" for what in one["passed"]] + [f"- **Failed**: {what}" for what in one["failed"]] + [""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-vm", description=__doc__.partition("\n")[0])
    names = ("24.11", "22.05")
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(RELEASES)}; {' '.join(names)}")
    outcomes = [try_release(RELEASES[name]) for name in parser.parse_args().releases or names]
    for one in outcomes:
        print(f"vm: Slurm {one['slurm']}: {len(one['passed'])} held, {len(one['failed'])} failed, {one['seconds']} s")
    kept = [RESULTS / f"vm-{name}.json" for name in RELEASES]
    text = section([json.loads(path.read_text()) for path in kept if path.exists()])
    before, _, rest = PAGE.read_text().partition(BEGINS)
    PAGE.write_text(f"{before}{BEGINS}\n{text}{ENDS}{rest.partition(ENDS)[2]}")
    return int(any(one["failed"] for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
