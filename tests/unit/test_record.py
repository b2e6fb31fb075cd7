"""Frozen value classes: what ``dataclass(frozen=True)`` gives, as far as this package uses it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from slurm_mps.record import record, replace


@record
class Point:
    x: int
    y: int = 0

    def sum(self) -> int:
        return self.x + self.y


@record
class Other:
    x: int
    y: int = 0


def test_values_by_position_by_name_and_by_default() -> None:
    """The constructor takes fields in the order of their annotations, and by name."""
    assert (Point(1, 2).x, Point(1, 2).y) == (1, 2)
    assert Point(1) == Point(x=1, y=0)
    assert Point(1, y=2).sum() == 3


def test_equality_is_of_class_and_values() -> None:
    """Two records are equal when they are of one class and all fields are; equal records are one key."""
    others: list[Any] = [Point(2, 1), Point(1, 3), Other(1, 2), (1, 2), None]
    assert Point(1, 2) == Point(1, 2)
    assert Point(1, 2) not in others
    assert len({Point(1, 2), Point(1, 2), Point(2, 1)}) == 2


def test_a_record_shows_its_values() -> None:
    """The repr names every field, for a traceback that an admin reads."""
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"


def test_a_record_is_read_only() -> None:
    """Nobody changes, adds or removes a field of a record that somebody else holds."""
    point: Any = Point(1, 2)
    with pytest.raises((AttributeError, FrozenInstanceError)):
        point.x = 3
    with pytest.raises((AttributeError, FrozenInstanceError)):
        point.z = 3
    with pytest.raises((AttributeError, FrozenInstanceError)):
        del point.x
    assert point == Point(1, 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((), {}), ((1, 2, 3), {}), ((1,), {"z": 3}), ((), {"y": 2}), ((1,), {"x": 1})],
    ids=["missing", "too many", "unknown", "missing by name", "given twice"],
)
def test_wrong_arguments_are_an_error(arguments: tuple[int, ...], named: dict[str, int]) -> None:
    """A record is never made with a field missing, left over or given twice."""
    make: Any = Point
    with pytest.raises(TypeError):
        make(*arguments, **named)


def test_replace_makes_a_changed_copy() -> None:
    """replace() leaves the original alone and knows the fields."""
    point = Point(1, 2)
    assert replace(point, y=5) == Point(1, 5)
    assert point == Point(1, 2)
    with pytest.raises(TypeError):
        replace(point, z=1)
