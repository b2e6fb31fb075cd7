"""``slurm-mps metrics``: write this node's metrics for node_exporter's textfile collector."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from slurm_mps.cli.output import FINE, NOT_HERE, NOT_ROOT, PROBLEM, complain, leave

if TYPE_CHECKING:
    import argparse

    from slurm_mps.status.node import NodeView

_CONFIG_SECONDS = 30.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "metrics",
        help="on a compute node, as root: write metrics for Prometheus",
        description="Writes metrics of this node's jobs for node_exporter, to the file that metrics.textfile of "
        "mps.toml names. Exit status: 0 fine, 1 the file cannot be written, 2 usage, 3 metrics are off, or the "
        "Prometheus library is missing, or slurm-mps has not been used here, 4 not root.",
    )
    parser.add_argument("--print", action="store_true", help="print what would be written, and change nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Count, look, write. Returns the exit status."""
    if os.geteuid() != 0:
        complain("metrics reads what belongs to root; run it as root")
        return NOT_ROOT
    from slurm_mps.errors import MpsError

    try:
        status, view = _run(options)
    except ImportError:
        complain(f"the Prometheus client library is missing: {sys.executable} -m pip install prometheus-client")
        return NOT_HERE
    except MpsError as error:
        complain(str(error))
        return PROBLEM
    if view and view.stuck:
        leave(status)
    return status


def _run(options: argparse.Namespace) -> tuple[int, NodeView | None]:
    from slurm_mps.config.load import load_config
    from slurm_mps.job.state import NodeState
    from slurm_mps.metrics.count import count
    from slurm_mps.metrics.expose import text
    from slurm_mps.status.node import look

    config = load_config(None, _CONFIG_SECONDS)
    if config.metrics_textfile == "none" and not options.print:
        complain("metrics are off: metrics.textfile of mps.toml says where they are to be written")
        return NOT_HERE, None
    try:
        state = NodeState(make=False)
    except FileNotFoundError:
        state = None
    view = look(sparing=True)
    if state is None or view is None:
        complain("slurm-mps has not been used since this node started")
        return NOT_HERE, None
    data = text(count(state, config.paths_logs, keep=not options.print), view)
    if options.print:
        sys.stdout.write(data.decode())
        sys.stdout.flush()
    else:
        _write(config.metrics_textfile, data)
    return FINE, view


def _write(path: str, data: bytes) -> None:
    """Whole or not at all, under a name that node_exporter does not look at until it is; readable by all.

    Raises: NodeError, also when others than root could have put something in its way.
    """
    from slurm_mps.errors import NodeError
    from slurm_mps.node.files import open_trusted

    directory, _, name = path.rpartition("/")
    try:
        with open_trusted(directory) as place:
            place.write(name, data, mode=0o644)
    except FileNotFoundError:
        raise NodeError(f"{directory} is not there; make it, or change metrics.textfile") from None
