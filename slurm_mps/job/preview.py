"""Makes the plan that the prolog would make for a job on this node, and changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ..config.load import load_config
from ..errors import NodeError, RequestError
from ..node.nvml import Gpu, Gpus
from ..record import record
from ..units import printable
from .actions import HoldGpu
from .joined import JoinGpu, JoinGpus
from .plan import Plan, make_plan
from .request import PER_GPU, PER_NODE, SHARE, VARIABLES, read_request
from .state import NodeState

_GRES = re.compile(r"gres/gpu|gpu")
_PARTS = re.compile(r"(?:gres/)?(?:mps|shard)")
_MPS = re.compile(r"(?:^|,)(?:gres/)?mps:([0-9]{1,3})(?:,|$)")
_COMPILE_SECONDS = 10.0
_COUNT_MAX = 4  # digits


@record
class Wish:
    """The options of sbatch as a user would type them; None for those not given.

    ``asked`` has those of request.VARIABLES that were given; ``--mps`` alone is "". ``devices``: which GPUs, as Slurm
    names them, instead of the first ones.
    """

    asked: Mapping[str, str]
    gres: str | None = None
    devices: str | None = None
    partition: str = ""


def gpus_of_gres(gres: str) -> int:
    """How many GPUs a value of --gres asks for: ``gpu``, ``gpu:2``, ``gpu:h200:2``, a part of one such as ``mps:25``,
    among others with commas.

    Raises: RequestError when it is no such list.
    """
    count = 0
    for word in gres.split(","):
        name, *rest = word.split(":")
        number = rest[-1] if rest and rest[-1].isdigit() else "1"
        if not name or len(rest) > 2 or len(number) > _COUNT_MAX:
            raise RequestError(f"--gres={printable(gres)}: expected a list such as gpu:2 or gpu:h200:2")
        count += int(number) if _GRES.fullmatch(name) else bool(_PARTS.fullmatch(name) and number != "0")
    return count


def part_of_gres(gres: str) -> dict[str, str]:
    """What Slurm gives the prolog of a job of gres/mps, where each GPU has a hundred parts."""
    found = _MPS.search(gres)
    return {SHARE: found[1]} if found and found[1].strip("0") else {}


class NoGpuError(RequestError):
    """The job asks for a GPU that this node lacks, or that does not answer: Slurm would not start such a job here."""


def _environment_of(wish: Wish, uid: int) -> dict[str, str]:
    """The environment that slurmd would give the prolog of such a job, with the options that the plugin carries."""
    given = {VARIABLES[option]: value for option, value in wish.asked.items()}
    mps = wish.asked.get("--mps")
    if mps == "1":  # to the prolog it means --mps without a value; the plugin takes it from nobody
        raise RequestError(f"--mps=1: expected {PER_NODE}, {PER_GPU} or off")
    given["SPANK_MPS"] = mps if mps and mps != "(null)" else "1"
    names = wish.devices
    if names is None:
        names = ",".join(map(str, range(gpus_of_gres(wish.gres) if wish.gres else 0)))
    given |= {**({"SLURM_JOB_GPUS": names} if names else {}), **part_of_gres(wish.gres or "")}
    return {"SLURM_JOB_ID": "0", "SLURM_JOB_UID": str(uid), **given}


def rehearse(wish: Wish, uid: int, gpus: Gpus) -> Plan:
    """The plan that the prolog would make, of this node's GPUs and site configuration.

    Raises: RequestError with what the job's user would read, also where another job holds one of the GPUs, as far as
    sees_holders(); NoGpuError; NodeError, ConfigError with what the admin would read.
    """
    try:
        gpus.resolve("0")  # an error of the driver comes first, before one of a single GPU
    except RequestError:
        if wish.gres and wish.devices is None:
            named = "name those that Slurm would give, as nvidia-smi -L lists them: --devices=MIG-..."
            raise NoGpuError(f"--gres={printable(wish.gres)}: this node has MIG slices; {named}") from None
    config = load_config(None, _COMPILE_SECONDS, wish.partition)
    request = read_request(_environment_of(wish, uid))
    plan = make_plan(request, config, tuple(_resolve(name, wish, gpus) for name in request.gpus))
    if sees_holders():
        _refuse_beside_others(plan)
    return plan


def _resolve(name: str, wish: Wish, gpus: Gpus) -> Gpu:
    try:
        return gpus.resolve(name)
    except NodeError:
        option = f"--gres={wish.gres}" if wish.devices is None else f"--devices={wish.devices}"
        raise NoGpuError(f"{printable(option, 80)}: this node has no GPU {printable(name)} that answers") from None


def sees_holders() -> bool:
    """Whether the caller may read which job holds a GPU: only root may."""
    return os.geteuid() == 0


def _refuse_beside_others(plan: Plan) -> None:
    try:
        state = NodeState(make=False)
    except FileNotFoundError:
        return  # no job had MPS here since the boot
    for action in plan.actions:
        for one in action.joins if isinstance(action, JoinGpus) else (action,):
            if isinstance(one, (HoldGpu, JoinGpu)):
                one.refuse_beside(state.ledgers.read(one.gpu).holders)
    state.close()
