"""Installing and uninstalling, from the look at the node to the last file. Prints nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config.settings import CONFIG_PATH
from ..errors import MpsError
from ..slurm.host import PLUGIN, Host
from . import changes
from .by_hand import jobs_with_mps, left_to_do, still_in_force, still_needed
from .plan import make_plan, require_file, stack_lines, stack_lines_of_others

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .by_hand import Todo
    from .changes import Comparison, Manifest, Undone
    from .plan import Options


@dataclass(frozen=True)
class Installed:
    """What an installation did, or with `dry_run` would do; `undone` of an earlier one."""

    release: str
    conf_path: str
    comparisons: list[Comparison]
    undone: list[Undone]
    by_hand: list[Todo]
    dry_run: bool

    @property
    def problems(self) -> list[str]:
        """Files that were left as they are though they should be others."""
        return [
            f"{one.change.path} stays: {one.stays}; move it away and install again"
            for one in self.comparisons
            if one.stays
        ]


@dataclass
class Uninstalled:
    """What became of each path, and why the rest was left, if it was."""

    undone: list[Undone] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        kept = [f"{one.path} {one.what}" for one in self.undone if one.kept and one.path != CONFIG_PATH]
        return self.refused + kept


def _host(slurm_conf: str | None, environment: Mapping[str, str]) -> Host:
    """This machine's Slurm, with a slurm.conf that can be read whole.

    Raises: MpsError, also when SLURM_CONF names no file: Slurm's own commands would look for it for a minute.
    """
    host = Host(environment, slurm_conf)
    named = environment.get("SLURM_CONF")
    if named and not host.conf_path:
        raise MpsError(f"SLURM_CONF={named} names no file", "unset it, or give it the right path")
    if host.conf.problems:
        raise MpsError(host.conf.problems[0])
    return host


def install(options: Options, environment: Mapping[str, str], *, dry_run: bool) -> Installed:
    """Put slurm-mps into this node's Slurm; run again, it finishes or upgrades what an earlier run began.

    Raises: NoSlurmError; MpsError, after which what was done until then is noted and can be undone.
    """
    with changes.Manifest(make=not dry_run) as manifest:
        try:
            host = _host(options.slurm_conf, environment)
            plan = make_plan(options, host, manifest)
            comparisons = changes.compare(plan.changes, manifest)
            gone = changes.no_longer_wanted(plan.changes, manifest)
            changed = {one.change.path for one in comparisons if one.is_needed}
            by_hand = left_to_do(options, plan, host, manifest, changed)
            if not dry_run:
                changes.apply(comparisons, manifest)
            undone = [changes.undo(path, manifest, dry_run=dry_run) for path in gone]
            if gone and not dry_run:
                for path in gone:
                    del manifest.wrote[path]
                manifest.write()
        finally:
            if not manifest.wrote and not dry_run:
                manifest.remove()
    return Installed(plan.release, host.conf_path, comparisons, undone, by_hand, dry_run)


def uninstall(slurm_conf: str | None, environment: Mapping[str, str], *, force: bool, dry_run: bool) -> Uninstalled:
    """Remove what install wrote, newest first. What the admin changed since stays.

    Returns: with `refused` when Slurm or a job still needs what would go; nothing was changed then, unless it could
    only be seen on the way.
    Raises: WrongOptionError; MpsError when the manifest cannot be read.
    """
    require_file("--slurm-conf", slurm_conf)
    result = Uninstalled()
    with changes.Manifest(make=False) as manifest:
        if not manifest.wrote:
            if not dry_run:
                manifest.remove()
            return result
        host = _host(slurm_conf, environment)
        if not force:
            _look_what_needs_it(host, manifest, result)
        removes_plugin = any(_is_plugin(path) for path in manifest.wrote)
        if removes_plugin:
            result.refused += [_names_it(*one) for one in stack_lines_of_others(host, manifest)]
        if result.refused:
            return result
        newest_first = list(manifest.wrote)[::-1]
        for path in sorted(newest_first, key=_is_plugin):  # the plugin last, when no line names it
            if _is_plugin(path) and not dry_run:
                result.refused += [_names_it(*one) for one in stack_lines(_host(slurm_conf, environment))]
                if result.refused:
                    return result
            result.undone.append(changes.undo(path, manifest, dry_run=dry_run))
        if not dry_run:
            manifest.remove()
    return result


def _look_what_needs_it(host: Host, manifest: Manifest, result: Uninstalled) -> None:
    """Jobs, slurm.conf as it stands, and slurmctld, which may not have taken over what was changed there."""
    result.refused += [f"job {job} has MPS on this node" for job in jobs_with_mps()]
    result.refused += still_needed(host, manifest.wrote)
    if result.refused:
        return
    in_force = still_in_force(host, manifest.wrote)
    if in_force is None:
        result.remarks.append(
            "slurmctld does not answer: if it still has our Prolog or Epilog, this node drains at its next job"
        )
    result.refused += in_force or []


def _is_plugin(path: str) -> bool:
    return os.path.basename(path) == PLUGIN


def _names_it(path: str, line: str) -> str:
    return f"{path}: {line}: without the plugin this line stops every srun, and slurmd from starting; take it out first"
