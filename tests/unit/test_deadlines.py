"""Slurm's timeouts against our own: each one that is too short is named, and no other."""

from __future__ import annotations

import pytest

from slurm_mps.config.settings import DEFAULTS
from slurm_mps.doctor.timeouts import check_deadlines

# As `scontrol show config` has them where slurm.conf says nothing, in all releases that were looked at.
UNSET = {"MessageTimeout": "10 sec", "PrologEpilogTimeout": "65534"}
SEPARATE = {"MessageTimeout": "10 sec", "EpilogTimeout": "40", "PrologTimeout": "12"}  # Slurm 25.05 and later


def problems(
    config: dict[str, str], prolog: float = DEFAULTS.deadlines_prolog, epilog: float = DEFAULTS.deadlines_epilog
) -> list[str]:
    return [problem.what.partition(" is ")[0] for problem in check_deadlines(config, prolog, epilog)]


@pytest.mark.parametrize("config", [UNSET, SEPARATE, {**UNSET, "PrologEpilogTimeout": "0"}, {}])
def test_the_defaults_fit(config: dict[str, str]) -> None:
    assert problems(config) == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**UNSET, "PrologEpilogTimeout": "30"}, ["PrologEpilogTimeout"]),  # the epilog alone
        ({**UNSET, "PrologEpilogTimeout": "8"}, ["PrologEpilogTimeout"] * 2),
        ({**SEPARATE, "PrologTimeout": "8"}, ["PrologTimeout"]),
        ({**SEPARATE, "EpilogTimeout": "30"}, ["EpilogTimeout"]),
        ({**UNSET, "MessageTimeout": "9 sec"}, ["MessageTimeout"]),
        ({"MessageTimeout": "2 sec", "PrologEpilogTimeout": "1"}, ["PrologEpilogTimeout"] * 2 + ["MessageTimeout"]),
    ],
)
def test_a_timeout_that_is_too_short_is_named(config: dict[str, str], named: list[str]) -> None:
    assert problems(config) == named


@pytest.mark.parametrize("config", [UNSET, SEPARATE, {**UNSET, "PrologEpilogTimeout": "31"}])
def test_the_line_that_it_proposes_cures_it(config: dict[str, str]) -> None:
    prolog, epilog = 600.5, 900.0
    found = list(check_deadlines(config, prolog, epilog))
    assert found
    lines = [problem.fix.split()[0].partition("=") for problem in found]
    cured = {**config, **{name: str(max(int(v) for n, _, v in lines if n == name)) for name, _, _ in lines}}
    assert list(check_deadlines(cured, prolog, epilog)) == []


def test_only_what_drains_a_node_is_a_problem() -> None:
    found = check_deadlines({"MessageTimeout": "2 sec", "PrologEpilogTimeout": "1"}, 7.5, 30)
    assert {problem.what.partition(" is ")[0]: problem.severity for problem in found} == {
        "PrologEpilogTimeout": "problem",
        "MessageTimeout": "warning",
    }
