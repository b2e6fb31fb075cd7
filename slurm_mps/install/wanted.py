"""The files that install writes on this node, each whole and its own. It changes no file of the site.

They are written in this order, a file before the file that names it. A `required` line in plugstack.conf whose plugin
is missing stops every srun, and slurmd from starting; a Prolog that is missing drains the node (both seen on Slurm
22.05).
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.settings import CONFIG_PATH
from ..errors import MpsError
from ..job.state import MADE_AT_BOOT
from ..job.verdict import VERDICT_VERSION
from ..node.engines import ENROOT
from ..node.paths import hidden_from_users, way_in
from ..slurm.host import EPILOG, PLUGIN, PROLOG, Host, has_slurms_plugins
from ..slurm.plugin_file import read_plugin
from .build import build_plugin, read_plugin_for, share_directory
from .changes import Change, Manifest, require_roots

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = {PROLOG: "10-slurm-mps.sh", EPILOG: "95-slurm-mps.sh"}
STACK_FILE = "slurm-mps.conf"
_COMMAND, _COMMAND_PLACES = "slurm-mps", ("/usr/local/bin", "/usr/bin")
UNITS, UNIT = "/etc/systemd/system", "slurm-mps-reconcile.service"
_PACKAGED_UNITS = "/usr/lib/systemd/system"
_AT_BOOT = "/etc/tmpfiles.d"


@dataclass(frozen=True)
class Options:
    """The admin's options. `login_node`: install for a host where users submit jobs and none runs."""

    slurm_conf: str | None = None
    plugin: str | None = None
    plugin_dir: str | None = None
    slurm_include: str | None = None
    login_node: bool = False


@dataclass(frozen=True)
class ScriptPlace:
    """Where one of the two scripts goes, and what runs it there.

    `value` is what slurm.conf has; `caller` the site's own script that has to run ours, where it has one and no list.
    """

    setting: str
    path: str
    value: str = ""
    caller: str = ""


@dataclass(frozen=True)
class Wanted:
    """The files for this node: `changes` in their order, the plugin's directory, and its line."""

    release: str
    changes: list[Change]
    plugin_directory: str
    stack_line: str


def find_wanted(options: Options, host: Host, manifest: Manifest) -> Wanted:
    """Look at this node's Slurm, and build the plugin if none is given.

    Raises: NoSlurmError; MpsError when something is missing, is of another release, or is not root's
    alone.
    """
    release = host.ask_release()
    _require_roots_and_open_to_users()
    directory = options.plugin_dir or next(filter(has_slurms_plugins, host.plugin_directories), "")
    if not directory:
        raise MpsError("Slurm's own plugins are not found in any usual place", "name their directory with --plugin-dir")
    plugin = _plugin(options, host, release, f"{directory}/{PLUGIN}", manifest)
    searched = map(os.path.realpath, host.plugin_directories)
    line = f"required {PLUGIN if os.path.realpath(directory) in searched else f'{directory}/{PLUGIN}'}"
    stack = _stack_file(host, line, manifest)
    if options.login_node:
        changes = [*plugin, *_command(manifest), *stack]
    else:
        scripts = [_script(script_place(host, setting)) for setting in SCRIPTS]
        changes = [
            *_config(manifest),
            *plugin,
            *scripts,
            *_command(manifest),
            *_unit(manifest),
            *_at_boot(manifest),
            *_enroot(manifest),
            *stack,
        ]
    return Wanted(release, _with_directories(changes), directory, line)


def _share(name: str) -> bytes:
    path = f"{share_directory()}/{name}"
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise MpsError(f"{path}: {error.strerror}", "install slurm-mps from its own wheel") from None


def _with_directories(changes: list[Change]) -> list[Change]:
    """The changes, and before the first the directories that are missing."""
    missing: list[str] = []
    for change in changes:
        directory = os.path.dirname(change.path)
        new = []
        while not os.path.isdir(directory) and directory not in missing:
            new.append(directory)
            directory = os.path.dirname(directory)
        missing += reversed(new)
    return [Change(path, mode=0o755) for path in missing] + changes


# ------------------------------------------------------------------------------------------------------- file by file


def _config(manifest: Manifest) -> list[Change]:
    """The sample, where there is no configuration; one that is there stays, also across an upgrade."""
    if not os.path.exists(CONFIG_PATH):
        return [Change(CONFIG_PATH, _share("etc/mps.toml"))]
    if os.path.realpath(CONFIG_PATH) not in manifest.wrote:
        return []
    with open(CONFIG_PATH, "rb") as file:
        return [Change(CONFIG_PATH, file.read())]


def _plugin(options: Options, host: Host, release: str, target: str, manifest: Manifest) -> list[Change]:
    """The plugin; one that a package put there for this Slurm stays."""
    given = read_plugin_for(release, options.plugin) if options.plugin else None
    if os.path.exists(target) and target not in manifest:
        why = _why_unfit(target, release, given)
        if why:
            raise MpsError(f"{target} {why}, and slurm-mps install did not put it there", "move it away first")
        return []
    return [Change(target, given or build_plugin(release, options.slurm_include, host.environment))]


def _why_unfit(path: str, release: str, wanted: bytes | None) -> str:
    """Why a plugin file cannot stay; empty where it can."""
    try:
        found = read_plugin(path)
    except MpsError:
        return "is not the plugin of slurm-mps"
    if not found.loads_in(release):
        return f"is for Slurm {found.slurm_release}, where {release} runs"
    if found.verdict_version < VERDICT_VERSION:
        return "is older than this slurm-mps"
    with open(path, "rb") as file:
        return "is another than --plugin" if wanted not in (None, file.read()) else ""


