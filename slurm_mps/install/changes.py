"""The files that install writes: whole, of its own, and noted before they are written.

Promises:
 - A file is written only where there is none, or where it is still as an earlier installation wrote it.
 - All that is going to be written is noted on disk first: an installation that is killed anywhere can be undone, or
   finished by running it again. uninstall removes what is still as it was written, and keeps and names the rest.
 - Root writes only where nobody else can (node/files.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from typing import Self

from ..errors import MpsError, NodeError
from ..node.files import Directory, LockFile, open_trusted
from ..node.paths import others_can_write

MANIFEST_DIRECTORY = "/var/lib/slurm-mps"
_MANIFEST = "installed.json"
_VERSION = 1
_LOCK_SECONDS = 5.0
_SIZE_MAX = 64 * 2**20
CHANGED, FOREIGN = "it was changed since it was installed", "slurm-mps install on this node did not write it"


@dataclass(frozen=True)
class Change:
    """A file to write, or with `data` None a directory to make."""

    path: str
    data: bytes | None = None
    mode: int = 0o644


@dataclass(frozen=True)
class Comparison:
    """A change, and what is there now (of a directory nothing but whether it is there)."""

    change: Change
    before: bytes | None
    before_mode: int = 0
    stays: str = ""  #: why the file is left as it is, if it is

    @property
    def is_needed(self) -> bool:
        same = self.before == (self.change.data or b"") and self.before_mode == self.change.mode
        return not self.stays and not same


@dataclass(frozen=True)
class Undone:
    """The result for one path: removed, gone already, or kept and why."""

    path: str
    what: str
    kept: bool = False


class Manifest:
    """The note in /var/lib/slurm-mps of the files that install has written here. One process at a time; use ``with``.

    `wrote`: by real path the digests of the contents that we put there, at most the last one and the one before. A
    directory has none.
    Raises on opening: MpsError when the note is damaged, or a newer slurm-mps wrote it.
    """

    def __init__(self, *, make: bool) -> None:
        self.wrote: dict[str, list[str]] = {}
        self._opened: Directory | None = None
        parent, _, name = MANIFEST_DIRECTORY.rpartition("/")
        with open_trusted(parent) as above:
            try:
                self._opened = above.make(name, 0o700) if make else above.subdirectory(name)
            except FileNotFoundError:
                return
        self._lock = LockFile(self._opened)
        self._lock.acquire(0, _LOCK_SECONDS)
        try:
            self._read(self._opened.read(_MANIFEST, _SIZE_MAX))
        except FileNotFoundError:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened:
            self._lock.close()
            self._opened.close()

    def __contains__(self, path: str) -> bool:
        """Whether the file at a path is there, and is as we wrote it."""
        try:
            with open(path, "rb") as file:
                return _digest(file.read(_SIZE_MAX)) in self.wrote.get(os.path.realpath(path), ())
        except OSError:
            return False

    def _read(self, text: bytes) -> None:
        where = f"{MANIFEST_DIRECTORY}/{_MANIFEST}"
        try:
            manifest = json.loads(text)
            version = manifest["version"]
            wrote = manifest["wrote"] if version == _VERSION else {}
            self.wrote = {str(path): [str(digest) for digest in digests] for path, digests in wrote.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MpsError(f"{where} is damaged: {error}", "it is kept; remove by hand what it names") from None
        if version != _VERSION:
            raise MpsError(f"{where} is of version {version}, and this slurm-mps reads {_VERSION}")

    def write(self) -> None:
        """Put the note on disk; when this returns it is there."""
        if self._opened is None:
            return
        text = json.dumps({"version": _VERSION, "wrote": self.wrote}, indent=1)
        self._opened.write(_MANIFEST, text.encode())

    def remove(self) -> None:
        """Remove the note, when all is undone."""
        if self._opened is None:
            return
        parent, _, name = MANIFEST_DIRECTORY.rpartition("/")
        self._opened.unlink(_MANIFEST)
        if self._opened.names() == ["lock"]:
            with open_trusted(parent) as above:
                above.remove_tree(name)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _place(path: str) -> tuple[Directory, str]:
    """A file's directory, open and proved to be root's, to be closed; and the file's name in it.

    Raises: FileNotFoundError; NodeError when others than root can write a directory on the way.
    """
    directory, name = os.path.split(os.path.realpath(path))
    return open_trusted(directory), name


def require_roots(path: str) -> None:
    """Raises: NodeError when others than root can change what is at `path`, or a directory above it."""
    written = others_can_write(path)
    if written:
        raise NodeError(f"{written} can be written by others than root")


def compare(changes: list[Change], manifest: Manifest) -> list[Comparison]:
    """Compare each change with the file that is there now.

    Raises: NodeError when a place is not root's alone.
    """
    return [_compare(change, manifest.wrote.get(os.path.realpath(change.path))) for change in changes]


def _compare(change: Change, wrote: list[str] | None) -> Comparison:
    if change.data is None:
        require_roots(change.path)
        return Comparison(change, b"" if os.path.isdir(change.path) else None, change.mode)
    try:
        directory, name = _place(change.path)
    except FileNotFoundError:  # the directory is to be made
        require_roots(change.path)
        return Comparison(change, None)
    with directory:
        try:
            before = directory.read(name, _SIZE_MAX)
            mode = stat.S_IMODE(os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return Comparison(change, None)
    is_same = before == change.data and mode == change.mode
    is_ours = wrote is not None and _digest(before) in wrote
    stays = "" if is_same or is_ours else FOREIGN if wrote is None else CHANGED
    return Comparison(change, before, mode, stays)


def apply(comparisons: list[Comparison], manifest: Manifest) -> None:
    """Note all that is going to be written, then write it.

    Raises: NodeError; the manifest then has every file that was written.
    """
    needed = [one for one in comparisons if one.is_needed]
    for one in needed:
        there = [] if one.before is None else [_digest(one.before)]  # stays ours until the new one is in its place
        new = [] if one.change.data is None else [_digest(one.change.data)]
        manifest.wrote[os.path.realpath(one.change.path)] = there + new if new else []
    if needed:
        manifest.write()
    for one in needed:
        directory, name = _place(one.change.path)
        with directory:
            if one.change.data is None:
                directory.make(name, one.change.mode).close()
            else:
                directory.write(name, one.change.data, one.change.mode)


def no_longer_wanted(changes: list[Change], manifest: Manifest) -> list[str]:
    """The files that an earlier installation wrote and this one would not: a script where the site looks no longer."""
    wanted = {os.path.realpath(change.path) for change in changes}
    return [path for path, digests in manifest.wrote.items() if digests and path not in wanted]


def undo(path: str, manifest: Manifest, *, dry_run: bool) -> Undone:
    """Remove what is at a path if it is still as we left it; keep anything else, and say so."""
    try:
        directory, name = _place(path)
    except FileNotFoundError:
        return Undone(path, "is gone already")
    with directory:
        if not manifest.wrote[path]:
            return _remove_directory(path, directory, name, dry_run=dry_run)
        return _remove_file(path, directory, name, manifest.wrote[path], dry_run=dry_run)


def _remove_file(path: str, directory: Directory, name: str, wrote: list[str], *, dry_run: bool) -> Undone:
    if not dry_run:
        directory.unlink(name, temporary_only=True)  # of a write that was cut short
    try:
        now = directory.read(name, _SIZE_MAX)
    except FileNotFoundError:
        return Undone(path, "is gone already")
    if _digest(now) not in wrote:
        return Undone(path, f"stays: {CHANGED}", kept=True)
    if not dry_run:
        directory.unlink(name)
    return Undone(path, "removed")


def _remove_directory(path: str, directory: Directory, name: str, *, dry_run: bool) -> Undone:
    if not directory.exists(name):
        return Undone(path, "is gone already")
    if dry_run:
        return Undone(path, "removed, if nothing else is in it")
    try:
        os.rmdir(name, dir_fd=directory.fd)
    except OSError:
        return Undone(path, "stays: other files are in it")
    return Undone(path, "removed")
