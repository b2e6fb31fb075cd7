"""The state files' format: what was written is read, and nothing else ever is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_mps.node.wordfile import (
    DamagedFileError,
    NewerFileError,
    decode,
    encode,
    fields,
    quote,
    unquote,
    with_fields,
)

GOOD = encode("journal", 1, ["job id=4711", "undo quit_daemon"])


def test_lines_come_back() -> None:
    assert decode(GOOD, "journal", 1) == ["job id=4711", "undo quit_daemon"]


def test_a_newer_version_is_told_from_damage() -> None:
    with pytest.raises(NewerFileError, match="version 2 is newer"):
        decode(encode("journal", 2, ["x"]), "journal", 1)


def test_an_older_version_is_not_read() -> None:
    with pytest.raises(DamagedFileError):
        decode(encode("journal", 1, ["x"]), "journal", 2)


def test_another_kind_is_not_taken() -> None:
    with pytest.raises(DamagedFileError):
        decode(encode("ledger", 1, ["x"]), "journal", 1)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_is_one_word(text: str) -> None:
    word = quote(text)
    assert word
    assert not any(c.isspace() for c in word)
    assert unquote(word) == text


@pytest.mark.parametrize("word", ["%zz", "%-1", "a%"])
def test_words_that_quote_cannot_have_made_are_refused(word: str) -> None:
    with pytest.raises(DamagedFileError):
        unquote(word)


def test_fields_are_quoted_and_read_back() -> None:
    line = with_fields("step", {"path": "/a b", "empty": ""})
    assert fields(line.split(" ")[1:]) == {"path": "/a b", "empty": ""}
    with pytest.raises(DamagedFileError):
        fields(["no-equals"])
