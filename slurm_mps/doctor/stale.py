"""What crashed jobs left, by the dry run of reconcile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..job.reconcile import Finding, Reconciler
from ..job.watch import Watch
from ..node.nvml import Gpus

if TYPE_CHECKING:
    from collections.abc import Mapping


class _NoWatch(Watch):
    """Ends nothing: whoever asks waits no longer than it wants to."""

    def __init__(self) -> None:
        pass

    def restart(self, seconds: float) -> None:
        pass


def stale_state(environment: Mapping[str, str]) -> list[Finding]:
    """Needs root. Raises: MpsError when the state directory is not to be trusted."""
    found: list[Finding] = []
    Reconciler(environment, Gpus(), _NoWatch(), found.append, dry_run=True).run()
    return found
