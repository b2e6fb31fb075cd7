"""Checks whether root can trust a path, and whether a job's user can reach it, by stat(2) alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

_LINKS_MAX = 16


def steps(path: str) -> Iterator[str]:
    """``/a``, ``/a/b``, ... of an absolute path, the path itself last, and the root before all."""
    yield "/"
    parts = [part for part in path.split("/") if part]
    for count in range(1, len(parts) + 1):
        yield "/" + "/".join(parts[:count])


def _chains(path: str) -> Iterator[str]:
    """The path and, where it is a link, the paths that it leads to."""
    for _ in range(_LINKS_MAX):
        yield path
        try:
            target = os.readlink(path)
        except OSError:
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    real = os.path.realpath(path)
    if real != path:
        yield real


def others_can_write(path: str, *, group_is_trusted: bool = False) -> str:
    """The first part of a path that others than root can change; "" for none. A missing file is no danger.

    A sticky directory of root's is safe, as /tmp is.
    """
    others = stat.S_IWOTH if group_is_trusted else stat.S_IWOTH | stat.S_IWGRP
    for one in (step for chain in _chains(path) for step in steps(chain)):
        try:
            status = os.lstat(one)
        except OSError:
            break
        if stat.S_ISLNK(status.st_mode):
            continue
        safe = not status.st_mode & others or (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX)
        if status.st_uid != 0 or not safe:
            return one
    return ""


def closed_to_users(path: str) -> str:
    """The first directory on the way to a path that a job's user cannot enter; "" for none."""
    for chain in _chains(path):
        for one in list(steps(chain))[:-1]:
            try:
                status = os.stat(one)
            except OSError:
                break
            if not status.st_mode & stat.S_IXOTH and not _has_acl(one):
                return one
    return ""


def hidden_from_users(path: str) -> str:
    """The path that keeps users from reading a file: a directory above it, or the file itself; "" for none."""
    closed = closed_to_users(path)
    if closed:
        return closed
    try:
        is_hidden = not os.stat(path).st_mode & stat.S_IROTH and not _has_acl(path)
    except OSError:
        return ""
    return path if is_hidden else ""


def way_in(closed: str, prefix: str) -> str:
    """The fix that lets users reach the slurm-mps below `prefix`, when the directory `closed` keeps them out.

    A directory above it is somebody's home, and stays closed.
    """
    if f"{closed}/".startswith(f"{prefix}/"):
        return f"chmod -R go+rX {prefix}"
    return (
        "install slurm-mps where everybody can read it, such as /opt/slurm-mps: python3 -m venv /opt/slurm-mps && "
        "/opt/slurm-mps/bin/pip install . && /opt/slurm-mps/bin/slurm-mps install"
    )


def _has_acl(path: str) -> bool:
    """Whether a path has an ACL, so that the mode alone does not tell who may enter."""
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False
