"""The order of things: bring a job's MPS up, take it down.

Promises:
 - Each step's undo is on disk before the step changes anything.
 - bring_up() leaves the job's MPS whole, or nothing of it.
 - take_down() goes on past an undo that fails, reports all failures together, and finds nothing to do a second time.
"""

from __future__ import annotations

import _thread
from time import monotonic

from ..errors import DeadlineError, MpsError, NodeError, RequestError
from ..node.messages import tell_admin
from ..record import replace
from . import logs
from .actions import JobOnNode, QuitDaemons, read_undo, side_by_side

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .actions import Step
    from .plan import Plan


def bring_up(ahead: Sequence[Step], decide: Callable[[], Plan], site: JobOnNode) -> None:
    """Do the steps of the plan that `decide` makes and leave the verdict for the job's tasks.

    The steps `ahead` are done while it decides; where they turn out not to be the plan's, or fail, all is undone and
    done in its turn (docs/decisions/0019).
    Raises: what `decide` or the step that failed raised, after everything before it was undone; NodeError when that
    failed too.
    """
    journal = site.journal
    try:
        for step in ahead:
            _note(step, site)
        beside = _Beside(ahead, decide, site)
        plan = beside.run()
        done = (*plan.claims, *ahead)
        if beside.in_vain:
            _undo_or_raise(site)
            done = ()
        for step in plan.steps:
            if step not in done:
                _note(step, site)
                step.apply(site)
        journal.write_verdict(plan.verdict([site.daemon(one.name) for one in plan.daemons]))
        journal.ready = True
        journal.write()
        if beside.in_vain:
            tell_admin(f"job {journal.job_id}: its control daemon was started twice: {beside.in_vain}")
    except Exception as error:  # a bug, too, must not leave half of it
        if ahead and isinstance(error, RequestError):  # else there are none, or they are of the job's run before this
            logs.forget(journal.job_id, site.config)
        problems = undo_all(replace(site, deadline=site.undo_deadline))
        if problems:
            raise NodeError(f"{error}; and it could not be undone: {'; '.join(problems)}") from error
        raise


def _note(step: Step, site: JobOnNode, after: int = 0) -> None:
    """On disk first: a prolog killed on the next line can still be undone. `after` as in Journal.note()."""
    undo = step.look()
    if undo is not None:
        site.journal.note(undo.line(), after)


class _Beside:
    """The plan is made and the GPUs are claimed, which waits for NVML, while a thread does the steps `ahead`.

    Where NVML hangs, which no deadline reaches, the thread undoes what it did when its time is over.
    """

    def __init__(self, ahead: Sequence[Step], decide: Callable[[], Plan], site: JobOnNode) -> None:
        self._ahead = ahead
        self._decide = decide
        self._site = site
        self._undone_first = len(site.journal.undo)
        self._plans: list[Plan] = []
        self._failures: list[Exception] = []
        self._is_late = False
        self.in_vain = ""  #: why what was done ahead is to be undone and done again
        self._claimed, self._journal_is_free = _thread.allocate_lock(), _thread.allocate_lock()
        self._claimed.acquire()

    def run(self) -> Plan:
        """Raises: what deciding or a claim raised; DeadlineError."""
        parts = (self._claim, self._do_ahead) if self._ahead else (self._claim,)
        side_by_side(lambda part: part(), parts)
        if self._is_late:
            raise DeadlineError("out of time")
        (plan,) = self._plans
        if any(step not in plan.steps for step in self._ahead):
            self.in_vain = "the kernel lists other GPUs than NVML"
        elif self._failures:
            if isinstance(self._failures[0], DeadlineError):
                raise self._failures[0]  # there is no time to wait for the same again
            self.in_vain = _in_words(self._failures[0])
        return plan

    def _claim(self) -> None:
        try:
            plan = self._decide()
            if not self._journal_is_free.acquire(blocking=False):
                raise DeadlineError("out of time")
            for step in plan.claims:
                _note(step, self._site, self._undone_first)
                step.apply(self._site)
            self._plans.append(plan)
        finally:
            self._claimed.release()

    def _do_ahead(self) -> None:
        try:
            for step in self._ahead:
                step.apply(self._site)
        except Exception as error:  # of no interest where it is not the plan's
            self._failures.append(error)
        if not self._claimed.acquire(timeout=max(0.0, self._site.deadline - monotonic())):
            self._is_late = True
            self._undo_ahead(replace(self._site, deadline=self._site.undo_deadline))

    def _undo_ahead(self, site: JobOnNode) -> None:
        if self._journal_is_free.acquire(blocking=False):
            _undo_or_raise(site)
            return
        for step in reversed(self._ahead):  # while the claims write the journal; what stays in it is undone twice
            undo = step.look()
            if undo is not None:
                undo.undo(site)


def _undo_or_raise(site: JobOnNode) -> None:
    problems = undo_all(site)
    if problems:
        raise NodeError("; ".join(problems))


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, MpsError) else f"a bug in slurm-mps: {error!r}"


def undo_all(site: JobOnNode) -> list[str]:
    """Undo what the journal says, last line first; what is undone leaves it. Returns what went wrong."""
    problems = []
    left: list[str] = []
    for line in reversed(site.journal.undo):
        try:
            read_undo(line).undo(site)
        except Exception as error:  # whatever it is, the others have their work to do
            problems.append(_in_words(error))
            left.insert(0, line)
    if site.journal.undo:
        site.journal.undo = left
        site.journal.ready = False
        try:
            site.journal.write()
        except NodeError as error:
            problems.append(str(error))
    return problems


def take_down(site: JobOnNode) -> None:
    """Undo everything and forget the job.

    Raises: NodeError with everything that could not be undone; the journal stays, so that it can be tried again.
    """
    _undo_or_raise(site)
    site.state.remove_journal(site.journal)


def is_up(site: JobOnNode, restart_count: int) -> bool:
    """Whether all of it was done for this very run of the job (a requeued job has the same id) and still stands."""
    journal = site.journal
    if not (journal.ready and journal.restart_count == restart_count and journal.boot_id == site.state.boot_id):
        return False
    daemons = [undo for undo in map(read_undo, journal.undo) if isinstance(undo, QuitDaemons)]
    return bool(daemons) and all(undo.stand(site) for undo in daemons)
