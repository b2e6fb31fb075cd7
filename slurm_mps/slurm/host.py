"""This machine's Slurm: its programs, files and daemons.

install and doctor both read it here, so that they agree. Slurm's own rules decide: which slurm.conf counts
(``_establish_config_source`` in read_config.c), what a line of plugstack.conf means (spank.c), in which order the
scripts of a pattern run (S12). Files that the caller may not read raise NotKnownError; programs run only in the
methods named ``ask_…``.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..errors import MpsError, NodeError
from ..node import processes
from ..node.paths import others_can_write
from ..node.reading import read_text
from ..units import printable
from .conf import Conf, ConfLine, read_conf
from .hostlist import hosts_of
from .programs import find_program

PROLOG, EPILOG = "Prolog", "Epilog"
PLUGIN = "spank_mps.so"
#: Programs that say which release they are. slurmd needs no slurm.conf for that; clients of 22.05 do.
_PROGRAMS = ("slurmd", "srun", "scontrol")
_SLURMD = ("slurmd", "slurmd-wlm")  # the latter is Debian's name of the file
#: Where slurmd of a configless node keeps what the controller sent.
_CONFIGLESS = "/run/slurm/conf"
_PLUGIN_PLACES = (
    "/usr/lib/*/slurm-wlm",
    "/usr/lib64/slurm",
    "/usr/lib/*/slurm",
    "/usr/lib/slurm",
    "/usr/local/lib/slurm",
)
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_ASK_SECONDS = 10.0
_COMMENT = re.compile(r"(?:^|(?<=[\s;]))#.*$", re.MULTILINE)
_SHOWN = re.compile(r"^(\w+)(?:\[\d+\])? *= (.*)$", re.MULTILINE)


class NotKnownError(MpsError):
    """Something cannot be known here. `needs_root`: root could know it."""

    def __init__(self, message: str, hint: str = "", *, needs_root: bool = False) -> None:
        super().__init__(message, hint)
        self.needs_root = needs_root


class NoSlurmError(NotKnownError):
    """There is no Slurm on this machine."""


class TwoReleasesError(MpsError):
    """The programs of Slurm on this machine are of different releases."""


class RefusedError(NodeError):
    """Slurm's own commands refuse slurm.conf."""


@dataclass(frozen=True)
class Controller:
    """slurmctld's configuration (names in lower case, each with its values), and this node's state.

    `node_state` and `node_reason` are empty where this host is no node.
    """

    config: Mapping[str, tuple[str, ...]]
    node_state: str
    node_reason: str

    def values(self, key: str) -> list[str]:
        return [value for value in self.config.get(key.lower(), ()) if value not in ("", "(null)")]

    def value(self, key: str) -> str:
        """A setting's values with commas between; empty where there is none."""
        return ",".join(self.values(key))


@dataclass(frozen=True)
class PlugstackLine:
    """A line of plugstack.conf that names our plugin: its place, its first word as it stands there, and the file."""

    line: ConfLine
    word: str
    path: str

    @property
    def is_read(self) -> bool:
        """Whether Slurm takes the line: it ignores one with another word, such as ``Required``."""
        return self.word in ("required", "optional")


@dataclass(frozen=True)
class Slurmd:
    """A slurmd that runs here, since when (seconds since 1970), and the node that ``-N`` names, if it does."""

    pid: int
    started_seconds: float
    node_name: str


