"""Privileged work on files: the only place in the privileged code that opens, makes or removes any.

Everything goes through a directory that is already open (``*at`` calls), never through a path that somebody could
change underneath; links are never followed; every descriptor is close-on-exec (Python's default).

Promises:
 - A trusted directory and all its parents belong to root and can be written by nobody else.
 - A file is there whole or not at all (temporary file, fsync, rename, fsync of the directory).
 - Removal leaves the file system it started on alone and follows nothing.
Source: CVE-2023-41914 (Slurm: chown after mkdir, recursive removal by path), CVE-2024-0132 and its successors (NVIDIA
Container Toolkit: links followed between look and use), CVE-2024-21626 (runc: an inherited descriptor).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from time import monotonic, sleep

from ..errors import DeadlineError, NodeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_READ_LIMIT_BYTES = 1024**2
_REMOVE_LIMIT_ENTRIES = 10_000
_REMOVE_LIMIT_DEPTH = 8
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_LOCK_POLL_SECONDS = 0.005

# A POSIX ACL as the kernel takes it in system.posix_acl_access: version 2, then (tag, permissions, id) each.
_ACL_VERSION = struct.pack("<I", 2)
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER_OBJ, _ACL_USER, _ACL_GROUP_OBJ, _ACL_MASK, _ACL_OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_ACL_NO_ID = 0xFFFFFFFF


def _check_name(name: str) -> str:
    """Names come from our own code, job ids and UUIDs; a slash would leave the directory."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise NodeError(f"{name!r} is no name for a file of slurm-mps")
    return name


def _temporary(name: str) -> str:
    """The name that write() gives a file until it is whole."""
    return f".{_check_name(name)}.new"


def whole_name(name: str) -> str:
    """The name of a file, also for the temporary file of a write() that was cut short."""
    return name[1:-4] if name.startswith(".") and name.endswith(".new") else name


def _only_root_writes(status: os.stat_result, *, group_is_trusted: bool = False) -> bool:
    """Whether nobody but root, and where that is trusted the group, can change this; a sticky directory is safe too."""
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return status.st_uid == 0
    others = stat.S_IWOTH if group_is_trusted else stat.S_IWGRP | stat.S_IWOTH
    return status.st_uid == 0 and not status.st_mode & others


