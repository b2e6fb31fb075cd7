"""Installing and uninstalling, from the look at the node to the last file. Prints nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..config.settings import CONFIG_PATH, DEFAULTS, STATE_DIRECTORY
from ..errors import MpsError
from ..slurm.host import PLUGIN, Host
from . import changes
from .by_hand import Todo, engines_that_miss, jobs_with_mps, left_to_do, still_in_force, still_needed
from .changes import Comparison, Manifest, Undone
from .wanted import Options, find_wanted, stack_lines, stack_lines_of_others


@dataclass(frozen=True)
class Installed:
    """The changes that an installation made, or with `dry_run` would make, and those of an earlier one that it took
    back.
    """

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
    """The result for each path; why uninstall refused (the action that must come first, and the problems); the
    directories that stay.
    """

    undone: list[Undone] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def refuse(self, reasons: list[tuple[str, str]]) -> None:
        """Add reasons: the action that must come first, and the problem."""
        for first, problem in reasons:
            self.refused.setdefault(first, []).append(problem)

    @property
    def problems(self) -> list[str]:
        kept = [f"{one.path} {one.what}" for one in self.undone if one.kept and one.path != CONFIG_PATH]
        return [problem for problems in self.refused.values() for problem in problems] + kept


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
            wanted = find_wanted(options, host, manifest)
            comparisons = changes.compare(wanted.changes, manifest)
            gone = changes.no_longer_wanted(wanted.changes, manifest)
            changed = {one.change.path for one in comparisons if one.is_needed}
            by_hand = left_to_do(options, wanted, host, manifest, changed)
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
    return Installed(wanted.release, host.conf_path, comparisons, undone, by_hand, dry_run)


def uninstall(slurm_conf: str | None, environment: Mapping[str, str], *, force: bool, dry_run: bool) -> Uninstalled:
    """Remove the files that install wrote, newest first. A file that the admin has changed since stays.

    Returns: with `refused` when Slurm or a job still needs what would go; nothing was changed then, unless it could
    only be seen on the way.
    Raises: MpsError when the manifest cannot be read.
    """
    result = Uninstalled()
    with changes.Manifest(make=False) as manifest:
        if not manifest.wrote:
            if not dry_run:
                manifest.remove()
            return result
        host = _host(slurm_conf, environment)
        if not force:
            _look_what_needs_it(host, manifest, result)
        if any(_is_plugin(path) for path in manifest.wrote):
            _refuse_lines(stack_lines_of_others(host, manifest), result)
        if result.refused:
            return result
        newest_first = list(manifest.wrote)[::-1]
        for path in sorted(newest_first, key=_is_plugin):  # the plugin last, when no line names it
            if _is_plugin(path) and not dry_run:
                _refuse_lines(stack_lines(_host(slurm_conf, environment)), result)
                if result.refused:
                    return result
            result.undone.append(changes.undo(path, manifest, dry_run=dry_run))
        result.left = _left()
        result.remarks += engines_that_miss()
        if not dry_run:
            manifest.remove()
    return result


def _look_what_needs_it(host: Host, manifest: Manifest, result: Uninstalled) -> None:
    """Jobs, slurm.conf as it stands, and slurmctld, which may not have taken over what was changed there."""
    result.refuse([("end these jobs", f"job {job} has MPS on this node") for job in jobs_with_mps()])
    result.refuse(still_needed(host, manifest.wrote))
    if result.refused:
        return
    in_force = still_in_force(host, manifest.wrote)
    if in_force is None:
        result.remarks.append(
            "slurmctld does not answer: if it still has our Prolog or Epilog, this node drains at its next job"
        )
    result.refuse(in_force or [])


def _refuse_lines(lines: list[tuple[str, str]], result: Uninstalled) -> None:
    why = "without the plugin this line stops every srun, and slurmd from starting"
    result.refuse([(f"take the line out of {path}", f"{path}: {line}: {why}") for path, line in lines])


def _is_plugin(path: str) -> bool:
    return os.path.basename(path) == PLUGIN


def _left() -> list[str]:
    """The directories that stay: this virtual environment, unless a package's, and what jobs left."""
    mine = sys.prefix != sys.base_prefix and not os.path.realpath("/usr/bin/slurm-mps").startswith(f"{sys.prefix}/")
    places = (sys.prefix if mine else "", STATE_DIRECTORY, DEFAULTS.paths_logs)
    return [path for path in places if os.path.isdir(path)]
