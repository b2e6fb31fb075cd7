"""What a GPU machine without a registry lacks to run a throw-away site: Slurm, munge, their libraries, and wheels.

``python3 -m tests.harness.bundle DIRECTORY`` collects it on a machine where ``make test`` runs; the plugin, which is
built for this very Slurm, travels in ``build/spank``. On the other machine the variable SLURM_MPS_BUNDLE names the
directory. Promises: it is laid over the throw-away machine alone, so that the GPU machine itself gets no file; of the
libraries only those that it does not have are used.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .release import BUNDLE_VARIABLE, own_release
from .runtime import REQUIREMENTS, WHEELS_VARIABLE

if TYPE_CHECKING:
    from .machine import Machine

PLUGINS = "usr/lib/x86_64-linux-gnu/slurm-wlm"
DAEMONS = ("slurmd", "slurmctld", "slurmstepd", "munged", "mungekey")
COMMANDS = ("srun", "sbatch", "salloc", "scontrol", "squeue", "sinfo", "scancel", "sdiag", "munge", "unmunge")
DRIVER_PROGRAMS = ("nvidia-smi", "nvidia-cuda-mps-control", "nvidia-cuda-mps-server")
_LIBRARIES = "opt/bundle/lib"
_USED = "/opt/bundle/used"
_OF_THE_C_LIBRARY = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|nss_.*))\.so\.\d+")
_LOADED = ("libslurmfull.so", "auth_munge.so", "cred_munge.so", "cgroup_v1.so", "cgroup_v2.so", "mpi_pmi2.so")
"""Of the plugins those whose libraries come along; the others that a site uses need none of their own."""
_TEST_TOOLS = ("pip", "pytest>=8", "hypothesis>=6")


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
    return {} if bundle is None else {f"/{top.name}": [top] for top in (bundle / "root").iterdir()}


def settle(machine: Machine) -> None:
    """Inside a machine that has started: have every program, whatever its environment, find Slurm's libraries and the
    NVIDIA driver's, and the driver's programs in /usr/bin."""
    known = machine.run(["ldconfig", "-p"]).check().stdout
    used = [name for name in _names(machine.path(f"/{_LIBRARIES}")) if f"\t{name} " not in known]
    machine.make_directory(_USED)
    for name in used:
        machine.path(f"{_USED}/{name}").symlink_to(f"/{_LIBRARIES}/{name}")
    where = [
        place for place in os.environ.get("LD_LIBRARY_PATH", "").split(":") if Path(place, "libcuda.so.1").exists()
    ]
    machine.write("/etc/ld.so.conf.d/slurm-mps-bundle.conf", "\n".join([*where, _USED, ""]))
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


def collect(target: Path, python: str) -> None:
    """Fill an empty directory."""
    (target / "release").write_text(f"{own_release()}\n")
    root = target / "root"
    for place, names in (("usr/sbin", DAEMONS), ("usr/bin", COMMANDS)):
        for name in names:
            _copy(f"/{place}/{name}", root / place / name)
    shutil.copytree(f"/{PLUGINS}", root / PLUGINS, ignore=shutil.ignore_patterns("*.a"), symlinks=True)
    (root / "usr/sbin/slurmstepd-wlm").symlink_to("slurmstepd")
    programs = [path for place in ("usr/sbin", "usr/bin") for path in (root / place).iterdir()]
    for name, path in _needed(programs + [root / PLUGINS / name for name in _LOADED]).items():
        _copy(path, root / _LIBRARIES / name)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)]
    words = ["download", "--quiet", "--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    words += [*platforms, "--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    subprocess.run(
        [sys.executable, "-m", "pip", *words, "-d", str(target / "wheels"), *REQUIREMENTS, *_TEST_TOOLS], check=True
    )


def main() -> int:
    """Collect a bundle."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.harness.bundle", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the other machine's /usr/bin/python3")
    options = parser.parse_args()
    if options.directory.exists() and not (options.directory / "release").exists():
        parser.error(f"{options.directory} is there, and no bundle")
    shutil.rmtree(options.directory, ignore_errors=True)
    options.directory.mkdir(parents=True)
    collect(options.directory, options.python)
    size = sum(path.stat().st_size for path in options.directory.rglob("*") if path.is_file())
    print(f"{options.directory}: {size / 1e6:.0f} MB; there {BUNDLE_VARIABLE} names it, beside build/spank")
    return 0


if __name__ == "__main__":
    sys.exit(main())