class Directory:
    """An open directory that only root can write; close with ``with`` or close()."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path  #: for messages and for programs that take a path; never opened again here

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def _fault(self, name: str, error: OSError) -> NodeError:
        return NodeError(f"{self.path}/{name}: {os.strerror(error.errno or 0)}")

    def exists(self, name: str) -> bool:
        try:
            os.stat(_check_name(name), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def subdirectory(self, name: str, *, group_is_trusted: bool = False) -> Directory:
        """Open a directory in this one.

        Raises: NodeError when it is a link, no directory, or can be written by others than root.
        """
        try:
            fd = os.open(_check_name(name), _DIRECTORY, dir_fd=self.fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._fault(name, error) from None
        if not _only_root_writes(os.fstat(fd), group_is_trusted=group_is_trusted):
            os.close(fd)
            raise NodeError(f"{self.path}/{name} can be written by others than root")
        return Directory(fd, f"{self.path.rstrip('/')}/{name}")

    def make(self, name: str, mode: int) -> Directory:
        """Make a directory with exactly `mode`, or open the one that is there."""
        old_umask = os.umask(0o777 & ~mode)
        try:
            os.mkdir(_check_name(name), mode, dir_fd=self.fd)
        except FileExistsError:
            pass
        except OSError as error:
            raise self._fault(name, error) from None
        finally:
            os.umask(old_umask)
        return self.subdirectory(name)

    def stamp(self, name: str) -> tuple[int, int]:
        """A stamp that differs for the file that a later write() puts in its place; (0, 0) for no file."""
        try:
            status = os.stat(_check_name(name), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return (0, 0)
        return (status.st_ino, status.st_ctime_ns)

    def changed_ns(self, name: str) -> int:
        """When a file was last written to, in nanoseconds since 1970."""
        return os.stat(_check_name(name), dir_fd=self.fd, follow_symlinks=False).st_mtime_ns

    def touch(self) -> None:
        """Make now the time at which this directory was last written to."""
        os.utime(self.fd)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.fd))

    def _open_roots_file(self, name: str, how: int = os.O_RDONLY) -> int:
        """Open a regular file that root made here; others may have written it.

        Raises: FileNotFoundError; NodeError for a link, a second name of a file elsewhere, or no file at all.
        """
        try:
            fd = os.open(_check_name(name), how | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._fault(name, error) from None
        status = os.fstat(fd)
        # Without a name it was replaced while we opened it, and is whole.
        if not (stat.S_ISREG(status.st_mode) and status.st_nlink <= 1 and status.st_uid == 0):
            os.close(fd)
            raise NodeError(f"{self.path}/{name} is not a file that only root writes")
        return fd

    def read(self, name: str, limit_bytes: int = _READ_LIMIT_BYTES) -> bytes:
        """Read a regular file that only root can write.

        Raises: FileNotFoundError; NodeError for anything that is not such a file, or longer than `limit_bytes`.
        """
        fd = self._open_roots_file(name)
        with open(fd, "rb", buffering=0) as file:
            if not _only_root_writes(os.fstat(fd)):
                raise NodeError(f"{self.path}/{name} is not a file that only root writes")
            data = file.read(limit_bytes + 1) or b""
        if len(data) > limit_bytes:
            raise NodeError(f"{self.path}/{name} is longer than {limit_bytes} bytes")
        return data

    def read_tail(self, name: str, limit_bytes: int) -> bytes:
        """Read at most the last `limit_bytes` of a file of root's whose content need not be root's, such as a log."""
        fd = self._open_roots_file(name)
        with open(fd, "rb", buffering=0) as file:
            file.seek(max(0, os.fstat(fd).st_size - limit_bytes))
            return file.read(limit_bytes) or b""

    def cut(self, name: str, limit_bytes: int, mode: int) -> None:
        """Cut a file of root's to its last `limit_bytes`. After a failure the file is as it was.

        The space of the rest is free when this returns, though somebody may still have it open.
        Raises: FileNotFoundError; NodeError.
        """
        data = self.read_tail(name, limit_bytes + 1)
        if len(data) <= limit_bytes:
            return
        fd = self._open_roots_file(name, os.O_WRONLY)
        try:
            self.write(name, data[-limit_bytes:], mode)
            os.ftruncate(fd, 0)
        except OSError as error:
            raise self._fault(name, error) from None
        finally:
            os.close(fd)

    def user_let_in(self, name: str) -> int | None:
        """The user that grant_user() let into a directory in this one; None for one that it did not make so."""
        with self.subdirectory(name) as directory:
            try:
                acl = os.getxattr(directory.fd, "system.posix_acl_access")
            except OSError:
                return None
        found = [uid for tag, _, uid in _ACL_ENTRY.iter_unpack(acl[len(_ACL_VERSION) :]) if tag == _ACL_USER]
        return found[0] if found else None

    def protect(self, name: str) -> None:
        """Take other users' permission to write a file of root's. A missing file is no error."""
        try:
            fd = self._open_roots_file(name)
        except FileNotFoundError:
            return
        try:
            os.fchmod(fd, 0o644)
        except OSError as error:
            raise self._fault(name, error) from None
        finally:
            os.close(fd)

    def write(self, name: str, data: bytes, mode: int = 0o600) -> None:
        """Put a file in place, whole or not at all, and on disk when this returns.

        Raises: NodeError; then the file of before is still there.
        """
        temporary = _temporary(name)
        try:
            self.unlink(name, temporary_only=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=self.fd)
            with open(fd, "wb", buffering=0) as file:
                written = 0
                while written < len(data):
                    written += file.write(data[written:]) or 0
                os.fchmod(fd, mode)
                os.fsync(fd)
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)
        except OSError as error:
            self.unlink(name, temporary_only=True)
            raise self._fault(name, error) from None

    def append(self, name: str, data: bytes, limit_bytes: int) -> None:
        """Add to a file of root's, in one write. Data that would make the file longer than `limit_bytes` is dropped.

        Raises: NodeError.
        """
        how = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK
        try:
            try:
                fd = os.open(_check_name(name), how | os.O_NOFOLLOW, dir_fd=self.fd)
            except FileNotFoundError:
                fd = os.open(name, how | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=self.fd)
            with open(fd, "ab", buffering=0) as file:
                status = os.fstat(fd)
                if not (stat.S_ISREG(status.st_mode) and _only_root_writes(status)):
                    raise NodeError(f"{self.path}/{name} is not a file that only root writes")
                if status.st_size + len(data) <= limit_bytes:
                    file.write(data)
        except OSError as error:
            raise self._fault(name, error) from None

    def link_socket(self, name: str, directory: Directory) -> None:
        """Give a socket of root's the same name in another directory, too, in place of what has it there.

        Raises: NodeError.
        """
        try:
            directory.unlink(name)
            os.link(_check_name(name), name, src_dir_fd=self.fd, dst_dir_fd=directory.fd, follow_symlinks=False)
            there = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
        except OSError as error:
            raise directory._fault(name, error) from None
        if not stat.S_ISSOCK(there.st_mode) or there.st_uid != 0:
            directory.unlink(name)
            raise NodeError(f"{self.path}/{name} is no socket of root's")

    def rename(self, name: str, new_name: str) -> bool:
        """Give a file another name, over one that has it; False when there is none."""
        try:
            os.rename(_check_name(name), _check_name(new_name), src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._fault(name, error) from None
        return True

    def unlink(self, name: str, *, temporary_only: bool = False) -> None:
        """Remove a file or a link, and the temporary file of a write() that was cut short. A missing file is no
        error.
        """
        for victim in (_temporary(name),) if temporary_only else (_temporary(name), name):
            try:
                os.unlink(victim, dir_fd=self.fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise self._fault(victim, error) from None

    def remove_tree(self, name: str) -> None:
        """Remove a directory and everything in it, and free the space at once. A missing directory is no error.

        Raises: NodeError when something cannot be removed, lies on another file system, or is beyond any size that
        this program ever makes.
        """
        budget = [_REMOVE_LIMIT_ENTRIES]
        try:
            _remove_tree(self.fd, _check_name(name), os.fstat(self.fd).st_dev, budget, _REMOVE_LIMIT_DEPTH)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._fault(name, error) from None

    def grant_user(self, uid: int | None) -> None:
        """Let one user, besides root, enter and list this directory (O24), and no other user any more; None: no user.

        Raises: NodeError when the file system has no POSIX ACLs.
        """
        users = () if uid is None else ((_ACL_USER, 5, uid),)
        mask = () if uid is None else ((_ACL_MASK, 5, _ACL_NO_ID),)
        entries = (
            (_ACL_USER_OBJ, 7, _ACL_NO_ID),
            *users,
            (_ACL_GROUP_OBJ, 0, _ACL_NO_ID),
            *mask,
            (_ACL_OTHER, 0, _ACL_NO_ID),
        )
        acl = _ACL_VERSION + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)
        try:
            os.setxattr(self.fd, "system.posix_acl_access", acl)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise NodeError(f"{self.path}: the file system has no POSIX ACLs", hint="mount it with them") from None
            raise NodeError(f"{self.path}: cannot let uid {uid} in: {os.strerror(error.errno or 0)}") from None

    def open_to_all(self) -> None:
        """Let everybody enter this directory, and nobody list it."""
        try:
            os.fchmod(self.fd, 0o711)
        except OSError as error:
            raise NodeError(f"{self.path}: cannot let users in: {os.strerror(error.errno or 0)}") from None


def _remove_tree(parent_fd: int, name: str, device: int, budget: list[int], depth: int) -> None:
    fd = os.open(name, _DIRECTORY, dir_fd=parent_fd)
    try:
        if os.fstat(fd).st_dev != device:
            raise NodeError(f"{name} lies on another file system and is left alone")
        for entry in os.listdir(fd):
            budget[0] -= 1
            if budget[0] < 0 or depth == 0:
                raise NodeError(f"{name} holds more than slurm-mps ever makes; it is left for the admin")
            status = os.stat(entry, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                _remove_tree(fd, entry, device, budget, depth - 1)
                continue
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size:
                _empty(fd, entry)
            os.unlink(entry, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent_fd)


def _empty(parent_fd: int, name: str) -> None:
    """Free a file's space: a process that has it open would keep the space otherwise."""
    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent_fd)
    try:
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def read_slurms_own(path: str, limit_bytes: int = 2**24) -> bytes:
    """Read a file of Slurm's, such as slurm.conf. Its owner does not matter: slurmd reads it by the same path, and runs
    as root what it names. Raises: OSError.
    """
    with open(path, "rb") as file:
        return file.read(limit_bytes)


