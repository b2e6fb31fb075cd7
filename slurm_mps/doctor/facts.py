"""The facts that doctor's checks look at: this host's Slurm, hooks, driver, site configuration and state.

Each fact is found once. Whatever may hang (slurmctld, the driver, squeue, a hook's Python) is asked in threads with
one common deadline.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from time import monotonic
from typing import Any, Generic, TypeVar

from ..config.settings import CONFIG_PATH, DEFAULTS, ConfigError, SiteConfig
from ..errors import DeadlineError, MpsError, NodeError
from ..job.reconcile import Reconciler, Repair
from ..job.watch import Watch
from ..node import processes
from ..node.control import ControlDaemon, Limits, Patience, quit_all, set_limits
from ..node.nvml import Gpus
from ..node.paths import others_can_write
from ..node.processes import Outcome
from ..slurm.conf import Conf
from ..slurm.host import EPILOG, PLUGIN, PROLOG, Controller, Host, NotKnownError
from ..units import GIB, printable
from .gpus import Driver, GpuFacts, look_at_gpus
from .scripts import Script, in_order, read_script

T = TypeVar("T")

DEADLINE_SECONDS = 1.4  # all of doctor takes less than two
_ENDING_SECONDS = 0.1  # for a program that is killed at the deadline
_TRIAL_END_SECONDS = 0.4  # for the daemon that doctor tries, before the deadline
_TRIAL_LOG_BYTES = 65536
_NO_GPU_STATUS = 100  # O6
#: Queries and commands that only some drivers know, and what they are for; jobs do without (O83).
CONTROL_EXTRAS = {
    "get_server_status": "the state of a server",
    "device_query": "a list of its GPUs",
    "sm_partition": "static partitions",
}
#: Where the file is silent these are unset, whatever slurmctld still has of an earlier one.
UNSET_BY_DEFAULT = frozenset(
    {"prolog", "epilog", "prologflags", "grestypes", "prologtimeout", "epilogtimeout", "prologepilogtimeout"}
    | {"jobcontainertype", "namespacetype", "taskprolog"}
)


class NoAnswerError(NotKnownError):
    """What was asked did not answer in time, which does not prove a fault.

    `check`: the id of the check that says so, as a warning where it asked a service, which does nothing but answer.
    """

    def __init__(self, message: str, hint: str, check: str, *, service: bool) -> None:
        super().__init__(message, hint)
        self.check = check
        self.service = service


class Later(Generic[T]):
    """An answer that is asked for in a thread, and waited for until a deadline that all answers share.

    `check` is the id of the check that says so when `what` does not answer in time. `look`: where to look at a service.
    """

    def __init__(self, check: str, what: str, ask: Callable[[], T], deadline: float, look: str = "") -> None:
        self._silent = NoAnswerError(
            f"{what} did not answer within {deadline - monotonic():.1f} s",
            look or f"look what keeps this node busy, then: slurm-mps doctor {check}",
            check,
            service=bool(look),
        )
        self._ask = ask
        self._deadline = deadline
        self._thread: threading.Thread | None = None
        self._answer: list[T] = []
        self._error: Exception | None = None

    def begin(self) -> threading.Thread:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self._thread

    def _run(self) -> None:
        try:
            self._answer.append(self._ask())
        except Exception as error:  # raised again in the thread that waits
            self._error = error

    def get(self) -> T:
        """Raises: what the question raised; NoAnswerError when there is no answer in time."""
        self.begin().join(max(0.0, self._deadline - monotonic()))
        if self._answer:
            return self._answer[0]
        raise self._silent if self._error is None or isinstance(self._error, DeadlineError) else self._error


class _NoWatch(Watch):
    """Ends nothing: doctor waits for an answer no longer than it wants to."""

    def __init__(self) -> None:
        pass

    def restart(self, seconds: float) -> None:
        pass


class Facts(Host):
    """The facts. All that a property cannot find out is raised as NotKnownError, or as MpsError in its own words."""

    def __init__(self, environment: Mapping[str, str], deadline_seconds: float = DEADLINE_SECONDS) -> None:
        super().__init__(environment)
        self._deadline = monotonic() + deadline_seconds
        self.trial_directory = f"/run/slurm-mps-doctor-{os.getpid()}"
        end, look_at_slurmctld = self._deadline, "on the controller: systemctl status slurmctld"
        self._controller = Later("slurmctld", "slurmctld", self.ask_slurmctld, end, look_at_slurmctld)
        self._driver = Later("driver", "the NVIDIA driver", look_at_gpus, end, "nvidia-smi; dmesg | grep -i nvrm")
        self._stale = Later("stale-state", "squeue", self._rehearse_reconcile, end)
        self._control_unknown = Later("control-program", "the control program", self._try_control_program, end)
        self._hook_versions = Later("hooks-python", "the hooks' Python", self._ask_hook_versions, end)
        self._compiler = Later("hooks-python", "the hooks' Python", self._ask_compiler, end)
        self._release = Later("slurm-version", "Slurm's commands", self.ask_release, end)

    def begin(self) -> None:
        """Ask everything at once: a question that waits for another's answer would have no time left for its own."""
        for question in self._questions:
            question.begin()

    def close(self) -> None:
        """Wait until the programs that were asked have ended, or were ended."""
        for question in self._questions:
            question.begin().join(max(0.0, self._deadline + _ENDING_SECONDS - monotonic()))

    @cached_property
    def _questions(self) -> list[Later[Any]]:
        here: list[Later[Any]] = [self._controller, self._release]
        if self.is_compute:
            here += [self._driver, self._hook_versions, self._compiler]
            here += [self._control_unknown, self._stale] if self.is_root else []
        return here

    def seconds_left(self) -> float:
        return max(0.05, self._deadline - monotonic())

    def run(self, argv: list[str], *files: str) -> Outcome:
        """Root runs nothing that others can write: neither the program nor the files that name it or that it reads."""
        self._trust(argv[0], *files)
        return super().run(argv, *files)

    def _trust(self, *files: str) -> None:
        for path in files if self.is_root else ():
            if others_can_write(path):
                raise NotKnownError(f"{path} can be written by others than root, and is not run")

    # --------------------------------------------------------------------------------------------------------- Slurm

    @cached_property
    def conf(self) -> Conf:
        if not self.conf_path:
            raise NotKnownError("there is no slurm.conf here")
        return super().conf

    @property
    def controller(self) -> Controller:
        """slurmctld's configuration, and this node's state."""
        return self._controller.get()

    @property
    def release(self) -> str:
        """The Slurm that is installed here, such as 22.05.8."""
        return self._release.get()

    def value(self, key: str, default: str = "") -> str:
        """The value of a key: slurm.conf's last one, or slurmctld's where slurm.conf has none, or `default`."""
        found = self.one(key)
        if found or key.lower() in UNSET_BY_DEFAULT:
            return found or default
        try:
            return self.controller.value(key) or default
        except MpsError:
            return default

    def words(self, key: str) -> set[str]:
        """A comma-separated value, in lower case."""
        return {word.strip().lower() for word in self.value(key).split(",") if word.strip()}

    def where(self, key: str) -> str:
        """The place to change a key: its line, or the file that lacks it."""
        found = self.conf.settings(key)
        return found[-1][0].place if found else self.conf_path

    @cached_property
    def cgroup(self) -> dict[str, str]:
        """cgroup.conf, keys in lower case; nothing where there is none."""
        try:
            lines = self.other_conf("cgroup.conf").lines
        except NotKnownError:
            return {}
        return {key: value for line in lines for key, value in line.pairs().items()}

    @cached_property
    def plugin_path(self) -> str:
        """The plugin file that Slurm would load, or should."""
        try:
            named = self.our_lines[0].path if self.our_lines else PLUGIN
        except NotKnownError:
            named = PLUGIN
        if named.startswith("/"):
            return named
        places = [f"{directory}/{named}" for directory in self.plugin_directories]
        if not places:
            raise NotKnownError("there is no Slurm here")
        return next(filter(os.path.exists, places), places[0])

    # --------------------------------------------------------------------------------------------------------- hooks

    @cached_property
    def is_installed(self) -> bool:
        """Whether slurm-mps is in this host's Slurm: a line for the plugin, a prolog or an epilog.

        A plugin file alone may be that of a package, which is off until `slurm-mps install`.
        """
        return bool((os.path.exists(self.plugstack_path) and self.lines_that_name_us) or self.our_hooks)

    @cached_property
    def tops(self) -> list[Script]:
        """The scripts that slurmd runs as Prolog and as Epilog."""
        return [read_script(path) for key in (PROLOG, EPILOG) for path in self.scripts(key)]

    @cached_property
    def parts(self) -> dict[str, list[Script]]:
        """The scripts that run as Prolog and as Epilog, in order. A script that names one of ours is cut at that
        place.
        """
        return {key: list(in_order(map(read_script, self.scripts(key)))) for key in (PROLOG, EPILOG)}

    @cached_property
    def our_hooks(self) -> list[Script]:
        """Our own scripts: those that slurmd runs or has run, and those that lie beside slurm.conf."""
        beside = [
            read_script(path)
            for kind in ("prolog.d", "epilog.d")
            for path in sorted(glob.glob(f"{self.conf_directory}/{kind}/*slurm-mps*"))
        ]
        found: dict[str, Script] = {}
        for script in (*self.parts[PROLOG], *self.parts[EPILOG], *beside):
            if script.is_ours:
                found.setdefault(script.path, script)
        return list(found.values())

    def hook_values(self) -> dict[str, str]:
        """The Python and package of our hooks."""
        return self._hook().values

    def _hook(self) -> Script:
        for script in self.our_hooks:
            if {"python", "package"} <= script.values.keys():
                return script
        raise NotKnownError("there is no prolog or epilog of slurm-mps here")

    @property
    def hook_versions(self) -> tuple[str, int]:
        """The versions of slurm-mps that the hooks import, as they import it, and of the verdicts that they write."""
        return self._hook_versions.get()

    def _ask_hook_versions(self) -> tuple[str, int]:
        values = self.hook_values()
        code = (
            "import sys; sys.path.append(sys.argv[1]); import slurm_mps, slurm_mps.job.prolog; "
            "print(slurm_mps.__version__, slurm_mps.job.verdict.VERDICT_VERSION)"
        )
        argv = [values["python"], "-I", "-S", "-c", code, os.path.dirname(values["package"])]
        outcome = self.run(argv, self._hook().path, values["package"])
        if outcome.status:
            raise NodeError(printable((outcome.errors.strip() or f"status {outcome.status}").splitlines()[-1], 200))
        version, verdict_version = outcome.output.split()[-2:]
        return version, int(verdict_version)

    @property
    def compiler(self) -> str:
        """The error of the program that checks mps.toml for the prolog; "" for none."""
        return self._compiler.get()

    def _ask_compiler(self) -> str:
        python = self.hook_values()["python"]
        outcome = self.run([python, "-I", "-m", "slurm_mps.config.file", CONFIG_PATH], self._hook().path)
        return printable((outcome.errors.strip() or "no message").splitlines()[-1], 200) if outcome.status else ""

    # ------------------------------------------------------------------------------------------- site, driver, state

    @cached_property
    def site_problems(self) -> list[str]:
        """Everything that is wrong with mps.toml."""
        return self._site[1]

    @property
    def site(self) -> SiteConfig:
        """The site configuration; the defaults where there is none or it is wrong, which is another finding."""
        try:
            return self._site[0][""]
        except NotKnownError:
            return DEFAULTS

    @property
    def sites(self) -> dict[str, SiteConfig]:
        """The same, and as each partition of mps.toml has it; the first is named ""."""
        try:
            return self._site[0]
        except NotKnownError:
            return {"": DEFAULTS}

    @cached_property
    def _site(self) -> tuple[dict[str, SiteConfig], list[str]]:
        from ..config.file import parse_site  # with jsonschema: completion, which lists the checks, does without

        try:
            with open(CONFIG_PATH, "rb") as file:
                return parse_site(file.read(), CONFIG_PATH), []
        except FileNotFoundError:
            return {"": DEFAULTS}, []
        except ConfigError as error:
            return {"": DEFAULTS}, error.problems
        except OSError as error:
            needs_root = error.errno == errno.EACCES
            raise NotKnownError(f"{CONFIG_PATH}: {error.strerror}", needs_root=needs_root) from None

    @property
    def driver(self) -> Driver:
        return self._driver.get()

    @property
    def gpus(self) -> tuple[GpuFacts, ...]:
        """The driver's GPUs. Raises: NotKnownError when the driver does not answer, which the check driver
        reports.
        """
        try:
            return self.driver.gpus
        except MpsError:
            raise NotKnownError("the NVIDIA driver does not answer") from None

    @property
    def stale(self) -> list[Repair]:
        """The repairs that reconcile would make."""
        if not self.is_root:
            raise NotKnownError("only root can read the state", needs_root=True)
        return self._stale.get()

    def _rehearse_reconcile(self) -> list[Repair]:
        found: list[Repair] = []
        Reconciler(self.environment, Gpus(), _NoWatch(), found.append, dry_run=True).run()
        return found

    @property
    def control_unknown(self) -> tuple[str, ...]:
        """The CONTROL_EXTRAS that a control daemon does not know. The same daemon has proved that it sets a job's
        limits.

        Raises: NodeError when it cannot.
        """
        if not self.is_root:
            raise NotKnownError("only root can try a control daemon", needs_root=True)
        return self._control_unknown.get()

    def _try_control_program(self) -> tuple[str, ...]:
        """Start a control daemon as a prolog does, set limits and read them back, and end it.

        It has a pipe directory of its own and no server, and so nothing on a GPU.
        """
        program = self.site.paths_control_program
        self._trust(program, CONFIG_PATH)
        end = self._deadline - _TRIAL_END_SECONDS
        os.mkdir(self.trial_directory, 0o700)
        daemon = ControlDaemon(program, f"{self.trial_directory}/pipe", f"{self.trial_directory}/log")
        try:
            os.mkdir(daemon.pipe_directory)
            os.mkdir(daemon.log_directory)
            (started,) = processes.wait_all([daemon.start(["0"], _TRIAL_LOG_BYTES)], end - monotonic())
            if started is None:
                raise DeadlineError(program)
            if started.status == _NO_GPU_STATUS:
                raise NotKnownError("no control daemon starts on GPU 0, which cannot be used now")
            if started.status:
                raise NodeError(f"{program} -d ended with status {started.status}")
            set_limits([(daemon, Limits(50.0, GIB, 0), 1)], end - monotonic())
            answers = daemon.command(list(CONTROL_EXTRAS), end - monotonic())
            return tuple(extra for extra in CONTROL_EXTRAS if f'Unknown command "{extra}"' in answers)
        finally:
            try:
                share = _TRIAL_END_SECONDS / 4
                quit_all([daemon], 0, Patience(1, share, share, share))
            except NodeError as error:
                raise DeadlineError(str(error)) from None  # SIGKILL was its last word
            finally:
                shutil.rmtree(self.trial_directory, ignore_errors=True)
