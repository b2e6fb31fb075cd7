"""``slurm-mps plan``: the steps that the prolog would take for a job on this node, and what undoes each."""

from __future__ import annotations

import argparse
import errno
import os
import pwd
import sys
from typing import TYPE_CHECKING

from ..units import printable
from .output import Exit, add_json_option, complain, print_json, refuse

if TYPE_CHECKING:
    from ..job.plan import Plan

_DEADLINE_SECONDS = 20.0
_NOTHING = "add --mps: for a job without an --mps option the prolog does nothing"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="on a compute node: what the prolog would do for a job, changing nothing",
        description="Prints the steps that the prolog would take on this node for a job with these options of sbatch, "
        "in order, each with the line that undoes it. The command changes nothing and asks no daemon. Only root sees "
        "that another job holds a GPU. Exit status: 0 the job would have MPS, 1 it would not, 2 usage, 3 this is no "
        "GPU node, 4 only others may read the site's configuration.",
    )
    parser.add_argument("--gres", help="such as gpu:2; the node's first GPUs stand for those that Slurm gives")
    parser.add_argument("--devices", metavar="LIST", help="these GPUs instead, by index or UUID, with commas")
    parser.add_argument("--partition", default="", metavar="NAME", help="the partition of Slurm that the job runs in")
    parser.add_argument("--mps", nargs="?", const="", metavar="per-node|per-gpu|off", help="as for sbatch")
    parser.add_argument("--mps-threads", metavar="PCT|auto", help="as for sbatch")
    parser.add_argument("--mps-mem", metavar="SIZE|auto", help="as for sbatch")
    parser.add_argument("--mps-priority", metavar="normal|low", help="as for sbatch")
    parser.add_argument("--user", help="whose job (default: yours)")
    add_json_option(parser, "plan/1")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the plan and print it. Returns the exit status."""
    uid = _uid(options.user)
    if uid is None:
        return refuse(options, Exit.USAGE, f"--user={options.user}: there is no such user")
    from ..job.preview import part_of_gres

    asks = bool(_asked(options) or part_of_gres(options.gres or ""))
    options.mps = options.mps if asks else _unasked(options)
    if not (asks or options.mps):
        return refuse(options, Exit.USAGE, _NOTHING)
    if options.mps == "off":
        return refuse(options, Exit.USAGE, "--mps=off: the job runs without MPS, and the prolog does nothing")
    from ..job.watch import Watch

    def give_up(message: str) -> int:
        return refuse(options, Exit.PROBLEM, message)

    Watch(_DEADLINE_SECONDS, give_up)
    status = _answer(options, uid, asks=asks)
    sys.stdout.flush()
    os._exit(status)  # the watch's thread may wake while an interpreter is torn down, and crash it


def _unasked(options: argparse.Namespace) -> str | None:
    """What a job with whole GPUs gets that does not ask, by its partition; None for nothing."""
    from ..config.load import mps_of_partition
    from ..errors import MpsError
    from ..job.preview import gpus_of_gres

    try:
        gpus = options.devices or gpus_of_gres(options.gres or "gpu:0")
        return (gpus and "MIG-" not in str(gpus) and mps_of_partition(options.partition)) or None
    except (MpsError, OSError):
        return None


def _asked(options: argparse.Namespace) -> dict[str, str]:
    """Those of sbatch's MPS options that were given, and their values."""
    from ..job.request import VARIABLES

    values = {option: getattr(options, option[2:].replace("-", "_")) for option in VARIABLES}
    return {option: value for option, value in values.items() if value is not None}