def open_trusted(path: str, *, group_is_trusted: bool = False) -> Directory:
    """Open a directory by an absolute path, checking every parent on the way down.

    Raises: FileNotFoundError; NodeError when any of them is a link or can be written by others than root, or with
    `group_is_trusted` by others than root and its group.
    """
    directory = Directory(os.open("/", _DIRECTORY), "")
    for name in path.strip("/").split("/"):
        with directory:
            directory = directory.subdirectory(name, group_is_trusted=group_is_trusted)
    return directory


def make_trusted(path: str, mode: int, *, group_is_trusted: bool = False) -> Directory:
    """Open a directory by an absolute path, and make its last part if it is missing. Only root may write that
    part.
    """
    parent, _, name = path.rstrip("/").rpartition("/")
    with open_trusted(parent, group_is_trusted=group_is_trusted) as directory:
        return directory.make(name, mode)


class LockFile:
    """Locks on byte ranges of one file that is never removed, so that there is no lock on a file that is gone.

    POSIX record locks: they end with the process however it dies, and no child inherits them.
    """

    def __init__(self, directory: Directory) -> None:
        self._path = f"{directory.path}/lock"
        try:
            self._fd = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=directory.fd)
        except OSError as error:
            raise NodeError(f"{self._path}: {os.strerror(error.errno or 0)}") from None

    def close(self) -> None:
        os.close(self._fd)

    def acquire(self, number: int, timeout_seconds: float) -> None:
        """Take lock `number`.

        Raises: DeadlineError when another process keeps it longer than `timeout_seconds`.
        """
        end = monotonic() + timeout_seconds
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
                return
            except (BlockingIOError, PermissionError):
                if monotonic() > end:
                    raise DeadlineError(
                        f"{self._path}: another slurm-mps has kept lock {number} for {timeout_seconds:g} s"
                    ) from None
                sleep(_LOCK_POLL_SECONDS)

    def release(self, number: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, number)
