"""What an installation writes, and how it is undone; the note of it is on disk before anything changes.

Promises: a file is there whole or not at all; whenever it is killed, running it again finishes it and `uninstall` takes
it back; what the admin changed since is not overwritten and not removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass, replace

from ..errors import MpsError, NodeError
from ..node.files import Directory, LockFile, open_trusted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

MANIFEST_DIRECTORY = "/var/lib/slurm-mps"
_MANIFEST, _FOUND_DIRECTORY = "installed.json", "found"
_VERSION = 1
_LOCK_SECONDS = 5.0
_SIZE_MAX = 64 * 2**20

FILE, LINES, DIRECTORY = "file", "lines", "directory"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Change:
    """A file to write whole, lines to add to the end of one, or a directory to make."""

    path: str
    kind: str = FILE
    data: bytes = b""  #: of a file all of it, of lines those to add
    mode: int = 0o644


@dataclass(frozen=True)
class Found:
    """What was there before: its mode, group and digest; the content is kept beside the manifest by its digest."""

    mode: int
    gid: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A change as the manifest has it. `written`: the digests of what we put there, the last one last."""

    path: str
    kind: str
    found: Found | None = None
    written: tuple[str, ...] = ()
    lines: str = ""


@dataclass(frozen=True)
class Step:
    """One change, looked at: what is there now, and what would be."""

    change: Change
    before: bytes | None
    after: bytes
    mode: int
    before_mode: int = 0
    kept: str = ""  #: why it is left as it is, if it is

    @property
    def needed(self) -> bool:
        same = self.before == self.after and self.before_mode == self.mode
        return not self.kept and not (self.before is not None and same)


@dataclass(frozen=True)
class Undone:
    """What became of one path: put back, removed, or kept and why."""

    path: str
    what: str
    kept: bool = False


@dataclass
class _Place:
    """A file's directory, open and proved to be root's, and its name in it."""

    directory: Directory
    name: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.directory.close()

    def read(self) -> bytes | None:
        try:
            return self.directory.read(self.name, _SIZE_MAX)
        except FileNotFoundError:
            return None

    def status(self) -> os.stat_result:
        return os.stat(self.name, dir_fd=self.directory.fd, follow_symlinks=False)

    def write(self, data: bytes, mode: int, gid: int = 0) -> None:
        self.directory.write(self.name, data, mode)
        if gid:
            os.chown(self.name, -1, gid, dir_fd=self.directory.fd)


def _place(path: str) -> _Place:
    """Raises: FileNotFoundError; NodeError when others than root can write a directory on the way."""
    directory, name = os.path.split(os.path.realpath(path))
    return _Place(open_trusted(directory), name)


