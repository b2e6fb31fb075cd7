"""Where doctor is: what Slurm's files, its controller, the driver and the site's configuration say of this host.

Each fact is read once. What can hang (slurmctld, the driver, squeue, a hook's Python) is asked in a thread with a
common deadline, so that all of it together takes no longer than one.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import socket
import stat
import threading
from functools import cached_property
from time import monotonic
from typing import Any, Generic, TypeVar

from ..config.settings import CONFIG_PATH, DEFAULTS, ConfigError, SiteConfig
from ..errors import MpsError, NodeError
from ..node import processes
from ..record import record
from ..slurm import conf
from ..slurm.hostlist import expand_hosts
from ..units import printable
from .callers import Script, Scripts
from .finding import NoAnswerError, NotCheckedError
from .gpus import Driver, look_at_gpus
from .paths import others_can_write
from .stale import stale_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..job.reconcile import Finding as StaleFinding

T = TypeVar("T")

DEADLINE_SECONDS = 1.4  # all of doctor takes less than two
_ENDING_SECONDS = 0.1  # for a program that is killed at the deadline
_CONF_PLACES = (
    "/etc/slurm/slurm.conf",
    "/run/slurm/conf/slurm.conf",  # a node without files of its own ("configless")
    "/etc/slurm-llnl/slurm.conf",
    "/usr/local/etc/slurm.conf",
)
_PROGRAM_PLACES = ("/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin", "/opt/slurm/bin", "/opt/slurm/sbin")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_SHOWN = re.compile(r"^(\w+)(?:\[\d+\])? *= (.*)$", re.MULTILINE)
#: Where the file is silent these are unset, whatever slurmctld still has of an earlier one.
UNSET_BY_DEFAULT = frozenset(
    {"prolog", "epilog", "prologflags", "grestypes", "prologtimeout", "epilogtimeout", "prologepilogtimeout"}
    | {"jobcontainertype", "namespacetype", "usepam", "taskprolog"}
)
_PLUGIN_NAME = "spank_mps.so"
_PLUGSTACK_WORDS = ("required", "optional")  # so written; Slurm ignores a line with any other word (spank.c)


class RefusedError(NodeError):
    """Slurm's own commands refuse slurm.conf."""


class Later(Generic[T]):
    """An answer that somebody else has to give; waited for until a deadline that all of them share."""

    def __init__(self, what: str, ask: Callable[[], T], deadline: float) -> None:
        self._what = what
        self._ask = ask
        self._deadline = deadline
        self._thread: threading.Thread | None = None
        self._answer: list[T] = []
        self._error: Exception | None = None

    def begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._answer.append(self._ask())
        except Exception as error:  # raised again in the thread that waits
            self._error = error

    def wait(self, longer_seconds: float = 0.0) -> None:
        """Wait for the answer, no longer than until the deadline and so much more."""
        if self._thread:
            self._thread.join(max(0.0, self._deadline + longer_seconds - monotonic()))

    def get(self) -> T:
        """Raises: what the question raised; NoAnswerError when there is no answer in time."""
        self.begin()
        self.wait()
        if self._error:
            raise self._error
        if not self._answer:
            raise NoAnswerError(f"{self._what} does not answer in time")
        return self._answer[0]


@record
class Running:
    """What slurmctld says: its configuration, keys in lower case, and the state of this node ("" for none)."""

    config: dict[str, str]
    node_state: str
    node_reason: str


@record
class PlugstackLine:
    """Our line in plugstack.conf: where, its first word as it is written, and the file that it names."""

    line: conf.ConfLine
    how: str
    path: str


