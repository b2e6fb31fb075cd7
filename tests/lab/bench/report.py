"""From samples to figures to a table."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING

from .inside import PLAIN_RUNS_PER_ROUND

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .inside import Samples

GOAL_PLAIN = 1.1
GOAL_BY_HAND = 1.3
GOAL_BY_HAND_REAL = 1.0
GOAL_GROWN = 1.1
GOAL_SAMPLE = 0.5


@dataclass(frozen=True)
class Figure:
    """Milliseconds of one contender."""

    median: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:8.2f} ({self.p90:.2f})"


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` and `difference` (ms) are medians over the rounds' own; `goal` is what `ratio` may be."""

    section: str
    name: str
    ours: Figure
    against: Figure | None = None
    ratio: float | None = None
    difference: float | None = None
    goal: float | None = None

    @property
    def ok(self) -> bool | None:
        """Whether the goal is met; None without one."""
        return None if self.goal is None or self.ratio is None else self.ratio <= self.goal

    @property
    def verdict(self) -> str:
        return "" if self.ok is None else f"at most {self.goal}  {'ok' if self.ok else 'MISSED'}"


def _figure(values: Sequence[float]) -> Figure:
    return Figure(round(median(values), 3), round(quantiles(values, n=10, method="inclusive")[8], 3))


def _compare(section: str, name: str, ours: Sequence[float], against: Sequence[float], goal: float | None) -> Row:
    ours = ours[: len(against)]
    pairs = list(zip(ours, against, strict=True))
    return Row(
        section,
        name,
        _figure(ours),
        _figure(against),
        ratio=round(median(one / other for one, other in pairs), 3),
        difference=round(median(one - other for one, other in pairs), 3),
        goal=goal,
    )


def make_rows(samples: Samples, jobs_before: int, *, real: bool = False) -> list[Row]:
    """Every comparison that the samples allow, in the order of the table."""
    by_hand = GOAL_BY_HAND_REAL if real else GOAL_BY_HAND
    section = "a job that does not ask, against #!/bin/sh and exit"
    rows = [
        _compare(section, script, samples[f"plain {script}"], samples["plain nothing"], GOAL_PLAIN)
        for script in ("prolog", "epilog")
    ]
    section = "a job that asks, against the hand-written bash script"
    rows += [
        _compare(section, script, samples[f"ours {script}"], samples[f"by hand {script}"], by_hand)
        for script in ("prolog", "epilog")
    ]
    section = "a job that asks, against the shape of Slurm's sample prolog"
    rows.append(_compare(section, "prolog", samples["ours prolog"], samples["sample prolog"], GOAL_SAMPLE))
    section = "a job that asks, against the vendor's floor: -d and the same commands, or quit (+ is our share)"
    rows += [
        _compare(section, script, samples[f"ours {script}"], samples[f"floor {script}"], None)
        for script in ("prolog", "epilog")
    ]
    if jobs_before:
        section = f"after {jobs_before} jobs on the node, against its first"
        rows += [
            _compare(section, script, samples[f"grown {script}"], samples[f"fresh {script}"], GOAL_GROWN)
            for script in ("prolog", "epilog")
        ]
    section = "python3 -I -S with one import, against none"
    rows += [
        _compare(section, name.removeprefix("import "), values, samples["import"], None)
        for name, values in samples.items()
        if name.startswith("import ")
    ]
    return rows


def print_table(measured_on: Mapping[str, str | int | float], rounds: int, rows: Sequence[Row]) -> None:
    """Print the table; its first line says what it was measured on."""
    on = measured_on
    print(
        f"Measured on {on['node']}: {on['cpu']}, {on['cores']} cores, Linux {on['kernel']}, "
        f"Python {on['python']}, load {on['load_at_start']}, {on['date']}"
    )
    print(f"Milliseconds: median (90th percentile) of {rounds} rounds, first part {rounds * PLAIN_RUNS_PER_ROUND};")
    print("ratio (x) and difference (+) are medians of the rounds' own, whose contenders took turns.")
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            print(f"\n{section}")
        compared = "" if row.against is None else f"{row.against!s:>18}  x{row.ratio:5.2f} {row.difference:+8.2f}"
        print(f"  {row.name:<16}{row.ours!s:>18}{compared}  {row.verdict}".rstrip())
