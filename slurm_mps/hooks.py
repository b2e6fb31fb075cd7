"""What slurmd calls: the prolog and the epilog of a job.

Whose fault a failure is decides how it ends. The user's: the prolog succeeds, the verdict is a refusal, the job's
tasks fail with its message. The node's: the site's policy (docs/decisions/0006). Ours (a bug): as the node's, with the
traceback in the log. What an epilog cannot put back drains the node.
"""

from __future__ import annotations

import _thread
import os
import sys
from time import monotonic, sleep, strftime

from . import __version__
from .config import DEFAULTS, ConfigError, SiteConfig, from_lines
from .errors import MpsError, NodeError, RequestError
from .lifecycle import bring_up, is_up, take_down
from .node import logs, processes
from .node.files import open_trusted
from .node.gpus import expected_uuids
from .node.messages import one_line, tell_admin
from .plan import make_plan, plan_start
from .record import replace
from .request import read_request, slurm_number
from .state import STATE_DIRECTORY, Journal, NodeState, Verdict, refused, without
from .steps import JobSite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .node.gpus import Gpus
    from .plan import Plan

CONFIG_DIRECTORY, CONFIG_NAME = "/etc/slurm", "mps.toml"
CONFIG_PATH = f"{CONFIG_DIRECTORY}/{CONFIG_NAME}"
_WATCH_SECONDS = 0.1
_LAST_WORDS_SECONDS = 0.5
_BRING_UP_SHARE, UNDO_SHARE = 0.6, 0.9  # of a hook's deadline; after the whole of it the process is over


def _compile_config(text: bytes, timeout_seconds: float) -> SiteConfig:
    """Check and compile the file in a process of its own: here neither jsonschema nor site-packages may come in."""
    outcome = processes.run(
        [sys.executable, "-I", "-m", "slurm_mps.config_file", CONFIG_PATH],
        {"PATH": "/usr/bin:/bin"},
        timeout_seconds,
        text.decode("utf-8", "surrogateescape"),
    )
    if outcome.status:
        raise ConfigError(outcome.errors.splitlines() or [f"{CONFIG_PATH}: cannot be checked"])
    return from_lines(outcome.output.splitlines())


def load_config(state: NodeState | None, timeout_seconds: float) -> SiteConfig:
    """The site configuration: defaults without a file, else the compiled one, made anew when the file has changed.

    The directory may be a link, as sites like to have it: what root's links in root's directories lead to is checked.
    Where the compiled form cannot be kept it is made each time: what is wrong with the state is said by others.
    Raises: ConfigError when the file is wrong; NodeError when it can be written by others than root.
    """
    try:
        with open_trusted(os.path.realpath(CONFIG_DIRECTORY)) as directory:
            status = os.stat(CONFIG_NAME, dir_fd=directory.fd)
            place = f"{status.st_dev}:{status.st_ino}:{status.st_size}"
            stamp = f"{__version__}:{place}:{status.st_mtime_ns}:{status.st_ctime_ns}"
            config = state.read_compiled_config(stamp) if state else None
            if config is None:
                config = _compile_config(directory.read(CONFIG_NAME), timeout_seconds)
                _keep_config(state, stamp, config, timeout_seconds)
            return config
    except FileNotFoundError:
        return DEFAULTS


def _keep_config(state: NodeState | None, stamp: str, config: SiteConfig, timeout_seconds: float) -> None:
    """Under a lock of all jobs: several that start after a change write the same file. It may also not be kept."""
    if state is None:
        return
    try:
        state.lock_ledgers(timeout_seconds)
        try:
            state.write_compiled_config(stamp, config)
        finally:
            state.unlock_ledgers()
    except NodeError:
        pass


