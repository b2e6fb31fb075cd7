"""A site to be examined, in health and with one fault at a time."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.harness.reports import report as checked
from tests.harness.site import PYTHON, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

COMMAND = [PYTHON, "-I", "-m", "slurm_mps.cli.main"]
#: A host that is none of slurm.conf's.
ELSEWHERE = ["unshare", "--uts", "sh", "-c", 'hostname login1 && exec "$@"', "sh"]


@dataclass(frozen=True)
class Diagnosis:
    """What doctor said: its exit status, and each finding with its severity."""

    status: int
    findings: tuple[Mapping[str, str], ...]

    def of(self, *severities: str) -> dict[str, str]:
        """What was found of these severities, by the check's id."""
        return {one["check"]: one["what"] for one in self.findings if one["severity"] in severities}

    @property
    def faults(self) -> dict[str, str]:
        return {one["check"]: one["severity"] for one in self.findings if one["severity"] in ("problem", "warning")}


class Patient:
    """A site whose files are changed and put back."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._kept: dict[Path, tuple[bytes | None, os.stat_result | None]] = {}
        self._undo: list[Callable[[], object]] = []

    def run(self, *argv: str, user: str | None = None, elsewhere: bool = False, **env: str) -> tuple[int, str, str]:
        """Run the command on node n1, or on a host that Slurm knows no node of."""
        before = list(ELSEWHERE) if elsewhere else []
        if elsewhere and user:
            before += ["setpriv", "--reuid=20001", "--regid=20001", "--clear-groups"]
            user = None
        node = None if elsewhere else "n1"
        result = self.site.machine.run([*before, *COMMAND, *argv], node=node, user=user, env=env)
        return result.returncode, result.stdout, result.stderr

    def examine(self, *argv: str, user: str | None = None, elsewhere: bool = False) -> Diagnosis:
        status, out, errors = self.run("doctor", "--json", *argv, user=user, elsewhere=elsewhere)
        assert out, errors
        found = checked(out, status)
        assert found["report"] == "doctor/1"
        return Diagnosis(status, tuple(found["findings"]))

    # ------------------------------------------------------------------------------------------------- changes

    def _keep(self, path: str) -> Path:
        place = self.site.machine.path(path, node="n1")
        if place not in self._kept:
            there = place.is_file()
            self._kept[place] = (place.read_bytes() if there else None, place.stat() if place.exists() else None)
        return place

    def write(self, path: str, text: str | bytes, mode: int = 0o644) -> None:
        place = self._keep(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text.encode() if isinstance(text, str) else text)
        place.chmod(mode)

    def read(self, path: str) -> str:
        return self.site.machine.path(path, node="n1").read_text()

    def append(self, path: str, text: str) -> None:
        self.write(path, f"{self.read(path)}{text}\n")

    def edit(self, path: str, old: str, new: str) -> None:
        text = self.read(path)
        assert old in text
        place = self._keep(path)
        place.write_text(text.replace(old, new))

    def remove(self, path: str) -> None:
        self._keep(path).unlink()

    def chmod(self, path: str, mode: int) -> None:
        self._keep(path).chmod(mode)

    def chown(self, path: str, uid: int) -> None:
        os.chown(self._keep(path), uid, -1)

    def shell(self, text: str, undo: str = "") -> str:
        """Run a script on the node, and another when the test is over."""
        if undo:
            self._undo.append(lambda: self.site.node("n1", "sh", "-c", undo).check())
        return self.site.node("n1", "sh", "-c", text).check().stdout

    def without_slurmd(self) -> None:
        """End the node's slurmd until the test is over, and until it has read the files that are put back."""
        cluster, written = self.site.cluster, self.site.machine.path("/run/slurmd-n1.pid", node="n1")
        cluster.stop_daemon("slurmd-n1")

        def start() -> None:
            cluster.start_node("n1")
            cluster.until("slurmd's pid", lambda: written.exists() or None, 20, "slurmd-n1")

        self._undo.append(start)

    def heal(self) -> None:
        """Put files back and undo everything else, newest first."""
        for place, (data, status) in reversed(self._kept.items()):
            if status is None:
                if place.is_dir():
                    shutil.rmtree(place)
                place.unlink(missing_ok=True)
                continue
            if data is not None:
                place.write_bytes(data)
            place.chmod(stat.S_IMODE(status.st_mode))
            os.chown(place, status.st_uid, status.st_gid)
        for undo in reversed(self._undo):
            undo()
        self._kept.clear()
        self._undo.clear()
        self.site.fault("n1")


@pytest.fixture(scope="session")
def used_site(shared_site: Site) -> Site:
    """The shared site after a job with MPS: what the prolog makes once is there."""
    shared_site.cluster.srun("-wn1", "--gres=gpu:1", "--mps", "true").check()
    shared_site.cluster.wait_idle()
    return shared_site


@pytest.fixture
def patient(used_site: Site) -> Iterator[Patient]:
    """The shared site, to be changed; put back afterwards, and healthy again."""
    one = Patient(used_site)
    try:
        yield one
    finally:
        one.heal()


@pytest.fixture(params=["free", "constrained"])
def healthy(request: pytest.FixtureRequest) -> Patient:
    """A good cluster, with devices confined or not."""
    return Patient(request.getfixturevalue("shared_site" if request.param == "free" else "shared_constrained_site"))
