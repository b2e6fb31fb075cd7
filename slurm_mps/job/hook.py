"""The common part of prolog and epilog: the job, the state, a watch, and how a failure ends.

A user's mistake ends in a refusal: the prolog succeeds, and the job's tasks fail with the message. For a fault of the
node, the site's policy decides (docs/decisions/0006). A bug of ours counts as a fault of the node, with the traceback
in the log.
"""

from __future__ import annotations

import os
from time import strftime

from ..config.settings import DEFAULTS
from ..errors import MpsError, NodeError, RequestError
from ..node.messages import one_line, tell_admin
from ..node.nvml import Gpus
from .request import slurm_number
from .watch import Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config.settings import SiteConfig
    from .state import NodeState


class Hook:
    """A prolog or an epilog of one job. Its attributes are set as it goes, for the message of a failure."""

    name = ""
    done = ""  #: the outcome that metrics count when all went well
    seconds = 0.0

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.gpus = Gpus()
        self.config: SiteConfig = DEFAULTS
        self.state: NodeState | None = None
        self.job_id: int | None = None
        self.watch = Watch(self.seconds, self.give_up)

    def run(self) -> int:
        """Do the work. Returns: the exit status for slurmd, 0 or 1 to have the node drained."""
        try:
            self.job_id = slurm_number(self.environment, "SLURM_JOB_ID")
            _must_be_root()
            self.work(self.job_id)
            self.note(self.done)
            return 0
        except RequestError as error:
            return self.refuse(error)
        except MpsError as error:
            return self.node_fault(str(error))
        except Exception:
            import traceback

            return self.node_fault(f"a bug in slurm-mps: {traceback.format_exc()}")

    def work(self, job_id: int) -> None:
        raise NotImplementedError

    def give_up(self, message: str) -> int:
        """The watch calls this when the time is over."""
        return self.node_fault(message)

    def refuse(self, error: RequestError) -> int:
        return self.node_fault(str(error))

    def node_fault(self, message: str) -> int:
        """Report to the admin, and leave the message for the health check, which gives a drained node its reason."""
        self.tell(message)
        try:
            if self.state:
                self.state.write_last_fault(f"{strftime('%Y-%m-%dT%H:%M:%S')} {one_line(f'{self.who}: {message}')}\n")
        except NodeError:
            pass  # syslog has the message
        self.note("node_fault")
        return 1

    @property
    def who(self) -> str:
        return self.name if self.job_id is None else f"job {self.job_id}"

    def tell(self, message: str) -> None:
        tell_admin(f"{self.who}: {message}")

    def note(self, outcome: str, reason: str = "-") -> None:
        """Where the site wants metrics, note the outcome and the time that it took. Failing to note it is no
        fault.
        """
        if self.state is None or not outcome or self.config.metrics_textfile == "none":
            return
        try:
            self.state.note_event(f"{self.name} {outcome} {self.watch.spent:.4f} {reason}")
        except NodeError:
            pass


def _must_be_root() -> None:
    """Raises: NodeError when Slurm runs the script as another user, who can put nothing back.

    slurmstepd of 24.05 to 25.11 drops its privileges for a moment when it ends the extern step, and an epilog that
    PrologFlags=RunInJob has it start in that moment keeps them dropped for good.
    """
    if os.geteuid():
        raise NodeError(
            f"runs as uid {os.geteuid()}, not as root",
            hint="take RunInJob out of PrologFlags: with it, Slurm before 26.05 at times starts an epilog without root",
        )
