"""Where Slurm's programs are."""

from __future__ import annotations

import os

#: Of Slurm's own build, of the distributions and SchedMD's packages, of cloud images.
_PREFIXES = ("/usr/local", "/usr", "/opt/slurm", "/usr/local/slurm")
PLACES = tuple(f"{prefix}/{name}" for prefix in _PREFIXES for name in ("bin", "sbin"))


def find_program(name: str, path: str) -> str:
    """The path of one of Slurm's programs: in a PATH such as ``/usr/bin:/bin``, or else in the usual places.

    Returns: empty where there is none.
    """
    for place in (*path.split(":"), *PLACES):
        program = f"{place}/{name}"
        if place.startswith("/") and os.access(program, os.X_OK):
            return program
    return ""
