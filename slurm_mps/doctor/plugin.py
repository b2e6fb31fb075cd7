"""Checks of the plugin: its line in plugstack.conf, its file, its release."""

from __future__ import annotations

import os
import stat

from ..errors import MpsError
from ..slurm.plugin_file import PluginFile, read_plugin
from .finding import NotCheckedError, check, fine, problem, warning
from .paths import closed_to_users, hidden_from_users, others_can_write
from .slurm import name_hidden

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .finding import Said
    from .place import Place


def _install(place: Place) -> str:
    """The command that puts plugin and line there."""
    return "slurm-mps install" if place.is_compute else "slurm-mps install --login-node"


@check(
    "plugstack",
    "plugstack.conf can be read, with all that it includes",
    why="Without it srun, sbatch and salloc know no --mps, and a job's tasks run without MPS.",
)
def plugstack(place: Place) -> Iterator[Said]:
    path = place.plugstack_path
    said = hidden_from_users(place.conf_path)  # of the directory that both are in
    try:
        files: tuple[str, ...] = place.plugstack.files
    except NotCheckedError:
        files = (path,)
    hidden = list(name_hidden(place, files, {said}))
    yield from hidden
    if (hidden or said) and not os.access(path, os.R_OK):
        return
    if not os.path.exists(path):
        yield problem(f"{path}: no such file", f"{_install(place)}; or {path}: required spank_mps.so")
        return
    for missing in place.plugstack.problems:
        yield problem(missing, "let every user read it")


@check(
    "plugstack-line",
    "plugstack.conf has the plugin of slurm-mps",
    why="A host without it has no --mps; a node without it runs the tasks of MPS jobs without MPS.",
)
def plugstack_line(place: Place) -> Iterator[Said]:
    for line in place.ignored_lines:
        yield problem(
            f"{line.line.place}: Slurm ignores the line, for {line.how!r} is none of its words",
            f"{line.line.place}: required {line.path}",
        )
    if not place.our_lines and not place.ignored_lines:
        cure = f"{_install(place)}; or {place.plugstack_path}: required spank_mps.so"
        yield problem(f"{place.plugstack_path} has no spank_mps.so", cure)


@check(
    "plugstack-required",
    "the plugin is required, not optional",
    why="Slurm ignores what an optional plugin says: a task that cannot have its daemon runs without MPS, unnoticed.",
)
def plugstack_required(place: Place) -> Iterator[Said]:
    for ours in place.our_lines:
        if ours.how != "required":
            yield problem(f"{ours.line.place}: {ours.line.text}", f"{ours.line.place}: required {ours.path}")


@check(
    "plugstack-twice",
    "the plugin stands in plugstack.conf once",
    why="Every srun says that its options are provided twice.",
)
def plugstack_twice(place: Place) -> Iterator[Said]:
    if len(place.our_lines) > 1:
        first, *others = place.our_lines
        yield warning(f"{others[0].line.place}: the plugin again, after {first.line.place}", "take one line out")


@check(
    "plugin-file",
    "the plugin that plugstack.conf names is there, and is slurm-mps'",
    why="A required plugin that is missing ends every srun, sbatch and salloc and drains every node that starts a job.",
)
def plugin_file(place: Place) -> Iterator[Said]:
    try:
        plugin = read_plugin(place.plugin_path)
    except MpsError as error:
        yield problem(str(error), f"{_install(place)}; or mend the path in {place.plugstack_path}")
        return
    yield fine(f"{place.plugin_path} of slurm-mps {plugin.version} for Slurm {plugin.slurm_release}")


def _plugin(place: Place) -> PluginFile:
    try:
        return read_plugin(place.plugin_path)
    except MpsError:
        raise NotCheckedError("there is no plugin to look at") from None


@check(
    "plugin-release",
    "the plugin was built for this Slurm",
    why="Slurm refuses a plugin of another release: every srun fails, and every node that starts a job drains.",
)
def plugin_release(place: Place) -> Iterator[Said]:
    plugin = _plugin(place)
    if not plugin.loads_in(place.release):
        yield problem(
            f"{place.plugin_path} was built for Slurm {plugin.slurm_release}, and here is {place.release}",
            f"{_install(place)}, which builds it for this release",
        )


@check(
    "plugin-version",
    "plugin and hooks are of the same slurm-mps",
    why="The plugin reads what the prolog writes; another version may not understand it, and the job's tasks fail.",
)
def plugin_version(place: Place) -> Iterator[Said]:
    plugin = _plugin(place)
    try:
        hooks = place.hook_python()
    except MpsError:
        raise NotCheckedError("the hooks' version is not known") from None
    if plugin.version != hooks:
        yield problem(
            f"{place.plugin_path} is of slurm-mps {plugin.version}, the prolog of {hooks}",
            f"{_install(place)}, which puts there what is of its own version",
        )


@check(
    "plugin-format",
    "the plugin reads the verdicts that the hooks write",
    why="A plugin refuses a verdict that is newer than it knows, and with it every task of a job with MPS.",
)
def plugin_format(place: Place) -> Iterator[Said]:
    plugin = _plugin(place)
    try:
        written = place.hook_verdict_version()
    except MpsError:
        raise NotCheckedError("the hooks' version is not known") from None
    if plugin.verdict_version < written:
        yield problem(
            f"{place.plugin_path} reads verdicts up to version {plugin.verdict_version}, the prolog writes {written}",
            "slurm-mps install, or the package's plugin of the same version",
        )


@check(
    "plugin-owner",
    "only root can write the plugin, and everybody can read it",
    why="slurmd and slurmstepd load it as root: who can write it is root. Who cannot read it cannot run srun.",
)
def plugin_owner(place: Place) -> Iterator[Said]:
    try:
        mode = os.stat(place.plugin_path).st_mode
    except OSError:
        raise NotCheckedError("there is no plugin to look at") from None
    written = others_can_write(place.plugin_path)
    if written:
        yield problem(f"{written} can be written by others than root", f"chown root: {written}; chmod go-w {written}")
    closed = closed_to_users(place.plugin_path)
    if closed:
        yield problem(f"users cannot enter {closed} on the way to {place.plugin_path}", f"chmod o+x {closed}")
    elif not mode & stat.S_IROTH:
        yield problem(f"{place.plugin_path} cannot be read by everybody", f"chmod 644 {place.plugin_path}")
    written = others_can_write(place.plugstack_path)
    if written and os.path.exists(place.plugstack_path):
        yield problem(f"{written} can be written by others than root", f"chown root: {written}; chmod go-w {written}")
