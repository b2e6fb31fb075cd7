"""What the Slurm of this machine is: its release, its configuration, the places where a plugin and scripts go.

slurm.conf is read here as far as installing needs it; no daemon is asked, so that it works before the first one runs.
"""

from __future__ import annotations

import fnmatch
import glob
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, field

from ..errors import MpsError
from ..node import processes
from ..node.reading import read_text
from ..slurm.conf import logical_lines, read_conf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: Where Slurm's packages, its own build and cloud images have the file; the last is a configless node's copy.
_CONFIGLESS = "/run/slurm/conf"
_CONFIGS = (
    "/etc/slurm/slurm.conf",
    "/usr/local/etc/slurm.conf",
    "/opt/slurm/etc/slurm.conf",
    _CONFIGLESS + "/slurm.conf",
)
_PROGRAMS = ("slurmd", "srun", "scontrol")
_PROGRAM_PLACES = ("/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/opt/slurm/sbin", "/opt/slurm/bin")
_PLUGIN_PLACES = (
    "/usr/lib/*/slurm-wlm",
    "/usr/lib64/slurm",
    "/usr/lib/*/slurm",
    "/usr/lib/slurm",
    "/usr/local/lib/slurm",
)
_ASK_SECONDS = 10
_INCLUDES_MAX = 100

PROLOG, EPILOG = "Prolog", "Epilog"


class NoSlurmError(MpsError):
    """There is no Slurm on this machine."""


@dataclass(frozen=True)
class SlurmConf:
    """What slurm.conf and the files that it includes say. `path` is empty where there is no such file."""

    path: str = ""
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: by name in lower case, as often as given

    @property
    def directory(self) -> str:
        """Where files of this site's belong; a configless node's copy is no such place."""
        return "/etc/slurm" if not self.path or self.is_copy else os.path.dirname(self.path)

    @property
    def is_copy(self) -> bool:
        """Whether the controller sends the configuration, so that it is changed there."""
        return os.path.dirname(self.path) == _CONFIGLESS

    def all(self, name: str) -> tuple[str, ...]:
        """Every value of a setting; ``(null)`` and nothing are none."""
        return tuple(value for value in self.settings.get(name.lower(), ()) if value not in ("", "(null)"))

    def one(self, name: str, default: str = "") -> str:
        """The value of a setting that is given once; Slurm takes the last."""
        return self.all(name)[-1] if self.all(name) else default


@dataclass(frozen=True)
class ScriptPlace:
    """Where one of the two scripts goes, and who runs it there.

    `value` is what slurm.conf has; `caller` the site's own script that has to run ours, where it has one and no list.
    """

    setting: str
    path: str
    value: str = ""
    caller: str = ""


@dataclass(frozen=True)
class StackPlace:
    """Where the plugin's line goes, the end of plugstack.conf or a file that it includes, and all `files` in force."""

    path: str
    own_file: bool
    files: tuple[str, ...]


def _lines(path: str) -> list[str]:
    return [line.text for line in logical_lines(path, read_text(path))]


def read_slurm_conf(path: str | None, environment: Mapping[str, str]) -> SlurmConf:
    """Read this machine's slurm.conf, or the one named.

    Returns: an empty one where there is none in the usual places. Raises: MpsError when it cannot be read.
    """
    named = path or environment.get("SLURM_CONF")
    chosen = named or next((place for place in _CONFIGS if os.path.exists(place)), "")
    if not chosen:
        return SlurmConf()
    found: dict[str, tuple[str, ...]] = {}
    try:
        conf = read_conf(chosen)
    except OSError as error:
        raise MpsError(f"{error.filename}: {error.strerror}") from None
    if conf.problems:
        raise MpsError(conf.problems[0])
    for line in conf.lines:
        for name, value in line.pairs().items():
            found[name] = (*found.get(name, ()), value)
    return SlurmConf(os.path.abspath(chosen), found)


def _find_program(name: str, environment: Mapping[str, str]) -> str | None:
    places = ":".join([environment.get("PATH", ""), *_PROGRAM_PLACES])
    return shutil.which(name, path=places)


def find_release(environment: Mapping[str, str]) -> tuple[str, str]:
    """Ask Slurm's own programs which release they are: slurmd's first, a login node's clients where there is none.

    Returns: the release, such as 22.05.8, and the program that said so.
    Raises: NoSlurmError; MpsError when they are of different releases, or do not say.
    """
    given = {name: environment[name] for name in ("PATH", "SLURM_CONF", "LD_LIBRARY_PATH") if name in environment}
    said: dict[str, str] = {}
    silent = ""
    for name in _PROGRAMS:
        program = _find_program(name, environment)
        if program is None:
            continue
        if given.get("SLURM_CONF") and not os.path.exists(given["SLURM_CONF"]):  # clients look for it for a minute
            raise MpsError(f"SLURM_CONF={given['SLURM_CONF']} names no file", "unset it, or give it the right path")
        outcome = processes.run([program, "-V"], given, _ASK_SECONDS)
        release = re.search(r"\b(\d+\.\d+\.\d+)", outcome.output)
        if release and not outcome.status:
            said[program] = release[1]
        else:  # clients want a slurm.conf before they tell even that (22.05)
            silent = f"{program} -V does not say its release: {(outcome.errors or outcome.output).strip()[-200:]}"
    if not said and silent:
        raise MpsError(silent)
    if not said:
        raise NoSlurmError("there is no Slurm on this machine: neither slurmd nor srun nor scontrol is in PATH")
    first = next(iter(said))
    for program, another in said.items():
        if another.split(".")[:2] != said[first].split(".")[:2]:
            raise MpsError(
                f"two releases of Slurm are on this machine: {first} is {said[first]}, {program} is {another}",
                "take the other one out of PATH, or away",
            )
    return said[first], first