def script_place(host: Host, setting: str, values: Sequence[str] | None = None) -> ScriptPlace:
    """Where our script for Prolog or Epilog goes; `values` are slurm.conf's unless others are given.

    A pattern that takes the script's name decides the directory. Without one it is the usual ``prolog.d``,
    ``epilog.d``, and a line to add by hand: to slurm.conf, or to the site's own single script.
    """
    values, name = host.all(setting) if values is None else values, SCRIPTS[setting]
    for value in values:
        path = os.path.join(os.path.dirname(value), name)
        if fnmatch.fnmatchcase(path, value):
            return ScriptPlace(setting, path, value)
    path = f"{host.site_directory}/{setting.lower()}.d/{name}"
    if not values:
        return ScriptPlace(setting, path)
    if re.search(r"[*?\[]", values[0]):
        raise MpsError(
            f"{host.conf_path}: {setting}={values[0]} does not take the name {name}", "let the pattern take *.sh or all"
        )
    return ScriptPlace(setting, path, values[0], caller=values[0])


def _require_roots_and_open_to_users() -> None:
    """Raises: MpsError unless this Python and this package are root's alone to write, and everybody's to read.

    Root's prolog runs them; so do the plugin as the job's user, which reads their paths as words, and users.
    """
    for path in (sys.executable, f"{_PACKAGE}/hook.py"):
        if path.split() != [path]:
            raise MpsError(f"{path}: the plugin takes no path with a blank", "install slurm-mps in /opt/slurm-mps")
        try:
            require_roots(path)
        except MpsError as error:
            raise MpsError(f"{error}, and root's prolog would run what is there", "install slurm-mps as root") from None
        closed = hidden_from_users(path)
        if closed:
            raise MpsError(f"users cannot reach {path}: {closed} is closed to them", way_in(closed, sys.prefix))


def _script(place: ScriptPlace) -> Change:
    """Prolog or epilog, with the paths of this Python and this package in it."""
    text = _share(f"{place.setting.lower()}/{SCRIPTS[place.setting]}").decode()
    for name, value in (("python", sys.executable), ("package", _PACKAGE)):
        text = re.sub(rf"(?m)^{name}=.*$", f"{name}={shlex.quote(value)}".replace("\\", r"\\"), text)
    return Change(place.path, text.encode(), mode=0o755)


def _command(manifest: Manifest) -> list[Change]:
    """``slurm-mps`` where users' PATH has it, unless it is there."""
    program = f"{os.path.dirname(sys.executable)}/{_COMMAND}"
    places = [f"{place}/{_COMMAND}" for place in _COMMAND_PLACES]
    if not os.path.exists(program) or any(os.path.exists(one) and one not in manifest for one in places):
        return []
    return [Change(places[0], f'#!/bin/sh\nexec {shlex.quote(program)} "$@"\n'.encode(), mode=0o755)]


def _unit(manifest: Manifest) -> list[Change]:
    """The unit that repairs a node at boot, not enabled; a package's own stays."""
    target = f"{UNITS}/{UNIT}"
    if not os.path.isdir(UNITS) or os.path.exists(f"{_PACKAGED_UNITS}/{UNIT}"):
        return []
    if os.path.exists(target) and target not in manifest:
        return []
    program = f"{os.path.dirname(sys.executable)}/{_COMMAND}"
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", _share(f"etc/{UNIT}").decode())
    return [Change(target, text.encode())]


def _at_boot(manifest: Manifest) -> list[Change]:
    """The file by which systemd makes the state directory; a site's own of that name stays."""
    target = f"{_AT_BOOT}/slurm-mps.conf"
    if not os.path.isdir(_AT_BOOT) or (os.path.exists(target) and target not in manifest):
        return []
    return [Change(target, MADE_AT_BOOT.encode())]


def _enroot(manifest: Manifest) -> list[Change]:
    """A file of our own among enroot's mounts, unless the site has the line. Other engines have no place for one."""
    wanted = ENROOT.lacks_line or ENROOT.path in manifest
    return [Change(ENROOT.path, f"{ENROOT.line}\n".encode())] if wanted else []


def _stack_file(host: Host, line: str, manifest: Manifest) -> list[Change]:
    """The file with the plugin's line: plugstack.conf itself where there is none, or one that it includes.

    None where the line is there, where no include takes a file of ours, and where the controller sends plugstack.conf:
    then the line is left to the admin (by_hand.py).
    """
    text = f"# slurm-mps: the --mps options of srun, sbatch and salloc\n{line}\n".encode()
    path = host.plugstack_path
    if host.is_copy or stack_lines_of_others(host, manifest):
        return []
    if not os.path.exists(path) or path in manifest:
        return [Change(path, text)]
    own = host.own_stack_file(STACK_FILE)
    return [Change(own, text)] if own else []


def stack_lines(host: Host) -> list[tuple[str, str]]:
    """The lines in force that name the plugin: file and line."""
    lines = host.our_lines if os.path.exists(host.plugstack_path) else []
    return [(one.line.path, one.line.text) for one in lines]


def stack_lines_of_others(host: Host, manifest: Manifest) -> list[tuple[str, str]]:
    """The lines in force that name the plugin and that `install` did not write."""
    return [(path, line) for path, line in stack_lines(host) if path not in manifest]
