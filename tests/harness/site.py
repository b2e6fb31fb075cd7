"""A throw-away site: a Slurm cluster of simulated GPU nodes with slurm-mps installed as an admin would.

``python3 -m tests.harness.site`` gives a shell in one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import bundle, release
from .cluster import CPUS_PER_NODE, REPOSITORY, SAMPLES, Cluster, FoundGpu
from .machine import GPU_DEVICES, Machine, Throwaway
from .runtime import MOUNT_POINT, build_plugin, ensure_runtime, install_project, mpi_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .cluster import Job
    from .machine import Result
    from .release import Release

CACHE = REPOSITORY / ".cache"
SIMULATOR = REPOSITORY / "build/simulator"
NEXT = "/next"
PLUGIN_DIRECTORY = "/usr/lib/x86_64-linux-gnu/slurm-wlm"
STATE_DIRECTORY = "/run/slurm-mps"
PARTITIONS = "/etc/slurm/mps-partitions"
CAPS_MAJOR = 236  # of nvidia-caps: the kernel gives it one that is free
PYTHON = f"{MOUNT_POINT}/bin/python3"
COMPUTE_MODES = {0: "DEFAULT", 2: "PROHIBITED", 3: "EXCLUSIVE_PROCESS"}


@dataclass(frozen=True)
class Snapshot:
    """What a job must leave as it found: processes, directories and compute modes of the whole machine."""

    processes: tuple[str, ...]
    directories: tuple[str, ...]
    compute_modes: tuple[str, ...]


def gpu_machine(
    *, real: bool = False, of: Release | None = None, then: Release | None = None, programs: Path | None = None
) -> Machine:
    """A machine with the project's runtime, and the simulated driver where every loader finds it, unless `real`.

    It has the Slurm of the release that is chosen (tests/harness/release.py), or `of` another, and the plugin as built
    there. What it needs to be upgraded to `then` is laid below NEXT. The programs in the directory `programs` take the
    place of the simulated driver's.
    """
    own = [] if programs is None else [programs]
    simulated = {"/usr/lib/x86_64-linux-gnu": [SIMULATOR / "lib"], "/usr/bin": [*own, SIMULATOR / "bin"]}
    overlays = bundle.overlays() if real else simulated
    root = release.ensure_root(of or release.chosen(), CACHE)
    binds: dict[str | Path, str] = {_runtime_in(root): MOUNT_POINT}
    if root is not None:
        place = REPOSITORY / "build/spank"
        place.mkdir(parents=True, exist_ok=True)
        binds[bundle.carried_plugin() or build_plugin(CACHE, REPOSITORY, root)] = str(place)
    if then is not None:
        next_root = release.ensure_root(then, CACHE)
        assert next_root is not None
        binds |= {next_root: f"{NEXT}/root", _runtime_in(next_root): f"{NEXT}/opt"}
        binds[build_plugin(CACHE, REPOSITORY, next_root)] = f"{NEXT}/plugin"
    shown = [REPOSITORY, *(bundle.shown() if real else [])]
    return Machine(overlays=overlays, binds=binds, root=root, shown=shown, gpus=None if real else GPU_DEVICES)


def _runtime_in(root: Path | None) -> Path:
    runtime = ensure_runtime(CACHE, root)
    install_project(runtime, REPOSITORY, root)
    return runtime


def simulated_gpus(machine: Machine, node: str | None = None, *, kind: str = "gpus") -> list[dict[str, Any]]:
    """GPUs, or MIG `slices`, as the simulated driver has them."""
    shown = json.loads(machine.run(["simulated-gpus", "show", "--json"], node=node).check().stdout)
    gpus: list[dict[str, Any]] = shown[kind]
    return gpus


def show_slices(machine: Machine, node: str | None = None) -> list[FoundGpu]:
    """Make the devices of a node's MIG slices and show them in /proc, as the driver does, by NVIDIA's MIG guide.

    Returns: the node's GPUs and slices as Slurm's AutoDetect=nvml finds them.
    """
    shown = json.loads(machine.run(["simulated-gpus", "show", "--json"], node=node).check().stdout)
    found = [FoundGpu("h200", (f"/dev/nvidia{gpu['index']}",), gpu["uuid"]) for gpu in shown["gpus"] if not gpu["mig"]]
    machine.make_directory("/dev/nvidia-caps")
    for one in shown["slices"]:
        instance = f"/proc/driver/nvidia/capabilities/gpu{one['gpu']}/mig/gi{one['instance']}"
        files = [f"/dev/nvidia{one['gpu']}"]
        for place, minor in zip((instance, f"{instance}/ci0"), one["caps"], strict=True):
            machine.write(f"{place}/access", f"DeviceFileMinor: {minor}\nDeviceFileMode: 292\n", node=node)
            files.append(f"/dev/nvidia-caps/nvidia-cap{minor}")
            make = 'test -e "$0" || mknod -m 444 "$0" c "$1" "$2"'
            machine.run(["sh", "-c", make, files[-1], str(CAPS_MAJOR), str(minor)]).check()
        found.append(FoundGpu(one["name"].rpartition(" ")[2], tuple(files), one["uuid"]))
    return found


def show_gpus_in_proc(machine: Machine, gpus: list[dict[str, Any]], node: str | None = None) -> None:
    """Show GPUs as the kernel's driver does (O69), to slurm-mps in /proc and to Slurm's AutoDetect=nvidia also in /sys;
    /dev/nvidia0 first.
    """
    for place in ("/proc/driver", "/sys/bus/pci/drivers"):
        machine.run(["mount", "-t", "tmpfs", "none", place], node=node).check()
    for minor, gpu in enumerate(gpus):
        address = gpu["pci_bus_id"].removeprefix("0000").lower()
        shown = f"Model: \t\t {gpu['name']}\nGPU UUID: \t {gpu['uuid']}\nDevice Minor: \t {minor}\n"
        shown += f"GPU Excluded:\t {gpu.get('excluded', 'No')}\n"
        machine.write(f"/proc/driver/nvidia/gpus/{address}/information", shown, node=node)
        processors = f"0-{(os.cpu_count() or 1) - 1}\n"
        machine.write(f"/sys/bus/pci/drivers/nvidia/{address}/local_cpulist", processors, node=node)


def install_hooks(machine: Machine) -> None:
    """Install plugin, scripts and sample configuration with the project's own ``make install-hooks``."""
    machine.run(
        ["make", "-s", "-C", str(REPOSITORY), "install-hooks", f"PLUGINDIR={PLUGIN_DIRECTORY}", f"PREFIX={MOUNT_POINT}"]
    ).check()


