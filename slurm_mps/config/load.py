"""The site configuration as the prolog has it: compiled once, and again when the file has changed."""

from __future__ import annotations

import os
import sys
from time import monotonic

from .. import __version__
from ..node import processes
from ..node.files import open_trusted
from .settings import CONFIG_DIRECTORY, CONFIG_NAME, CONFIG_PATH, DEFAULTS, PARTITIONS_PATH, ConfigError, from_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from .settings import SiteConfig

    class Cache(Protocol):
        """Where the compiled form is kept between jobs."""

        def read_compiled_config(self, stamp: str = "", partition: str = "") -> SiteConfig | None: ...
        def keep_compiled_config(self, stamp: str, lines: list[str]) -> None: ...
        def lock_config(self, timeout_seconds: float) -> bool: ...
        def unlock_config(self) -> None: ...


def load_config(cache: Cache | None, timeout_seconds: float, partition: str = "") -> SiteConfig:
    """The site configuration: defaults without a file, else the compiled form, made anew when the file has changed.

    `partition` is the job's; "" has what holds where no partition says otherwise. The directory may be a link: the
    directory behind it is checked.
    Raises: ConfigError when the file is wrong; NodeError when it can be written by others than root.
    """
    try:
        with open_trusted(os.path.realpath(CONFIG_DIRECTORY)) as directory:
            status = os.stat(CONFIG_NAME, dir_fd=directory.fd)
            place = f"{status.st_dev}:{status.st_ino}:{status.st_size}"
            stamp = f"{__version__}:{place}:{status.st_mtime_ns}:{status.st_ctime_ns}"
            if cache is None:
                return from_lines(_compile(directory.read(CONFIG_NAME), timeout_seconds), partition)
            config = cache.read_compiled_config(stamp, partition)
            if config is None:
                end = monotonic() + timeout_seconds
                # Of prologs that start together one compiles. Where that takes long, or cannot be kept, each does.
                locked = cache.lock_config(timeout_seconds / 3)
                try:
                    config = cache.read_compiled_config(stamp, partition)
                    if config is None:
                        lines = _compile(directory.read(CONFIG_NAME), end - monotonic())
                        if locked:  # two would write the same file
                            cache.keep_compiled_config(stamp, lines)
                        config = from_lines(lines, partition)
                finally:
                    if locked:
                        cache.unlock_config()
            return config
    except FileNotFoundError:
        return DEFAULTS


def mps_of_partition(partition: str) -> str:
    """The MPS of a partition's jobs that do not ask for it: ``per-node``, ``per-gpu``, or empty for none.

    It stands in a file of the partition's name and not in mps.toml, so that the prolog's shell sees it without
    Python.
    Raises: ConfigError when the file says something else; NodeError when it can be written by others than root.
    """
    if not partition:
        return ""
    try:
        with open_trusted(os.path.realpath(PARTITIONS_PATH)) as directory:
            word = directory.read(partition).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""
    if word not in ("per-node", "per-gpu"):
        raise ConfigError([f"{PARTITIONS_PATH}/{partition}: expected per-node or per-gpu"])
    return word


def _compile(text: bytes, timeout_seconds: float) -> list[str]:
    """Check and compile the file in a process of its own: here neither jsonschema nor site-packages may come in."""
    outcome = processes.run(
        [sys.executable, "-I", "-m", "slurm_mps.config.file", CONFIG_PATH],
        {"PATH": "/usr/bin:/bin"},
        timeout_seconds,
        text.decode("utf-8", "surrogateescape"),
    )
    if outcome.status:
        raise ConfigError(outcome.errors.splitlines() or [f"{CONFIG_PATH}: cannot be checked"])
    return outcome.output.splitlines()
