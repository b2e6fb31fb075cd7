"""Reads a plugin file without loading it: the Slurm that it was built for, its own version, and the verdicts that it
reads.

Slurm refuses a SPANK plugin of another release, and a required plugin that is refused fails every srun, sbatch and
salloc and drains every node that starts a job. `install` and `doctor` therefore look before Slurm does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike

from ..errors import MpsError

_SIZE_MAX = 16 * 2**20
#: slurm_mps_plugin of spank_mps.c: version, newest verdict that it reads, SLURM_VERSION_NUMBER of Slurm's headers.
_MARK = re.compile(rb"slurm-mps plugin ([\w.+-]{1,64}) verdict (\d{1,9}) slurm 0x([0-9a-f]{1,8})\n\0")


@dataclass(frozen=True)
class PluginFile:
    """``slurm_release`` such as 22.05.8: of the headers it was built with. ``version`` is slurm-mps' own.

    ``verdict_version`` is the newest verdict that it reads.
    """

    slurm_release: str
    version: str
    verdict_version: int

    def loads_in(self, slurm_release: str) -> bool:
        """Whether a Slurm of this release takes it: a release of the same year and month does."""
        return self.slurm_release.split(".")[:2] == slurm_release.split(".")[:2]


def read_plugin(path: str | PathLike[str]) -> PluginFile:
    """Read a plugin file's mark, and run nothing of it.

    Raises: MpsError when there is no such file, or it is not slurm-mps' plugin.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_SIZE_MAX)
    except OSError as error:
        raise MpsError(f"{path}: {error.strerror}") from None
    mark = _MARK.search(data) if data.startswith(b"\x7fELF") else None
    if not mark:
        raise MpsError(f"{path} is not the plugin of slurm-mps")
    version, verdict, slurm = (word.decode() for word in mark.groups())
    year, month, patch = int(slurm, 16) >> 16, int(slurm, 16) >> 8 & 255, int(slurm, 16) & 255
    return PluginFile(f"{year}.{month:02d}.{patch}", version, int(verdict))
