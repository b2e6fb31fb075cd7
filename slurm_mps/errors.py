"""The errors, by whose fault they are: that decides what happens to the job and to the node.

Slurm drains a node whose prolog fails, so a user's mistake must never look like broken hardware, nor the reverse.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class MpsError(Exception):
    """An error for a person to read: ``message`` says who, what, on which thing and why; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class RequestError(MpsError):
    """The job cannot have what it asked for. The job fails with the message; the node stays in service.

    ``reason`` is one word; metrics and exit statuses go by it.
    """

    def __init__(self, message: str, hint: str = "", reason: str = "request") -> None:
        super().__init__(message, hint)
        self.reason = reason


class NodeError(MpsError):
    """This node cannot do its part. The site's policy for node faults applies."""


class DeadlineError(NodeError):
    """Something on this node did not answer in time."""


def raise_all(problems: Sequence[Exception]) -> None:
    """Raise the one problem, or one NodeError that reports several. No problem raises nothing."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise NodeError("; ".join(map(describe_error, problems)))


def describe_error(error: Exception) -> str:
    """The text of an error for a message. Any error but our own is a bug, and the text says so."""
    return str(error) if isinstance(error, MpsError) else f"a bug in slurm-mps: {error!r}"