class Host:
    """The Slurm of this machine. `environment` is the caller's; `slurm_conf` is read instead of the one found.

    Each fact is found once. Methods raise NotKnownError where a fact cannot be known.
    """

    def __init__(self, environment: Mapping[str, str], slurm_conf: str | None = None) -> None:
        self.environment = environment
        self.is_root = os.geteuid() == 0
        self.hostname = socket.gethostname().partition(".")[0]
        self._named_conf = slurm_conf or environment.get("SLURM_CONF", "")

    # ------------------------------------------------------------------------------------------------------ programs

    def program(self, name: str) -> str:
        """The path of one of Slurm's programs. Raises: NotKnownError when there is none."""
        path = find_program(name, self.environment.get("PATH", ""))
        if not path:
            raise NotKnownError(f"there is no {name} here")
        return path

    def seconds_left(self) -> float:
        """How long a program may take."""
        return _ASK_SECONDS

    def run(self, argv: list[str], *_files: str) -> processes.Outcome:
        """Run a program with an environment made from nothing; `_files` name the program, or are read by it.

        Raises: NodeError, DeadlineError.
        """
        environment = {"PATH": _PATH, "LC_ALL": "C", **({"SLURM_CONF": self.conf_path} if self.conf_path else {})}
        libraries = self.environment.get("LD_LIBRARY_PATH", "")
        if libraries and not (self.is_root and any(map(others_can_write, libraries.split(":")))):
            environment["LD_LIBRARY_PATH"] = libraries
        return processes.run(argv, environment, self.seconds_left())

    @cached_property
    def programs(self) -> list[str]:
        """The paths of slurmd, srun and scontrol, if they are on this machine."""
        found = (find_program(name, self.environment.get("PATH", "")) for name in _PROGRAMS)
        return [path for path in found if path]

    def _prefixes(self) -> list[str]:
        """Where these programs were installed to: ``/opt/slurm`` of ``/opt/slurm/sbin/slurmd``."""
        return list(dict.fromkeys(os.path.dirname(os.path.dirname(os.path.realpath(one))) for one in self.programs))

    def ask_release(self) -> str:
        """Ask Slurm's programs which release they are, such as 22.05.8.

        Raises: NoSlurmError; TwoReleasesError; NotKnownError when none of them says; NodeError.
        """
        releases: dict[str, str] = {}
        silent = ""
        for program in self.programs:
            if releases and not self._is_readable():
                break  # a client waits a minute for a slurm.conf, and says nothing
            outcome = self.run([program, "-V"], *filter(None, [self.conf_path]))
            found = re.search(r"\b(\d+\.\d+\.\d+)", outcome.output)
            if found and not outcome.status:
                releases[program] = found[1]
            else:
                words = (outcome.errors or outcome.output).strip().splitlines() or ["no message"]
                silent = f"{program} -V does not say its release: {printable(words[-1], 200)}"
        if not releases and silent:
            raise NotKnownError(silent)
        if not releases:
            raise NoSlurmError("there is no Slurm on this machine: neither slurmd nor srun nor scontrol is in PATH")
        first = next(iter(releases))
        for program, release in releases.items():
            if release.split(".")[:2] != releases[first].split(".")[:2]:
                raise TwoReleasesError(
                    f"two releases of Slurm are on this machine: {first} is {releases[first]}, {program} is {release}",
                    "take the other one out of PATH, or away",
                )
        return releases[first]

    # ---------------------------------------------------------------------------------------------------- slurm.conf

    @cached_property
    def conf_path(self) -> str:
        """Where slurm.conf is, or may be in a directory that is closed to us; empty where there is none."""
        built = (f"{prefix}/etc/slurm.conf" for prefix in self._prefixes())
        usual = ("/etc/slurm/slurm.conf", *built, f"{_CONFIGLESS}/slurm.conf")
        places = (self._named_conf,) if self._named_conf else usual
        return os.path.abspath(found) if (found := next(filter(_may_be_file, places), "")) else ""

    @property
    def conf_directory(self) -> str:
        """Where Slurm looks for its other files."""
        return os.path.dirname(self.conf_path) or "/etc/slurm"

    @property
    def is_copy(self) -> bool:
        """Whether the controller sends the configuration, so that it is changed there."""
        return self.conf_directory == _CONFIGLESS

    @property
    def site_directory(self) -> str:
        """Where files that the site adds belong."""
        return "/etc/slurm" if self.is_copy else self.conf_directory

    @cached_property
    def conf(self) -> Conf:
        """slurm.conf with what it includes; one without lines where there is no file."""
        return self._read(self.conf_path) if self.conf_path else Conf("", (), (), (), ())

    def _is_readable(self) -> bool:
        """Whether slurm.conf is there and can be read with all that it includes."""
        try:
            return bool(self.conf.path) and not self.conf.problems
        except NotKnownError:
            return False

    def other_conf(self, name: str) -> Conf:
        """A file beside slurm.conf, such as gres.conf."""
        return self._read(f"{self.conf_directory}/{name}")

    def _read(self, path: str, *, globs: bool = False) -> Conf:
        try:
            return read_conf(path, globs=globs)
        except OSError as error:
            raise NotKnownError(f"{path}: {error.strerror}", needs_root=error.errno == errno.EACCES) from None

    def all(self, key: str) -> list[str]:
        """Every value that slurm.conf gives a key; ``(null)`` and nothing are none."""
        return [value for _, value in self.conf.settings(key) if value not in ("", "(null)")]

    def one(self, key: str, default: str = "") -> str:
        """The value of a key that is given once; Slurm takes the last."""
        return [default, *self.all(key)][-1]

    # ----------------------------------------------------------------------------------------------------- slurmctld

    def ask_slurmctld(self) -> Controller:
        """Raises: RefusedError; NodeError when slurmctld does not answer; NotKnownError when there is no scontrol."""
        scontrol, files = self.program("scontrol"), [path for path in (self.conf_path,) if path]
        shown = self.run([scontrol, "show", "config"], *files)
        if shown.status:
            words = [line.removeprefix("scontrol: ") for line in shown.errors.splitlines()] or ["no message"]
            if any("contact slurm controller" in line for line in words):
                raise NodeError(printable(words[-1], 200))
            raise RefusedError(printable("; ".join(words[:3]), 300))
        config: dict[str, tuple[str, ...]] = {}
        for key, value in _SHOWN.findall(shown.output):  # a key that may be given several times is shown with numbers
            config[key.lower()] = (*config.get(key.lower(), ()), value.strip())
        node = self.run([scontrol, "-o", "show", "node", self.node_name], *files).output if self.node_name else ""
        state = (re.search(r" State=(\S+)", node) or ["", ""])[1]
        reason = (re.search(r" Reason=(.*?)(?: \[\S+\])?\s*(?: Comment=.*)?$", node.strip()) or ["", ""])[1]
        return Controller(config, state, reason)

    # ----------------------------------------------------------------------------------------------------- this node

    @cached_property
    def node_lines(self) -> dict[str, dict[str, str]]:
        """The NodeName lines of this host, by node name, with what the DEFAULT line gives them.

        Empty where slurm.conf cannot be read.
        """
        found: dict[str, dict[str, str]] = {}
        default: dict[str, str] = {}
        try:
            records = self.conf.records("NodeName")
        except NotKnownError:
            return {}
        for _, pairs in records:
            if pairs["nodename"].upper() == "DEFAULT":
                default = default | pairs
                continue
            names, hosts = hosts_of(pairs["nodename"]), hosts_of(pairs.get("nodehostname", ""))
            hosts = hosts if len(hosts) == len(names) else hosts * len(names) or names
            for name, host in zip(names, hosts, strict=False):
                if host.partition(".")[0] == self.hostname:
                    found[name] = default | pairs
        return found

    @cached_property
    def node_name(self) -> str:
        """Slurm's name of this host as a compute node; empty where the host is none.

        With several nodes on one host, it is the node whose slurmd runs here.
        """
        given = self.environment.get("SLURMD_NODENAME", "")
        running = [one.node_name for one in self.slurmds if one.node_name in self.node_lines]
        return next(filter(None, [given, *running, *self.node_lines]), "")

    @property
    def is_compute(self) -> bool:
        """Whether jobs run here."""
        return bool(self.node_name)

    @property
    def is_controller_alone(self) -> bool:
        """Whether slurmctld runs here, and no job."""
        try:
            hosts = {value.partition("(")[0].partition(".")[0] for value in self.all("SlurmctldHost")}
        except NotKnownError:
            return False
        return not self.is_compute and self.hostname in hosts

    @cached_property
    def gpus_in_slurm(self) -> int:
        """How many GPUs slurm.conf gives this node."""
        return count_gpus(self.node_lines.get(self.node_name, {}).get("gres", ""))

    @cached_property
    def slurmds(self) -> list[Slurmd]:
        """Root's slurmds that see our files, if their mount namespaces can be read.

        One in a mount namespace of its own is a unit of systemd with a private directory, or with ``-N`` another node.
        """
        here: list[Slurmd] = []
        elsewhere: list[Slurmd] = []
        ours = processes.mount_namespace("self")
        for pid in processes.pids():
            identity = processes.identify(pid) if processes.name_of(pid) in _SLURMD else None
            if identity is None or processes.uid_of(pid) != 0:
                continue
            try:
                words = read_text(f"/proc/{pid}/cmdline", 65536).split("\0")
            except OSError:
                continue
            name = words[words.index("-N") + 1] if "-N" in words[:-1] else ""
            one = Slurmd(pid, time.time() - processes.age_seconds(identity), name)
            (here if processes.mount_namespace(pid) in ("", ours) else elsewhere).append(one)
        return here or [one for one in elsewhere if not one.node_name]

    # ---------------------------------------------------------------------------------------------- plugins, scripts

    @cached_property
    def plugin_directories(self) -> list[str]:
        """Where Slurm looks for plugins: PluginDir's directories, or else the one that has Slurm's own, or none."""
        named = [path for value in self.all("PluginDir") for path in value.split(":") if path]
        usual = [f"{prefix}/{name}/slurm" for prefix in self._prefixes() for name in ("lib64", "lib")]
        found = [path for place in (*usual, *_PLUGIN_PLACES) for path in sorted(glob.glob(place))]
        return named or [path for path in found if has_slurms_plugins(path)][:1]

    @property
    def plugstack_path(self) -> str:
        return self.one("PlugStackConfig", f"{self.conf_directory}/plugstack.conf")

    @cached_property
    def plugstack(self) -> Conf:
        """plugstack.conf with what it includes."""
        return self._read(self.plugstack_path, globs=True)

    @cached_property
    def lines_that_name_us(self) -> list[PlugstackLine]:
        found = []
        for line in self.plugstack.lines:
            word, path, *_ = [*line.text.split(None, 2), "", ""]
            if os.path.basename(path) == PLUGIN:
                found.append(PlugstackLine(line, word, path))
        return found

    @property
    def our_lines(self) -> list[PlugstackLine]:
        """The lines for our plugin that Slurm reads."""
        return [line for line in self.lines_that_name_us if line.is_read]

    def own_stack_file(self, name: str) -> str:
        """Where a file of our own with the plugin's line goes: where an include of plugstack.conf takes its name.

        Returns: empty where no include does.
        """
        candidates = ((f"{os.path.dirname(pattern)}/{name}", pattern) for pattern in self.plugstack.includes)
        return next((path for path, pattern in candidates if fnmatch.fnmatchcase(path, pattern)), "")

    def scripts(self, key: str) -> list[str]:
        """The scripts of Prolog or Epilog in the order in which slurmd runs them: each pattern's in reverse (S12)."""
        return [path for pattern in self.all(key) for path in sorted(glob.glob(pattern), reverse=True)]


def without_comments(script: str) -> str:
    """A shell script's text without comments."""
    return _COMMENT.sub("", script)


def has_slurms_plugins(directory: str) -> bool:
    """Whether Slurm's own plugins are in a directory."""
    return bool(glob.glob(f"{glob.escape(directory)}/proctrack_*.so"))


def count_gpus(gres: str) -> int:
    """How many GPUs a value of Gres= has: ``gpu:2``, ``gpu:h200:2(S:0-1),shard:8``."""
    words = [word for word in re.split(r",(?![^(]*\))", gres) if word.startswith("gpu")]
    counts = [re.sub(r"\(.*", "", word).split(":")[1:] for word in words]
    return sum(int(count[-1]) if count and count[-1].isdigit() else 1 for count in counts)


def _may_be_file(path: str) -> bool:
    """Whether there is a file, or a directory on the way that we cannot enter."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return error.errno == errno.EACCES
