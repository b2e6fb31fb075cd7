"""What a GPU machine without a registry lacks to run a throw-away site: Slurm, munge, a container engine, the libraries
of all three, and wheels.

``python3 -m tests.harness.bundle DIRECTORY`` collects it on a machine where ``make test`` runs; the plugin, which is
built for this very Slurm, travels in ``build/spank``. With ``--release`` it is another release's whole root file system
(release.py), with its plugin, and this machine's container engine. On the other machine the variable SLURM_MPS_BUNDLE
names the directory. Promises: it is laid over the throw-away machine alone, so that the GPU machine itself gets no file
but for the root in ``.cache``; of the libraries only those that the throw-away machine does not have are used.
"""

from __future__ import annotations

import argparse
import fnmatch
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from .release import BUNDLE_VARIABLE, RELEASES, ROOT_ARCHIVE, carried_root, ensure_root, own_release
from .runtime import WHEELS_VARIABLE, build_plugin, download, python_version

if TYPE_CHECKING:
    from .machine import Machine

PLUGINS = "usr/lib/x86_64-linux-gnu/slurm-wlm"
DAEMONS = ("slurmd", "slurmctld", "slurmstepd", "munged", "mungekey")
COMMANDS = ("srun", "sbatch", "salloc", "scontrol", "squeue", "sinfo", "scancel", "sdiag", "munge", "unmunge")
ENGINE = "ch-run"
"""Charliecloud's: of the container engines the one that is small and asks a node for nothing but user namespaces."""
DRIVER_PROGRAMS = ("nvidia-smi", "nvidia-cuda-mps-control", "nvidia-cuda-mps-server")
_LIBRARIES = "opt/bundle/lib"
_USED = "/opt/bundle/used"
_OF_THE_C_LIBRARY = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|nss_.*))\.so\.\d+")
_LOADED = ("libslurmfull.so", "auth_munge.so", "cred_munge.so", "cgroup_v1.so", "cgroup_v2.so", "mpi_pmi2.so")
"""Of the plugins those whose libraries come along; the others that a site uses need none of their own."""
_TEST_TOOLS = ("pytest>=8", "hypothesis>=6")
_NOT_IN_A_ROOT = (
    *("./dev/*", "./var/cache/*", "./var/lib/apt", "./var/lib/dpkg", "*/__pycache__"),
    *("./usr/share/*/*", "./usr/include", "./usr/lib/linux", "./usr/lib/systemd", "*/gconv", "*-gnu/systemd"),
    *("./usr/libexec", "./usr/lib/gcc", "./usr/bin/*-linux-gnu-*", "*.a", "*.o", "*san.so*", "*gprofng*"),
    *("*/libisl.*", "*/libbfd-*", "*/libopcodes-*", "*/libctf*", "*/libgmp.*", "*/libmp[cf]*", "*/libmvec.*"),
    *("*/perl*", "*/apt*", "*/libapt-*", "*dpkg*", "*/sqv", "*/strace", "*/openssl"),
    *("*/libX11*", "*/libze_*", "*/libxml2.*", "*/libslurm.so*"),
)
"""What no site needs: caches, documents, the compiler, Perl, apt, systemd, and what plugins that no site loads need."""


def directory() -> Path | None:
    """Where the bundle is; None on a machine that needs none. Its wheels then serve the runtime, too."""
    named = os.environ.get(BUNDLE_VARIABLE)
    if not named:
        return None
    os.environ.setdefault(WHEELS_VARIABLE, f"{Path(named).resolve()}/wheels")
    return Path(named).resolve()


def overlays() -> dict[str, list[str | Path]]:
    """What a machine lays over its file system."""
    bundle = directory()
    return {} if bundle is None else {f"/{top.name}": [top] for top in (bundle / "root").glob("*")}


def shown() -> list[str | Path]:
    """The files of the NVIDIA driver, which a machine with a carried root has not itself."""
    if carried_root() is None:
        return []
    files = [Path(found) for found in map(shutil.which, DRIVER_PROGRAMS) if found]
    for place in driver_places():
        files += [path for word in ("cuda", "nvidia") for path in Path(place).glob(f"lib{word}*.so.*")]
    return list({path.resolve(): None for path in files})


