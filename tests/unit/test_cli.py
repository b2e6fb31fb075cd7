"""The command: its answers on stdout, its exit status."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slurm_mps.cli.main import main
from slurm_mps.config.file import parse_config
from slurm_mps.config.settings import ALL_USERS, DEFAULTS, from_settings


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = main(list(argv))
    return status, capsys.readouterr().out


def test_a_good_file_is_fine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mps.toml"
    file.write_text('[gpus]\ncompute_mode = "unchanged"\n')
    assert run(capsys, "config", "check", str(file)) == (0, f"{file}: fine\n")
    file.write_text('[gpus]\nsharing = "joined"\njoined_users = "all"\n[limits.memory]\nmax = "8G"\n')
    assert run(capsys, "config", "check", str(file)) == (0, f"{file}: fine\n{ALL_USERS}\n")


def test_every_problem_has_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mps.toml"
    file.write_text('[gpus]\ncompute_mode = "x"\n[logs]\nmax_jobs = 0\n')
    status, out = run(capsys, "config", "check", str(file))
    assert status == 1
    assert len(out.splitlines()) == 2
    assert f"{file}: logs.max_jobs: 0 is less than 1" in out


def test_no_file_means_the_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm_mps.config.settings.CONFIG_PATH", "/nonexistent/mps.toml")
    status, out = run(capsys, "config", "check")
    assert (status, "the defaults hold" in out) == (0, True)


def test_a_file_that_was_named_must_be_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "config", "check", str(tmp_path / "none")) == (1, f"{tmp_path / 'none'}: no such file\n")


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "config", "schema")
    assert status == 0
    assert json.loads(out)["properties"].keys() >= {"gpus", "limits", "deadlines", "logs", "policy"}


@pytest.mark.parametrize("argv", [[], ["config"], ["nonsense"]])
def test_wrong_usage_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize("value", ["abc", "nan", "0", "601"])
def test_a_number_of_seconds_that_cannot_be_meant_is_told_with_what_can(
    capsys: pytest.CaptureFixture[str], value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--timeout", value])
    said = f"slurm-mps verify: error: argument --timeout: '{value}': expected seconds, 1 to 600\n"
    assert (caught.value.code, capsys.readouterr().err.endswith(said)) == (2, True)


def test_check_reports_for_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mps.toml"
    file.write_text("[logs]\nmax_jobs = 0\n")
    status, out = run(capsys, "config", "check", "--json", str(file))
    report = json.loads(out)
    assert (status, report["report"], report["status"]) == (1, "config-check/1", 1)
    assert report["problems"] == [f"{file}: logs.max_jobs: 0 is less than 1"]


def test_check_names_a_default_that_refuses_every_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The prolog takes the file all the same: who gives --mps-mem has what they ask."""
    file = tmp_path / "mps.toml"
    file.write_text('[limits.memory]\ndefault = "100M"\n')
    status, out = run(capsys, "config", "check", str(file))
    assert status == 1
    assert out.startswith(f"{file}: every job without --mps-mem is refused: the site's default limit (limits.memory.d")
    assert parse_config(file.read_bytes(), str(file)).limits_memory_default == "100M"
    file.write_text('[limits.memory]\ndefault = "100M"\n[limits.thread_percentage]\ndefault = 10\n')
    assert run(capsys, "config", "check", str(file))[0] == 0


def test_show_says_what_holds_and_where_it_comes_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every setting of the schema, once, with the default or the file's word."""
    file = tmp_path / "mps.toml"
    file.write_text('[limits.memory]\nmax = "8G"\n[deadlines]\nprolog = 7.5\n')
    status, out = run(capsys, "config", "show", "--noheader", "-o", "setting,value,from,default", str(file))
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert status == 0
    assert {name.replace(".", "_") for name in rows} == vars(DEFAULTS).keys()
    assert rows["limits.memory.max"] == ["8G", str(file), "none"]
    assert rows["deadlines.prolog"] == ["7.5", str(file), "7.5"]
    assert rows["deadlines.epilog"] == ["30", "default", "30"]


def test_show_without_a_file_shows_the_defaults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out = run(capsys, "config", "show", "--json", str(tmp_path / "none"))
    settings = json.loads(out)["settings"]
    assert status == 0
    assert from_settings({one["setting"]: one["value"] for one in settings}) == DEFAULTS
    assert {one["from"] for one in settings} == {"default"}


def test_show_of_a_wrong_file_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mps.toml"
    file.write_text("[logs]\nmax_jobs = 0\n")
    assert main(["config", "show", str(file)]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"slurm-mps: {file}: logs.max_jobs: 0 is less than 1\n")


@pytest.mark.parametrize("command", [["config", "schema"], ["completion", "bash"]])
def test_a_reader_that_has_enough_is_no_error(command: list[str]) -> None:
    """As of `slurm-mps logs 1 | head`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "slurm_mps.cli.main", *command], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("command", "status"), [("config show", 0), ("doctor --list", 0), ("config nonsense", 2)])
def test_a_stream_that_is_closed_is_not_there_and_no_more(command: str, status: int, closed: str) -> None:
    """The exit status is the answer's, and no file that is opened later gets what is meant for stdout or stderr."""
    line = f"{shlex.quote(sys.executable)} -m slurm_mps.cli.main {command}"
    whole = subprocess.run(["sh", "-c", line], capture_output=True, check=False)
    done = subprocess.run(["sh", "-c", f"{line} {closed}"], capture_output=True, check=False)
    assert whole.returncode == done.returncode == status
    assert done.stdout == (b"" if " >&-" in f" {closed}" else whole.stdout)
    assert done.stderr == (b"" if "2>&-" in closed else whole.stderr)


def test_a_full_disk_is_said() -> None:
    with open("/dev/full", "wb") as full:
        line = [sys.executable, "-m", "slurm_mps.cli.main", "config", "schema"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, check=False)
    told = b"slurm-mps: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_the_help_of_status_names_the_fields_of_the_cluster_too(capsys: pytest.CaptureFixture[str]) -> None:
    """They are another module's, which is imported only when it is asked for."""
    from slurm_mps.cli.cluster import COLUMNS

    with pytest.raises(SystemExit):
        main(["status", "--help"])
    said = "".join(capsys.readouterr().out.split())
    assert ",".join(column.name for column in COLUMNS) in said
