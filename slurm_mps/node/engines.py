"""Container engines whose site file can give every container the state directory (docs/containers.md)."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass

from .reading import read_text

_STATE = "/run/slurm-mps"
_MOUNTS = "/etc/enroot/mounts.d"
_BIND = f"bind path = {_STATE}"
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
        return os.path.exists(self.there) and not any(map(_names_state, glob.glob(self.pattern)))


def _names_state(path: str) -> bool:
    try:
        lines = read_text(path).splitlines()
    except OSError:
        return False
    return any(_STATE in line.partition("#")[0] for line in lines)


def _of_one_file(name: str, path: str) -> Engine:
    return Engine(name, path, path, path, _BIND)


ENROOT = Engine("enroot", _MOUNTS, f"{_MOUNTS}/50-slurm-mps.fstab", f"{_MOUNTS}/*.fstab", _FSTAB)
OTHERS = (
    _of_one_file("Apptainer", "/etc/apptainer/apptainer.conf"),
    _of_one_file("SingularityCE", "/etc/singularity/singularity.conf"),
)
