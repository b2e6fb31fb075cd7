"""Builds the plugin from the sources that came with the package, for the Slurm of this machine and no other."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping

from .. import __version__
from ..errors import MpsError
from ..job.verdict import VERDICT_VERSION
from ..node import processes
from ..slurm.host import PLUGIN
from ..slurm.plugin_file import read_plugin
from ..slurm.programs import find_program

_BUILD_SECONDS = 120.0
_NEEDS = (
    "gcc, make, the C library's headers and Slurm's are needed (Debian: gcc make libc6-dev libslurm-dev; "
    "Red Hat: gcc make glibc-devel slurm-devel), or a plugin built elsewhere (--plugin)"
)
_HEADERS = "install the headers of the Slurm that runs; --slurm-include names a directory of them"


def share_directory() -> str:
    """Where the plugin's sources, the scripts and the samples are: in the installed package, or in a checkout.

    Raises: MpsError when the package came without them.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for place in (f"{package}/share", os.path.dirname(package)):
        if os.path.exists(f"{place}/spank/spank_mps.c"):
            return place
    raise MpsError(f"{package} came without the plugin's sources", "install slurm-mps from its own wheel")


def build_plugin(release: str, include: str | None, environment: Mapping[str, str]) -> bytes:
    """Build the plugin in a directory of its own that is gone afterwards.

    `include` is where Slurm's headers are, if not where the compiler looks.
    Raises: MpsError when it cannot be built, or is for another Slurm than `release`.
    """
    given = {"PATH": environment.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"}
    with tempfile.TemporaryDirectory(prefix="slurm-mps-build-") as directory:
        argv = [
            find_program("make", given["PATH"]) or "make",
            "--no-print-directory",
            "-C",
            f"{share_directory()}/spank",
        ]
        argv += [f"BUILD={directory}", f"VERSION={__version__}", f"CPPFLAGS={f'-isystem {include}' if include else ''}"]
        try:
            outcome = processes.run(argv, given, _BUILD_SECONDS)
        except MpsError as error:
            raise MpsError(f"the plugin cannot be built: {error}", _NEEDS) from None
        if outcome.status:
            lines = [line for line in outcome.errors.splitlines() if "error" in line.lower() or "not found" in line]
            why = lines[0] if lines else outcome.errors.strip()[-200:]
            raise MpsError(f"the plugin cannot be built: {why}", _NEEDS)
        return read_plugin_for(release, f"{directory}/{PLUGIN}", _HEADERS)


def read_plugin_for(release: str, path: str, hint: str = "build it where that Slurm is") -> bytes:
    """Read a plugin that must be for this Slurm.

    Raises: MpsError when it is not: a `required` plugin of another release stops every srun, and slurmd itself; or when
    it does not read our prolog's verdicts: then it refuses the tasks of every job with MPS.
    """
    plugin = read_plugin(path)
    if plugin.verdict_version < VERDICT_VERSION:
        raise MpsError(
            f"the plugin {path} is older than this slurm-mps: it reads verdicts up to version "
            f"{plugin.verdict_version}, and the prolog writes {VERDICT_VERSION}",
            "build it of the same checkout",
        )
    if not plugin.loads_in(release):
        raise MpsError(f"the plugin is for Slurm {plugin.slurm_release}, and {release} runs here", hint)
    with open(path, "rb") as file:
        return file.read()
