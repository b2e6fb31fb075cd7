"""The order of things: bring a job's MPS up, take it down.

Promises:
 - Each step's undo is on disk before the step changes anything.
 - bring_up() leaves the job's MPS whole, or nothing of it.
 - take_down() goes on past an undo that fails, reports all failures together, and finds nothing to do a second time.
"""

from __future__ import annotations

from .errors import MpsError, NodeError
from .record import replace
from .steps import JobSite, QuitDaemons, read_undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .plan import Plan


def bring_up(plan: Plan, site: JobSite) -> None:
    """Do a plan's steps and leave the verdict for the job's tasks.

    Raises: what the step that failed raised, after everything before it was undone; NodeError when that failed too.
    """
    journal = site.journal
    try:
        for step in plan.steps:
            undo = step.look()
            if undo is not None:
                journal.note(undo.line())  # on disk first: a prolog killed on the next line can still be undone
            step.apply(site)
        journal.write_verdict(plan.verdict([site.daemon(one.name) for one in plan.daemons]))
        journal.ready = True
        journal.write()
    except Exception as error:  # a bug, too, must not leave half of it
        problems = undo_all(replace(site, deadline=site.undo_deadline))
        if problems:
            raise NodeError(f"{error}; and it could not be undone: {'; '.join(problems)}") from error
        raise


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
    problems = undo_all(site)
    if problems:
        raise NodeError("; ".join(problems))
    site.state.remove_journal(site.journal)


def is_up(site: JobSite, restart_count: int) -> bool:
    """Whether all of it was done for this very run of the job (a requeued job has the same id) and still stands."""
    journal = site.journal
    if not (journal.ready and journal.restart_count == restart_count and journal.boot_id == site.state.boot_id):
        return False
    daemons = [undo for undo in map(read_undo, journal.undo) if isinstance(undo, QuitDaemons)]
    return bool(daemons) and all(undo.stand(site) for undo in daemons)
