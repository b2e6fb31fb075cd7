"""CONTRIBUTING.md can be followed: its session goes as it shows, and the files that it names are there."""

from __future__ import annotations

import re

from tests.harness.cluster import REPOSITORY
from tests.lab.session import PAGE, play, recorded

_NUMBER = re.compile(r"\b[0-9a-f.-]*[0-9][0-9a-f.-]*\b")  # pids, checksums, the boot's id
_NAME = re.compile(r"`((?:[\w.\[\]-]+/)*[\w\[\]-]+(?:/|\.(?:py|c|h|\[ch\]|md|json|lua)))`")


def comparable(session: str) -> list[list[str]]:
    """Its words, without what is another each time."""
    return [_NUMBER.sub("0", line).split() for line in session.splitlines()]


def test_the_session_goes_as_the_page_shows() -> None:
    """``python3 -m tests.lab.session`` writes it anew."""
    session = recorded()
    assert comparable(play(session)) == comparable(session)


def test_the_files_that_the_page_names_are_there() -> None:
    """By their path, or by its end where the page says below which folder."""
    names = {name for name in _NAME.findall(PAGE.read_text()) if "NAME" not in name}
    rooms = ("slurm_mps", "slurm_mps/*", "spank", "tests", "tests/*")
    places = [REPOSITORY, *(path for room in rooms for path in REPOSITORY.glob(room))]
    assert len(names) > 40
    assert [name for name in names if not any(one for place in places for one in place.glob(name))] == []