def slurmd_runs(since: float = math.inf) -> bool:
    """Whether a program of that name runs here; a user's that is called so costs a question to slurmctld.

    With `since` (seconds of the epoch): whether root's runs here, and was started after that.
    """
    asked = not math.isinf(since)
    ages = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                before, _, after = file.read().rpartition(")")
            if before.endswith("(slurmd") and not (asked and os.stat(path).st_uid):
                started = int(after.split()[19]) / os.sysconf("SC_CLK_TCK")  # after boot: starttime, field 22
                ages.append(time.clock_gettime(time.CLOCK_BOOTTIME) - started)
        except (OSError, ValueError, IndexError):  # it has ended
            pass
    return bool(ages) and not (asked and max(ages) > time.time() - since)


def ask_running(environment: Mapping[str, str]) -> dict[str, tuple[str, ...]] | None:
    """Prolog and Epilog as slurmctld has them, by name in lower case; None when it does not answer."""
    program = _find_program("scontrol", environment)
    if program is None:
        return None
    given = {name: environment[name] for name in ("PATH", "SLURM_CONF") if name in environment}
    try:
        outcome = processes.run([program, "show", "config"], given, _ASK_SECONDS)
    except MpsError:
        return None
    if outcome.status:
        return None
    found: dict[str, tuple[str, ...]] = {"prolog": (), "epilog": ()}
    for name, value in re.findall(r"(?m)^(Prolog|Epilog)(?:\[\d+\])?\s*=\s*(.*?)\s*$", outcome.output):
        found[name.lower()] += (value,)
    return found


def plugin_directories(conf: SlurmConf, slurm_program: str) -> list[str]:
    """Where Slurm looks for plugins that plugstack.conf names without a path: PluginDir's, or where its own are."""
    named = [place for value in conf.all("PluginDir") for place in value.split(":")]
    try:
        return named or [find_plugin_directory(conf, slurm_program)]
    except MpsError:
        return []


def find_plugin_directory(conf: SlurmConf, slurm_program: str) -> str:
    """The directory with Slurm's own plugins, of slurm.conf's PluginDir or of the usual ones.

    Raises: MpsError when none is found.
    """
    prefix = os.path.dirname(os.path.dirname(os.path.realpath(slurm_program)))
    usual = [f"{prefix}/lib64/slurm", f"{prefix}/lib/slurm", *_PLUGIN_PLACES]
    places = [place for value in conf.all("PluginDir") for place in value.split(":")] or usual
    for place in places:
        for directory in sorted(glob.glob(place)):
            if is_plugin_directory(directory):
                return directory
    raise MpsError("Slurm's own plugins are not found in any usual place", "name their directory with --plugin-dir")


def is_plugin_directory(directory: str) -> bool:
    """Whether Slurm's own plugins are there."""
    return bool(glob.glob(f"{glob.escape(directory)}/proctrack_*.so"))


def find_script_place(conf: SlurmConf, setting: str, name: str) -> ScriptPlace:
    """Where the Prolog or Epilog script `name` goes on this site.

    A pattern in slurm.conf that takes the name decides the directory. Without one it is the usual ``prolog.d``,
    ``epilog.d``, and a line to add: for slurm.conf, or for the site's own single script, which has to call ours.
    """
    for value in conf.all(setting):
        path = os.path.join(os.path.dirname(value), name)
        if fnmatch.fnmatchcase(path, value):
            return ScriptPlace(setting, path, value)
    values = conf.all(setting)
    path = f"{conf.directory}/{setting.lower()}.d/{name}"
    if not values:
        return ScriptPlace(setting, path)
    if re.search(r"[*?\[]", values[0]):
        raise MpsError(
            f"{conf.path}: {setting}={values[0]} does not take the name {name}", "let the pattern take *.sh or all"
        )
    return ScriptPlace(setting, path, values[0], caller=values[0])


def runs_before(place: ScriptPlace) -> list[str]:
    """The site's scripts that Slurm runs before ours: a pattern's files in reverse order (S12, seen on 22.05)."""
    if not place.value or place.caller:
        return []
    names = [os.path.basename(path) for path in glob.glob(place.value)]
    return sorted((name for name in names if name > os.path.basename(place.path)), reverse=True)


def find_stack_place(conf: SlurmConf, name: str) -> StackPlace:
    """Where the line for plugstack.conf goes: a file `name` of its own where a directory of such is included."""
    top = conf.one("PlugStackConfig", f"{os.path.dirname(conf.path) or conf.directory}/plugstack.conf")
    files, own = [top], ""
    for path in files:
        if not os.path.exists(path) or len(files) > _INCLUDES_MAX:
            continue
        for line in _lines(path):
            word, pattern, *_ = [*line.split(), "", ""]
            if word != "include" or not pattern:  # so written: Slurm ignores an Include there (spank.c)
                continue
            pattern = os.path.join(os.path.dirname(top), pattern)
            candidate = os.path.join(os.path.dirname(pattern), name)
            own = own or (candidate if fnmatch.fnmatchcase(candidate, pattern) else "")
            files += [one for one in sorted(glob.glob(pattern)) if one not in files]
    return StackPlace(own or top, bool(own), tuple(files))


def stack_lines(files: tuple[str, ...], plugin: str) -> list[tuple[str, str]]:
    """The lines in force that name the plugin: file and line."""
    found = []
    for path in files:
        if os.path.exists(path):
            found += [(path, line) for line in _lines(path) if os.path.basename(_plugin_of(line)) == plugin]
    return found


def _plugin_of(line: str) -> str:
    words = line.split()
    return words[1] if len(words) > 1 and words[0] in ("required", "optional") else ""
