"""Whose fault it was: the one thing that decides what happens to the job and to the node.

Slurm drains a node whose prolog fails, so a user's mistake must never look like broken hardware, nor the reverse.
"""

from __future__ import annotations


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
