"""The command: its answers on stdout, its exit status."""

import json
from pathlib import Path

import pytest

from slurm_mps.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = main(list(argv))
    return status, capsys.readouterr().out


def test_a_good_file_is_fine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mps.toml"
    file.write_text('[gpus]\ncompute_mode = "unchanged"\n')
    assert run(capsys, "config", "check", str(file)) == (0, f"{file}: fine\n")


def test_every_problem_has_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mps.toml"
    file.write_text('[gpus]\ncompute_mode = "x"\n[logs]\nmax_jobs = 0\n')
    status, out = run(capsys, "config", "check", str(file))
    assert status == 1
    assert len(out.splitlines()) == 2
    assert f"{file}: logs.max_jobs: 0 is less than 1" in out


def test_no_file_means_the_defaults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out = run(capsys, "config", "check", str(tmp_path / "none"))
    assert (status, "the defaults hold" in out) == (0, True)


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "config", "schema")
    assert status == 0
    assert json.loads(out)["properties"].keys() >= {"gpus", "limits", "deadlines", "logs", "policy"}


@pytest.mark.parametrize("argv", [[], ["config"], ["nonsense"]])
def test_wrong_usage_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_the_help_of_status_names_the_fields_of_the_cluster_too(capsys: pytest.CaptureFixture[str]) -> None:
    """They are another module's, which is imported only when it is asked for."""
    from slurm_mps.cli.cluster import COLUMNS

    with pytest.raises(SystemExit):
        main(["status", "--help"])
    said = "".join(capsys.readouterr().out.split())
    assert ",".join(column.name for column in COLUMNS) in said
