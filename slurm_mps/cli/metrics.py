"""``slurm-mps metrics``: write this node's metrics for node_exporter's textfile collector."""

from __future__ import annotations

import argparse
import os
import sys

from .output import Exit, leave, refuse

_CONFIG_SECONDS = 30.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    if os.geteuid() != 0:
        return refuse(options, Exit.NOT_ROOT, "metrics reads what belongs to root; run it as root")
    from ..errors import MpsError

    try:
        return _run(options)
    except ImportError:
        missing = f"the Prometheus client library is missing: {sys.executable} -m pip install prometheus-client"
        return refuse(options, Exit.NOT_HERE, missing)
    except MpsError as error:
        return refuse(options, Exit.PROBLEM, str(error))


def _run(options: argparse.Namespace) -> int:
    from ..config.load import load_config
    from ..job.state import NodeState
    from ..metrics.count import count
    from ..metrics.expose import text
    from ..status.node import look

    config = load_config(None, _CONFIG_SECONDS)
    if config.metrics_textfile == "none" and not options.print:
        return refuse(options, Exit.NOT_HERE, "metrics are off: metrics.textfile of mps.toml says where they go")
    try:
        state = NodeState(make=not options.print)  # so that what was written before a reboot does not stay
    except FileNotFoundError:
        state = None
    view = look(sparing=True)
    if state is None or view is None:
        return refuse(options, Exit.NOT_HERE, "slurm-mps has not been used since this node started")
    data = text(count(state, config.paths_logs, keep=not options.print), view)
    if options.print:
        sys.stdout.write(data.decode())
        sys.stdout.flush()
    else:
        _write(config.metrics_textfile, data)
    if view.stuck:
        leave(Exit.FINE)
    return Exit.FINE


def _write(path: str, data: bytes) -> None:
    """Whole or not at all, under a name that node_exporter does not look at until it is; readable by all.

    Raises: NodeError, also when others than root could have put something in its way.
    """
    from ..errors import NodeError
    from ..node.files import open_trusted

    directory, _, name = path.rpartition("/")
    try:
        with open_trusted(directory) as place:
            place.write(name, data, mode=0o644)
    except FileNotFoundError:
        raise NodeError(f"{directory} is not there; make it, or change metrics.textfile") from None