class Watch:
    """Ends this process when its time is over, even if it hangs where no other deadline reaches: in the driver, in a
    write that nobody reads. Counts from the start of the hook; the site's deadline may come later than the default.
    """

    def __init__(self, seconds: float, give_up: Callable[[str], int]) -> None:
        self._started = monotonic()
        self._seconds = seconds
        self._give_up = give_up
        _thread.start_new_thread(self._wait, ())

    def set(self, seconds: float) -> None:
        self._seconds = seconds

    def restart(self, seconds: float) -> None:
        """Give the next piece of work a time of its own."""
        self._started = monotonic()
        self._seconds = seconds

    @property
    def left(self) -> float:
        """Seconds until what is brought up must be so."""
        return max(0.0, self._started + _BRING_UP_SHARE * self._seconds - monotonic())

    @property
    def spent(self) -> float:
        """Seconds since the start, without Python's own."""
        return monotonic() - self._started

    def at(self, share: float) -> float:
        """The monotonic time at which this share of the whole time is over."""
        return self._started + share * self._seconds

    def _until_last_words(self) -> float:
        reserved = min(_LAST_WORDS_SECONDS, (1 - UNDO_SHARE) * self._seconds)
        return self.at(1.0) - reserved - monotonic()

    def _wait(self) -> None:
        while (left := self._until_last_words()) > 0:
            sleep(min(left, _WATCH_SECONDS))
        status = [1]
        done = _thread.allocate_lock()
        done.acquire()

        def last_words() -> None:
            status[0] = self._give_up(f"not done after {self._seconds:g} s; the NVIDIA driver may hang")
            done.release()

        _thread.start_new_thread(last_words, ())
        done.acquire(timeout=_LAST_WORDS_SECONDS)
        os._exit(status[0])


def _must_be_root() -> None:
    """Raises: NodeError when Slurm runs the hook as somebody else; then nothing of root's can be read or put back.

    slurmstepd of 24.05 to 25.11 drops its privileges for a moment when it ends the extern step, and an epilog that
    PrologFlags=RunInJob has it start in that moment keeps them dropped for good.
    """
    if os.geteuid():
        raise NodeError(
            f"runs as uid {os.geteuid()}, not as root",
            hint="with PrologFlags=RunInJob, Slurm before 26.05 does that to an epilog at times: leave it out",
        )


class _Prolog:
    """The prolog of one job; remembers as much as is needed to say how it failed."""

    def __init__(self, environment: Mapping[str, str], gpus: Gpus) -> None:
        self._environment = environment
        self._watch = Watch(DEFAULTS.deadlines_prolog, self._node_fault)
        self._gpus = gpus
        self._config = DEFAULTS
        self._state: NodeState | None = None
        self._journal: Journal | None = None
        self._job_id: int | None = None
        self._who = "prolog"

    def run(self) -> int:
        try:
            self._run()
            self._note("ready")
            return 0
        except RequestError as error:
            return self._refuse(str(error), error.reason)
        except MpsError as error:
            return self._node_fault(str(error))
        except Exception:
            import traceback

            return self._node_fault(f"a bug in slurm-mps: {traceback.format_exc()}")

    def _run(self) -> None:
        self._job_id = job_id = slurm_number(self._environment, "SLURM_JOB_ID")
        self._who = f"job {job_id}"
        _must_be_root()
        state = self._open_state()
        state.lock_job(job_id, self._watch.left)
        restart_count = slurm_number(self._environment, "SLURM_JOB_RESTART_COUNT", default=0)
        left = state.open_journal(job_id)
        if left:
            old = self._site(state, left, left.read_config() or DEFAULTS)
            if is_up(old, restart_count):
                return
            take_down(replace(old, deadline=old.undo_deadline))
        uid = slurm_number(self._environment, "SLURM_JOB_UID")
        node = self._environment.get("SLURMD_NODENAME", "")
        self._journal = journal = state.begin_journal(job_id, uid, restart_count, node)
        request = read_request(self._environment)
        journal.write_config(self._config)
        site = self._site(state, journal, self._config)

        def decide() -> Plan:
            return make_plan(request, self._config, tuple(site.gpus.resolve(name) for name in request.gpus))

        bring_up(plan_start(request, expected_uuids(request.gpus)), decide, site)

    def _open_state(self) -> NodeState:
        """Open the state directory and read the configuration, which says what comes of a fault of either."""
        try:
            self._state = NodeState()
        except NodeError:
            self._configure()
            raise
        self._configure()
        return self._state

    def _configure(self) -> None:
        try:
            self._config = load_config(self._state, self._watch.left)
        except NodeError:
            self._config = (self._state and self._state.read_compiled_config()) or DEFAULTS
            raise
        self._watch.set(self._config.deadlines_prolog)

    def _site(self, state: NodeState, journal: Journal, config: SiteConfig) -> JobSite:
        return JobSite(state, journal, self._gpus, config, self._watch.at(_BRING_UP_SHARE), self._watch.at(UNDO_SHARE))

    def _refuse(self, message: str, reason: str) -> int:
        """The job's tasks fail with the message; the node has nothing to do with it."""
        if self._journal is None:
            return self._node_fault(message)
        try:
            self._tell_tasks(refused(message))
        except NodeError as error:
            return self._node_fault(f"{message}; and the verdict cannot be written: {error}")
        self._note("refused", reason)
        return 0

    def _note(self, outcome: str, reason: str = "-") -> None:
        note_hook(self._state, self._config, "prolog", outcome, self._watch, reason)

    def _node_fault(self, message: str) -> int:
        """Tell the admin, then do as the site wants: fail the job here, let it run, or have Slurm drain the node."""
        tell_fault(self._state, f"{self._who}: {message}")
        self._note("node_fault")
        policy = self._config.policy_node_fault
        try:
            if policy != "drain" and self._job_id is not None:
                # What could not be undone is in the way of a job that runs: a wrong compute mode, a daemon on its GPU.
                runs = policy == "run_without_mps" and not (self._journal and self._journal.undo)
                self._tell_tasks((without if runs else refused)(f"this node cannot give it MPS: {message}"))
                return 0
            if self._state and self._journal and not self._journal.undo:
                self._state.remove_journal(self._journal)  # the job goes elsewhere, its epilog may never come here
        except MpsError as error:
            tell_admin(f"{self._who}: {error}")
        return 1

    def _tell_tasks(self, verdict: Verdict) -> None:
        """Leave a verdict where the plugin looks for it: with the job's state or, where none could be made, its logs.

        Raises: NodeError when the job's tasks would not be told.
        """
        job_id = self._job_id or 0
        try:
            if self._journal:
                self._journal.tell_tasks(verdict)
                return
        except NodeError as error:
            tell_admin(f"{self._who}: {error}")
        elsewhere = f"{STATE_DIRECTORY}/jobs/{job_id}"
        if not self._journal and os.path.lexists(elsewhere):
            raise NodeError(f"{elsewhere} is there already, and may belong to a daemon that runs")
        jobs = self._state.job_ids() if self._state else []
        logs.leave_verdict(job_id, verdict.encode(), self._config, jobs)


