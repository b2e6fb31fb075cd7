"""Whose fault it was: the one thing that decides what happens to the job and to the node.

Slurm drains a node whose prolog fails, so a user's mistake must never look like broken hardware, nor the reverse.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class MpsError(Exception):
    """Something to tell a person: ``message`` says who, what, on which thing and why; ``hint`` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class RequestError(MpsError):
    """The job cannot have what it asked for. The job fails with the message; the node stays in service.

    ``reason`` is one word, for who counts them.
    """

    def __init__(self, message: str, hint: str = "", reason: str = "request") -> None:
        super().__init__(message, hint)
        self.reason = reason


class NodeError(MpsError):
    """This node cannot do its part. The site's policy for node faults applies."""


class DeadlineError(NodeError):
    """Something on this node did not answer in time."""


def raise_all(problems: Sequence[Exception]) -> None:
    """Raise what went wrong; of several problems, one NodeError that reports them all. Nothing where there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise NodeError("; ".join(map(describe_error, problems)))


def describe_error(error: Exception) -> str:
    """An error for a message: our own in its words, any other as the bug that it is."""
    return str(error) if isinstance(error, MpsError) else f"a bug in slurm-mps: {error!r}"
