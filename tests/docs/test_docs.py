"""Site and man pages build without a warning, and say of each command what the parser says."""

from __future__ import annotations

import argparse
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from slurm_mps import __version__
from slurm_mps.cli.main import build_parser
from slurm_mps.config.file import schema
from tests.docs.messages import ROOT
from tests.harness.reports import command_names

if TYPE_CHECKING:
    from pathlib import Path

#: Those that are written by hand; an example is part of a command's page.
PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if path.parent.name not in ("generated", "examples")
]
_CODE_OR_TABLE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$|^[|<][^\n]*", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`[^`]*`|\]\([^)]*\)")
_LABEL = re.compile(r"^\s*\d+\. |(?<!\S)(\*\*?)[^*]+\1 ")
_NEXT_SENTENCE = re.compile(r"[a-z0-9X)][.!?]\)? +(?=[A-Z])")
_PARAGRAPH_ENDS = re.compile(r"\s*\n\s*\n|\n(?=\s*(?:[-:]|\d+\.) )|\n(?=#)")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``make docs``, from nothing: what was built before would not be looked at again."""
    out = tmp_path_factory.mktemp("docs")
    line = ["make", "-s", "docs", f"DOCS={out}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return out


def text_of(page: Path) -> str:
    """A man page's source without its typesetting."""
    source = page.read_text().replace("\\-", "-").replace("\\(aq", "'")
    return re.sub(r"\\f[BIPR]|\\[&%]", "", source)


def parser_of(name: str) -> argparse.ArgumentParser:
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001
    parser: argparse.ArgumentParser = commands.choices[name]
    return parser


def test_every_link_leads_to_a_file_that_is_there_without_a_build() -> None:
    """Most read the pages where the repository is shown, not on the site."""
    made = ROOT / "docs/generated"
    broken = []
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        for link in (link for link in links if not re.match(r"\w+:", link)):
            target = (page.parent / link).resolve()
            if not target.exists() or made in target.parents:
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_read_once(page: Path) -> None:
    """A paragraph opens it; none has over 80 words, no line a second sentence or, but for a table's, 400 characters."""
    prose = _CODE_OR_TABLE.sub("", page.read_text()).strip()
    title, first, *others = _PARAGRAPH_ENDS.split(prose)
    assert title.startswith("# ")
    assert first[0] not in "#-:" or page.parent.name == "man"  # where a synopsis stands first
    assert [one for one in (first, *others) if len(one.split()) > 80] == []
    plain = (_SPAN.sub("X", _LABEL.sub("", line)) for line in prose.splitlines())
    assert [line for line in plain if _NEXT_SENTENCE.search(line)] == [], "a line has one sentence"
    assert [line for line in prose.splitlines() if len(line) > 400] == []


def test_one_place_knows_the_version() -> None:
    """The package's own is what the changelog's newest entry and each example say."""
    newest = re.search(r"^## (\S+), (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == __version__
    places = ("*.md", "*.toml", "*.cff", "packaging/*.*", "docs/**/*.md")
    text = "".join(path.read_text() for place in places for path in ROOT.glob(place))
    assert set(re.findall(r"slurm[-_]mps\W{1,6}(\d+\.\d+\.\d+)", text)) == {__version__}


@pytest.mark.parametrize("name", command_names(build_parser()))
def test_each_command_has_a_page_with_every_option(built: Path, name: str) -> None:
    text = text_of(built / f"man/slurm-mps-{name}.1")
    parser = parser_of(name)
    for action in parser._actions:  # noqa: SLF001
        for option in action.option_strings:
            assert option in text
    for inner in command_names(parser):
        assert f"slurm-mps {name} {inner}".lower() in text.lower()
    assert (built / f"html/generated/{name}.html").exists()


def test_the_pages_of_configuration_and_options_name_them_all(built: Path) -> None:
    text = text_of(built / "man/mps.toml.5")
    for table, keys in schema()["properties"].items():
        assert f"[{table}]" in text
        assert all(key in text for key in keys["properties"])
    text = text_of(built / "man/slurm-mps.7")
    registered = re.findall(r'\{ "(mps[-a-z]*)"', (ROOT / "spank/request.c").read_text())
    assert "mps" in registered
    assert all(f"--{option}" in text for option in registered)


def test_the_site_has_every_page(built: Path) -> None:
    """A page that no table of contents names is a warning, and so an error; none is left out of the build either."""
    sources = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    pages = {path.relative_to(built / "html").with_suffix("") for path in (built / "html").rglob("*.html")}
    assert {str(path) for path in sources - pages if path.parts[0] != "examples"} == set()
