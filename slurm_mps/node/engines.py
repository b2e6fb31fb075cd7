"""Container engines whose site file can give every container the state directory (docs/containers.md)."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass

from .reading import read_text

_STATE = "/run/slurm-mps"
_MOUNTS = "/etc/enroot/mounts.d"
_BIND = f"bind path = {_STATE}"
#: A line of apptainer.conf (SOURCE, or SOURCE:TARGET and more), or of an fstab.
_BIND_LINE = re.compile(r"\s*(?:bind path\s*=\s*)?(/[^\s:]*)(?:[\s:]+(/[^\s:]*))?")
_FSTAB = f"{_STATE} {_STATE} none x-create=dir,bind,ro,nosuid,nodev,nofail,silent"


@dataclass(frozen=True)
class Engine:
    """An engine, which is here where `there` is: `path` takes `line`, which any file of `pattern` may have."""

    name: str
    there: str
    path: str
    pattern: str
    line: str

    @property
    def lacks_line(self) -> bool:
        return os.path.exists(self.there) and not any(map(_binds_state, glob.glob(self.pattern)))


def _binds_state(path: str) -> bool:
    """Whether a line of the file binds the state directory, or one above it, to its own place."""
    try:
        found = map(_BIND_LINE.match, read_text(path).splitlines())
    except OSError:
        return False
    binds = [line.groups() for line in found if line]
    return any(
        target in (None, source) and f"{_STATE}/".startswith(f"{source.rstrip('/')}/") for source, target in binds
    )


def _of_one_file(name: str, path: str) -> Engine:
    return Engine(name, path, path, path, _BIND)


ENROOT = Engine("enroot", _MOUNTS, f"{_MOUNTS}/50-slurm-mps.fstab", f"{_MOUNTS}/*.fstab", _FSTAB)
OTHERS = (
    _of_one_file("Apptainer", "/etc/apptainer/apptainer.conf"),
    _of_one_file("SingularityCE", "/etc/singularity/singularity.conf"),
)
