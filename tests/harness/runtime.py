"""The Python that jobs and the installed project run on inside a throw-away machine.

A virtual environment made from /usr/bin/python3, of the host or of another root file system, built once and
bind-mounted at ``/opt/slurm-mps``. Promises:
ordinary users of the machine can run it; it is built at that very path (in a mount namespace), so the scripts
in its ``bin`` name an interpreter that exists inside; building it changes nothing on the host outside the
cache directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNT_POINT = "/opt/slurm-mps"
BASE_PYTHON = "/usr/bin/python3"
REQUIREMENTS = (
    "nvidia-ml-py>=12.535",
    "jsonschema>=4.17",
    "mpi4py>=4.1,<5",
    "mpich>=5,<6",
    "rich>=13",
    "prometheus-client>=0.16",
    "setuptools>=77",
    "submitit>=1.5",
    "shtab>=1.7",
    "wheel",
)
WHEELS_VARIABLE = "SLURM_MPS_WHEELS"
"""Names a directory of wheels, pip's own among them, to install from where no registry can be reached."""
_LAYOUT = "1"  # to be raised when this module builds the environment in another way
_PIP_TIMEOUT_SECONDS = 600.0
_NOT_PACKAGED = ("tests/", "docs/", "build/", ".github/")
_PROJECT_MARK = ".project-sources"

# Runs "$@" where $1 is seen at $2. An overlay on the parent gives the mount point without making it on the
# host, and goes on showing what else is there (a local package index, say).
_AT_MOUNT_POINT = """set -eu
source=$1 target=$2; shift 2
mount -n -t tmpfs -o mode=755 none /media
mkdir /media/upper /media/work /media/source
mount -n --bind "$source" /media/source
parent=$(dirname "$target")
mount -n -t overlay none -o "lowerdir=$parent,upperdir=/media/upper,workdir=/media/work" "$parent"
mkdir -p "$target"
mount -n --bind /media/source "$target"
exec "$@"
"""

# Runs "$@" in the root file system $1, which stays as it is: $2 is seen at $3 there, and $4 where it is here.
_IN_ROOT = """set -eu
root=$1 source=$2 target=$3 shown=$4; shift 4
mount -n -t tmpfs -o mode=755 none /media
mkdir /media/upper /media/work /media/root
mount -n -t overlay none -o "lowerdir=$root,upperdir=/media/upper,workdir=/media/work" /media/root
mkdir -p "/media/root$target" "/media/root$shown"
mount -n --bind "$source" "/media/root$target"
mount -n --bind "$shown" "/media/root$shown"
mount -n --rbind /dev /media/root/dev
mount -n -t proc proc /media/root/proc
exec chroot /media/root "$@"
"""


def mpi_environment(runtime: str = MOUNT_POINT) -> dict[str, str]:
    """What an mpi4py program needs under ``srun --mpi=pmi2`` inside a machine, whose only interface is `lo`.

    - MPI4PY_LIBMPI: mpi4py loads the wheel's MPICH, and no MPI of the host's.
    - FI_PROVIDER: not needed on a plain host; keeps libfabric from a fast network that the host has, whose
      devices are not in the machine's /dev. The address on `lo` is found without FI_TCP_IFACE.
    - GLIBC_TUNABLES: memory comes zeroed. MPICH 5.0 sends 4 KB of its heap as an address, packed so that zeros take no
      room; where the heap held text, lines are longer than the 1,024 bytes that Slurm takes for one, and ranks hang.
    """
    zeroed = "glibc.malloc.tcache_count=0:glibc.malloc.perturb=255"
    return {"MPI4PY_LIBMPI": f"{runtime}/lib/libmpi.so.12", "FI_PROVIDER": "tcp", "GLIBC_TUNABLES": zeroed}


def ensure_runtime(cache_dir: str | Path, root: Path | None = None) -> Path:
    """Return the environment's directory on the host, built first where it is missing or its inputs changed.

    To be given to a machine as ``binds={ensure_runtime(cache, root): MOUNT_POINT}``. With `root` it is made of the
    Python there, of wheels that the host gets for it.
    """
    cache = Path(cache_dir).resolve()
    version = python_version(root)
    runtime = cache / f"runtime-{_key(version)}"
    with _lock(cache):
        if not runtime.is_dir():
            partial = runtime.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _say(f"building {runtime} from {BASE_PYTHON} {version} (once)")
            _run_at_mount_point(partial, [BASE_PYTHON, "-m", "venv", *_venv_options(root), MOUNT_POINT], root)
            _say(f"installing {', '.join(REQUIREMENTS)}")
            with tempfile.TemporaryDirectory(prefix="wheels-", dir=cache) as wheels:
                if root is not None:
                    _gather(Path(wheels), version)
                _pip(partial, ["install", *REQUIREMENTS], root, wheels if root else None)
            partial.rename(runtime)
    return runtime


