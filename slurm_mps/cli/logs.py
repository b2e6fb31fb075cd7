"""``slurm-mps logs``: what a job's control daemons and servers wrote, in plain words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import localtime, strftime
from typing import TYPE_CHECKING, Any

from ..units import printable
from .output import Exit, add_json_option, complain, print_json, refuse
from .status import job_name, job_numbers

if TYPE_CHECKING:
    from ..job.verdict import DaemonPlace
    from ..job_log.events import Event
    from ..job_log.read import DaemonLogs

_EVENTS_MAX = 20_000
_LINE_MAX = 1000


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "logs",
        help="what happened to a job's MPS: who connected, who faulted, who was refused",
        description="Shows what happened to a job's control daemons and servers on this node, from their logs, while "
        "the job runs and after it. Users see their own jobs, root sees all. Exit status: 0 nothing went wrong, "
        "1 something did, or the logs cannot be read, 2 usage, 3 no logs of this job here, 4 another user's job.",
    )
    parser.add_argument("job", type=job_name, nargs="?", metavar="JOBID", help="which job: slurm-mps status lists them")
    parser.add_argument("-t", "--trouble", action="store_true", help="only what went wrong")
    parser.add_argument("--raw", action="store_true", help="the logs as they are, but for characters that do not print")
    add_json_option(parser, "logs/1")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the logs of a job say. Returns the exit status."""
    from ..errors import NodeError

    if options.job is None:
        return refuse(
            options, Exit.USAGE, "which job? slurm-mps logs JOBID; slurm-mps status lists the jobs of this node"
        )
    if options.raw and (options.trouble or options.json):
        return refuse(options, Exit.USAGE, "--raw prints the logs themselves; leave out --trouble and --json")
    try:
        (job_id,) = job_numbers([options.job])
        places, logs = _find(job_id)
        if not logs:
            message = f"there are no logs of job {options.job} on this node; look on a node where it ran"
            return refuse(options, Exit.NOT_HERE, message)
        return _print_raw(logs) if options.raw else _print(options, job_id, places, logs)
    except PermissionError:
        who = "its user and root, or root alone where other users' jobs had its GPU, too"
        return refuse(options, Exit.NOT_ROOT, f"the logs of job {options.job} can be read by {who}")
    except NodeError as error:
        return refuse(options, Exit.PROBLEM, str(error))


def _find(job_id: int) -> tuple[dict[str, DaemonPlace], list[DaemonLogs]]:
    """The job's daemons, by name, where it still runs; and where the logs of each lie."""
    from ..job.verdict_file import read_verdict
    from ..job_log.read import DaemonLogs, find_logs

    verdict = read_verdict(job_id)
    if verdict and verdict.daemons:
        places = {place.name: place for place in verdict.daemons}
        return places, [DaemonLogs(place.name, place.log_directory) for place in verdict.daemons]
    return {}, find_logs(_log_root(), job_id)


def _log_root() -> str:
    """Where the site keeps logs; the default where its configuration cannot be read."""
    from ..config.file import parse_config
    from ..config.settings import CONFIG_PATH, DEFAULTS, ConfigError

    try:
        with open(CONFIG_PATH, "rb") as file:
            return parse_config(file.read(), CONFIG_PATH).paths_logs
    except (OSError, ConfigError):
        return DEFAULTS.paths_logs


def _print_raw(logs: list[DaemonLogs]) -> int:
    from ..job_log.read import CONTROL_LOG, SERVER_LOG, read_log

    for one in logs:
        for name in (CONTROL_LOG, SERVER_LOG):
            print(f"==> {one.directory}/{name} <==")
            for line in read_log(one.directory, name).decode("utf-8", "replace").splitlines():
                print(printable(line, _LINE_MAX))
    sys.stdout.flush()
    return Exit.FINE


def _print(options: argparse.Namespace, job_id: int, places: dict[str, DaemonPlace], logs: list[DaemonLogs]) -> int:
    from ..job_log.read import events_of
    from ..job_log.words import TROUBLE, describe

    found = [(one, event) for one in logs for event in events_of(one)]
    found.sort(key=lambda pair: pair[1].seconds)
    if not found:  # a control daemon's first line is that it has started
        return refuse(options, Exit.PROBLEM, f"the logs in {logs[0].directory} say nothing; is the file system full?")
    status = Exit.PROBLEM if any(event.kind in TROUBLE for _, event in found) else Exit.FINE
    if options.trouble:
        found = [pair for pair in found if pair[1].kind in TROUBLE]
    if len(found) > _EVENTS_MAX:
        complain(f"the last {_EVENTS_MAX} of {len(found)} events are shown; --raw shows all")
        found = found[-_EVENTS_MAX:]
    name = _namer(running=bool(places))
    gpus = {one.name: places[one.name].gpus if one.name in places else () for one in logs}
    described = [(one.name, event, describe(event, gpus[one.name], name)) for one, event in found]
    if options.json:
        print_json(options, status, job_id=job_id, events=[_report(*row) for row in described])
        return status
    for where, event, words in described:
        when = f"{strftime('%Y-%m-%d %H:%M:%S', localtime(event.seconds))}.{int(event.seconds * 1000) % 1000:03}"
        print(f"{when}  {where + ': ' if where else ''}{printable(words, _LINE_MAX)}")
    if not described:
        complain("nothing went wrong")
    sys.stdout.flush()
    return status


def _namer(*, running: bool) -> Callable[[int], str]:
    """What a client is called: while its job runs also by its rank, as far as its environment tells."""
    from ..node.reading import environments_of

    known: dict[int, str] = {}

    def name(pid: int) -> str:
        if pid not in known:
            environment = environments_of([pid]).get(pid, {}) if running else {}
            rank, step = environment.get("SLURM_PROCID", ""), environment.get("SLURM_STEP_ID", "")
            who = f" (rank {rank} of step {step})" if rank.isdecimal() and step.isdecimal() else ""
            known[pid] = f"client {pid}{who}"
        return known[pid]

    return name


def _report(where: str, event: Event, words: str) -> dict[str, Any]:
    return {
        "seconds": event.seconds,
        "daemon": where or None,
        "kind": event.kind,
        "pid": event.pid or None,
        "uid": event.uid if event.uid >= 0 else None,
        "gpu": event.gpu or None,
        "number": event.number,
        "culprits": list(event.culprits),
        "pids": list(event.pids),
        "words": printable(words, _LINE_MAX),
    }