def _answer(options: argparse.Namespace, uid: int, *, asks: bool) -> int:
    from ..config.settings import CONFIG_PATH
    from ..errors import NodeError, RequestError
    from ..job.ledger import SEPARATE
    from ..job.preview import NoGpuError, Wish, rehearse, sees_holders
    from ..node.nvml import Gpus

    wish = Wish(_asked(options), options.gres, options.devices, options.partition)
    wrong = _wrong_device(options.devices or "")
    if wrong:
        return refuse(options, Exit.USAGE, f"--devices={printable(options.devices)}: {wrong}")
    if _is_closed(CONFIG_PATH):
        return refuse(options, Exit.NOT_ROOT, f"{CONFIG_PATH}: {os.strerror(errno.EACCES)}")
    try:
        plan = rehearse(wish, uid, Gpus())
    except NoGpuError as error:
        return _refuse(str(error), "this node cannot run such a job", options)
    except RequestError as error:
        if error.reason == "mig" and not asks:
            return refuse(options, Exit.USAGE, _NOTHING)
        return _refuse(str(error), "the job's tasks would fail with this", options)
    except NodeError as error:
        if not os.path.exists("/dev/nvidiactl"):
            return refuse(options, Exit.NOT_HERE, f"this is no GPU node: {error}")
        return _refuse(str(error), "a fault of this node", options)
    if not sees_holders():
        complain("only root sees whether another job holds these GPUs now")
    threads = min(daemon.limits.thread_percentage for daemon in plan.daemons)
    if plan.config.gpus_sharing == SEPARATE and threads < 100:
        complain(
            f"jobs with MPS take turns on a GPU here, and in its turns this one has {threads:g} % of the threads; "
            "ask for more where its kernels fill more"
        )
    _print(plan, options, _partition_settings(options.partition))
    return Exit.FINE


def _partition_settings(partition: str) -> dict[str, object]:
    """What mps.toml's table of a partition sets for its jobs."""
    from ..config.file import effective
    from ..config.settings import CONFIG_PATH

    if not partition or not os.path.exists(CONFIG_PATH):
        return {}
    with open(CONFIG_PATH, "rb") as file:
        return {one.name: one.value for one in effective(file.read(), CONFIG_PATH, partition) if one.table}


def _is_closed(path: str) -> bool:
    """Whether we may not read a file, which is no fault of the node: the prolog is root."""
    try:
        with open(path, "rb"):
            return False
    except OSError as error:
        return isinstance(error, PermissionError)


def _uid(name: str | None) -> int | None:
    if name is None:
        return os.getuid()
    try:
        return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _wrong_device(names: str) -> str:
    """What is wrong with a value of --devices as a list; nothing for one of GPUs, or of what is refused to a job."""
    listed = [name for name in names.split(",") if name]
    if not all(name.startswith(("GPU-", "MIG-")) or (name.isascii() and name.isdecimal()) for name in listed):
        return "expected indices or UUIDs of GPUs, with commas"
    return "it names a GPU twice" if len(set(listed)) < len(listed) else ""


def _refuse(message: str, meaning: str, options: argparse.Namespace) -> int:
    """Tell the message that the job's user, or the admin, would read."""
    if options.json:
        print_json(options, Exit.PROBLEM, problem=message, meaning=meaning, actions=[])
    else:
        complain(f"{message} ({meaning})")
    return Exit.PROBLEM


def _print(plan: Plan, options: argparse.Namespace, of_partition: dict[str, object]) -> None:
    from ..job.preview import sees_holders

    actions = []
    for action in plan.actions:
        undo = action.undo()
        actions.append(
            {
                "action": action.describe(),
                "undo": undo and undo.line(),
                "undo_means": undo and undo.describe(),
            }
        )
    if options.json:
        gpus = [{"index": gpu.index, "uuid": gpu.uuid, "mig_profile": gpu.profile or None} for gpu in plan.gpus]
        print_json(
            options,
            Exit.FINE,
            partition_settings=of_partition,
            gpus=gpus,
            clients_per_gpu=plan.clients_per_gpu,
            holders_seen=sees_holders(),
            actions=actions,
        )
        return
    for gpu in plan.gpus:
        if gpu.profile:
            print(f"{gpu.called} is a slice of GPU {gpu.index}")
    for number, one in enumerate(actions, start=1):
        print(f"{number:2}. {one['action']}")
        if one["undo"]:
            print(f"    undo, noted first: {one['undo']}")
            print(f"                       {one['undo_means']}")
    print(f"{len(actions) + 1:2}. tell the job's tasks: ready, {plan.clients_per_gpu} clients on each GPU")
    if options.partition:
        settings = ", ".join(f"{name} {value}" for name, value in of_partition.items())
        print(f"from [partition.{printable(options.partition)}] of mps.toml: {settings or 'nothing'}")
