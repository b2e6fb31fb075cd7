"""What the sources can say to a person: the literal text of every message, from Python and from C.

``python3 -m tests.docs.messages 'A MESSAGE, AS IT WAS PRINTED'`` says which lines of the sources it is from.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "slurm_mps"
#: Functions whose text a person reads: on stderr, in syslog, in a report of findings. Doctor's problem() and warning()
#: are none: a finding is looked up by its check's name, which it prints (tests/doctor/test_docs.py).
SAYING = {"complain", "refuse", "tell_admin", "tell_fault", "_refuse", "_node_fault", "report", "Repair"}
#: The same of Python itself and of what stands behind a terminal or a parser.
SAYING |= {"print", "write", "exit", "error", "ArgumentTypeError", "SystemExit"}
#: Files that are sentences from end to end.
SENTENCES = {"slurm_mps/job_log/blame.py", "slurm_mps/job_log/words.py", "slurm_mps/verify/judge.py"}
SENTENCES |= {"slurm_mps/verify/table.py"}
#: A programmer's own.
NOT_SAID = {"slurm_mps/record.py"}
#: Of the plugin: an option's help (that of the others is known by its end).
NO_MESSAGES = {
    "share this job's GPUs between its processes through CUDA MPS, "  # noqa: ISC004
    "with one control daemon on each node (so does --mps alone) or on each GPU, or, with off, without MPS "
    "whatever else is given",
}
#: What nvidia-cuda-mps-control says, and ours only look for.
OTHERS_WORDS = {"Cannot find MPS control daemon"}
_SHORTEST = 10


def fragments(node: ast.expr) -> list[str]:
    """The literal parts of a text, split where a value stands; of a choice, the parts of both."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        found: list[str] = []
        for part in node.values:
            found += fragments(part) if isinstance(part, ast.Constant) else [""]
        return found
    if isinstance(node, ast.BinOp):
        return fragments(node.left) + fragments(node.right)
    if isinstance(node, ast.IfExp):
        return fragments(node.body) + fragments(node.orelse)
    return []


def _error_names() -> set[str]:
    """Every exception class of the package."""
    classes = (node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return {node.name for node in classes if isinstance(node, ast.ClassDef) and node.name.endswith("Error")}


ERRORS = _error_names()


def texts(tree: ast.Module, *, everything: bool = False) -> Iterator[tuple[int, ast.expr]]:
    """Line and expression of what a file says; of one that is all sentences, every text but its docstrings."""
    saying = SAYING | ERRORS
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    docstrings |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if everything and isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in docstrings:
            yield node.lineno, node
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):  # whatever class it is of
            yield from ((node.lineno, argument) for argument in node.exc.args)
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in saying:
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                yield node.lineno, argument


def _parts(text: ast.expr) -> list[str]:
    """The literal parts that say something, each of one line."""
    parts = [line.strip() for part in fragments(text) for line in part.split("\n")]
    return [part for part in parts if len(part) >= _SHORTEST and " " in part and part not in OTHERS_WORDS]


def python_messages(*, everything: bool = False) -> list[tuple[str, str]]:
    """Where, and every literal part of each text that a message is made from; with `everything` of any other, too."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name in NOT_SAID:
            continue
        for line, text in texts(ast.parse(path.read_text()), everything=everything or name in SENTENCES):
            found += [(f"{name}:{line}", part) for part in _parts(text)]
    return found


def c_messages(files: str = "*.c") -> list[tuple[str, str]]:
    """The same of the plugin: every literal of several words, joined as the compiler joins them."""
    found = []
    for path in sorted((ROOT / "spank").glob(files)):
        text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), path.read_text(), flags=re.DOTALL)
        for match in re.finditer(r'"(?:[^"\\\n]|\\.)*"(?:\s*(?:"(?:[^"\\\n]|\\.)*"))*', text):
            joined = "".join(re.findall(r'"((?:[^"\\\n]|\\.)*)"', match[0]))
            parts = re.split(r"%[-0-9.*]*(?:[a-z]+)|%%|\\n", joined)
            longest = max(parts, key=len).strip()
            if longest.count(" ") >= 2 and longest not in NO_MESSAGES and "(implies --mps)" not in joined:
                found.append((f"spank/{path.name}:{text[: match.start()].count(chr(10)) + 1}", longest))
    return found


def plain(text: str) -> str:
    """Text to compare: without code marks, in one line."""
    return " ".join(text.replace("`", "").split())


def lines_of(message: str) -> list[str]:
    """Where a message is from, with the part of it that stands there; the longest first."""
    said = plain(message)
    known = [*python_messages(everything=True), *c_messages("*.[ch]")]
    found = {(where, plain(part)) for where, part in known if plain(part) in said}
    return [f"{where}: {part}" for where, part in sorted(found, key=lambda one: -len(one[1]))]


if __name__ == "__main__":
    print("\n".join(lines_of(" ".join(sys.argv[1:]))))
