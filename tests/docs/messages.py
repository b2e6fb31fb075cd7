"""What the sources can say to a person: the literal text of every message, from Python and from C."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "slurm_mps"
#: Functions whose text a person reads: on stderr, in syslog, in a report of findings.
SAYING = {"complain", "refuse", "tell_admin", "tell_fault", "_refuse", "_node_fault", "report", "Finding"}
#: Files that are sentences from end to end.
SENTENCES = {"slurm_mps/job_log/blame.py", "slurm_mps/verify/judge.py"}
#: Of the plugin: the first line of a file, and an option's help (that of the others is known by its end).
NO_MESSAGES = {
    "slurm-mps verdict 1",
    "share this job's GPUs between its processes through CUDA MPS, "  # noqa: ISC004
    "with one control daemon on each node (so does --mps alone) or on each GPU",
}
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


def _texts(path: Path) -> Iterator[tuple[int, ast.expr]]:
    """Line and expression of what a file says."""
    saying = SAYING | ERRORS
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    everything = str(path.relative_to(ROOT)) in SENTENCES
    for node in ast.walk(tree):
        if everything and isinstance(node, ast.JoinedStr) and id(node) not in docstrings:
            yield node.lineno, node
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in saying:
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                yield node.lineno, argument


def python_messages() -> list[tuple[str, str]]:
    """Where, and the longest literal part of each text that a message is made from."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in _texts(path):
            longest = max(fragments(text), key=len, default="").strip()
            if len(longest) >= _SHORTEST and " " in longest:
                found.append((f"{path.relative_to(ROOT)}:{line}", longest))
    return found


def c_messages() -> list[tuple[str, str]]:
    """The same of the plugin: every literal of several words, joined as the compiler joins them."""
    found = []
    for path in sorted((ROOT / "spank").glob("*.c")):
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
