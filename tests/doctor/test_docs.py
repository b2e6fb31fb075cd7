"""docs/doctor.md has an entry for every check, and no other."""

import re
from pathlib import Path

from slurm_mps.doctor.examine import all_checks, page_of

PAGE = Path(__file__).parents[2] / "docs/doctor.md"


def test_every_check_has_its_entry_and_every_entry_its_check() -> None:
    entries = re.findall(r"^### (\S+)$", PAGE.read_text(), re.MULTILINE)
    assert entries == list(all_checks())


def test_every_entry_says_something() -> None:
    parts = re.split(r"^#+ .*$", PAGE.read_text(), flags=re.MULTILINE)
    entries = [part.strip() for part in parts if part.strip()]
    assert len(entries) >= len(all_checks())
    assert min(map(len, entries)) > 80


def test_a_page_leads_to_its_entry() -> None:
    """What is named is there, and the anchor is what a heading of that name gets."""
    assert page_of("gres-order") == f"{PAGE}#gres-order"
    assert all(re.fullmatch(r"[a-z-]+", check) for check in all_checks())
