"""Programs of an attacker's, and waiting for what they bring about."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from tests.harness.gpunode import GpuNode

T = TypeVar("T")


def until(what: str, look: Callable[[], T | None]) -> T:
    """Look again and again until there is an answer."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within 10 s: {what}")


@contextmanager
def started(node: GpuNode, *argv: str, user: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of a user's that is gone, with all that it has started, when the block ends."""
    child = node.start("setsid", "--wait", *argv, user=user, env=env)
    try:
        yield child
    finally:
        node.run("sh", "-c", "kill -9 -1; true", user=user)  # all of this user's, in this machine alone
        child.wait(5)


def let_use_fuse(node: GpuNode) -> None:
    """Let users make file systems of their own, as distributions do."""
    node.run("sh", "-c", "[ -e /dev/fuse ] || mknod /dev/fuse c 10 229; chmod 666 /dev/fuse").check()


def give(node: GpuNode, user: str, program: bytes, name: str = "stay.so") -> None:
    """Put a program or a library into a user's home."""
    place = node.machine.path(f"/home/{user}/{name}")
    place.write_bytes(program)
    place.chmod(0o755)
