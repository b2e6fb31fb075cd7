"""Whoever reads a message at night finds it in docs/messages.md, in the words that were printed."""

from __future__ import annotations

import ast

import pytest

from tests.docs.messages import ROOT, c_messages, fragments, lines_of, plain, python_messages, texts

DOCUMENTED = plain("".join((ROOT / "docs" / page).read_text() for page in ("messages.md", "doctor.md")))


@pytest.mark.parametrize("messages", [python_messages(), c_messages()], ids=["python", "plugin"])
def test_every_message_has_an_entry(messages: list[tuple[str, str]]) -> None:
    """By each part without a value in it; of the plugin by the longest."""
    assert len(messages) > 30
    missing = [f"{where}: {text}" for where, text in messages if plain(text) not in DOCUMENTED]
    assert missing == []


def test_a_message_leads_to_its_line() -> None:
    """As it was printed, with values in it and a hint behind it."""
    said = "sbatch: error: mps: --mps-priority=high: expected normal or low"
    assert any(line.startswith("spank/options.h:") for line in lines_of(said))
    said = "job 7: this job has no GPU on this node; ask for one, such as --gres=gpu:1"
    assert any(line.startswith("slurm_mps/job/plan.py:") for line in lines_of(said))


def test_a_message_is_found_in_all_its_forms() -> None:
    """The extractor sees plain texts, values in the middle, choices and sums."""
    text = "f(f'job {n} has no GPU', 'a' if x else f'b {c} d', 'one ' + 'two')"
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert [fragments(argument) for argument in call.args] == [
        ["job ", "", " has no GPU"],
        ["a", "b ", "", " d"],
        ["one ", "two"],
    ]


def test_whatever_way_it_is_said_it_is_seen() -> None:
    """print() and stderr, errors of any class, a parser's own, and a file of sentences."""
    said = """
print(f"{n} jobs are left here")
sys.stderr.write("no one answers")
raise ValueError(f"{x}: no host list")
raise Weird("this is odd")
sys.exit("and so it ends")
raise argparse.ArgumentTypeError("give a number")
"""
    found = {part.strip() for _, text in texts(ast.parse(said)) for part in fragments(text)}
    assert found >= {
        "jobs are left here",
        "no one answers",
        ": no host list",
        "this is odd",
        "and so it ends",
        "give a number",
    }
    assert not [text for _, text in texts(ast.parse('f"{a} is b"'))]
    assert len([text for _, text in texts(ast.parse('a = f"{a} is b"'), everything=True)]) == 1
    choice = ast.parse('"""Not said."""\nwhy = "" if asked else "it did not ask"')
    assert [part for _, text in texts(choice, everything=True) for part in fragments(text)] == ["", "it did not ask"]
