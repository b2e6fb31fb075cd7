"""Percentages and sizes: what a user may write, and what reaches the control program."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm_mps.node.control import Limits, limit_answers
from slurm_mps.units import (
    GIB,
    MIB,
    TIB,
    describe_memory,
    format_memory,
    format_thread_percentage,
    parse_memory,
    parse_thread_percentage,
    printable,
)

BAD_PERCENTS = [
    "",
    "0",
    "0.0",
    "101",
    "100.1",
    "abc",
    "25\n",
    "-1",
    "+5",
    "1e1",
    "12.55",
    "12.",
    ".5",
    " 25",
    "0x10",
]
BAD_SIZES = ["", "8", "8X", "-1G", "1.5G", "0", "0G", "G", "8GB", "8 G", " 8G", "8G\n", "8K", "9999999999M"]
ARABIC_DIGITS = "\u0662\u0665"  # int() reads them; the control program does not


@pytest.mark.parametrize(("text", "percent"), [("25", 25), ("12.5", 12.5), ("100", 100), ("100.0", 100), ("0.1", 0.1)])
def test_percentages_a_user_may_write(text: str, percent: float) -> None:
    assert parse_thread_percentage(text) == percent


@pytest.mark.parametrize("text", [*BAD_PERCENTS, ARABIC_DIGITS])
def test_what_is_no_percentage_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="above 0 and up to 100"):
        parse_thread_percentage(text)


@pytest.mark.parametrize(("text", "size"), [("8G", 8 * GIB), ("512M", 512 * MIB), ("1T", TIB), ("8g", 8 * GIB)])
def test_sizes_a_user_may_write(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", [*BAD_SIZES, ARABIC_DIGITS + "G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="M, G or T"):
        parse_memory(text)


@given(st.integers(min_value=1, max_value=1000))
def test_a_percentage_reads_back_as_the_control_program_prints_it(tenths: int) -> None:
    """``set`` takes our form and ``get`` prints one decimal (O1); the two must name the same number."""
    percent = parse_thread_percentage(format_thread_percentage(tenths / 10))
    assert percent == tenths / 10
    assert limit_answers(Limits(percent), 1)[0][0] == f"{tenths // 10}.{tenths % 10}"


@given(st.integers(min_value=1, max_value=2**30))
def test_a_size_survives_writing_and_is_always_an_integer_with_m_or_g(mebibytes: int) -> None:
    """Only an integer with M or G is safe to hand to the control program (O3)."""
    text = format_memory(mebibytes * MIB)
    assert text[-1] in "MG"
    assert text[:-1].isdigit()
    assert int(text[:-1]) * {"M": MIB, "G": GIB}[text[-1]] == mebibytes * MIB


def test_sizes_for_people() -> None:
    assert describe_memory(79 * GIB) == "79 GiB"
    assert describe_memory(143771 * MIB) == "140.4 GiB"
    assert describe_memory(514 * MIB) == "514 MiB"


@given(st.text())
def test_nothing_of_a_users_text_can_start_a_line_or_a_terminal_sequence(text: str) -> None:
    shown = printable(text)
    assert len(shown) <= 40
    assert all(" " <= c <= "~" for c in shown)
