"""What slurmd runs as Prolog and Epilog, in order, with what those scripts run in turn.

A site's own single script may name ours, or hand a directory to a loop or to run-parts, as DeepOps' does. Only its
text is read: comments and tests are no calls, ``$dir`` is what a line above set it to, and a directory's files run in
ascending order of names. What runs is cut out of the caller, so that what stands before a call is known to run before.
A script is read and looked through once, however many lead to it: those of a directory may all name that directory.
"""

from __future__ import annotations

import glob
import os
import re
from functools import cache

from ..node.reading import read_text
from ..record import record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_HOOK_VALUE = re.compile(r"^(python|package)=(\S+)$", re.MULTILINE)
_COMMENT = re.compile(r"(?:^|(?<=[\s;]))#.*$", re.MULTILINE)
_ASSIGNMENT = re.compile(r"""\s*(?:export\s+|readonly\s+|local\s+)?(\w+)=["']?([^\s"';]+)["']?\s*;?\s*""")
_OWN_DIRECTORY = re.compile(r"""\$\(dirname\s+(?:--\s+)?"?\$(?:0|\{0\})"?\)|\$\{0%/\*\}""")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_TEST = re.compile(r"\[\[?\s[^\]\n]{0,200}\s\]\]?|\btest\s+-\w\s+\S+")
_PATH = re.compile(r"(?<![\w.$})*])(?:/[\w.+@=*?-]+)+")
_DESCENDING = re.compile(r"\b(?:ls|sort)\s+-\w*r|\s--reverse\b")
_RUN_PARTS = re.compile(r"(?:^|[\s/;(])run-parts\s")
_SYSTEM = ("/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/", "/dev/", "/proc/", "/sys/")
_NAMED = r"(?:slurm-mps|(?:pro|epi)log[\w.-]*\.d\b)"
_OF_HOOKS = re.compile(_NAMED)
#: A path of that kind that hangs on a variable nobody set here, or on the directory that the script is in.
_LEFT_OPEN = re.compile(rf"\$\S{{0,200}}{_NAMED}|(?<!\S)(?:\.\.?/)*(?:pro|epi)log[\w.-]*\.d/")


@record
class Script:
    """A prolog or epilog script, or the part of one that runs before or after a call to another.

    `text` is None where it cannot be read. `top` is the script that slurmd runs, which led here.
    """

    path: str
    text: str | None
    executable: bool
    top: str

    @property
    def code(self) -> str:
        """What it does: its text without comments."""
        return _without_comments(self.text or "")

    @property
    def is_ours(self) -> bool:
        return "slurm-mps" in (self.text or "") and "/hook.py" in self.code

    @property
    def is_open(self) -> bool:
        """Whether it seems to run prologs or epilogs that its text alone does not tell."""
        return not self.is_ours and bool(first(_LEFT_OPEN, self.code))

    @property
    def values(self) -> dict[str, str]:
        """The Python and the package that it names."""
        return _values(self.text or "")


@cache
def first(kind: re.Pattern[str], code: str) -> str:
    """What of that kind stands first in a script, or nothing; looked for once, whoever else runs that script."""
    found = kind.search(code)
    return found[0].strip() if found else ""


@cache
def _without_comments(text: str) -> str:
    return _COMMENT.sub("", text)


@cache
def _values(text: str) -> dict[str, str]:
    return dict(_HOOK_VALUE.findall(text))


