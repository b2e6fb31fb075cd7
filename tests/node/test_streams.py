"""What all commands have in common, by running them: one report with --json, exit statuses, -o, colour."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from slurm_mps.cli.cluster import COLUMNS as CLUSTER
from slurm_mps.cli.main import build_parser, main
from tests.harness.cluster import REPOSITORY
from tests.harness.reports import kinds, report
from tests.harness.runtime import MOUNT_POINT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode

COMMAND = f"{MOUNT_POINT}/bin/slurm-mps"
JOB = "4711"
BAD, CLOSED = "/etc/slurm/bad.toml", "/etc/slurm/closed.toml"


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command by its words, down to those that have none below them."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
    if not inner:
        yield name, parser
    for action in inner:
        for word, one in action.choices.items():
            yield from parsers(one, f"{name} {word}".strip())


COMMANDS = dict(parsers(build_parser()))
WITH_JSON = [name for name, parser in COMMANDS.items() if parser.get_default("report")]
WITH_TABLES = [name for name, parser in COMMANDS.items() if "--noheader" in parser.format_help()]
#: Words, user (None: root), exit status, with a job of alice's on GPUs 0 and 1.
RUNS = [
    ("status", None, 0),
    ("status", "alice", 0),
    (f"status {JOB}", "bob", 1),
    ("status -w n1", None, 2),
    ("status --cluster -w n[1", None, 2),
    ("status --cluster", None, 1),
    ("status --cluster", "alice", 1),
    ("top", None, 3),
    ("top", "alice", 3),
    (f"logs {JOB}", None, 0),
    (f"logs {JOB}", "alice", 0),
    (f"logs {JOB}", "bob", 4),
    ("logs 77", None, 3),
    ("logs", "alice", 2),
    (f"logs {JOB} --raw --trouble", None, 2),
    ("metrics", "alice", 4),
    ("metrics", None, 3),
    ("doctor", None, 1),
    ("doctor", "alice", 1),
    ("doctor mig", None, 3),
    ("doctor --list", "alice", 0),
    ("doctor nonsense", None, 2),
    ("doctor --list -o what", None, 2),
    ("plan --mps --gres=gpu:1", None, 1),
    ("plan --mps --gres=gpu:1", "alice", 0),
    ("plan --mps --devices=2", None, 0),
    ("plan --mps --devices=4", None, 1),
    ("plan --gres=gpu:1", None, 2),
    ("plan --mps --user=nobody-here", None, 2),
    ("config check", None, 0),
    (f"config check {BAD}", "alice", 1),
    (f"config check {CLOSED}", "alice", 4),
    ("config show", "alice", 0),
    (f"config show {BAD}", None, 1),
    (f"config show {CLOSED}", "alice", 4),
    ("config schema", None, 0),
    ("config schema", "alice", 0),
    ("reconcile --dry-run", None, 1),
    ("reconcile", "alice", 4),
    ("verify", None, 3),
    ("verify", "alice", 3),
    ("install --dry-run --plugin /etc/passwd", None, 1),
    ("install --dry-run", "alice", 4),
    ("uninstall --dry-run", None, 1),
    ("uninstall", "alice", 4),
    ("completion bash", None, 0),
    ("completion bash", "alice", 0),
    ("completion", "alice", 2),
]
#: Of those the ones that answer, though their exit status is not 0.
ANSWERS = {
    *(f"status {JOB}", "doctor", "doctor mig", "plan --mps --gres=gpu:1", "plan --mps --devices=4"),
    *(f"config check {BAD}", "reconcile --dry-run", "uninstall --dry-run"),
}


@pytest.fixture(scope="module")
def busy(shared_gpu_node: GpuNode) -> Iterator[GpuNode]:
    """A node with a job of alice's, and two files of configuration: one that is wrong, one that is root's."""
    before = shared_gpu_node.snapshot()
    shared_gpu_node.prolog(int(JOB)).check()
    shared_gpu_node.machine.write(BAD, "[logs]\nmax_jobs = 0\n[gpus]\nclients = 1\n")
    shared_gpu_node.machine.write(CLOSED, "")
    shared_gpu_node.run("chmod", "600", CLOSED).check()
    yield shared_gpu_node
    shared_gpu_node.run("rm", BAD, CLOSED).check()
    shared_gpu_node.epilog(int(JOB)).check()
    ends = time.monotonic() + 2  # the program that asked the daemon to quit may end a moment after the epilog
    while shared_gpu_node.snapshot() != before and time.monotonic() < ends:
        time.sleep(0.02)
    assert shared_gpu_node.snapshot() == before


def name_of(words: str) -> str:
    return max((name for name in COMMANDS if f"{words} ".startswith(f"{name} ")), key=len)


@pytest.mark.parametrize(("words", "user", "status"), RUNS)
def test_each_command_ends_as_documented_and_reports_once(
    busy: GpuNode, words: str, user: str | None, status: int
) -> None:
    """The same exit status with --json, one report of the documented shape, an error in it where there is no answer."""
    plain = busy.run(COMMAND, *words.split(), user=user)
    assert plain.returncode == status, plain
    if name_of(words) not in WITH_JSON:
        return
    result = busy.run(COMMAND, *words.split(), "--json", user=user)
    assert result.returncode == status
    found = report(result.stdout, status)
    assert ("error" in found) == (status != 0 and words not in ANSWERS), found
    if "error" in found:
        told = [line.removeprefix("slurm-mps: ") for line in result.stderr.splitlines()]
        assert "; ".join(told) == found["error"]
        assert plain.stdout == "", "commentary belongs on stderr"


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_is_reported_too(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Also in the words of the parser, which has not yet come to --json."""
    for wrong in (["--nonsense"], ["--timeout=x"]):
        with pytest.raises(SystemExit) as ended:
            main([*name.split(), *wrong, "--json"])
        told = capsys.readouterr()
        assert ended.value.code == 2
        if name in WITH_JSON:
            assert report(told.out, 2)["error"] in told.err
        else:
            assert told.out == ""