class Site(Throwaway):
    """A cluster with slurm-mps; use it as a context manager.

    config: the text of mps.toml; empty for defaults. upgraded_from: the release that it has until :meth:`upgrade`.
    slices: into what each of these GPUs is cut, on a site of one node.
    """

    def __init__(
        self,
        *,
        nodes: int = 2,
        gpus_per_node: int = 4,
        shards_per_node: int = 0,
        mps_per_node: int = 0,
        cpus_per_node: int = CPUS_PER_NODE,
        constrain_devices: bool = False,
        config: str = "",
        extra_slurm_conf: str = "",
        autodetect: str = "",
        plugstack: str | None = None,
        real: bool = False,
        upgraded_from: str = "",
        slices: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        chosen = release.chosen()
        now = release.RELEASES[upgraded_from] if upgraded_from else chosen
        self._then = chosen if upgraded_from else None
        self.machine = gpu_machine(real=real, of=now, then=self._then)
        self.real = real
        self.gpus_per_node = gpus_per_node
        self._config = config
        self._slices = slices or {}
        self.cluster = Cluster(
            self.machine,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            shards_per_node=shards_per_node,
            mps_per_node=mps_per_node,
            cpus_per_node=cpus_per_node,
            constrain_devices=constrain_devices,
            extra_slurm_conf=extra_slurm_conf,
            autodetect=autodetect,
            plugstack=plugstack,
            prolog="/etc/slurm/prolog.d/*",
            epilog="/etc/slurm/epilog.d/*",
            release=now,
        )

    def begin(self) -> None:
        self.machine.begin()
        if self.real:
            bundle.settle(self.machine)
        if self._then is not None:
            self._lay_next_usr()
        install_hooks(self.machine)
        self.configure(self._config)
        for name in self.cluster.node_names:
            self.machine.add_node(name)
            if self.real:
                continue
            self.node(name, "simulated-gpus", "create", str(self.gpus_per_node), "--seed", name).check()
            for gpu, profiles in self._slices.items():
                self.node(name, "simulated-gpus", "mig", str(gpu), *profiles).check()
            self.show_gpus_in_proc(name, self.gpus(name))
            if self._slices:
                self.cluster.found_gpus = show_slices(self.machine, name)
        self.cluster.begin()

    def close(self) -> None:
        try:
            self.cluster.close()
        finally:
            self.machine.close()

    def _lay_next_usr(self) -> None:
        """The next release's /usr with the simulated driver in it, made before the nodes so that all share it."""
        lay = f"""
            mount -t tmpfs none {NEXT}/made
            mkdir {NEXT}/made/upper {NEXT}/made/work {NEXT}/made/usr
            layers=lowerdir={NEXT}/root/usr,upperdir={NEXT}/made/upper,workdir={NEXT}/made/work
            mount -t overlay none -o $layers {NEXT}/made/usr
            cp -a {SIMULATOR}/bin/. {NEXT}/made/usr/bin/
            cp -a {SIMULATOR}/lib/. {NEXT}/made/usr/lib/x86_64-linux-gnu/
        """
        self.machine.make_directory(f"{NEXT}/made")
        self.machine.run(["sh", "-euc", lay]).check()

    def upgrade(self) -> None:
        """Upgrade Slurm as an admin does it under running jobs: stop the daemons, replace the files, start them again.

        The plugin is built and the hooks are installed anew; slurmstepds, control daemons and programs go on.
        """
        assert self._then is not None
        for daemon in ("slurmctld", *(f"slurmd-{name}" for name in self.nodes)):
            self.cluster.stop_daemon(daemon)
        for node in (None, *self.nodes):
            swap = f"mount --bind {NEXT}/made/usr /usr; mount --bind {NEXT}/opt {MOUNT_POINT}"
            self.machine.run(["sh", "-euc", swap], node=node).check()
        self.machine.run(["mount", "--bind", f"{NEXT}/plugin", str(REPOSITORY / "build/spank")]).check()
        install_hooks(self.machine)
        self.cluster.release = self._then
        self.cluster.start_controller()
        for name in self.nodes:
            self.cluster.start_node(name)

    def show_gpus_in_proc(self, node: str, gpus: list[dict[str, Any]]) -> None:
        """Show GPUs as the kernel's driver does, /dev/nvidia0 first."""
        show_gpus_in_proc(self.machine, gpus, node)

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.cluster.node_names

    def configure(self, text: str) -> None:
        """Replace the site configuration."""
        self.machine.write("/etc/slurm/mps.toml", text)

    def node(self, node: str, *argv: str, user: str | None = None, env: dict[str, str] | None = None) -> Result:
        """Run a command on a node, as root unless told otherwise."""
        return self.machine.run(argv, node=node, user=user, env=env)

    def fault(self, node: str, *settings: str) -> None:
        """Tell a node's simulated driver to misbehave; nothing for well again."""
        self.node(node, "simulated-gpus", "fault", "--clear").check()
        if settings:
            self.node(node, "simulated-gpus", "fault", *settings).check()

    def gpus(self, node: str) -> list[dict[str, Any]]:
        """The node's GPUs as the simulated driver has them."""
        return simulated_gpus(self.machine, node)

    def compute_modes(self, node: str) -> list[str]:
        return (
            self.node(node, "nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader")
            .check()
            .stdout.splitlines()
        )

    def set_compute_mode(self, node: str, index: int, mode: int) -> None:
        self.node(node, "simulated-gpus", "set-mode", str(index), str(mode)).check()

    def mps_processes(self) -> list[str]:
        """The command names of all MPS daemons and servers of the machine."""
        return [p.comm for p in self.machine.processes() if p.comm.startswith("nvidia-cuda-mps")]

    def verdict(self, job: Job) -> str:
        """The verdict that n1's prolog writes for a job, when it is there."""
        path = self.machine.path(f"{STATE_DIRECTORY}/jobs/{job}/verdict", node="n1")
        return self.cluster.until("the verdict", lambda: path.read_text() if path.exists() else None, 20)

    def change_verdict(self, job: Job, pattern: str, words: str) -> None:
        """Change lines of it."""
        changed = re.sub(pattern, words, self.verdict(job), flags=re.MULTILINE)
        self.machine.path(f"{STATE_DIRECTORY}/jobs/{job}/verdict", node="n1").write_text(changed)

    def state_files(self, node: str) -> list[str]:
        """What slurm-mps keeps of jobs and GPUs on a node."""
        places = [f"{STATE_DIRECTORY}/jobs", f"{STATE_DIRECTORY}/gpus"]
        return self.node(node, "find", *places, "-mindepth", "1").stdout.splitlines()

    def snapshot(self) -> Snapshot:
        """The machine as it is, when all jobs have ended."""
        self.cluster.wait_idle()
        processes = Counter((p.comm, p.uid) for p in self.machine.processes())
        directories = []
        modes = []
        for name in self.nodes:
            found = self.node(name, "find", "/tmp", "/dev/shm", "-xdev", "-mindepth", "1").stdout.splitlines()
            directories += [f"{name}:{path}" for path in found + self.state_files(name)]
            modes += [f"{name}:{mode}" for mode in self.compute_modes(name)]
        return Snapshot(
            tuple(sorted(f"{count} x {comm} of uid {uid}" for (comm, uid), count in processes.items())),
            tuple(sorted(directories)),
            tuple(modes),
        )


class MarkedSite(Site):
    """A site whose controller marks jobs as etc/job_submit.lua does."""

    def __init__(self) -> None:
        super().__init__(extra_slurm_conf="JobSubmitPlugins=lua")

    def configure(self, text: str) -> None:
        super().configure(text)
        self.machine.write("/etc/slurm/job_submit.lua", (SAMPLES / "job_submit.lua").read_text())


def main() -> int:
    """A shell in a site."""
    with Site() as site:
        print("site: users alice, bob, carol (su - alice); logs in /var/log/slurm; gone when the shell ends")
        for name, node in site.machine.nodes.items():
            print(f"site: {name} (its own /run, /tmp, /var/log): nsenter -t {node.pid} -m")
        environment = site.machine.environment(env={"TERM": "xterm", **mpi_environment()})
        return subprocess.call(site.machine.command(sys.argv[1:] or ["/bin/bash"]), env=environment)


if __name__ == "__main__":
    sys.exit(main())
