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
        return os.path.exists(self.there) and not self._bound()

    @property
    def needs_directory(self) -> bool:
        """Whether a line names the state directory itself: Apptainer starts no container where it is missing."""
        return _STATE in self._bound()

    def _bound(self) -> set[str]:
        """What the lines bind to its own place: the state directory, or directories above it."""
        return {source for path in glob.glob(self.pattern) for source in _bound_by(path)}


def _bound_by(path: str) -> set[str]:
    try:
        found = map(_BIND_LINE.match, read_text(path).splitlines())
    except OSError:
        return set()
    binds = [line.groups() for line in found if line]
    sources = {source.rstrip("/") for source, target in binds if target in (None, source)}
    return {source for source in sources if f"{_STATE}/".startswith(f"{source}/")}


def _of_one_file(name: str, path: str) -> Engine:
    return Engine(name, path, path, path, _BIND)


ENROOT = Engine("enroot", _MOUNTS, f"{_MOUNTS}/50-slurm-mps.fstab", f"{_MOUNTS}/*.fstab", _FSTAB)
OTHERS = (
    _of_one_file("Apptainer", "/etc/apptainer/apptainer.conf"),
    _of_one_file("SingularityCE", "/etc/singularity/singularity.conf"),
)
