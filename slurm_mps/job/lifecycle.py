"""Bring a job's MPS up, and take it down.

Promises:
 - Each action's undo is on disk before the action changes anything.
 - bring_up() succeeds, or undoes everything that it did.
 - take_down() goes on past an undo that fails, and reports all failures together. A second run finds nothing to do.
"""

from __future__ import annotations

from ..errors import DeadlineError, NodeError, RequestError, describe_error
from ..node import processes
from ..node.messages import tell_admin
from ..node.nvml import expected_uuids
from ..record import replace
from . import logs
from .actions import MakeDirectories, QuitDaemons, ReleaseGpu, StartDaemons, StartServers
from .joined import LeaveGpus
from .plan import first_actions, make_plan
from .undo import read_undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .actions import Action, JobOnNode
    from .request import JobRequest

_CHILD_ENDS_SECONDS = 1.0  # a program whose work is not needed any more, or not waited for


def bring_up(request: JobRequest, job: JobOnNode) -> None:
    """Give the job what it asks for, and leave the verdict for its tasks.

    The control daemons start while NVML opens (docs/decisions/0019), on the GPUs that the kernel lists. Where NVML
    lists other GPUs, everything is undone, and done again on those.
    Raises: RequestError when the job cannot have what it asks, or what the action that failed raised, after everything
    before it was undone; NodeError when that failed too.
    """
    first = first_actions(request, job.config, expected_uuids(request.gpus))
    children: Sequence[processes.Child] = ()
    try:
        _note(first, job)
        children = _begin(first, job)
        plan = make_plan(request, job.config, tuple(job.gpus.resolve(name) for name in request.gpus))
        if first and plan.actions[: len(first)] != first:
            _withdraw(children, job)
            first, children = (), ()
            why = "the kernel lists other GPUs than NVML"
            tell_admin(f"job {job.journal.job_id}: its control daemon was started twice: {why}")
        _note(plan.actions, job)
        for action in plan.actions:
            if first and isinstance(action, StartDaemons):
                action.finish(children, job)
                children = ()
            elif isinstance(action, StartServers):
                children = action.begin(job)
            elif not (first and isinstance(action, MakeDirectories)):
                action.apply(job)
        job.seconds(0)  # the watch may have given up, and left another verdict
        job.journal.write_verdict(plan.verdict(plan.running(job)))
        job.journal.ready = True
        job.journal.write()
    except Exception as error:  # a bug, too, must not leave half of it
        is_late = bool(job.journal.waited) and isinstance(error, DeadlineError)
        if first and (is_late or isinstance(error, RequestError)):
            processes.wait_all(children, _CHILD_ENDS_SECONDS)  # a daemon that is still starting would make them again
            logs.forget(job.journal.job_id, job.config)  # they are empty, and would push out an older job's
        problems = _undo(children, job)
        if problems:
            raise NodeError(f"{error}; and it could not be undone: {'; '.join(problems)}") from error
        if is_late:
            raise RequestError(job.journal.waited, hint="submit the job again", reason="busy_gpu") from error
        raise
    job.gpus.close()  # while the daemons start their servers
    processes.wait_all(children, _CHILD_ENDS_SECONDS)


def _note(actions: Iterable[Action], job: JobOnNode) -> None:
    """Put the undos of these actions on disk, except those that are there already.

    Each GPU's ledger is read first: an action whose undo could not read it must not start.
    """
    undos = [undo for action in actions if (undo := action.undo()) is not None]
    for undo in undos:
        for gpu in undo.gpus if isinstance(undo, (ReleaseGpu, LeaveGpus)) else ():
            job.state.ledgers.read(gpu)
    new = [line for undo in undos if (line := undo.line()) not in job.journal.undo]
    if new:
        job.journal.note(*new)


def _begin(actions: Iterable[Action], job: JobOnNode) -> Sequence[processes.Child]:
    """Make the daemons' directories and start the daemons without waiting. Returns: the programs that start them.

    The GPUs are not claimed yet: a control daemon does nothing on a GPU before it has a server.
    """
    children: Sequence[processes.Child] = ()
    for action in actions:
        if isinstance(action, MakeDirectories):
            action.apply(job)
        elif isinstance(action, StartDaemons):
            children = action.begin(job)
    return children


def _withdraw(children: Sequence[processes.Child], job: JobOnNode) -> None:
    problems = _undo(children, job)
    if problems:
        raise NodeError("; ".join(problems))


def _undo(children: Sequence[processes.Child], job: JobOnNode) -> list[str]:
    """Undo everything, after the programs that start daemons have ended: otherwise a daemon could start after its
    undo.
    """
    processes.wait_all(children, _CHILD_ENDS_SECONDS)
    return undo_all(replace(job, deadline=job.undo_deadline))


def undo_all(job: JobOnNode, *, claims: bool = True) -> list[str]:
    """Run the undos of the journal, last line first; an undo that succeeds leaves it. Without `claims` the GPUs stay
    claimed.

    Returns: the errors, in words.
    """
    problems = []
    left: list[str] = []
    for line in reversed(job.journal.undo):
        try:
            undo = read_undo(line)
            if claims or not isinstance(undo, (ReleaseGpu, LeaveGpus)):
                undo.run(job)
            else:
                left.insert(0, line)
        except Exception as error:  # whatever it is, the others have their work to do
            problems.append(describe_error(error))
            left.insert(0, line)
    if job.journal.undo:
        job.journal.undo = left
        job.journal.ready = False
        try:
            job.journal.write()
        except NodeError as error:
            problems.append(str(error))
    return problems


def take_down(job: JobOnNode) -> None:
    """Undo everything and forget the job.

    Raises: NodeError with every undo that failed; the journal stays, so that a later run can try again.
    """
    problems = undo_all(job)
    if problems:
        raise NodeError("; ".join(problems))
    job.state.remove_journal(job.journal)


def is_up(job: JobOnNode, run: str) -> bool:
    """Whether bring-up is complete for this run of the job (request.run_of_job), and its daemons still run."""
    journal = job.journal
    if not (journal.ready and journal.run == run and journal.boot_id == job.state.boot_id):
        return False
    daemons = [undo for undo in map(read_undo, journal.undo) if isinstance(undo, (QuitDaemons, LeaveGpus))]
    return bool(daemons) and all(undo.all_run(job) for undo in daemons)