def tell_fault(state: NodeState | None, message: str) -> None:
    """Tell the admin, and whoever looks later: the health check, which gives a drained node its reason."""
    tell_admin(message)
    try:
        if state:
            state.write_last_fault(f"{strftime('%Y-%m-%dT%H:%M:%S')} {one_line(message)}\n")
    except NodeError:
        pass  # it has been told


def note_hook(
    state: NodeState | None, config: SiteConfig, hook: str, outcome: str, watch: Watch, reason: str = "-"
) -> None:
    """Where the site wants metrics, note how a hook ended and after how long; that it cannot be noted is no fault."""
    if state is None or config.metrics_textfile == "none":
        return
    try:
        state.note_event(f"{hook} {outcome} {watch.spent:.4f} {reason}")
    except NodeError:
        pass


def prolog(environment: Mapping[str, str], gpus: Gpus) -> int:
    """Bring up the job's MPS. Returns slurmd's answer: 0, or 1 to have the node drained and the job requeued."""
    return _Prolog(environment, gpus).run()


def _epilog(state: NodeState, job_id: int, watch: Watch, gpus: Gpus, learn: Callable[[SiteConfig], None]) -> None:
    state.lock_job(job_id, watch.left)
    journal = state.open_journal(job_id)
    if journal is None:
        return
    config = journal.read_config() or DEFAULTS
    learn(config)
    watch.set(config.deadlines_epilog)
    if config.gpus_compute_mode != "unchanged":
        gpus.open_ahead()  # while the daemon quits
    end = watch.at(UNDO_SHARE)
    take_down(JobSite(state, journal, gpus, config, end, end))
    note_hook(state, config, "epilog", "done", watch)


def epilog(environment: Mapping[str, str], gpus: Gpus) -> int:
    """Take down whatever was brought up for the job, from the state on disk.

    Returns: 0; 1 when something is left, so that Slurm drains the node rather than give it to the next job.
    """
    who = "epilog"
    state: NodeState | None = None
    config = DEFAULTS

    def report(message: str) -> int:
        tell_fault(state, f"{who}: {message}")
        note_hook(state, config, "epilog", "node_fault", watch)
        return 1

    def learn(jobs_own: SiteConfig) -> None:
        nonlocal config
        config = jobs_own

    watch = Watch(DEFAULTS.deadlines_epilog, report)
    try:
        job_id = slurm_number(environment, "SLURM_JOB_ID")
        who = f"job {job_id}"
        _must_be_root()
        state = NodeState()
        _epilog(state, job_id, watch, gpus, learn)
        return 0
    except MpsError as error:
        return report(str(error))
    except Exception:
        import traceback

        return report(f"a bug in slurm-mps: {traceback.format_exc()}")
