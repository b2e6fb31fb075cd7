"""Checks of the plugin: its line in plugstack.conf, its file, its release."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from ...errors import MpsError
from ...slurm.host import NotKnownError
from ...slurm.plugin_file import read_plugin
from ..facts import Facts
from ..finding import Finding, check, fine, problem, warning
from .installed import install_command


@check(
    "plugstack",
    "plugstack.conf requires the plugin of slurm-mps, once",
    why="A host without the line has no --mps. A node without it runs the tasks of MPS jobs without MPS.",
)
def plugstack(facts: Facts) -> Iterator[Finding]:
    path = facts.plugstack_path
    by_hand = f"{install_command(facts)}; or {path}: required spank_mps.so"
    try:
        problems, lines = facts.plugstack.problems, facts.lines_that_name_us
    except NotKnownError as error:
        if error.needs_root:
            raise
        yield problem(str(error), by_hand)
        return
    for missing in problems:
        if not missing.endswith(os.strerror(errno.EACCES)):  # the check slurm-files
            yield problem(missing, "put the file there, or take the include line out")
    if not lines:
        yield problem(f"{path} does not name spank_mps.so", by_hand)
    for one in lines:
        right = f"{one.line.place}: required {one.path}"
        if not one.is_read:
            yield problem(f"{one.line.place}: Slurm ignores a line that begins with {one.word!r}", right)
        elif one.word != "required":
            why = "Slurm ignores what an optional plugin says: a task without its control daemon runs all the same."
            yield problem(f"{one.line.place}: {one.line.text}", right, why)
    if len(facts.our_lines) > 1:
        first, second, *_ = facts.our_lines
        what = f"{second.line.place}: the plugin again, after {first.line.place}"
        yield warning(what, "take one line out", "Every srun prints that the plugin's options are provided twice.")


@check(
    "pyxis-order",
    "the line of pyxis in plugstack.conf comes before that of slurm-mps",
    why="pyxis lets the image's variables win over those that a task has by then, CUDA_MPS_PIPE_DIRECTORY among them.",
)
def pyxis_order(facts: Facts) -> Iterator[Finding]:
    lines = facts.plugstack.lines
    for ours in facts.our_lines[:1]:
        for line in lines[lines.index(ours.line) :]:
            if "spank_pyxis.so" in line.text:
                yield warning(f"{line.place}: pyxis, after {ours.line.place}", "let the line of pyxis come first")


@check(
    "plugin-file",
    "the plugin that plugstack.conf names is there, for this Slurm",
    why="A required plugin that Slurm cannot load ends every srun, sbatch and salloc, and drains every node that "
    "starts a job.",
)
def plugin_file(facts: Facts) -> Iterator[Finding]:
    if not facts.our_lines:
        raise NotKnownError("no line of plugstack.conf names the plugin")
    path = facts.plugin_path
    try:
        plugin = read_plugin(path)
    except MpsError as error:
        yield problem(str(error), f"{install_command(facts)}; or correct the path in {facts.plugstack_path}")
        return
    if not plugin.loads_in(facts.release):
        what = f"{path} was built for Slurm {plugin.slurm_release}, and {facts.release} is here"
        yield problem(what, f"{install_command(facts)}, which builds it for this release")
    yield fine(f"{path} of slurm-mps {plugin.version} for Slurm {plugin.slurm_release}")


@check(
    "plugin-version",
    "plugin and hooks are of the same slurm-mps",
    why="The plugin reads the verdict that the prolog writes. One of another version may refuse it, and with it every "
    "task of a job with MPS.",
)
def plugin_version(facts: Facts) -> Iterator[Finding]:
    path = facts.plugin_path
    try:
        plugin = read_plugin(path)
        version, verdict_version = facts.hook_versions
    except MpsError:
        raise NotKnownError("there is no plugin to look at, or the hooks' version is not known") from None
    fix = f"{install_command(facts)}, or the package's plugin of the same version"
    if plugin.verdict_version < verdict_version:
        what = f"{path} reads verdicts up to version {plugin.verdict_version}, and the prolog writes {verdict_version}"
        yield problem(what, fix)
    elif plugin.version != version:
        yield problem(f"{path} is of slurm-mps {plugin.version}, and the hooks are of {version}", fix)
