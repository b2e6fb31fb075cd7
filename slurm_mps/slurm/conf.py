"""Slurm's configuration files as Slurm reads them: lines with their place, includes followed.

Source: slurm.conf(5), gres.conf(5), spank(8).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..node.reading import read_text

_PAIR = re.compile(r'([A-Za-z][\w.-]*)\s*\+?=\s*("[^"]*"|\S+)')
_INCLUDE = re.compile(r"^include\s+(\S.*)$", re.IGNORECASE)
_PLUGSTACK_INCLUDE = re.compile(r"^include[ \t]+([^ \t]+)")  # plugstack.conf's words: in small letters alone (spank.c)
_DEPTH_MAX = 8


@dataclass(frozen=True)
class ConfLine:
    """One line without its comment, joined with those that continue it."""

    path: str
    number: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.path}:{self.number}"

    def pairs(self) -> dict[str, str]:
        """The line's ``Key=value`` words, keys in lower case."""
        return {key.lower(): value.strip('"') for key, value in _PAIR.findall(self.text)}


@dataclass(frozen=True)
class Conf:
    """A configuration file with all that it includes, and the problems of reading it."""

    path: str
    lines: tuple[ConfLine, ...]
    problems: tuple[str, ...]
    files: tuple[str, ...]  #: all of which it is made, the file itself first, also those that cannot be read
    includes: tuple[str, ...]  #: what it includes: paths, in plugstack.conf patterns

    def records(self, key: str) -> list[tuple[ConfLine, dict[str, str]]]:
        """The lines that begin with this key, such as NodeName, and their pairs."""
        found = []
        for line in self.lines:
            pairs = line.pairs()
            if next(iter(pairs), "") == key.lower():
                found.append((line, pairs))
        return found

    def settings(self, key: str) -> list[tuple[ConfLine, str]]:
        """Each line that gives this key a value, in the file's order."""
        return [(line, pairs[key.lower()]) for line in self.lines if key.lower() in (pairs := line.pairs())]


def logical_lines(path: str, text: str) -> Iterator[ConfLine]:
    """A file's lines without comments, joined where they are continued."""
    joined, number = "", 0
    for count, raw in enumerate(text.splitlines(), start=1):
        number = number or count
        line = re.split(r"(?<!\\)#", raw, maxsplit=1)[0].rstrip()
        if line.endswith("\\"):
            joined += line[:-1] + " "
            continue
        whole = (joined + line).strip()
        if whole:
            yield ConfLine(path, number, whole)
        joined, number = "", 0


def read_conf(path: str, *, globs: bool = False) -> Conf:
    """Read a file and what it includes; with `globs` an include is a pattern, as in plugstack.conf.

    Raises: OSError when the file itself cannot be read.
    """
    reader = _Reader(globs=globs)
    reader.files.append(path)
    lines = tuple(reader.read(path, read_text(path), 0))
    return Conf(path, lines, tuple(reader.problems), tuple(reader.files), tuple(reader.includes))


class _Reader:
    """Follows the includes, and keeps what it met on the way."""

    def __init__(self, *, globs: bool) -> None:
        self._globs = globs
        self.problems: list[str] = []
        self.files: list[str] = []
        self.includes: list[str] = []

    def read(self, path: str, text: str, depth: int) -> Iterator[ConfLine]:
        include = _PLUGSTACK_INCLUDE if self._globs else _INCLUDE
        for line in logical_lines(path, text):
            match = include.match(line.text)
            if not match:
                yield line
                continue
            wanted = os.path.join(os.path.dirname(path), match[1].strip().strip('"'))
            self.includes.append(wanted)
            for included in sorted(glob.glob(wanted)) if self._globs else [wanted]:
                if depth >= _DEPTH_MAX:
                    self.problems.append(f"{line.place}: includes go deeper than {_DEPTH_MAX}")
                    return
                self.files.append(included)
                try:
                    inner = read_text(included)
                except OSError as error:
                    self.problems.append(f"{line.place}: {included}: {error.strerror}")
                    continue
                yield from self.read(included, inner, depth + 1)
