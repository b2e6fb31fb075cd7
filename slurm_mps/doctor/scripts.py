"""The scripts that slurmd runs as Prolog and Epilog, in order.

doctor reads a site's script for the path of one of ours, and follows nothing else in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from ..node.reading import read_text
from ..slurm.host import without_comments

_HOOK_VALUE = re.compile(r"^(python|package)=(\S+)$", re.MULTILINE)
_PATH = re.compile(r"[\w./+@=-]+")


@dataclass(frozen=True)
class Script:
    """A prolog or epilog script, or the part of one that runs before or after it runs ours.

    `code` is what it does, its text without comments; None where it cannot be read. `top` is the script that slurmd
    runs, which led here. `values` are the Python and the package that our own scripts name.
    """

    path: str
    code: str | None
    is_executable: bool
    top: str

    @property
    def is_ours(self) -> bool:
        return "/hook.py" in (self.code or "") and bool(self.values)

    @property
    def values(self) -> dict[str, str]:
        return dict(_HOOK_VALUE.findall(self.code or ""))

    def may_run(self, path: str) -> bool:
        """Whether its text has the name of a script, or of the directory that the script lies in."""
        directory, name = os.path.split(path)
        return any(word in (self.code or "") for word in (name, os.path.basename(directory)))


@cache
def read_script(path: str) -> Script:
    try:
        code: str | None = without_comments(read_text(path, 65536))
    except OSError:
        code = None
    try:
        is_executable = bool(os.stat(path).st_mode & 0o100)
    except OSError:
        is_executable = False
    return Script(path, code, is_executable, path)


def in_order(tops: Iterable[Script]) -> Iterator[Script]:
    """The scripts that slurmd runs, each that names one of ours cut there: its part before, ours, its part after."""
    for top in tops:
        code, at = top.code or "", 0
        for named in _PATH.finditer(code) if not top.is_ours else ():
            if named[0].startswith("/") and "slurm-mps" in named[0] and read_script(named[0]).is_ours:
                yield replace(top, code=code[at : named.start()])
                yield replace(read_script(named[0]), top=top.path)
                at = named.end()
        yield replace(top, code=code[at:]) if at else top
