"""The part of the throw-away machine that runs as its own programs: keeper, PID 1 and node holders.

Run as a script by :mod:`tests.harness.machine`, never imported by it, so that it starts quickly and needs
nothing but the standard library. Promises:

- The *keeper* stays outside. It ends the machine when its standard input closes, so a test process that was
  killed with SIGKILL leaves nothing behind; it then removes the cgroup directories that Slurm made.
- *PID 1* owns the mounts. Its root is an overlay whose upper layer is a tmpfs: whatever is written inside, to
  whatever path, never reaches the host.
- A *node holder* keeps one more mount namespace alive, in which the node's private directories are its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
IFF_UP = 1

INIT_CGROUP = "init"
UNIFIED = "unified"  # stands for cgroup v2 among the names of v1 controllers
# NVIDIA's own numbers: without its driver, opening one gives ENXIO, or EPERM where a device cgroup denies it.
NVIDIA_MAJOR = 195
NVIDIA_CONTROL_MINOR = 255
STAGING_DIRECTORIES = ("/media", "/mnt", "/srv")
TMPFS_DIRECTORIES = {
    "/run": 0o755,
    "/tmp": 0o1777,
    "/home": 0o755,
    "/var/log": 0o755,
    "/var/spool": 0o755,
    "/var/lib/slurm": 0o755,
    "/var/lib/munge": 0o755,
    "/etc/slurm": 0o755,
    "/etc/munge": 0o755,
}
PSEUDO_FILESYSTEMS = frozenset(
    {"autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "fusectl"}
    | {"hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "securityfs", "sysfs", "tmpfs", "tracefs"}
)

_libc = ctypes.CDLL(None, use_errno=True)


def _check(returned: int, what: str) -> None:
    """Raise the C library's error, naming what was attempted."""
    if returned != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags`; Python offers ``os.unshare`` from 3.12 only."""
    _check(_libc.unshare(ctypes.c_int(flags)), f"unshare {flags:#x}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    done = _libc.mount(
        source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    _check(done, f"mount {kind or 'bind'} {source} on {target} ({data})")


def mount_tmpfs(target: str, mode: int) -> None:
    """Put an empty file system in memory on `target`, made first where it is missing."""
    os.makedirs(target, exist_ok=True)
    mount("tmpfs", target, "tmpfs", 0, f"mode={mode:o}")


def die_with_parent() -> None:
    """Be killed when the parent dies: PID 1 must not outlive a keeper that was killed."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl PR_SET_PDEATHSIG")


# ---------------------------------------------------------------------------------------------------- cgroups


def host_mounts() -> Iterator[tuple[str, str, list[str]]]:
    """Each mount of this namespace: its mount point, file system type and super options."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _source, options = after.split(" ", 2)
        yield before.split(" ")[4].replace("\\040", " "), kind, options.split(",")


def cgroup_prefix() -> str:
    """What the names of machines' cgroups begin with: their keepers' pids mean something in this PID namespace only."""
    return f"slurm-mps-machine.{os.stat('/proc/self/ns/pid').st_ino}."


def make_cgroups(controllers: list[str]) -> dict[str, Path]:
    """Make this machine's own directory in each cgroup v1 hierarchy of `controllers` that the host has, or else one in
    cgroup v2, by the name UNIFIED.

    Slurm's directories go under it, so machines that run at the same time do not meet, and one removal clears
    all.
    """
    made: dict[str, Path] = {}
    for where, kind, options in host_mounts():
        for controller in set(controllers) & set(options) if kind == "cgroup" else ():
            sweep_stale_cgroups(Path(where))
            made[controller] = Path(where, f"{cgroup_prefix()}{os.getpid()}")
            made[controller].mkdir(exist_ok=True)
    return made or make_unified_cgroup()


def make_unified_cgroup() -> dict[str, Path]:
    """The machine's directory in cgroup v2."""
    for where, kind, _ in host_mounts():
        if kind == "cgroup2":
            sweep_stale_cgroups(Path(where))
            top = Path(where, f"{cgroup_prefix()}{os.getpid()}")
            top.mkdir(exist_ok=True)
            return {UNIFIED: top}
    return {}


def enable_controllers(directory: Path) -> list[str]:
    """Let what is below a directory of cgroup v2 have its controllers, as far as they can be had; those it had not."""
    control = directory / "cgroup.subtree_control"
    missing = set((directory / "cgroup.controllers").read_text().split()) - set(control.read_text().split())
    for controller in missing:
        with contextlib.suppress(OSError):
            control.write_text(f"+{controller}")
    return sorted(missing)


def disable_controllers(directory: Path, controllers: list[str]) -> None:
    """Put a directory back; what somebody has come to use meanwhile stays."""
    for controller in controllers:
        with contextlib.suppress(OSError):
            (directory / "cgroup.subtree_control").write_text(f"-{controller}")


def settle_in_unified_cgroup(top: Path) -> None:
    """Move PID 1, which is in `top`, to where a host has it, and make what slurmd expects of systemd.

    A directory that has others with controllers must not have processes itself; and slurmd takes the directory above
    PID 1's for the root.
    """
    for name in (INIT_CGROUP, "system.slice"):
        (top / name).mkdir(exist_ok=True)
    (top / INIT_CGROUP / "cgroup.procs").write_text("0")
    enable_controllers(top)
    enable_controllers(top / "system.slice")


def sweep_stale_cgroups(hierarchy: Path) -> None:
    """Remove what a killed keeper could not; a dead one that is not yet reaped has an empty cmdline."""
    for left in hierarchy.glob(f"{cgroup_prefix()}*"):
        try:
            keeper = left.name.removeprefix(cgroup_prefix())
            alive = Path(__file__).name in Path(f"/proc/{keeper}/cmdline").read_text()
        except FileNotFoundError:
            alive = False
        if not alive:
            remove_cgroup(left, deadline=time.monotonic() + 1)


def thaw(cgroups: dict[str, Path]) -> None:
    """Thaw every frozen cgroup: a process frozen by cgroup v1 does not die of SIGKILL."""
    for directory, _, files in os.walk(cgroups.get("freezer", "/nonexistent")):
        if "freezer.state" in files:
            with contextlib.suppress(OSError):
                Path(directory, "freezer.state").write_text("THAWED")


def remove_cgroup(top: Path, deadline: float) -> None:
    """Remove a cgroup and all below it, trying until `deadline`: the just-dead hold one for a moment."""
    for directory, _, _ in os.walk(top, topdown=False):
        while True:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            else:
                break


# ----------------------------------------------------------------------------------------------------- keeper


def keep(spec: dict[str, Any]) -> int:
    """Start PID 1, tell the parent its pid, and take everything down when the parent is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cgroups = make_cgroups(spec["cgroup_controllers"])
    host_cgroup = cgroups[UNIFIED].parent if UNIFIED in cgroups else None
    enabled = enable_controllers(host_cgroup) if host_cgroup else []
    from_child, to_parent = os.pipe()
    unshare(CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        os.close(from_child)
        be_init(spec, cgroups, to_parent)
    os.close(to_parent)
    try:
        if os.read(from_child, 1) != b"+":
            return 1
        unified = str(cgroups[UNIFIED] / INIT_CGROUP) if UNIFIED in cgroups else ""
        print(json.dumps({"pid": pid, "cgroups": sorted(cgroups), "unified": unified}), flush=True)
        wait_for_end(pid)
    finally:
        thaw(cgroups)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for directory in cgroups.values():
            remove_cgroup(directory, deadline=time.monotonic() + 3)
        if host_cgroup:
            disable_controllers(host_cgroup, enabled)
    return 0


def wait_for_end(pid: int) -> None:
    """Return when standard input has closed or PID 1 has died."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(pidfd, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == pidfd or not os.read(0, 4096):
                return


# ------------------------------------------------------------------------------------------------------ PID 1


def be_init(spec: dict[str, Any], cgroups: dict[str, Path], to_parent: int) -> None:
    """Set up the machine, say so with one ``+``, then only reap; never returns."""
    try:
        die_with_parent()
        for directory in cgroups.values():
            (directory / "cgroup.procs").write_text("0")
        unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWCGROUP)
        if UNIFIED in cgroups:
            settle_in_unified_cgroup(cgroups[UNIFIED])
        os.umask(0o022)
        build_root(spec, sorted(cgroups))
        socket.sethostname(spec["hostname"])
        bring_up_network(spec["address"])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Nobody waits in PID 1: ignoring SIGCHLD makes the kernel reap every orphan by itself.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.write(to_parent, b"+")
        # The pipes to the test process must not stay open in here.
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(to_parent)
        while True:
            signal.pause()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def bring_up_network(address: str) -> None:
    """Bring `lo` up, with a second address that is not a loopback one; iproute2 may be missing.

    slurmctld resolves names with AI_ADDRCONFIG, which finds nothing, not even 127.0.0.1, where every address
    of the machine is a loopback address (getaddrinfo(3)).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(sock, SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
        for request_number, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.255")):
            packed = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(sock, request_number, packed)


def build_root(spec: dict[str, Any], controllers: list[str]) -> None:
    """Build the machine's file system beside the host's, from the host's own or another, and make it the root."""
    own_root = os.open("/", os.O_PATH)
    enter_root_of_the_namespace()
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    os.fchdir(own_root)
    os.chroot(".")
    os.close(own_root)
    host_file_systems = [where for where, kind, _ in host_mounts() if kind not in PSEUDO_FILESYSTEMS]
    stage = next(place for place in STAGING_DIRECTORIES if os.path.isdir(place))
    mount_tmpfs(stage, 0o755)
    upper, work, root = (os.path.join(stage, name) for name in ("upper", "work", "root"))
    for directory in (upper, work, root):
        os.mkdir(directory, 0o755)
    os.chmod(upper, 0o755)
    fill_upper_layer(spec, upper)
    mount("overlay", root, "overlay", 0, f"lowerdir={spec['root']},upperdir={upper},workdir={work}")
    for where in host_file_systems if spec["root"] == "/" else ():
        bind_host_file_system(where, root, stage)
    mount_kernel_file_systems(root, controllers)
    make_devices(root + "/dev", spec["gpus"])
    for directory, mode in TMPFS_DIRECTORIES.items():
        mount_tmpfs(root + directory, mode)
    make_homes(spec, root)
    for where in spec["shown"]:  # over the directories that are the machine's own: a checkout may be in /home or /tmp
        bind_read_only(where, root)
    for source, target in spec["binds"].items():
        bind(source, root + target)
    new_root = os.open(root, os.O_PATH)
    enter_root_of_the_namespace()
    os.fchdir(new_root)
    os.close(new_root)
    # pivot_root(2): pivot_root(".", ".") stacks the old root on the new; detaching "." leaves the new.
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount old root")
    os.chdir("/")


def enter_root_of_the_namespace() -> None:
    """Make the root of this mount namespace this process's root, also where the process is in a chroot.

    In a chroot pivot_root(2) would replace the root of the chroot alone: the namespace would keep the host's root, and
    nsenter(1) would run the machine's commands there.
    """
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    _check(_libc.setns(own, CLONE_NEWNS), "setns to the own mount namespace")  # sets the root, says setns(2)
    os.close(own)


def fill_upper_layer(spec: dict[str, Any], upper: str) -> None:
    """Write what differs from the host: the accounts, the names, and the simulated libraries and programs.

    The simulated files are copied into the upper layer and not overlaid a second time: an overlay on an
    overlay on a container's own overlay is one more than the kernel allows.
    """
    os.makedirs(f"{upper}/etc", exist_ok=True)
    for name, lines in spec["etc_lines"].items():
        lower = Path(spec["root"], "etc", name)
        old = lower.read_text().splitlines() if lower.exists() else []
        missing = [line for line in lines if not any(have.split(":")[0] == line.split(":")[0] for have in old)]
        Path(upper, "etc", name).write_text("\n".join(old + missing) + "\n")
        Path(upper, "etc", name).chmod(0o600 if name == "shadow" else 0o644)
    for name, text in spec["etc_files"].items():
        Path(upper, "etc", name).write_text(text)
    for target, directories in spec["overlays"].items():
        place = upper + (os.path.realpath(target) if spec["root"] == "/" else target)
        os.makedirs(place, exist_ok=True)
        for directory in reversed(directories):  # the first named lies on top, as in lowerdir=
            shutil.copytree(directory, place, symlinks=True, dirs_exist_ok=True)


def bind_host_file_system(where: str, root: str, stage: str) -> None:
    """Show a further file system of the host (a checkout's own disk, say) at the same place, read-only."""
    kernels = ("/proc", "/sys", "/dev", "/run", "/etc", stage)
    if where == "/" or any(where == top or where.startswith(top + "/") for top in kernels):
        return
    with contextlib.suppress(OSError):  # one hidden by a later mount cannot be reached, here or on the host
        bind_read_only(where, root)


def bind_read_only(where: str, root: str) -> None:
    """Show what the host has at `where` at the same place."""
    bind(where, root + where)
    mount("none", root + where, "", MS_BIND | MS_REMOUNT | MS_RDONLY)


def bind(source: str, target: str) -> None:
    """Bind `source` on `target`, making the mount point."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    mount(source, target, "", MS_BIND | MS_REC)


def mount_kernel_file_systems(root: str, controllers: list[str]) -> None:
    """Give the machine its own /proc, /sys and those cgroup hierarchies that it has a directory in.

    Mounted from inside the new cgroup namespace, a hierarchy shows only this machine's directory, as its
    root.
    """
    mount("proc", f"{root}/proc", "proc")
    mount("sysfs", f"{root}/sys", "sysfs")
    if UNIFIED in controllers:
        mount("cgroup2", f"{root}/sys/fs/cgroup", "cgroup2")
        return
    with contextlib.suppress(OSError):  # no such directory in a kernel without cgroups
        mount_tmpfs(f"{root}/sys/fs/cgroup", 0o755)
    for controller in controllers:
        os.makedirs(f"{root}/sys/fs/cgroup/{controller}")
        mount("cgroup", f"{root}/sys/fs/cgroup/{controller}", "cgroup", 0, controller)


def nvidia_devices(gpus: int | None) -> list[tuple[str, int, int]]:
    """Name, major and minor of the driver's devices: `gpus` imagined ones, or for None those of the host."""
    if gpus is not None:
        imagined = [(f"nvidia{index}", NVIDIA_MAJOR, index) for index in range(gpus)]
        return [("nvidiactl", NVIDIA_MAJOR, NVIDIA_CONTROL_MINOR), *imagined]
    found = [(entry.name, entry.stat()) for entry in os.scandir("/dev") if entry.name.startswith("nvidia")]
    return [(name, os.major(st.st_rdev), os.minor(st.st_rdev)) for name, st in found if stat.S_ISCHR(st.st_mode)]


def make_devices(dev: str, gpus: int | None) -> None:
    """A small /dev with the character devices of an NVIDIA driver, imagined or real."""
    nvidia = nvidia_devices(gpus)
    mount_tmpfs(dev, 0o755)
    for name, major, minor in (
        ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0), *nvidia,
    ):  # fmt: skip
        os.mknod(f"{dev}/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.chmod(f"{dev}/{name}", 0o666)
    mount_tmpfs(f"{dev}/shm", 0o1777)
    os.mkdir(f"{dev}/pts")
    mount("devpts", f"{dev}/pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=620")
    for name, target in (
        ("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2"),
    ):  # fmt: skip
        os.symlink(target, f"{dev}/{name}")


def make_homes(spec: dict[str, Any], root: str) -> None:
    """A home for each ordinary user, and the directory in which simulated GPUs keep their state."""
    for name, uid in spec["users"].items():
        os.mkdir(f"{root}/home/{name}", 0o755)
        os.chown(f"{root}/home/{name}", uid, uid)
    os.mkdir(f"{root}/run/simulated-gpus", 0o755)


# ------------------------------------------------------------------------------------------------------- node


def hold_node(spec: dict[str, Any]) -> int:
    """Make one node's mount namespace and keep it until the machine ends; run inside the machine.

    The shared directories are held open while their parents are covered, then bound back in.
    """
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    shared = {path: os.open(path, os.O_PATH) for path in spec["shared"]}
    for path in spec["private"]:
        mount_tmpfs(path, stat.S_IMODE(os.stat(path).st_mode))
    for path, descriptor in shared.items():
        bind(f"/proc/self/fd/{descriptor}", path)
        os.close(descriptor)
    os.makedirs("/run/simulated-gpus", exist_ok=True)
    print("ready", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    _roles = {"keeper": keep, "node": hold_node}
    # By the environment: a test that looks for a program by its command line shall not find this one.
    sys.exit(_roles[sys.argv[1]](json.loads(os.environ["HARNESS_SPEC"])))
