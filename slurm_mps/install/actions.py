"""Installing and uninstalling, from the look at the node to the last file. Prints nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..config.settings import CONFIG_PATH
from . import changes
from .build import PLUGIN
from .plan import (
    Options,
    Plan,
    afterwards,
    jobs_with_mps,
    make_plan,
    require_file,
    stack_still_names_it,
    still_in_force,
    still_needed,
)
from .site import read_slurm_conf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from .changes import Step, Undone
    from .site import SlurmConf


@dataclass(frozen=True)
class Installed:
    """What an installation did, or with `dry_run` would do: `steps` as looked at before, `undone` of an earlier one."""

    plan: Plan
    steps: list[Step]
    undone: list[Undone]
    dry_run: bool

    @property
    def problems(self) -> list[str]:
        """Files that were left as they are though they should be others."""
        hint = "move it away and install again"
        return [f"{step.change.path} stays: {step.kept}; {hint}" for step in self.steps if step.kept]


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


def install(options: Options, environment: Mapping[str, str], *, dry_run: bool) -> Installed:
    """Put slurm-mps into this node's Slurm; run again, it finishes or upgrades what an earlier run began.

    Raises: NoSlurmError; MpsError, after which what was done until then is noted and can be undone.
    """
    with changes.Manifest(make=not dry_run) as manifest:
        try:
            plan = make_plan(options, environment, manifest.entries.keys())
            steps = changes.look(plan.changes, manifest)
            gone = changes.no_longer_wanted(plan.changes, manifest)
            changed = {step.change.path for step in steps if step.needed}
            left = plan.by_hand + afterwards(options, plan, changed, environment)
            if not dry_run:
                changes.apply(steps, manifest)
            undone = [changes.undo(entry, manifest, dry_run=dry_run) for entry in gone]
            if not dry_run:
                manifest.forget(gone)
        finally:
            if not manifest.entries and not dry_run:
                manifest.remove()
    return Installed(replace(plan, by_hand=left), steps, undone, dry_run)


def uninstall(slurm_conf: str | None, environment: Mapping[str, str], *, force: bool, dry_run: bool) -> Uninstalled:
    """Put this node back as it was found. What the admin changed since stays.

    Returns: with `refused` when Slurm or a job still needs what would go; nothing was changed then, unless it could
    only be seen on the way.
    Raises: WrongOptionError; MpsError when the manifest or a file that it kept cannot be read.
    """
    require_file("--slurm-conf", slurm_conf)
    result = Uninstalled()
    with changes.Manifest(make=False) as manifest:
        if not manifest.entries:
            if not dry_run:
                manifest.remove()
            return result
        conf = read_slurm_conf(slurm_conf, environment)
        ours = manifest.entries.keys()
        removes_plugin = any(path.endswith(f"/{PLUGIN}") for path in ours)
        if not force:
            _look_who_needs_it(conf, ours, environment, result)
        if removes_plugin:
            result.refused += [_names_it(where) for where in stack_still_names_it(conf, ours)]
        if result.refused:
            return result
        for entry in reversed(list(manifest.entries.values())):
            if entry.path.endswith(f"/{PLUGIN}") and not dry_run:
                left = stack_still_names_it(conf, ())
                if left:
                    result.refused += [_names_it(where) for where in left]
                    return result
            result.undone.append(changes.undo(entry, manifest, dry_run=dry_run))
        if not dry_run:
            manifest.remove()
    return result


def _look_who_needs_it(
    conf: SlurmConf, ours: Container[str], environment: Mapping[str, str], result: Uninstalled
) -> None:
    """Jobs, slurm.conf as it stands, and slurmctld, which may not have taken over what was changed there."""
    result.refused += [f"job {job} has MPS on this node" for job in jobs_with_mps()]
    result.refused += still_needed(conf, ours)
    if result.refused:
        return
    in_force = still_in_force(conf, ours, environment)
    if in_force is None:
        result.remarks.append(
            "slurmctld does not answer: if it still has our Prolog or Epilog, this node drains at its next job"
        )
    result.refused += in_force or []


def _names_it(where: str) -> str:
    return f"{where}: without the plugin this line stops every srun, and slurmd from starting; take it out first"