@pytest.mark.parametrize("name", [*WITH_TABLES, "status --cluster", "doctor --list"])
def test_a_field_that_there_is_not_is_wrong_usage(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Whatever else is asked, and before anything is looked at."""
    for options in ([], ["-n"], ["--json"] if name != "top" else []):
        with pytest.raises(SystemExit) as ended:
            main([*name.split(), "-o", "nonsense", *options])
        told = capsys.readouterr()
        assert (ended.value.code, "there is no field 'nonsense'; choose from " in told.err) == (2, True)
        assert bool(told.out) == ("--json" in options)


def test_every_report_has_a_shape() -> None:
    """And each shape is some command's."""
    made = {COMMANDS[name].get_default("report") for name in WITH_JSON} | {"cluster/1", "doctor-checks/1"}
    assert made == kinds().keys()


def documented() -> dict[str, set[int]]:
    """slurm-mps(1)'s table."""
    page = (REPOSITORY / "docs/man/slurm-mps.1.md").read_text()
    rows = re.findall(r"^\| `(.*?)` \|(.*)\|(.*)\|(.*)\|$", page, re.MULTILINE)
    return {
        name: {0, 2, *(number for number, cell in zip((1, 3, 4), cells, strict=True) if cell.strip())}
        for name, *cells in rows
    }


def test_the_table_of_exit_statuses_is_true() -> None:
    """It has every command, with the statuses that its help names and no other than the runs above end with."""
    table = documented()
    assert table.keys() == {*COMMANDS, "status --cluster"}
    for name, parser in COMMANDS.items():
        text = (parser.description or "").partition("Exit status:")[2]
        assert {int(number) for number in re.findall(r"(?:^|, ) ?([0-4]) ", text)} == table[name], name
    for words, _, status in RUNS:
        name = "status --cluster" if "--cluster" in words else name_of(words)
        assert status in table[name], words


def test_both_users_run_every_command() -> None:
    assert {name_of(words) for words, user, _ in RUNS if user is None} == COMMANDS.keys()
    assert {name_of(words) for words, user, _ in RUNS if user} == COMMANDS.keys()


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("reconcile --dry-run -o outcome,thing", ["left"]),
        (f"status -o job,uuid {JOB}", [JOB, JOB]),
        ("doctor --list -o where,check", None),
        ("config show -o value", None),
    ],
)
def test_tables_have_the_fields_asked_for(busy: GpuNode, words: str, rows: list[str] | None) -> None:
    fields = words.partition("-o ")[2].split()[0].upper().split(",")
    headed = busy.run(COMMAND, *words.split()).stdout.splitlines()
    bare = busy.run(COMMAND, *words.split(), "--noheader").stdout.splitlines()
    assert headed[0].split() == fields
    assert [line.split() for line in headed[1:]] == [line.split() for line in bare]
    assert rows is None or [line.split()[0] for line in bare] == rows


def test_the_fields_of_the_cluster_are_checked_by_the_same_rule(busy: GpuNode) -> None:
    result = busy.run(COMMAND, "status", "--cluster", "-o", "gpu", "--json")
    assert report(result.stdout, 2)["error"].endswith(",".join(column.name for column in CLUSTER))


# ---------------------------------------------------------------------------------------------------------- colour


def shown(terminal: bool, environment: dict[str, str]) -> str:
    """What a table looks like; its headings are bold where there is colour."""
    line = [sys.executable, "-m", "slurm_mps.cli.main", "config", "show"]
    command = ["script", "-qec", shlex.join(line), "/dev/null"] if terminal else line
    given = {"PATH": os.environ["PATH"], "TERM": "xterm", **environment}
    return subprocess.run(command, env=given, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("environment", "terminal", "pipe"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
        ({"CLICOLOR": "0"}, True, False),
        ({"CLICOLOR_FORCE": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_who_gets_colour(environment: dict[str, str], terminal: bool, pipe: bool) -> None:
    """As slurm-mps(1) says; the text is the same."""
    texts = [shown(True, environment), shown(False, environment)]
    assert ["\x1b" in text for text in texts] == [terminal, pipe]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", text).split() for text in texts]
    assert plain[0] == plain[1]
    assert plain[0][0] == "SETTING"