class Scripts:
    """The scripts of this host, each as it was when it was first asked for."""

    def __init__(self) -> None:
        self.read = cache(_read_script)
        self._steps = cache(self._look_through)
        self._own_parts = cache(self._join_own_parts)
        self._files = cache(_files)

    def in_order(self, tops: Iterable[Script]) -> list[Script]:
        """Scripts that slurmd runs, and all that these run, in the order in which they run; a caller comes in parts.

        From each of `tops` a script is followed once. Where it is met again it comes as one, its own parts joined: once
        before the first of ours and once after, since more often would say no more.
        """
        found: list[Script] = []
        ours_ran = False
        for top in tops:
            followed: set[str] = set()
            told: set[str] = set()
            ahead: list[Script | str] = [top.path]
            while ahead:
                step = ahead.pop()
                if isinstance(step, Script):
                    script = step
                elif step in told:
                    continue
                else:
                    script = self.read(step)
                    if script.text is not None and not script.is_ours:
                        if step not in followed:
                            followed.add(step)
                            ahead += reversed(self._steps(step))
                            continue
                        script = self._own_parts(step)
                    told.add(step)
                if not ours_ran and script.is_ours:
                    ours_ran = True
                    told.clear()
                found.append(replace(script, top=top.path))
        return found

    def _look_through(self, path: str) -> list[Script | str]:
        """What a script does, in order: its own parts, and the paths of those that it runs."""
        script = self.read(path)
        steps: list[Script | str] = []
        own = ""
        for line in _resolved_lines(script):
            at = 0
            for named in _PATH.finditer(line):
                paths = self._run_by(named[0], line)
                if paths is None:
                    continue
                own += line[at : named.start()]
                at = named.end()
                called = [one for one in paths if one != path]
                if called:
                    steps += [replace(script, text=own), *called]
                    own = ""
            own += line[at:]
        return [*steps, replace(script, text=own)]

    def _join_own_parts(self, path: str) -> Script:
        parts = (step.text or "" for step in self._steps(path) if isinstance(step, Script))
        return replace(self.read(path), text="".join(parts))

    def _run_by(self, named: str, line: str) -> list[str] | None:
        """The scripts that a line runs by naming a path; None where the path is something else."""
        if named.startswith(_SYSTEM):
            return None
        if "*" in named or "?" in named or os.path.isdir(named):
            if not re.search(r"(?:pro|epi)log", named):
                return None
            paths = self._files(named)
            if _RUN_PARTS.search(line) and "--regex" not in line and _is_debians_run_parts():
                paths = [path for path in paths if re.fullmatch(r"[A-Za-z0-9_-]+", os.path.basename(path))]
            return paths[::-1] if _DESCENDING.search(line) else paths
        if os.path.isfile(named):
            return [named] if "slurm-mps" in named or _begins(named, b"#!") else None
        return [] if _OF_HOOKS.search(named) else None


def _read_script(path: str) -> Script:
    try:
        text: str | None = read_text(path, 65536)
    except OSError:
        text = None
    try:
        executable = bool(os.stat(path).st_mode & 0o100)
    except OSError:
        executable = False
    return Script(path, text, executable, path)


def _resolved_lines(script: Script) -> Iterator[str]:
    """What a script does, line by line, with the values of variables that it sets itself; tests are left out."""
    variables: dict[str, str] = {}
    here = os.path.dirname(script.path)
    for raw in script.code.splitlines(keepends=True):
        line = _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], found[0]), _OWN_DIRECTORY.sub(here, raw))
        given = _ASSIGNMENT.fullmatch(line)
        if given:
            variables[given[1]] = given[2][:4096]
        else:
            yield re.sub(r"""["'](?=/)""", "", _TEST.sub("", line))  # "$dir"/* is one path


def _files(named: str) -> list[str]:
    """The files of a directory, or that a pattern finds, by name."""
    return [path for path in sorted(glob.glob(f"{named}/*" if os.path.isdir(named) else named)) if os.path.isfile(path)]


def _is_debians_run_parts() -> bool:
    """Debian's takes no name with a dot in it; Red Hat's, a script, does."""
    return any(_begins(path, b"\x7fELF") for path in ("/usr/bin/run-parts", "/bin/run-parts"))


def _begins(path: str, magic: bytes) -> bool:
    try:
        return read_text(path, len(magic)).encode() == magic
    except OSError:
        return False
