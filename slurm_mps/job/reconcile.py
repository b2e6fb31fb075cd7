"""Repair what jobs that are over left on this node: a hook was killed or failed, and no other will come.

Promises (docs/decisions/0005):
 - A job of this boot is touched only when Slurm says that it is over, and no slurmstepd of it lives here.
 - Whatever is done is done under the hooks' own locks, by the journal's own undo; killed anywhere, it can be run again.
 - What slurm-mps did not write is named, and left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from time import monotonic, time

from ..config.load import load_config
from ..config.settings import CONFIG_PATH, DEFAULTS, STATE_DIRECTORY, SiteConfig
from ..errors import DeadlineError, MpsError, NodeError
from ..node.control import Stray, kill_all, search
from ..node.nvml import COMPUTE_MODES, EXCLUSIVE_PROCESS, Gpus
from ..node.processes import SIGKILL, SIGTERM, ProcessIdentity, identify
from ..record import record
from ..slurm import jobs as slurm
from ..slurm.hostlist import hosts_of
from ..slurm.jobs import SlurmJob
from . import joined, joined_daemon, logs
from .actions import JobOnNode, let_go
from .ledger import describe_gone
from .lifecycle import take_down
from .request import ID_MAX
from .state import NodeState
from .watch import UNDO_SHARE, Watch

#: How a repair ended. LEFT is a problem; BUSY is in a hook's hands; KEPT belongs to a job that is not over.
REPAIRED, WOULD_REPAIR, LEFT, BUSY, KEPT = "repaired", "would repair", "left", "busy", "kept"

_QUEUED = frozenset(("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"))
_LONG_OVER_SECONDS = 600
_LOCK_SECONDS = 1.0
_SLURM_SECONDS = 30.0
_SEARCH_SECONDS = 10.0
_JOBS = f"{STATE_DIRECTORY}/jobs"
_WHY_LOGS = "of a job that is over, and more than the site keeps"
_WHY_GPU_LOGS = "of joined jobs whose control daemon is gone"


@record
class Repair:
    """One thing that was looked at because it was not as it should be, or because a job may still need it."""

    thing: str
    outcome: str
    why: str


@record
class _Seen:
    """What is kept of a job, as it was before Slurm was asked; no boot: it has no journal."""

    boot_id: str
    node: str
    stamp: tuple[int, int]


def is_over(job: SlurmJob | None, node: str, now_seconds: float) -> tuple[bool, str]:
    """Whether a job is over on a node, by what Slurm says of it (None: it does not know it), and why. Pure.

    `node` is Slurm's own name of it; without, a job that is anywhere may be here.
    """
    if job is None:
        return True, "Slurm does not know the job any more"
    if job.state in slurm.OVER or job.state in _QUEUED:
        return True, f"to Slurm it is {job.state}"
    if node and job.nodes and node not in (hosts_of(job.nodes) or [node]):  # not understood: it may be among them
        return True, f"to Slurm it is {job.state} on other nodes only"
    if job.state == "COMPLETING" and _is_long_ago(job.end_seconds, now_seconds):
        return True, f"to Slurm it is COMPLETING for more than {_LONG_OVER_SECONDS // 60} minutes"
    return False, f"to Slurm it is {job.state}"


def _is_long_ago(end_seconds: int | None, now_seconds: float) -> bool:
    return end_seconds is not None and now_seconds - end_seconds > _LONG_OVER_SECONDS


class Reconciler:
    """One look at the node, and its repairs; with `dry_run` only the look. `report` is given each repair as it comes.

    `watch` ends the process where a driver hangs; `environment` says where squeue is found and which Slurm it asks.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        gpus: Gpus,
        watch: Watch,
        report: Callable[[Repair], None],
        *,
        dry_run: bool,
    ) -> None:
        self._environment = environment
        self._gpus = gpus
        self._watch = watch
        self._told: dict[str, int] = {}

        def tell(repair: Repair) -> None:
            self._told[repair.outcome] = self._told.get(repair.outcome, 0) + 1
            report(repair)

        self._report = tell
        self._dry_run = dry_run
        self._in_slurm: dict[int, SlurmJob] = {}
        self._silence = ""  #: why Slurm gave no answer
        self._with_steps: set[int] = set()
        self._with_their_job: set[int] = set()  #: whose ledger entries wait: for the real run, or for a job's end

    def run(self) -> bool:
        """Look, and repair. False when there is nothing of slurm-mps on this node.

        Raises: NodeError when the state directory is not to be trusted.
        """
        strays = self._search()
        state = self._open_state()
        config = self._site_config(state)
        if state is None:
            untidy, gpus = self._untidy_logs(config, ()), logs.of_gpus(config)
            if not strays and not untidy and not gpus:
                return False
            if self._dry_run:
                self._ask(list(strays))
                for job_id in strays:
                    self._say_of_lost(job_id)
                for job_id in untidy:
                    self._report(Repair(f"logs of job {job_id}", WOULD_REPAIR, _WHY_LOGS))
                for gpu in gpus:
                    self._report(Repair(f"logs of {gpu}", WOULD_REPAIR, _WHY_GPU_LOGS))
                return True
            state = NodeState()
        self._repair(state, strays, config)
        return True

    def _search(self) -> dict[int, list[Stray]]:
        """The control daemons and servers of jobs, by job."""
        self._watch.restart(2 * _SEARCH_SECONDS)
        try:
            found = search(_JOBS, _SEARCH_SECONDS)
        except NodeError as error:
            self._report(Repair("this node", LEFT, str(error)))
            return {}
        return _by_job(found)

    def _open_state(self) -> NodeState | None:
        try:
            return NodeState(make=False) if self._dry_run or not os.path.isdir(STATE_DIRECTORY) else NodeState()
        except FileNotFoundError:
            return None

    def _repair(self, state: NodeState, strays: dict[int, list[Stray]], config: SiteConfig) -> None:
        jobs = state.job_ids()
        seen = {job: one for job in jobs if (one := self._look(state, job))}
        lost = [job for job in strays if job not in jobs or (job in seen and not seen[job].boot_id)]
        self._ask([*lost, *(job for job, one in seen.items() if one.boot_id == state.boot_id)])
        for job_id, one in seen.items():
            if job_id not in lost:
                self._job(state, job_id, one)
        for job_id in lost:
            over, why = self._say_of_lost(job_id)
            if over and not self._dry_run:
                self._locked(state, job_id, partial(self._end_strays, state, job_id, strays[job_id], why))
        for uuid in state.ledgers.names():
            self._guarded(uuid, partial(self._ledger, state, uuid))
            self._guarded(uuid, partial(self._joined, state, uuid, config))
        self._guarded(joined_daemon.DIRECTORY, partial(self._lost_daemons, state))
        for uuid in logs.of_gpus(config):
            self._guarded(f"logs of {uuid}", partial(self._lost_logs, state, uuid, config))
        for path in state.strangers():
            self._report(Repair(path, LEFT, "slurm-mps did not put it there"))
        for job_id in self._untidy_logs(config, [*jobs, *lost]):
            self._locked(state, job_id, partial(self._tidy, state, job_id, config))
        if not self._dry_run and config.metrics_textfile != "none":
            self._guarded("metrics", partial(self._note, state))

    def _note(self, state: NodeState) -> None:
        for outcome in (REPAIRED, LEFT):
            state.note_event(f"reconcile {outcome} {self._told.get(outcome, 0)} -")

    # ---------------------------------------------------------------------------------------------- who is over

    def _look(self, state: NodeState, job_id: int) -> _Seen | None:
        """A job's state; None where it cannot be read, which is reported."""
        try:
            stamp = state.stamp(job_id)
            journal = state.look_at_journal(job_id)
        except MpsError as error:
            self._report(Repair(f"job {job_id}", LEFT, str(error)))
            return None
        return _Seen(journal.boot_id, journal.node, stamp) if journal else _Seen("", "", stamp)

    def _ask(self, job_ids: list[int]) -> None:
        """Learn what Slurm knows of jobs: its processes here, and its controller."""
        self._with_steps = slurm.jobs_with_steps()
        self._watch.restart(2 * _SLURM_SECONDS)
        if not job_ids:
            return
        try:
            self._in_slurm = slurm.find_jobs(job_ids, self._environment, _SLURM_SECONDS)
        except NodeError as error:
            self._silence = str(error)

    def _is_over(self, job_id: int, node: str) -> tuple[bool, str, str]:
        """Whether a job of this boot is over here, the outcome to report if it is not, and why.

        A slurmstepd that is there long after its job has ended hangs, and keeps nothing.
        """
        job, steps = self._in_slurm.get(job_id), job_id in self._with_steps
        if self._silence:
            why = "a slurmstepd of it runs here" if steps else f"Slurm does not say whether it is over: {self._silence}"
            return False, KEPT if steps else LEFT, why
        over, why = is_over(job, node, time())
        if over and steps and job is None:
            return False, LEFT, f"{why}, but a slurmstepd of it still runs here: end that, and run this again"
        if over and steps and job and not (job.state in slurm.OVER and _is_long_ago(job.end_seconds, time())):
            return False, KEPT, "a slurmstepd of it runs here"
        return over, KEPT, why

    # ---------------------------------------------------------------------------------------------- what is done

    def _job(self, state: NodeState, job_id: int, seen: _Seen) -> None:
        """Take down a job that is over; without a journal, remove its directory."""
        thing = f"job {job_id}"
        if not seen.boot_id:
            why = "its directory has no journal: nothing was started for it"
        elif seen.boot_id != state.boot_id:
            why = "it is of an earlier boot"
        else:
            over, outcome, why = self._is_over(job_id, seen.node)
            if not over:
                self._report(Repair(thing, outcome, why))
                return
        self._locked(state, job_id, partial(self._take_down, state, job_id, seen, why))

    def _take_down(self, state: NodeState, job_id: int, seen: _Seen, why: str) -> Repair:
        thing = f"job {job_id}"
        if state.stamp(job_id) != seen.stamp:
            return Repair(thing, KEPT, "it started again, or its epilog ended it, meanwhile")
        if self._dry_run:
            self._with_their_job.add(job_id)
            return Repair(thing, WOULD_REPAIR, why)
        journal = state.open_journal(job_id)
        if journal:
            config = journal.read_config() or DEFAULTS
            self._watch.restart(config.deadlines_epilog)
            end = self._watch.at(UNDO_SHARE)
            take_down(JobOnNode(state, journal, self._gpus, config, end, end))
        return Repair(thing, REPAIRED, why)

    def _say_of_lost(self, job_id: int) -> tuple[bool, str]:
        """Whether a job is over of which there are processes and no journal; says so when nothing is to be done."""
        over, _, why = self._is_over(job_id, "")
        why = f"it has MPS processes and no journal; {why}"
        if not over:  # whoever runs without a journal is not kept: its epilog will not find what it has
            self._report(Repair(f"job {job_id}", LEFT, why))
            self._with_their_job.add(job_id)
        elif self._dry_run:
            self._report(Repair(f"job {job_id}", WOULD_REPAIR, why))
        return over, why

    def _end_strays(self, state: NodeState, job_id: int, strays: list[Stray], why: str) -> Repair | None:
        """End the processes of a job that has no journal, and look at what they may have left of their GPUs."""
        thing = f"job {job_id}"
        if state.look_at_journal(job_id):
            return Repair(thing, KEPT, "it started again meanwhile")
        processes = [stray.process for stray in strays]
        if not any(identify(process.pid) == process for process in processes):
            return None
        if left := _end(processes):
            return Repair(thing, LEFT, f"{why}; {left}")
        state.open_journal(job_id)  # removes the directory without one
        for uuid in sorted({gpu for stray in strays for gpu in stray.gpus if gpu} - set(state.ledgers.names())):
            self._guarded(uuid, partial(self._mode_of_lost, uuid, job_id))
        return Repair(thing, REPAIRED, why)

    def _mode_of_lost(self, uuid: str, job_id: int) -> Repair | None:
        if self._gpus.compute_mode(uuid) != EXCLUSIVE_PROCESS:
            return None
        why = (
            f"EXCLUSIVE_PROCESS since job {job_id}; the compute mode before that is unknown; nvidia-smi -c sets another"
        )
        return Repair(uuid, LEFT, why)

    def _ledger(self, state: NodeState, uuid: str) -> Repair | None:
        """Take those who are gone out of a GPU's ledger; without holders the GPU gets back its compute mode."""
        state.ledgers.lock(_LOCK_SECONDS)
        try:
            written, boot_id = state.ledgers.read_as_written(uuid)
            entry = state.ledgers.read(uuid)
            left = entry.holders
            if (
                entry.daemon is not None
                or (left and left == written.holders)
                or self._with_their_job.intersection(one.job_id for one in written.holders)
            ):
                return None
            if boot_id != state.boot_id:
                why = "its ledger is of an earlier boot" if boot_id else "a write of its ledger was cut short"
            else:
                why = describe_gone(written, entry) or "no job holds it"
                if not left and entry.mode_found is not None:
                    why += f"; compute mode back to {COMPUTE_MODES.get(entry.mode_found, entry.mode_found)}"
            if self._dry_run:
                return Repair(uuid, WOULD_REPAIR, why)
            self._watch.restart(DEFAULTS.deadlines_epilog)
            let_go(uuid, (), state, self._gpus)
            return Repair(uuid, REPAIRED, why)
        finally:
            state.ledgers.unlock()

    def _joined(self, state: NodeState, uuid: str, config: SiteConfig) -> Repair | None:
        """Take those who are gone out of the ledger of joined jobs, and end a daemon that nobody is going to end."""
        written, _ = state.ledgers.read_as_written(uuid)
        entry = state.ledgers.read(uuid)
        if entry.daemon is None or self._with_their_job.intersection(one.job_id for one in written.holders):
            return None
        why = joined.what_is_left(entry, written)
        if not why:
            return None
        if self._dry_run:
            return Repair(uuid, WOULD_REPAIR, why)
        self._watch.restart(DEFAULTS.deadlines_epilog)
        end = self._watch.at(UNDO_SHARE)
        joined.settle(uuid, state, self._gpus, config, lambda wanted: min(wanted, max(0.0, end - monotonic())))
        return Repair(uuid, REPAIRED, why)

    def _lost_daemons(self, state: NodeState) -> None:
        """End the daemons of joined jobs that no ledger names, and remove what they had."""
        names = joined.names(state)
        strays = search(joined_daemon.DIRECTORY, _SEARCH_SECONDS) if names else []
        for gpu in names:
            self._guarded(gpu, partial(self._lost_daemon, state, gpu, strays))

    def _lost_daemon(self, state: NodeState, gpu: str, strays: Sequence[Stray]) -> Repair | None:
        """The strays were there before the ledger is read: a daemon that a job starts meanwhile is not among them."""
        try:
            daemon = state.ledgers.read(gpu).daemon
        except MpsError:
            return None  # a ledger that cannot be read may name it, and has been reported
        named, here = daemon and joined_daemon.pipe_path(gpu, daemon), f"{joined_daemon.daemon_path(gpu)}/"
        lost = [one.process for one in strays if one.pipe_directory.startswith(here) and one.pipe_directory != named]
        if daemon is not None and not lost:
            return None
        why = "control daemons of joined jobs that no ledger names"
        if self._dry_run:
            return Repair(gpu, WOULD_REPAIR, why)
        self._watch.restart(DEFAULTS.deadlines_epilog)
        if left := _end(lost):
            return Repair(gpu, LEFT, f"{why}; {left}")
        state.ledgers.lock(_LOCK_SECONDS)
        try:
            if state.ledgers.read(gpu).daemon is None:
                state.daemons().remove_tree(gpu)
        finally:
            state.ledgers.unlock()
        return Repair(gpu, REPAIRED, why)

    # --------------------------------------------------------------------------------------------------- the logs

    def _lost_logs(self, state: NodeState, gpu: str, config: SiteConfig) -> Repair | None:
        """Remove the logs of joined jobs' daemons that are gone: the boot ended them."""
        entry = state.ledgers.read(gpu)
        if entry.daemon is not None or entry.holders:
            return None
        if self._dry_run:
            return Repair(f"logs of {gpu}", WOULD_REPAIR, _WHY_GPU_LOGS)
        gone = joined_daemon.forget_logs(gpu, state, config)
        return Repair(f"logs of {gpu}", REPAIRED, _WHY_GPU_LOGS) if gone else None

    def _site_config(self, state: NodeState | None) -> SiteConfig:
        """The site configuration; the defaults, with a report, where its file cannot be used."""
        try:
            return load_config(None if self._dry_run else state, _SLURM_SECONDS)
        except MpsError as error:
            self._report(Repair(CONFIG_PATH, LEFT, str(error)))
            return DEFAULTS

    def _untidy_logs(self, config: SiteConfig, jobs: Collection[int]) -> list[int]:
        try:
            return logs.untidy(config, jobs)
        except MpsError as error:
            self._report(Repair(config.paths_logs, LEFT, str(error)))
            return []

    def _tidy(self, state: NodeState, job_id: int, config: SiteConfig) -> Repair | None:
        if job_id in state.job_ids():
            return None
        if self._dry_run:
            return Repair(f"logs of job {job_id}", WOULD_REPAIR, _WHY_LOGS)
        logs.keep(job_id, config, state.job_ids())
        return Repair(f"logs of job {job_id}", REPAIRED, _WHY_LOGS)

    # --------------------------------------------------------------------------------------------- how it is done

    def _locked(self, state: NodeState, job_id: int, work: Callable[[], Repair | None]) -> None:
        """Do something about a job while no hook of it can; a hook that is at work is left to it."""
        self._watch.restart(DEFAULTS.deadlines_epilog)
        try:
            state.lock_job(job_id, _LOCK_SECONDS)
        except DeadlineError:
            self._report(Repair(f"job {job_id}", BUSY, "its prolog or epilog is at work"))
            return
        try:
            self._guarded(f"job {job_id}", work)
        finally:
            state.unlock_job(job_id)

    def _guarded(self, thing: str, work: Callable[[], Repair | None]) -> None:
        """Do one thing and tell what came of it; what goes wrong keeps nothing else from being done."""
        try:
            repair = work()
        except MpsError as error:
            repair = Repair(thing, LEFT, str(error))
        except OSError as error:
            repair = Repair(thing, LEFT, f"{error.filename or 'a system call'}: {error.strerror}")
        if repair:
            self._report(repair)


def _end(processes: Sequence[ProcessIdentity]) -> str:
    """End processes of MPS. Returns: which of them are still there, in words; empty for none."""
    for number in (SIGTERM, SIGKILL):
        kill_all(processes, number, DEFAULTS.deadlines_signal)
    left = [str(process.pid) for process in processes if identify(process.pid) == process]
    return f"MPS processes {', '.join(left)} are there after SIGKILL" if left else ""


def _by_job(strays: list[Stray]) -> dict[int, list[Stray]]:
    """By the job whose directory they were started for; others are none of ours."""
    found: dict[int, list[Stray]] = {}
    for stray in strays:
        job = stray.pipe_directory.removeprefix(f"{_JOBS}/").partition("/")[0]
        if job.isdigit() and len(job) <= 10 and int(job) <= ID_MAX:
            found.setdefault(int(job), []).append(stray)
    return found
