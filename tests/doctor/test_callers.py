"""Which scripts run, and in which order, by their files alone; test_faults.py has them in a site."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from slurm_mps.doctor import callers
from slurm_mps.doctor.callers import Script, Scripts
from slurm_mps.doctor.checks import hooks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from slurm_mps.doctor.facts import Facts

OURS = "# slurm-mps\nexec python3 /opt/slurm_mps/hook.py\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "epilog.d"
    path.mkdir()
    return path


def in_order(*tops: Path) -> list[Script]:
    known = Scripts()
    return known.in_order([known.read(str(path)) for path in tops])


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("#!/bin/sh", *lines)))
    return path


@pytest.mark.parametrize("count", [24, 48])
def test_scripts_that_name_their_own_directory_are_read_and_looked_through_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """What is left to do for each way from one to another is to see that there is nothing left to do."""
    tops = [write(directory / f"{number}-site", f"ls {directory}/* >/dev/null") for number in range(10, 10 + count)]
    done: Counter[str] = Counter()

    def count_calls(name: str) -> None:
        work: Callable[..., object] = getattr(callers, name)

        def counted(first: Script | str, *more: object) -> object:
            done[f"{name} {first.path if isinstance(first, Script) else first}"] += 1
            return work(first, *more)

        monkeypatch.setattr(callers, name, counted)

    for name in ("read_text", "_resolved_lines"):
        count_calls(name)
    parts = in_order(*tops)
    assert done == {f"{name} {top}": 1 for name in ("read_text", "_resolved_lines") for top in tops}
    assert {(part.top, part.path) for part in parts} == {(str(top), str(path)) for top in tops for path in tops}
    assert len(parts) <= 3 * count**2, "from each script to each: what stands before a call and after it, and the whole"


class Searched:
    """A pattern that keeps what was searched for it."""

    def __init__(self, pattern: str) -> None:
        self.codes: list[str] = []
        self._pattern = re.compile(pattern)

    def search(self, code: str) -> re.Match[str] | None:
        self.codes.append(code)
        return self._pattern.search(code)


def test_a_check_searches_each_text_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text may be of 64 KiB, and comes once for each script of slurmd's that leads to it."""
    tops = [write(directory / f"{number}-site", f"ls {directory}/*", "pkill sleep") for number in range(10, 20)]
    ours = directory.parent / "ours"
    ours.write_text(OURS)
    kills = Searched("pkill")
    monkeypatch.setattr(hooks, "_KILLS", kills)
    facts = cast("Facts", SimpleNamespace(epilog_parts=in_order(*tops, ours)))
    assert len({said.what for said in hooks.epilog_order(facts)}) == len(tops)
    assert kills.codes
    assert max(Counter(kills.codes).values()) == 1


def test_what_runs_again_after_ours_is_told_again(directory: Path) -> None:
    """Before ours it does no harm: that it runs there is not all that is to be known of it."""
    helper, ours = write(directory / "helper", "nvidia-smi -c 0"), write(directory / "ours", OURS)
    again = [str(helper)] * 5
    top = write(directory.parent / "epilog.sh", *again, str(ours), *again)
    parts = [part for part in in_order(top) if part.path != str(top)]
    assert [part.path for part in parts] == [str(helper), str(helper), str(ours), str(helper)]
    assert {part.top for part in parts} == {str(top)}


@pytest.mark.parametrize(
    ("line", "found"), [("[ -x /usr/bin/pkill ] || exit 0", False), ("/usr/bin/pkill -u $SLURM_JOB_USER", True)]
)
def test_what_runs_again_is_judged_by_what_it_does_too(directory: Path, line: str, *, found: bool) -> None:
    """A test is no call, and what the script runs in turn is a script of its own."""
    other, ours = write(directory / "other", "true"), write(directory / "ours", OURS)
    helper = write(directory / "helper", line, f"{other} pkill", "true")
    again = [str(helper)] * 2
    parts = in_order(write(directory.parent / "epilog.sh", *again, str(ours), *again))
    helpers = [part.code for part in parts if part.path == str(helper)]
    assert ["bin/pkill" in code for code in helpers] == [found, False, found, found], "in two parts, and twice as one"
    assert str(other) not in "".join(helpers)
