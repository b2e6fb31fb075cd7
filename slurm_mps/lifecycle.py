"""The order of things: bring a job's MPS up, take it down.

Promises:
 - Each step's undo is on disk before the step changes anything.
 - bring_up() leaves the job's MPS whole, or nothing of it.
 - take_down() goes on past an undo that fails, reports all failures together, and finds nothing to do a second time.
"""

from __future__ import annotations

import _thread
from time import monotonic

from .errors import DeadlineError, MpsError, NodeError
from .record import replace
from .steps import JobSite, QuitDaemons, read_undo, side_by_side

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .plan import Plan
    from .steps import Step


def bring_up(ahead: Sequence[Step], decide: Callable[[], Plan], site: JobSite) -> None:
    """Do the steps of the plan that `decide` makes and leave the verdict for the job's tasks.

    The steps `ahead` are done while it decides; where they turn out not to be the plan's, all is undone and begun
    again (docs/decisions/0019).
    Raises: what `decide` or the step that failed raised, after everything before it was undone; NodeError when that
    failed too.
    """
    journal = site.journal
    try:
        for step in ahead:
            _note(step, site)
        plan = _claim_beside(ahead, decide, site)
        done = (*plan.claims, *ahead)
        if any(step not in plan.steps for step in ahead):
            _undo_or_raise(site)
            done = ()
        for step in plan.steps:
            if step not in done:
                _note(step, site)
                step.apply(site)
        journal.write_verdict(plan.verdict([site.daemon(one.name) for one in plan.daemons]))
        journal.ready = True
        journal.write()
    except Exception as error:  # a bug, too, must not leave half of it
        problems = undo_all(replace(site, deadline=site.undo_deadline))
        if problems:
            raise NodeError(f"{error}; and it could not be undone: {'; '.join(problems)}") from error
        raise


def _note(step: Step, site: JobSite, after: int = 0) -> None:
    """On disk first: a prolog killed on the next line can still be undone. `after` as in Journal.note()."""
    undo = step.look()
    if undo is not None:
        site.journal.note(undo.line(), after)


def _claim_beside(ahead: Sequence[Step], decide: Callable[[], Plan], site: JobSite) -> Plan:
    """Decide and claim the GPUs, which waits for NVML, and do `ahead` beside it.

    Where deciding hangs in the driver, which no deadline reaches, what was done ahead is undone when its time is over.
    Raises: what `decide` or a claim raised; what a step ahead did, if it is one of the plan's.
    """
    plans: list[Plan] = []
    failures: list[Exception] = []
    undone_first = len(site.journal.undo)
    decided, journals_writer = _thread.allocate_lock(), _thread.allocate_lock()
    decided.acquire()

    def claim() -> None:
        try:
            plan = decide()
        finally:
            decided.release()
        if not journals_writer.acquire(blocking=False):
            raise DeadlineError("out of time")
        for step in plan.claims:
            _note(step, site, undone_first)
            step.apply(site)
        site.gpus.close()
        plans.append(plan)

    def do_ahead() -> None:
        try:
            for step in ahead:
                step.apply(site)
        except Exception as error:  # raised in the end, if it matters
            failures.append(error)
        in_time = decided.acquire(timeout=max(0.0, site.deadline - monotonic()))
        if not in_time and journals_writer.acquire(blocking=False):
            _undo_or_raise(replace(site, deadline=site.undo_deadline))

    side_by_side(lambda part: part(), (claim, do_ahead) if ahead else (claim,))
    (plan,) = plans
    if failures and all(step in plan.steps for step in ahead):
        raise failures[0]
    return plan


def _undo_or_raise(site: JobSite) -> None:
    problems = undo_all(site)
    if problems:
        raise NodeError("; ".join(problems))


def undo_all(site: JobSite) -> list[str]:
    """Undo what the journal says, newest first; what is undone leaves the journal. Returns what went wrong."""
    problems = []
    left: list[str] = []
    for line in reversed(site.journal.undo):
        try:
            read_undo(line).undo(site)
        except Exception as error:  # whatever it is, the others have their work to do
            problems.append(str(error) if isinstance(error, MpsError) else f"a bug in slurm-mps: {error!r}")
            left.insert(0, line)
    if site.journal.undo:
        site.journal.undo = left
        site.journal.ready = False
        try:
            site.journal.write()
        except NodeError as error:
            problems.append(str(error))
    return problems


def take_down(site: JobSite) -> None:
    """Undo everything and forget the job.

    Raises: NodeError with everything that could not be undone; the journal stays, so that it can be tried again.
    """
    _undo_or_raise(site)
    site.state.remove_journal(site.journal)


def is_up(site: JobSite, restart_count: int) -> bool:
    """Whether all of it was done for this very run of the job (a requeued job has the same id) and still stands."""
    journal = site.journal
    if not (journal.ready and journal.restart_count == restart_count and journal.boot_id == site.state.boot_id):
        return False
    daemons = [undo for undo in map(read_undo, journal.undo) if isinstance(undo, QuitDaemons)]
    return bool(daemons) and all(undo.stand(site) for undo in daemons)
