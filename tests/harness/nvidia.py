"""NVIDIA's own control and server programs, which run on a machine without a GPU (O83).

Debian's non-free has them. They are fetched with apt, whose signatures hold, into the cache directory; non-free is a
source of that download alone, and nothing is installed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from .release import mirror_of_this_machine

PACKAGE = "nvidia-cuda-mps"
SUITES = {535: "bookworm", 550: "trixie"}
"""Which suite has a driver branch's programs."""
PROGRAMS = ("nvidia-cuda-mps-control", "nvidia-cuda-mps-server")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_TIMEOUT_SECONDS = 120.0
_CACHE = Path(__file__).parents[2] / ".cache"


class NotFetchedError(Exception):
    """The programs cannot be had here; the text says why."""


def programs_of(branch: int) -> Path:
    """The directory with a driver branch's PROGRAMS; where they cannot be had the test is left out, but not in a CI."""
    try:
        return _programs_of(branch)
    except NotFetchedError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))


@cache
def _programs_of(branch: int) -> Path:
    """Fetch them first where they are not there. Raises: NotFetchedError."""
    found = _CACHE / f"{PACKAGE}-{branch}"
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / f"{PACKAGE}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not found.is_dir():
            _fetch(branch, found)
    return found


def _fetch(branch: int, found: Path) -> None:
    """Make the directory beside its place and rename it, so that it is whole or absent."""
    work = found.with_suffix(".partial")
    shutil.rmtree(work, ignore_errors=True)
    for part in ("lists/partial", "cache/archives/partial", "programs"):
        (work / part).mkdir(parents=True)
    source = work / "sources.list"
    source.write_text(f"deb [signed-by={_KEYRING}] {mirror_of_this_machine()} {SUITES[branch]} non-free\n")
    places = {
        "Dir::Etc::SourceList": source,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": work / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": work / "cache",
    }
    settings = {
        **places,
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "root",  # the cache is a directory that _apt may not enter
        "Acquire::Retries": 1,
        "Acquire::http::Timeout": 20,
        "Acquire::Languages": "none",
        "APT::Update::Error-Mode": "any",
    }
    apt = ["apt-get", "-q", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    _run(branch, [*apt, "update"], work)
    _run(branch, [*apt, "download", f"{PACKAGE}={branch}.*"], work)
    (package,) = work.glob("*.deb")
    _run(branch, ["dpkg", "-x", str(package), "files"], work)
    for name in PROGRAMS:
        next((work / "files").rglob(name)).rename(work / "programs" / name)
    (work / "programs").rename(found)
    shutil.rmtree(work)


def _run(branch: int, argv: list[str], work: Path) -> None:
    try:
        done = subprocess.run(argv, cwd=work, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFetchedError(f"NVIDIA's control program {branch}: {error}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))] or ["no message"]
        raise NotFetchedError(f"NVIDIA's control program {branch} could not be fetched from Debian: {said[0]}")
