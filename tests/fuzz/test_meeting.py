"""Whatever lies where the ranks of ``slurm-mps verify`` meet: a good report, or one clean error, and no wait for it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from time import monotonic
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slurm_mps.verify.judge import problems
from slurm_mps.verify.meeting import Meeting, MeetingError, _enter, _remove
from slurm_mps.verify.report import Evidence, RankReport
from slurm_mps.verify.table import document, rows, summary

from . import examples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GOOD = vars(
    RankReport(rank=1, pid=2, pid_namespace=1, pipe_directory="/run/slurm-mps/jobs/7/pipe", threads="25", memory="0=1G")
)
TEXTS = st.text(max_size=20) | st.text("0123456789=,.MG%GPU-", max_size=20) | st.just("9" * 5000)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.lists(st.integers(), max_size=2)
FIELDS = st.dictionaries(st.sampled_from([*GOOD, "more"]), VALUES, max_size=5)
#: Of the right kind, whatever they say.
RIGHT = st.fixed_dictionaries(
    {name: {int: st.integers(), str: TEXTS, bool: st.booleans()}[type(value)] for name, value in GOOD.items()}
).map(lambda report: {**report, "rank": 1})
REPORTS = (
    st.binary(max_size=200)
    | (RIGHT | FIELDS | FIELDS.map(lambda fields: {**GOOD, **fields})).map(json.dumps).map(str.encode)
    | st.recursive(VALUES, st.lists, max_leaves=5).map(json.dumps).map(str.encode)
    | st.integers(1, 2000).map(lambda depth: b"[" * 100 * depth)
)


def a_file(place: Path, data: bytes) -> None:
    place.write_bytes(data)


def a_hole(place: Path, data: bytes) -> None:
    place.write_bytes(data)
    os.truncate(place, 1 << 40)


def a_fifo(place: Path, _data: bytes) -> None:
    os.mkfifo(place)


def a_directory(place: Path, _data: bytes) -> None:
    place.mkdir()


def a_link(place: Path, data: bytes) -> None:
    (place.parent / "elsewhere").write_bytes(data)
    place.symlink_to("elsewhere")


def a_link_to_itself(place: Path, _data: bytes) -> None:
    place.symlink_to(place.name)


def an_endless_file(place: Path, _data: bytes) -> None:
    place.symlink_to("/dev/zero")


def a_socket(place: Path, _data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))


KINDS = st.sampled_from(
    [a_file, a_file, a_hole, a_fifo, a_directory, a_link, a_link_to_itself, an_endless_file, a_socket]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("meeting") / "ours"
    place.mkdir()
    yield place
    _remove(str(place))


@given(lay=KINDS, data=REPORTS)
@example(lay=a_file, data=json.dumps({**GOOD, "more": "of a newer version"}).encode())
@example(lay=a_file, data=json.dumps({**GOOD, "rank": 2}).encode())
@example(lay=a_file, data=b"[" * 200_000)
@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_a_reports_place_is_read_or_refused(
    place: Path, lay: Callable[[Path, bytes], None], data: bytes
) -> None:
    """And whatever a report says, it is judged and shown."""
    fd = os.open(place, os.O_RDONLY)
    start = monotonic()
    try:
        lay(place / "1", data)
        (report,) = Meeting(str(place), fd).collect([1], start)
    except MeetingError:
        return
    finally:
        os.close(fd)
        _remove(str(place))
        place.mkdir()
        assert monotonic() - start < 1
    assert report.rank == 1
    assert {name: type(value) for name, value in vars(report).items()} == {n: type(v) for n, v in GOOD.items()}
    evidence = Evidence("n1", (1,), [report], {}, 10)
    assert len(list(rows(evidence))) == 1
    assert summary(evidence)
    json.dumps(document(evidence, problems(evidence)))


@given(lay=KINDS, data=st.binary(max_size=10), held=st.booleans())
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_a_directory_that_somebody_holds_is_entered(
    place: Path, lay: Callable[[Path, bytes], None], data: bytes, held: bool
) -> None:
    there = place / "slurm-mps-verify-7.0.0-00"
    lay(there, data)
    holder = os.open(there, os.O_RDONLY | os.O_NONBLOCK) if held and lay in (a_file, a_directory) else -1
    if holder >= 0:
        fcntl.flock(holder, fcntl.LOCK_EX)
    meeting = _enter(str(there))
    if holder >= 0:
        os.close(holder)
    _remove(str(place))
    place.mkdir()
    assert (meeting is not None) is (lay is a_directory and held)
