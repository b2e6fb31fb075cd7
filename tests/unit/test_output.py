"""How commands print: the fields asked for, nothing that forges a line, no decoration in a pipe."""

import argparse

import pytest

from slurm_mps.cli.output import Column, add_table_options, chosen, fitting, print_table

COLUMNS = (Column("job", "JOB", right=True), Column("user", "USER"), Column("command", "COMMAND", hidden=True))
ROWS = ({"job": 7, "user": "alice", "command": "a\x1b[2Jb\nc", "style": "red"}, {"job": 4711, "user": None})


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_table_options(parser, COLUMNS, "some/1")
    return parser.parse_args(argv)


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    said = options(*argv)
    print_table(ROWS, chosen(COLUMNS, said), noheader=said.noheader)
    return capsys.readouterr().out.splitlines()


def test_a_pipe_gets_columns_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == [" JOB  USER", "   7  alice", "4711  -"]


def test_the_fields_asked_for_stand_in_that_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split() for line in shown(capsys, "-n", "-o", "user,job")] == [["alice", "7"], ["-", "4711"]]


def test_what_a_user_chose_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "-n", "-o", "command") == ["a?[2Jb?c", "-"]


def test_a_long_line_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"user": "x" * 190}] * 2, [Column("user", "USER")], noheader=True)
    assert capsys.readouterr().out.splitlines() == ["x" * 190] * 2


def test_a_narrow_terminal_cuts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pid that lost its last digit is another process."""
    monkeypatch.setenv("COLUMNS", "20")
    print_table([{"user": "alice", "job": 1234567890, "command": "x" * 30}], COLUMNS, noheader=True)
    assert capsys.readouterr().out.split() == ["1234567890", "alice", "x" * 30]


def test_what_is_spare_goes_first_where_room_is_short() -> None:
    columns = [Column("job", "JOB"), Column("mode", "MODE", spare=1), Column("memory", "MEM"), Column("gpu", "GPU")]
    rows = [{"job": 4711, "mode": "E. Process", "memory": 143771, "gpu": "GPU-51000000"}]
    names = {width: [column.name for column in fitting(rows, columns, width)] for width in (38, 37, 26, 25, 3)}
    assert names == {
        38: ["job", "mode", "memory", "gpu"],
        37: ["job", "memory", "gpu"],
        26: ["job", "memory", "gpu"],
        25: ["job", "memory"],
        3: ["job"],
    }
