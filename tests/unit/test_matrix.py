"""``make test-matrix``: what it makes of its runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from tests.harness.release import RELEASES
from tests.lab import matrix
from tests.lab.matrix import Outcome, commit_of, page_of, read_report, to_be_run_again

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789ab"


def outcome(release: str, commit: str = COMMIT, *, clean: bool = True) -> Outcome:
    counts = {suite: {"passed": 10, "skipped": 1} for suite in matrix.SUITES}
    counts["doctor"] = {"passed": 2, "failed": 1}
    suite = RELEASES[release].suite
    return Outcome(commit, clean, release, f"{release}.1", suite, "3.11.2", "2026-01-01", 1.0, counts, ["a"], {"b": 3})


def all_of_them() -> list[Outcome]:
    return [outcome(name) for name in RELEASES]


# ---------------------------------------------------------------------------------------- which runs make one page


def test_runs_of_one_commit_make_a_page() -> None:
    assert to_be_run_again(all_of_them(), COMMIT) == {}


@pytest.mark.parametrize(
    ("ran", "why"),
    [
        (None, "it has not run"),
        (outcome("24.11", "ba9876543210"), f"commit ba9876543210 ran, and this is {COMMIT}"),
        (outcome("24.11", clean=False), "it ran with changes that are in no commit"),
        (outcome("24.11", ""), "nobody knows which commit of slurm-mps ran"),
    ],
)
def test_other_runs_do_not_and_are_named(ran: Outcome | None, why: str) -> None:
    others = [one for one in all_of_them() if one.release != "24.11"]
    assert to_be_run_again([*others, *([ran] if ran else [])], COMMIT) == {"24.11": why}


def test_each_release_may_have_run_in_a_go_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is what was written."""
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    for one in all_of_them():
        (tmp_path / f"{one.release}.json").write_text(json.dumps(asdict(one)))
    assert matrix.read_results() == all_of_them()
    (tmp_path / "22.05.json").unlink()
    assert to_be_run_again(matrix.read_results(), COMMIT) == {"22.05": "it has not run"}


def test_a_page_of_two_commits_says_which_ran_where() -> None:
    page = page_of([outcome("22.05"), replace(outcome("24.11"), commit="ba9876543210"), outcome("26.05")])
    ran = f"slurm-mps at commit {COMMIT}, on 24.11.1 at ba9876543210, from which it differs in tests and documents only"
    assert f"\n{ran}:\n" in page


def test_commits_that_differ_in_tests_and_documents_alone_make_a_page(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    commits: list[str] = []
    for name in ("slurm_mps/a.py", "tests/a.py", "docs/a.md", "spank/a.c"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x\n")
        if not commits:
            subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", name], check=True)
        commits.append(commit_of(tmp_path)[0])
    first, _, documents, plugin = commits
    ran = [outcome(name, first) for name in RELEASES]
    assert to_be_run_again(ran, documents, tmp_path) == {}
    assert set(to_be_run_again(ran, plugin, tmp_path)) == set(RELEASES)
    assert set(to_be_run_again(ran, COMMIT, tmp_path)) == set(RELEASES)


def test_a_tree_is_clean_but_for_what_the_matrix_writes(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ("", False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    (tmp_path / "docs").mkdir()
    for name in ("docs/support.md", "code.py"):
        (tmp_path / name).write_text("1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout[:12]
    assert commit_of(tmp_path) == (commit, True)
    (tmp_path / "docs/support.md").write_text("2\n")
    assert commit_of(tmp_path) == (commit, True)
    (tmp_path / "new.py").write_text("")
    assert commit_of(tmp_path) == (commit, False)
    (tmp_path / "new.py").unlink()
    (tmp_path / "code.py").write_text("2\n")
    assert commit_of(tmp_path) == (commit, False)


# ------------------------------------------------------------------------------------------------- what pytest says


def test_a_report_is_counted_with_files_that_cannot_be_collected(tmp_path: Path) -> None:
    """As pytest itself writes it: such a file is one failure of its folder, and the rest still counts."""
    files = {
        "doctor/test_some.py": "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "@pytest.mark.skip(reason='no')\ndef test_c(): pass\n",
        "install/test_broken.py": "import nothing_of_that_name\n",
        "verify/test_left_out.py": "import pytest\npytest.skip('not here', allow_module_level=True)\n",
    }
    for name, text in files.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    report = tmp_path / "report.xml"
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    subprocess.run([*line, f"--junitxml={report}", "tests"], cwd=tmp_path, capture_output=True, check=False)
    counts, failures, skips = read_report(report)
    assert counts["doctor"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert (counts["install"], counts["verify"], counts["slurm"]) == ({"failed": 1}, {"skipped": 1}, {})
    assert sorted(failures) == ["tests/doctor/test_some.py::test_b", "tests/install/test_broken.py"]
    assert skips["no"] == 1
    assert sum(skips.values()) == 2