def install_project(runtime: Path, checkout: str | Path, root: Path | None = None) -> None:
    """Install the project's package from `checkout`, unless these very sources are in there.

    Built from a copy: setuptools writes beside the sources, and a checkout stays as it is.
    """
    top = Path(checkout).resolve()
    with _lock(runtime.parent):
        sources = _project_sources(top)
        digest = _digest(top, sources)
        mark = runtime / _PROJECT_MARK
        if mark.exists() and mark.read_text() == digest:
            return
        _say(f"installing the project from {top}")
        mark.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="slurm-mps-build-", dir=runtime.parent) as scratch:
            copy = Path(scratch)
            for name in sources:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(top / name, copy / name)
            _pip(runtime, ["install", "--no-deps", "--no-build-isolation", "--force-reinstall", scratch], root)
        mark.write_text(digest)


def build_plugin(cache_dir: str | Path, checkout: str | Path, root: Path) -> Path:
    """Build the plugin with the compiler and the Slurm headers of another root. Returns its directory on the host."""
    top = Path(checkout).resolve()
    built = Path(cache_dir).resolve() / f"plugin-{root.name.removeprefix('root-')}"
    with _lock(built.parent):
        built.mkdir(exist_ok=True)
        make = ["make", "-s", "-C", str(top / "spank"), f"BUILD={MOUNT_POINT}"]
        _run_at_mount_point(built, make, root, top)
    return built


def python_version(root: Path | None) -> str:
    """The version of the Python that an environment is made of, such as 3.11.2."""
    line = [*(["chroot", str(root)] if root else []), BASE_PYTHON, "--version"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1]


def _key(version: str) -> str:
    """Names the inputs of a build: another key, another environment."""
    text = "\n".join((_LAYOUT, f"Python {version}", MOUNT_POINT, *REQUIREMENTS))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _project_sources(top: Path) -> list[str]:
    """The files that a build may use: all of git's without tests and docs; without git, the package."""
    if not (top / ".git").exists():
        package = (path for path in (top / "slurm_mps").rglob("*") if path.is_file() and path.suffix != ".pyc")
        shared = (path for name in ("spank", "prolog", "epilog", "etc") for path in (top / name).iterdir())
        tops = ["pyproject.toml", "setup.py", "LICENSE"]
        return sorted([*tops, *(str(path.relative_to(top)) for path in (*package, *shared) if path.is_file())])
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={top}", "-C", str(top), "ls-files", "-z", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = sorted(set(listed.stdout.split("\0")) - {""})
    return [name for name in names if not name.startswith(_NOT_PACKAGED) and (top / name).is_file()]


def _digest(top: Path, names: list[str]) -> str:
    """Names the contents of the sources."""
    total = hashlib.sha256()
    for name in names:
        total.update(f"{name}\0{hashlib.sha256((top / name).read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _gather(wheels: Path, python_version: str) -> None:
    """Get what an environment in a root needs to where it is seen there."""
    carried = os.environ.get(WHEELS_VARIABLE)
    if carried:
        shutil.copytree(carried, wheels, dirs_exist_ok=True)
    else:
        download(wheels, python_version)


def download(wheels: Path, python_version: str, *more: str) -> None:
    """Get what an environment of another Python needs, and `more`, so that it needs no network."""
    line = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--only-binary=:all:"]
    line += [f"--python-version={python_version}", f"--dest={wheels}", "pip", *REQUIREMENTS, *more]
    done = subprocess.run(line, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(line)}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def _pip(runtime: Path, words: list[str], root: Path | None = None, wheels: str | None = None) -> None:
    """Run the environment's pip at the environment's final path."""
    pip = [f"{MOUNT_POINT}/bin/python3", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = wheels or (None if root else os.environ.get(WHEELS_VARIABLE))
    if wheels:
        (own,) = Path(wheels).glob("pip-*.whl")
        pip[1:3] = [f"{own}/pip"]
        words = [words[0], "--no-index", "--find-links", wheels, *words[1:]]
        words += ["pip"] if root else []
    _run_at_mount_point(runtime, [*pip, *words], root)


def _venv_options(root: Path | None) -> list[str]:
    """Where there is no registry, pip itself comes as a wheel, and ensurepip may be missing."""
    return ["--without-pip"] if root or os.environ.get(WHEELS_VARIABLE) else []


def _run_at_mount_point(directory: Path, argv: list[str], root: Path | None = None, shown: Path | None = None) -> None:
    """Run a command that sees `directory` at MOUNT_POINT; all users can read what it makes.

    In another root it sees `shown` as well, or else what is beside `directory`.
    """
    command = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c"]
    if root is None:
        command += [_AT_MOUNT_POINT, "sh", str(directory), MOUNT_POINT, *argv]
    else:
        command += [_IN_ROOT, "sh", str(root), str(directory), MOUNT_POINT, str(shown or directory.parent), *argv]
    hidden = ("PYTHON", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", *(("PIP_",) if root else ()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        command,
        env=environment,
        cwd="/",
        umask=0o022,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_PIP_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(argv)}: exit {done.returncode}\n{done.stdout}")


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """One builder at a time, across test processes."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"harness: {text}", flush=True)