def driver_places() -> list[str]:
    """Where this machine's loader, as this program was started, finds the driver's libraries."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    known = re.findall(r"^\tlibcuda\.so\.1 .*x86-64.* => (.*)/libcuda", listed, re.MULTILINE)
    named = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [place for place in named if place and Path(place, "libcuda.so.1").exists()] or known


def carried_plugin() -> Path | None:
    """The plugin for a carried root, which has no compiler."""
    bundle = directory()
    return bundle / "plugin" if bundle and carried_root() else None


def settle(machine: Machine) -> None:
    """Inside a machine that has started: have every program, whatever its environment, find Slurm's libraries and the
    NVIDIA driver's, and the driver's programs in /usr/bin."""
    known = machine.run(["ldconfig", "-p"]).check().stdout
    used = [name for name in _names(machine.path(f"/{_LIBRARIES}")) if f"\t{name} " not in known]
    machine.make_directory(_USED)
    for name in used:
        machine.path(f"{_USED}/{name}").symlink_to(f"/{_LIBRARIES}/{name}")
    machine.write("/etc/ld.so.conf.d/slurm-mps-bundle.conf", "\n".join([*driver_places(), _USED, ""]))
    machine.run(["ldconfig"]).check()
    for program in DRIVER_PROGRAMS:
        found = shutil.which(program)
        place = machine.path(f"/usr/bin/{program}")
        if found and not os.path.lexists(place):
            place.symlink_to(found)


def _names(place: Path) -> list[str]:
    return sorted(os.listdir(place)) if place.is_dir() else []


def _copy(source: str, target: Path) -> None:
    """One program, whatever links (Debian's alternatives) lead to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(os.path.realpath(source), target)


def _needed(programs: list[Path]) -> dict[str, str]:
    """The libraries that these load, by soname, without those of the C library."""
    listed = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(\S+) => (/\S+)", listed)
    return {name: path for name, path in found if not _OF_THE_C_LIBRARY.fullmatch(name) and "slurm-wlm" not in path}


def collect(target: Path, *, slurm: bool) -> None:
    """This machine's own container engine, and its own Slurm if asked, into an empty directory."""
    root = target / "root"
    places = {"usr/sbin": DAEMONS, "usr/bin": (*COMMANDS, ENGINE)} if slurm else {"usr/bin": (ENGINE,)}
    programs = [root / place / name for place, names in places.items() for name in names]
    for program in programs:
        _copy(f"/{program.relative_to(root)}", program)
    if slurm:
        shutil.copytree(f"/{PLUGINS}", root / PLUGINS, ignore=shutil.ignore_patterns("*.a"), symlinks=True)
        (root / "usr/sbin/slurmstepd-wlm").symlink_to("slurmstepd")
        programs += [root / PLUGINS / name for name in _LOADED]
    for name, path in _needed(programs).items():
        _copy(path, root / _LIBRARIES / name)


def pack(root: Path, archive: Path) -> None:
    """A root file system, as small as it gets."""

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if any(fnmatch.fnmatchcase(member.name, one) for one in _NOT_IN_A_ROOT) else member

    with (
        lzma.open(archive, "w", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w|") as files,
    ):
        files.add(root, ".", filter=wanted)


def main() -> int:
    """Collect a bundle."""
    from .cluster import REPOSITORY
    from .site import CACHE

    parser = argparse.ArgumentParser(prog="python3 -m tests.harness.bundle", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the other machine's /usr/bin/python3")
    parser.add_argument("--release", choices=RELEASES, default=own_release(), help="default: this machine's own")
    options = parser.parse_args()
    if options.directory.exists() and not (options.directory / "release").exists():
        parser.error(f"{options.directory} is there, and no bundle")
    shutil.rmtree(options.directory, ignore_errors=True)
    options.directory.mkdir(parents=True)
    (options.directory / "release").write_text(f"{options.release}\n")
    root = ensure_root(RELEASES[options.release], CACHE)
    collect(options.directory, slurm=root is None)
    if root is not None:
        shutil.copytree(build_plugin(CACHE, REPOSITORY, root), options.directory / "plugin")
        pack(root, options.directory / ROOT_ARCHIVE)
    for python in {options.python, python_version(root)} if root else {options.python}:
        download(options.directory / "wheels", python, *_TEST_TOOLS)
    size = sum(path.stat().st_size for path in options.directory.rglob("*") if path.is_file())
    beside = "" if root else ", beside build/spank"
    print(f"{options.directory}: {size / 1e6:.0f} MB; there {BUNDLE_VARIABLE} names it{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
