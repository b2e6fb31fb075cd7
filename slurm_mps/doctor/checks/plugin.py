"""Checks of the plugin: its line in plugstack.conf, its file, its release."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from ...errors import MpsError
from ...node.paths import closed_to_users, hidden_from_users, others_can_write
from ...slurm.host import NotKnownError
from ...slurm.plugin_file import PluginFile, read_plugin
from ..finding import check, fine, problem
from .installed import install_command
from .slurm import name_hidden

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..facts import Facts
    from ..finding import Finding


@check(
    "plugstack",
    "plugstack.conf can be read, with all that it includes",
    why="Without it srun, sbatch and salloc know no --mps, and a job's tasks run without MPS.",
)
def plugstack(facts: Facts) -> Iterator[Finding]:
    path = facts.plugstack_path
    said = hidden_from_users(facts.conf_path)  # of the directory that both are in
    try:
        files: tuple[str, ...] = facts.plugstack.files
    except NotKnownError:
        files = (path,)
    hidden = list(name_hidden(facts, files, {said}))
    yield from hidden
    if (hidden or said) and not os.access(path, os.R_OK):
        return
    if not os.path.exists(path):
        yield problem(f"{path}: no such file", f"{install_command(facts)}; or {path}: required spank_mps.so")
        return
    for missing in facts.plugstack.problems:
        yield problem(missing, "let every user read it")


@check(
    "plugstack-line",
    "plugstack.conf has the plugin of slurm-mps",
    why="A host without it has no --mps; a node without it runs the tasks of MPS jobs without MPS.",
)
def plugstack_line(facts: Facts) -> Iterator[Finding]:
    for line in facts.lines_that_name_us:
        if not line.is_read:
            yield problem(
                f"{line.line.place}: Slurm ignores the line, for {line.word!r} is none of its words",
                f"{line.line.place}: required {line.path}",
            )
    if not facts.lines_that_name_us:
        fix = f"{install_command(facts)}; or {facts.plugstack_path}: required spank_mps.so"
        yield problem(f"{facts.plugstack_path} has no spank_mps.so", fix)


@check(
    "plugstack-required",
    "the plugin is required, not optional",
    why="Slurm ignores what an optional plugin says: a task that cannot have its daemon runs without MPS, unnoticed.",
)
def plugstack_required(facts: Facts) -> Iterator[Finding]:
    for ours in facts.our_lines:
        if ours.word != "required":
            yield problem(f"{ours.line.place}: {ours.line.text}", f"{ours.line.place}: required {ours.path}")


@check(
    "plugstack-twice",
    "the plugin stands in plugstack.conf once",
    why="Each task is counted twice: --mps-threads=auto and --mps-mem=auto give too little, and tasks are refused as "
    "too many for their GPU.",
)
def plugstack_twice(facts: Facts) -> Iterator[Finding]:
    if len(facts.our_lines) > 1:
        first, *others = facts.our_lines
        yield problem(f"{others[0].line.place}: the plugin again, after {first.line.place}", "take one line out")


@check(
    "plugin-file",
    "the plugin that plugstack.conf names is there, and is slurm-mps'",
    why="A required plugin that is missing ends every srun, sbatch and salloc and drains every node that starts a job.",
)
def plugin_file(facts: Facts) -> Iterator[Finding]:
    if not facts.our_lines:
        raise NotKnownError("no line of plugstack.conf names the plugin")
    path = facts.plugin_path
    try:
        plugin = read_plugin(path)
    except MpsError as error:
        yield problem(str(error), f"{install_command(facts)}; or mend the path in {facts.plugstack_path}")
        return
    yield fine(f"{facts.plugin_path} of slurm-mps {plugin.version} for Slurm {plugin.slurm_release}")


def _plugin(facts: Facts) -> PluginFile:
    try:
        return read_plugin(facts.plugin_path)
    except MpsError:
        raise NotKnownError("there is no plugin to look at") from None


@check(
    "plugin-release",
    "the plugin was built for this Slurm",
    why="Slurm refuses a plugin of another release: every srun fails, and every node that starts a job drains.",
)
def plugin_release(facts: Facts) -> Iterator[Finding]:
    plugin = _plugin(facts)
    if not plugin.loads_in(facts.release):
        yield problem(
            f"{facts.plugin_path} was built for Slurm {plugin.slurm_release}, and here is {facts.release}",
            f"{install_command(facts)}, which builds it for this release",
        )


@check(
    "plugin-version",
    "plugin and hooks are of the same slurm-mps",
    why="The plugin reads what the prolog writes; another version may not understand it, and the job's tasks fail.",
)
def plugin_version(facts: Facts) -> Iterator[Finding]:
    plugin = _plugin(facts)
    try:
        hooks = facts.hook_versions[0]
    except MpsError:
        raise NotKnownError("the hooks' version is not known") from None
    if plugin.version != hooks:
        yield problem(
            f"{facts.plugin_path} is of slurm-mps {plugin.version}, the prolog of {hooks}",
            f"{install_command(facts)}, which puts there what is of its own version",
        )


@check(
    "plugin-format",
    "the plugin reads the verdicts that the hooks write",
    why="A plugin refuses a verdict that is newer than it knows, and with it every task of a job with MPS.",
)
def plugin_format(facts: Facts) -> Iterator[Finding]:
    plugin = _plugin(facts)
    try:
        written = facts.hook_versions[1]
    except MpsError:
        raise NotKnownError("the hooks' version is not known") from None
    if plugin.verdict_version < written:
        yield problem(
            f"{facts.plugin_path} reads verdicts up to version {plugin.verdict_version}, the prolog writes {written}",
            "slurm-mps install, or the package's plugin of the same version",
        )


@check(
    "plugin-owner",
    "only root can write the plugin, and everybody can read it",
    why="slurmd and slurmstepd load it as root: who can write it is root. Who cannot read it cannot run srun.",
)
def plugin_owner(facts: Facts) -> Iterator[Finding]:
    try:
        mode = os.stat(facts.plugin_path).st_mode
    except OSError:
        raise NotKnownError("there is no plugin to look at") from None
    written = others_can_write(facts.plugin_path)
    if written:
        yield problem(f"{written} can be written by others than root", f"chown root: {written}; chmod go-w {written}")
    closed = closed_to_users(facts.plugin_path)
    if closed:
        yield problem(f"users cannot enter {closed} on the way to {facts.plugin_path}", f"chmod o+x {closed}")
    elif not mode & stat.S_IROTH:
        yield problem(f"{facts.plugin_path} cannot be read by everybody", f"chmod 644 {facts.plugin_path}")
    written = others_can_write(facts.plugstack_path)
    if written and os.path.exists(facts.plugstack_path):
        yield problem(f"{written} can be written by others than root", f"chown root: {written}; chmod go-w {written}")