def require_roots(path: str) -> None:
    """Raises: NodeError when others than root can change what is at `path`, or any directory above it."""
    real = os.path.realpath(path)
    while not os.path.isdir(real):
        status = os.stat(real) if os.path.exists(real) else None
        if status and (status.st_uid or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise NodeError(f"{real} can be written by others than root")
        real = os.path.dirname(real)
    if real != "/":
        open_trusted(real).close()


class Manifest:
    """What was changed on this node, in /var/lib/slurm-mps. One at a time; close it with ``with``.

    Raises on opening: MpsError when it is damaged, or a newer slurm-mps wrote it.
    """

    def __init__(self, *, make: bool) -> None:
        self.entries: dict[str, Entry] = {}
        self._opened: Directory | None = None
        parent, _, name = MANIFEST_DIRECTORY.rpartition("/")
        with open_trusted(parent) as above:
            try:
                self._opened = above.make(name, 0o700) if make else above.subdirectory(name)
            except FileNotFoundError:
                return
        self._lock = LockFile(self._directory)
        self._lock.acquire(0, _LOCK_SECONDS)
        try:
            self._read(self._directory.read(_MANIFEST, _SIZE_MAX))
        except FileNotFoundError:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened:
            self._lock.close()
            self._opened.close()

    @property
    def _directory(self) -> Directory:
        if self._opened is None:
            raise MpsError(f"{MANIFEST_DIRECTORY} is not there")
        return self._opened

    def _read(self, text: bytes) -> None:
        where = f"{MANIFEST_DIRECTORY}/{_MANIFEST}"
        try:
            manifest = json.loads(text)
            version = manifest["version"]
            entries = [_entry(**fields) for fields in manifest["changes"]] if version == _VERSION else []
        except (ValueError, KeyError, TypeError) as error:
            raise MpsError(f"{where} is damaged: {error}", "it is kept; undo by hand what it names") from None
        if version != _VERSION:
            raise MpsError(f"{where} is of version {version}, and this slurm-mps reads {_VERSION}")
        self.entries = {entry.path: entry for entry in entries}

    def write(self) -> None:
        """Put the note on disk; when this returns it is there."""
        changes = [_without_nothing(entry) for entry in self.entries.values()]
        text = json.dumps({"version": _VERSION, "changes": changes}, indent=1)
        self._directory.write(_MANIFEST, text.encode())

    def forget(self, entries: list[Entry]) -> None:
        """Take what was undone off the note."""
        for entry in entries:
            del self.entries[entry.path]
        if entries:
            self.write()

    def keep(self, data: bytes) -> None:
        """Keep the content of a file that is going to be changed."""
        with self._directory.make(_FOUND_DIRECTORY, 0o700) as found:
            found.write(digest(data), data)

    def kept(self, sha256: str) -> bytes:
        """Raises: MpsError when it is not there, or not whole."""
        where = f"{MANIFEST_DIRECTORY}/{_FOUND_DIRECTORY}/{sha256}"
        try:
            with self._directory.subdirectory(_FOUND_DIRECTORY) as found:
                data = found.read(sha256, _SIZE_MAX)
        except FileNotFoundError:
            raise MpsError(f"{where} is gone, which a file is to be put back from") from None
        if digest(data) != sha256:
            raise MpsError(f"{where} is damaged")
        return data

    def remove(self) -> None:
        """Remove the manifest and what it kept, when all is undone."""
        if self._opened is None:
            return
        parent, _, name = MANIFEST_DIRECTORY.rpartition("/")
        self._directory.unlink(_MANIFEST)
        self._directory.remove_tree(_FOUND_DIRECTORY)
        if self._directory.names() == ["lock"]:
            with open_trusted(parent) as above:
                above.remove_tree(name)


def _entry(path: str, kind: str, written: list[str], lines: str = "", found: dict[str, Any] | None = None) -> Entry:
    return Entry(path, kind, Found(**found) if found else None, tuple(written), lines)


def _without_nothing(entry: Entry) -> dict[str, Any]:
    fields = {**vars(entry), "found": vars(entry.found) if entry.found else None}
    return {name: value for name, value in fields.items() if value not in (None, "")}


# --------------------------------------------------------------------------------------------------------- looking


def look(changes: list[Change], manifest: Manifest) -> list[Step]:
    """What each change would do now.

    Raises: NodeError when a place is not root's alone.
    """
    return [_look(change, manifest.entries.get(_key(change))) for change in changes]


def _key(change: Change) -> str:
    return os.path.realpath(change.path)


def _look(change: Change, entry: Entry | None) -> Step:
    if change.kind == DIRECTORY:
        require_roots(change.path)
        there = os.path.isdir(change.path)
        return Step(change, b"" if there else None, b"", change.mode, change.mode)
    before, mode_now = None, 0
    try:
        with _place(change.path) as place:
            before = place.read()
            mode_now = 0 if before is None else stat.S_IMODE(place.status().st_mode)
    except FileNotFoundError:  # the directory is to be made
        require_roots(change.path)
    mode = mode_now if before is not None and change.kind == LINES else change.mode
    after = change.data if change.kind == FILE else _with_lines(before or b"", change.data, entry)
    known = entry is None or before is None or digest(before) in entry.written or _is_found(before, entry)
    kept = "" if known or before == after or change.kind == LINES else "it was changed since it was installed"
    return Step(change, before, after, mode, mode_now, kept)


def _is_found(data: bytes, entry: Entry) -> bool:
    return entry.found is not None and entry.found.sha256 == digest(data)


def _with_lines(text: bytes, lines: bytes, entry: Entry | None) -> bytes:
    """The text with the lines at its end, once; those of an earlier installation go."""
    if lines in text:
        return text
    if entry and entry.lines:
        text = _without_lines(text, entry.lines.encode())
    return text + (b"\n" if text and not text.endswith(b"\n") else b"") + lines


def _without_lines(text: bytes, lines: bytes) -> bytes:
    before, found, after = text.partition(lines)
    whole = found and (not before or before.endswith(b"\n"))
    return before + after if whole else text


def no_longer_wanted(changes: list[Change], manifest: Manifest) -> list[Entry]:
    """What an earlier installation wrote and this one would not: a script where the site looks no longer."""
    wanted = {_key(change) for change in changes}
    return [entry for entry in manifest.entries.values() if entry.kind == FILE and entry.path not in wanted]


# ----------------------------------------------------------------------------------------------------- doing, undoing


def apply(steps: list[Step], manifest: Manifest) -> None:
    """Note all that is going to be done, then do it.

    Raises: NodeError; what was done until then is in the manifest.
    """
    needed = [step for step in steps if step.needed]
    for step in needed:
        _note(step, manifest)
    if needed:
        manifest.write()
    for step in needed:
        _do(step)


def _note(step: Step, manifest: Manifest) -> None:
    key = _key(step.change)
    entry = manifest.entries.get(key)
    if entry is None:
        found = None
        if step.before is not None:
            with _place(key) as place:
                status = place.status()
            found = Found(stat.S_IMODE(status.st_mode), status.st_gid, digest(step.before))
            manifest.keep(step.before)
        entry = Entry(key, step.change.kind, found)
    there = digest(step.before or b"")  # stays ours until the new one is in its place
    written = (*(one for one in entry.written if one == there), digest(step.after))
    lines = step.change.data.decode() if step.change.kind == LINES else ""
    manifest.entries[key] = replace(entry, written=() if entry.kind == DIRECTORY else written, lines=lines)


def _do(step: Step) -> None:
    key = _key(step.change)
    if step.change.kind == DIRECTORY:
        with _place(key) as place:
            place.directory.make(place.name, step.mode).close()
        return
    with _place(key) as place:
        gid = place.status().st_gid if step.before is not None else 0
        place.write(step.after, step.mode, gid)


def undo(entry: Entry, manifest: Manifest, *, dry_run: bool) -> Undone:
    """Put back what was at one path, if it is still as we left it; otherwise keep it and say so."""
    try:
        place = _place(entry.path)
    except FileNotFoundError:
        return Undone(entry.path, "is gone already")
    with place:
        if entry.kind == DIRECTORY:
            return _undo_directory(entry, place, dry_run=dry_run)
        if not dry_run:
            place.directory.unlink(place.name, temporary_only=True)  # of a write that was cut short
        now = place.read()
        if entry.kind == LINES:
            return _undo_lines(entry, now, place, manifest, dry_run=dry_run)
        if now is not None and digest(now) not in entry.written and not _is_found(now, entry):
            return Undone(entry.path, "stays: it was changed since it was installed", kept=True)
        return _put_back(entry, now, place, manifest, dry_run=dry_run)


def _put_back(entry: Entry, now: bytes | None, place: _Place, manifest: Manifest, *, dry_run: bool) -> Undone:
    """Make a file what was found, or nothing."""
    if entry.found is None:
        if not dry_run:
            place.directory.unlink(place.name)
        return Undone(entry.path, "is gone already" if now is None else "removed")
    if now is not None and _is_found(now, entry) and stat.S_IMODE(place.status().st_mode) == entry.found.mode:
        return Undone(entry.path, "is as it was")
    if not dry_run:
        place.write(manifest.kept(entry.found.sha256), entry.found.mode, entry.found.gid)
    return Undone(entry.path, "put back as it was")


def _undo_lines(entry: Entry, now: bytes | None, place: _Place, manifest: Manifest, *, dry_run: bool) -> Undone:
    """Take our lines out; what is then as it was found is put back to the byte, anything else keeps the rest."""
    if now is None:
        return Undone(entry.path, "is gone already")
    rest = _without_lines(now, entry.lines.encode())
    before = manifest.kept(entry.found.sha256) if entry.found else b""
    if rest in (before, before + b"\n"):
        return _put_back(entry, now, place, manifest, dry_run=dry_run)
    if rest == now:
        return Undone(entry.path, "has none of our lines any more")
    if not dry_run:
        status = place.status()
        place.write(rest, stat.S_IMODE(status.st_mode), status.st_gid)
    return Undone(entry.path, "our lines removed; the rest was changed since and stays")


def _undo_directory(entry: Entry, place: _Place, *, dry_run: bool) -> Undone:
    if not place.directory.exists(place.name):
        return Undone(entry.path, "is gone already")
    if dry_run:
        return Undone(entry.path, "removed, if nothing else is in it")
    try:
        os.rmdir(place.name, dir_fd=place.directory.fd)
    except OSError:
        return Undone(entry.path, "stays: other files are in it")
    return Undone(entry.path, "removed")