class Place:
    """The facts. `environment` is the caller's; everything is asked for at most once."""

    def __init__(self, environment: Mapping[str, str], deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.environment = environment
        self.is_root = os.geteuid() == 0
        self.hostname = socket.gethostname().partition(".")[0]
        self.deadline = monotonic() + deadline_seconds
        self._scripts = Scripts()
        self._running = Later("slurmctld", self._ask_slurmctld, self.deadline)
        self._driver = Later("the NVIDIA driver", look_at_gpus, self.deadline)
        self._stale = Later("squeue", lambda: stale_state(environment), self.deadline)
        self._control_help = Later("the control program", self._ask_control_program, self.deadline)
        self._hook_python = Later("the hooks' Python", self._ask_hook_python, self.deadline)
        self._compiler = Later("the hooks' Python", self._ask_compiler, self.deadline)
        self._release = Later("Slurm's commands", self._ask_release, self.deadline)

    def begin(self) -> None:
        """Ask everybody at once: who would be asked after somebody has kept us waiting had no time left to answer."""
        for question in self._questions:
            question.begin()

    def close(self) -> None:
        """Wait until the programs that were asked have ended, or were ended."""
        for question in self._questions:
            question.wait(_ENDING_SECONDS)

    @cached_property
    def _questions(self) -> list[Later[Any]]:
        here: list[Later[Any]] = [self._running, self._release]
        if self.is_compute:
            here += [self._driver, self._control_help, self._hook_python, self._compiler]
            here += [self._stale] if self.is_root else []
        return here

    # -------------------------------------------------------------------------------------------------- programs

    def run(self, argv: list[str], *code: str, **environment: str) -> processes.Outcome:
        """Run a program until the common deadline, with an environment made from nothing.

        Root runs nothing that others can write: neither the program nor the files of `code` that name or make it.
        Raises: NodeError, DeadlineError, NotCheckedError.
        """
        for path in (argv[0], *code) if self.is_root else ():
            if others_can_write(path):
                raise NotCheckedError(f"{path} can be written by others than root, and is not run")
        left = max(0.05, self.deadline - monotonic())
        return processes.run(argv, {"PATH": _PATH, "LC_ALL": "C", **environment}, left)

    def program(self, name: str) -> str:
        """The path of one of Slurm's programs.

        Raises: NotCheckedError when there is none.
        """
        for place in (*self.environment.get("PATH", "").split(":"), *_PROGRAM_PLACES):
            path = f"{place}/{name}"
            if place.startswith("/") and os.access(path, os.X_OK):
                return path
        raise NotCheckedError(f"there is no {name} here")

    def _slurm_environment(self) -> dict[str, str]:
        return {"SLURM_CONF": self.conf_path} if self.conf_path else {}

    # ------------------------------------------------------------------------------------------------- slurm.conf

    @cached_property
    def conf_path(self) -> str:
        """Where slurm.conf is, or would be if we might look there; empty where there is none."""
        wanted = self.environment.get("SLURM_CONF", "")
        places = (wanted,) if wanted else _CONF_PLACES
        return next((path for path in places if _may_be_file(path)), "")

    @cached_property
    def conf_directory(self) -> str:
        return os.path.dirname(self.conf_path) or "/etc/slurm"

    @cached_property
    def slurm_conf(self) -> conf.Conf:
        """Raises: NotCheckedError when there is none, or it cannot be read."""
        if not self.conf_path:
            raise NotCheckedError("there is no slurm.conf here")
        return self._conf(self.conf_path)

    def _conf(self, path: str, *, globs: bool = False) -> conf.Conf:
        try:
            return conf.read_conf(path, globs=globs)
        except OSError as error:
            raise NotCheckedError(f"{path}: {error.strerror}", needs_root=error.errno == 13) from None

    def values(self, key: str) -> list[tuple[str, str]]:
        """Where and what slurm.conf says for a key; where it is silent what slurmctld has, if it has a default."""
        found = [(line.place, value) for line, value in self.slurm_conf.settings(key)]
        if found or key.lower() in UNSET_BY_DEFAULT:
            return found
        try:
            value = self.running.config.get(key.lower(), "(null)")
        except (MpsError, NotCheckedError):
            return []
        return [] if value == "(null)" else [("what slurmctld has", value)]

    def value(self, key: str, default: str = "") -> str:
        """What holds for a key: the file's last word, slurmctld's, or `default`."""
        found = self.values(key)
        return found[-1][1] if found else default

    def words(self, key: str) -> set[str]:
        """A comma-separated value, in lower case."""
        return {word.strip().lower() for word in self.value(key).split(",") if word.strip()}

    def where(self, key: str) -> str:
        """The place to change a key: its line, or the file that lacks it."""
        found = self.slurm_conf.settings(key)
        return found[-1][0].place if found else self.conf_path

    # --------------------------------------------------------------------------------------- slurmctld and releases

    @property
    def running(self) -> Running:
        """Raises: NodeError, NotCheckedError."""
        return self._running.get()

    def _ask_slurmctld(self) -> Running:
        scontrol = self.program("scontrol")
        given, environment = [path for path in (self.conf_path,) if path], self._slurm_environment()
        shown = self.run([scontrol, "show", "config"], *given, **environment)
        if shown.status:
            said = [line.removeprefix("scontrol: ") for line in shown.errors.splitlines()] or ["no message"]
            if any("contact slurm controller" in line for line in said):
                raise NodeError(printable(said[-1], 200))
            raise RefusedError(printable("; ".join(said[:3]), 300))
        config: dict[str, str] = {}
        for key, value in _SHOWN.findall(shown.output):
            old = config.get(key.lower())  # a key that may be given several times is shown with numbers
            config[key.lower()] = value.strip() if old is None else f"{old},{value.strip()}"
        state = reason = ""
        if self.node_name:
            node = self.run([scontrol, "-o", "show", "node", self.node_name], *given, **environment).output
            state = (re.search(r" State=(\S+)", node) or ["", ""])[1]
            reason = (re.search(r" Reason=(.*?)(?: \[\S+\])?\s*(?: Comment=.*)?$", node.strip()) or ["", ""])[1]
        return Running(config, state, reason)

    @property
    def release(self) -> str:
        """The Slurm that is installed here, such as 22.05.8. Raises: NodeError, NotCheckedError."""
        return self._release.get()

    def _ask_release(self) -> str:
        for name in ("scontrol", "slurmd", "slurmctld"):
            try:
                program = self.program(name)
            except NotCheckedError:
                continue
            said = self.run([program, "-V"], **self._slurm_environment())
            found = re.search(r"(\d+\.\d+\.\d+)", said.output + said.errors)
            if found:
                return found[1]
        raise NotCheckedError("there is no Slurm here")

    # --------------------------------------------------------------------------------------------------- this node

    @cached_property
    def node_name(self) -> str:
        """What Slurm calls this host as a compute node; empty where it is none.

        Of several on one host it is the one whose slurmd has left its pid file here.
        """
        given = self.environment.get("SLURMD_NODENAME", "")
        if given:
            return given
        names = list(self.node_lines)
        with_pid = [name for name in names if os.path.exists(self.slurmd_pid_file(name))]
        return (with_pid or names or [""])[0]

    @cached_property
    def node_lines(self) -> dict[str, dict[str, str]]:
        """The slurm.conf lines of this host's nodes, by node name, with what the DEFAULT line gives them."""
        found: dict[str, dict[str, str]] = {}
        default: dict[str, str] = {}
        try:
            records = self.slurm_conf.records("NodeName")
        except NotCheckedError:
            return {}
        for _, pairs in records:
            if pairs["nodename"].upper() == "DEFAULT":
                default = default | pairs
                continue
            names, hosts = _expand(pairs["nodename"]), _expand(pairs.get("nodehostname", ""))
            for name, host in zip(
                names, hosts if len(hosts) == len(names) else hosts * len(names) or names, strict=False
            ):
                if host.partition(".")[0] == self.hostname:
                    found[name] = default | pairs
        return found

    def slurmd_pid_file(self, node_name: str) -> str:
        """Where a slurmd leaves its pid, by slurm.conf alone: asked before anybody is waited for."""
        given = self.slurm_conf.settings("SlurmdPidFile")
        path = given[-1][1] if given else "/run/slurmd.pid"
        return path.replace("%n", node_name).replace("%h", self.hostname)

    @cached_property
    def is_compute(self) -> bool:
        return bool(self.node_name)

    @property
    def is_controller_alone(self) -> bool:
        """Whether slurmctld runs here, and no slurmd."""
        try:
            hosts = {value.partition("(")[0] for _, value in self.slurm_conf.settings("SlurmctldHost")}
        except NotCheckedError:
            return False
        return not self.is_compute and self.hostname in {host.partition(".")[0] for host in hosts}

    @cached_property
    def gpus_in_slurm(self) -> int:
        """How many GPUs slurm.conf gives this node."""
        gres = self.node_lines.get(self.node_name, {}).get("gres", "")
        counts = [
            re.sub(r"\(.*", "", word).split(":")[1:]
            for word in re.split(r",(?![^(]*\))", gres)
            if word.startswith("gpu")
        ]
        return sum(int(words[-1]) if words and words[-1].isdigit() else 1 for words in counts)

    # ------------------------------------------------------------------------------------------------------- files

    def other_conf(self, name: str) -> conf.Conf:
        """gres.conf or cgroup.conf, beside slurm.conf. Raises: NotCheckedError."""
        return self._conf(f"{self.conf_directory}/{name}")

    @cached_property
    def cgroup(self) -> dict[str, str]:
        """cgroup.conf, keys in lower case; nothing where there is none."""
        try:
            lines = self.other_conf("cgroup.conf").lines
        except NotCheckedError:
            return {}
        return {key: value for line in lines for key, value in line.pairs().items()}

    @cached_property
    def plugin_directories(self) -> list[str]:
        given = self.value("PluginDir")
        if given:
            return [path for path in given.split(":") if path]
        return sorted(glob.glob("/usr/lib/*/slurm-wlm") + glob.glob("/usr/lib64/slurm") + glob.glob("/usr/lib/*/slurm"))

    @cached_property
    def plugstack_path(self) -> str:
        return self.value("PlugStackConfig", f"{self.conf_directory}/plugstack.conf")

    @cached_property
    def plugstack(self) -> conf.Conf:
        return self._conf(self.plugstack_path, globs=True)

    @cached_property
    def our_lines(self) -> list[PlugstackLine]:
        """Our plugin in plugstack.conf, as far as Slurm reads it there. Raises: NotCheckedError."""
        return [line for line in self._lines_that_name_us if line.how in _PLUGSTACK_WORDS]

    @cached_property
    def ignored_lines(self) -> list[PlugstackLine]:
        """Lines with our plugin that Slurm ignores, such as ``Required spank_mps.so``. Raises: NotCheckedError."""
        return [line for line in self._lines_that_name_us if line.how not in _PLUGSTACK_WORDS]

    @cached_property
    def _lines_that_name_us(self) -> list[PlugstackLine]:
        found = []
        for line in self.plugstack.lines:
            how, named, *_ = [*line.text.split(None, 2), "", ""]
            if os.path.basename(named) == _PLUGIN_NAME:
                found.append(PlugstackLine(line, how, named))
        return found

    @cached_property
    def plugin_path(self) -> str:
        """The plugin file that Slurm would load, or should. Raises: NotCheckedError."""
        try:
            named = self.our_lines[0].path if self.our_lines else _PLUGIN_NAME
        except NotCheckedError:
            named = _PLUGIN_NAME
        if named.startswith("/"):
            return named
        places = [f"{directory}/{named}" for directory in self.plugin_directories]
        if not places:
            raise NotCheckedError("there is no Slurm here")
        return next((path for path in places if os.path.exists(path)), places[0])

    # ------------------------------------------------------------------------------------------------------- hooks

    def scripts(self, key: str) -> list[Script]:
        """The scripts of Prolog or Epilog in the order in which slurmd runs them: each pattern's in reverse (S12)."""
        return [
            self._scripts.read(path)
            for _, pattern in self.values(key)
            for path in sorted(glob.glob(pattern), reverse=True)
        ]

    @cached_property
    def prologs(self) -> list[Script]:
        return self.scripts("Prolog")

    @cached_property
    def epilogs(self) -> list[Script]:
        return self.scripts("Epilog")

    @cached_property
    def prolog_parts(self) -> list[Script]:
        """All that runs as prolog, in order: the scripts, those that they run, and what stands around a call."""
        return self._scripts.in_order(self.prologs)

    @cached_property
    def epilog_parts(self) -> list[Script]:
        """The same of the epilogs."""
        return self._scripts.in_order(self.epilogs)

    @cached_property
    def our_hooks(self) -> list[Script]:
        """Our own scripts: those that slurmd runs or has run, and those that lie beside slurm.conf."""
        beside = [
            self._scripts.read(path)
            for kind in ("prolog.d", "epilog.d")
            for path in sorted(glob.glob(f"{self.conf_directory}/{kind}/*slurm-mps*"))
        ]
        found: dict[str, Script] = {}
        for script in (*self.prolog_parts, *self.epilog_parts, *beside):
            if script.is_ours:
                found.setdefault(script.path, script)
        return list(found.values())

    def hook_values(self) -> dict[str, str]:
        """The Python and package of our hooks. Raises: NotCheckedError when there is no hook to be read."""
        return self._hook().values

    def _hook(self) -> Script:
        for script in self.our_hooks:
            if {"python", "package"} <= script.values.keys():
                return script
        raise NotCheckedError("there is no prolog or epilog of slurm-mps here")

    def hook_python(self) -> str:
        """The version of slurm-mps that the hooks import, as they import it. Raises: NodeError, NotCheckedError."""
        return self._hook_python.get()[0]

    def hook_verdict_version(self) -> int:
        """The version of the verdicts that they write. Raises: NodeError, NotCheckedError."""
        return int(self._hook_python.get()[1])

    def _ask_hook_python(self) -> tuple[str, str]:
        values = self.hook_values()
        code = (
            "import sys; sys.path.append(sys.argv[1]); import slurm_mps, slurm_mps.job.prolog; "
            "print(slurm_mps.__version__); print(slurm_mps.job.verdict.VERDICT_VERSION)"
        )
        argv = [values["python"], "-I", "-S", "-c", code, os.path.dirname(values["package"])]
        said = self.run(argv, self._hook().path, values["package"])
        if said.status:
            raise NodeError(printable((said.errors.strip() or f"status {said.status}").splitlines()[-1], 200))
        version, verdict_version = said.output.split()[-2:]
        return version, verdict_version

    def compiler(self) -> str:
        """What is wrong with the program that checks mps.toml for the prolog; "" for nothing.

        Raises: NodeError, NotCheckedError.
        """
        return self._compiler.get()

    def _ask_compiler(self) -> str:
        python = self.hook_values()["python"]
        said = self.run([python, "-I", "-m", "slurm_mps.config.file", CONFIG_PATH], self._hook().path)
        return printable((said.errors.strip() or "no message").splitlines()[-1], 200) if said.status else ""

    # ------------------------------------------------------------------------------------------------ site, driver

    @cached_property
    def site_problems(self) -> list[str]:
        """Everything that is wrong with mps.toml. Raises: NotCheckedError when it cannot be read."""
        return self._site[1]

    @property
    def site(self) -> SiteConfig:
        """The site configuration; the defaults where there is none or it is wrong, which is another finding."""
        try:
            return self._site[0]
        except NotCheckedError:
            return DEFAULTS

    @cached_property
    def _site(self) -> tuple[SiteConfig, list[str]]:
        from ..config.file import parse_config

        try:
            with open(CONFIG_PATH, "rb") as file:
                return parse_config(file.read(), CONFIG_PATH), []
        except FileNotFoundError:
            return DEFAULTS, []
        except ConfigError as error:
            return DEFAULTS, error.problems
        except OSError as error:
            raise NotCheckedError(f"{CONFIG_PATH}: {error.strerror}", needs_root=error.errno == 13) from None

    @property
    def driver(self) -> Driver:
        """Raises: NodeError, NotCheckedError."""
        return self._driver.get()

    def stale(self) -> list[StaleFinding]:
        """What reconcile would do. Raises: MpsError, NotCheckedError."""
        if not self.is_root:
            raise NotCheckedError("only root can read the state", needs_root=True)
        return self._stale.get()

    def control_help(self) -> str:
        """What the control program says of its options and commands. Raises: NodeError, NotCheckedError."""
        return self._control_help.get()

    def _ask_control_program(self) -> str:
        said = self.run([self.site.paths_control_program, "-h"], CONFIG_PATH)
        return said.output if not said.status else ""


def _may_be_file(path: str) -> bool:
    """Whether there is a file, or a directory on the way that we cannot enter."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return error.errno == errno.EACCES


def _expand(text: str) -> list[str]:
    try:
        return expand_hosts(text) if text else []
    except ValueError:
        return []
