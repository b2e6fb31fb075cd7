"""docs/doctor.md has an entry for every check, and no other."""

import re
from pathlib import Path

from slurm_mps.doctor.examine import all_checks, explain

PAGE = Path(__file__).parents[2] / "docs/doctor.md"


def test_every_check_has_its_entry_and_every_entry_its_check() -> None:
    entries = re.findall(r"^### (\S+)$", PAGE.read_text(), re.MULTILINE)
    assert entries == list(all_checks())


def test_every_entry_says_something() -> None:
    parts = re.split(r"^#+ .*$", PAGE.read_text(), flags=re.MULTILINE)
    entries = [part.strip() for part in parts if part.strip()]
    assert len(entries) >= len(all_checks())
    assert min(map(len, entries)) > 80


def test_an_explanation_is_the_entry_and_says_where_the_page_is() -> None:
    shown = explain("gres-order")
    assert shown.startswith("### gres-order\nSlurm counts GPUs in the order of gres.conf's lines")
    assert shown.endswith(f"\n\n({PAGE})")
    assert shown.count("###") == 1
