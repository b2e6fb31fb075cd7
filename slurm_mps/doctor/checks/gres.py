"""Checks of the GPUs as Slurm has them: GresTypes, gres.conf, the node's count."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator

from ...config.settings import CONFIG_PATH, PARTITIONS_PATH
from ...slurm.conf import ConfLine
from ...slurm.host import count_gpus
from ...slurm.hostlist import hosts_of
from ..facts import Facts
from ..finding import COMPUTE, GPU_NODE, Finding, check, fine, problem, warning

_FINDS_NVIDIA = ("nvml", "nvidia")  # the latter from Slurm 24.05 on
_NO_GPU = 'srun --gres=gpu:1 finds no such node ("Requested node configuration is not available").'


def _gres_lines(facts: Facts) -> list[tuple[ConfLine, dict[str, str]]]:
    """The lines of gres.conf that are this node's."""
    lines = [(line, line.pairs()) for line in facts.other_conf("gres.conf").lines]
    return [one for one in lines if facts.node_name in hosts_of(one[1].get("nodename", facts.node_name))]


def _gpu_lines(facts: Facts) -> list[tuple[ConfLine, dict[str, str]]]:
    return [(line, pairs) for line, pairs in _gres_lines(facts) if pairs.get("name", "").lower() == "gpu"]


def _autodetect(facts: Facts) -> str:
    """How Slurm finds this node's GPUs; off where gres.conf does not say."""
    return ["off", *(pairs["autodetect"].lower() for _, pairs in _gres_lines(facts) if "autodetect" in pairs)][-1]


def _gpu_files(facts: Facts) -> list[tuple[ConfLine, str]]:
    """The device files of this node's GPUs, in the order in which Slurm counts them."""
    given = [(line, pairs["file"]) for line, pairs in _gpu_lines(facts) if "file" in pairs]
    return [(line, path) for line, files in given for path in hosts_of(files) or [files]]


#: What was wrong with gres/mps and gres/shard until a release, by Slurm's own tickets.
_SHARED_FAULTS = (
    ((22, 5), "shards taken from several GPUs are lost", 15316),
    ((22, 5), "variables are wrong", 15247),
    ((23, 11), "a GPU is given whole and in parts at once", 18590),
    ((25, 5), "backfill does not see shards", 22235),
    ((25, 5), "counts are wrong after a request that is refused", 22617),
)


#: What was wrong with MIG until a release, by Slurm's own changelog.
_MIG_FAULTS = (
    ("22.05.6", "the wrong devices of slices where a GPU's minor number is not its index"),
    ("23.02.7", "the wrong slices confined to a job, and faults with several in one"),
    ("23.11.4", "one slice in CUDA_VISIBLE_DEVICES of all tasks with --gpus-per-task"),
)

#: By UUID to the prolog, as it names slices with AutoDetect (S17).
_NAMES_GPUS_BY_UUID = (25, 11)


@check(
    "gres-types",
    "Slurm hands out GPUs, and parts of them only where MPS jobs may share one",
    why="Without gres/gpu no job has a GPU of its own. A job of gres/mps has MPS without another option, and is "
    "refused where gpus.sharing is refuse.",
)
def gres_types(facts: Facts) -> Iterator[Finding]:
    types = facts.words("GresTypes")
    if "gpu" not in types:
        has = facts.value("GresTypes") or "nothing"
        yield problem(f"GresTypes has {has}, and not gpu", f"{facts.where('GresTypes')}: GresTypes=gpu")
    if "mps" in types and facts.site.gpus_sharing == "refuse":
        what = f"{facts.where('GresTypes')}: GresTypes has mps, and gpus.sharing refuses its jobs"
        yield problem(what, 'GresTypes=gpu, or gpus.sharing = "separate" in mps.toml')
    unasked = [os.path.basename(path) for path in glob.glob(f"{PARTITIONS_PATH}/*")]
    if "shard" in types and unasked and facts.site.gpus_sharing == "refuse":
        what = f"partition {unasked[0]} gives MPS to jobs that do not ask; of gres/shard only one on a GPU then runs"
        fix = f'gpus.sharing = "separate" in {CONFIG_PATH}, or rm {PARTITIONS_PATH}/{unasked[0]}'
        yield warning(what, fix)
    if "mps" in types and facts.site.gpus_sharing == "separate":
        yield fine(
            "jobs of gres/mps take turns on a GPU, with their part of the threads: large parts and few jobs waste least"
        )


@check(
    "gres-shared",
    "Slurm's release has no known faults in sharing GPUs",
    why="Until a release that fixes them, gres/mps and gres/shard have faults that slurm-mps cannot see: a GPU given "
    "twice, parts that are lost.",
)
def gres_shared(facts: Facts) -> Iterator[Finding]:
    shared = [name for name in ("mps", "shard") if name in facts.words("GresTypes")]
    number = tuple(int(word) for word in facts.release.split(".")[:2])
    faults = [f"{what} (ticket {ticket})" for until, what, ticket in _SHARED_FAULTS if number <= until]
    if shared and faults:
        what = f"GresTypes has {' and '.join(shared)}, and Slurm {facts.release} has known faults there"
        yield warning(f"{what}: {'; '.join(faults)}", "upgrade Slurm, or watch for them")


@check(
    "gres-conf",
    "gres.conf names this node's GPUs by device files that are there, or finds them with NVML",
    why="From gres.conf Slurm has the GPU indices that it gives the prolog, and the devices that a task may open. "
    "slurmd does not start, or offers fewer GPUs, where a device file is missing.",
    where=GPU_NODE,
)
def gres_conf(facts: Facts) -> Iterator[Finding]:
    path = f"{facts.conf_directory}/gres.conf"
    line = f"{path}: NodeName={facts.node_name} Name=gpu File=/dev/nvidia[0-{facts.gpus_in_slurm - 1}]"
    if not os.path.exists(path):
        yield problem(f"{path}: No such file or directory", line)
        return
    gpus = _gpu_lines(facts)
    if _autodetect(facts) not in _FINDS_NVIDIA:
        if not gpus:
            yield problem(f"{path} has no GPU of node {facts.node_name}", line)
        for at, pairs in gpus:
            if "file" not in pairs:
                yield problem(f"{at.place}: no File=", line)
    for at, device in _gpu_files(facts):
        try:
            wrong = "" if stat.S_ISCHR(os.stat(device).st_mode) else "not a device"
        except OSError as error:
            wrong = str(error.strerror)
        if wrong:
            yield problem(f"{at.place}: {device}: {wrong}", "nvidia-smi makes the device files; or correct the line")


@check(
    "mig",
    "Slurm finds MIG slices by UUID, and its release has no known faults there",
    why="slurm-mps refuses a job on a slice, and on a whole GPU beside one, that Slurm names by number. A fault of "
    "Slurm's can give a task another job's slice, or none.",
    where=GPU_NODE,
)
def mig(facts: Facts) -> Iterator[Finding]:
    on = ", ".join(str(gpu.index) for gpu in facts.gpus if gpu.mig)
    changing = ", ".join(str(gpu.index) for gpu in facts.gpus if gpu.mig_pending not in (None, gpu.mig))
    if changing:
        fix = "drain the node, nvidia-smi --gpu-reset, restart slurmd"
        yield warning(f"GPU {changing}: MIG mode was changed and waits for a reset of the GPU", fix)
    if not on:
        return
    kind = _autodetect(facts)
    if kind != "nvml":
        where = f"{facts.conf_directory}/gres.conf"
        yield warning(f"GPU {on}: MIG mode is on, and {where} has AutoDetect={kind}", f"{where}: AutoDetect=nvml")
    number = tuple(int(word) for word in facts.release.split(".")[:3])
    whole = ", ".join(str(gpu.index) for gpu in facts.gpus if not gpu.mig)
    if kind == "nvml" and whole and number < _NAMES_GPUS_BY_UUID:
        what = f"Slurm {facts.release} names GPU {whole} by number, and slurm-mps refuses that beside slices (GPU {on})"
        yield warning(what, "Slurm 25.11, or slices on all GPUs of a node or on none")
    faults = [f"{what} (until {fixed})" for fixed, what in _MIG_FAULTS if number < tuple(map(int, fixed.split(".")))]
    if faults:
        yield warning(f"GPU {on}: MIG mode is on, and Slurm {facts.release} has {'; '.join(faults)}", "upgrade Slurm")


@check(
    "gres-order",
    "Slurm counts the GPUs as the driver does, and knows them by their own UUIDs",
    why="The prolog takes Slurm's index for NVML's. In another order it starts MPS on another job's GPU. With another "
    "card's UUID Slurm hands out one GPU by its file and another by its UUID.",
    where=GPU_NODE,
)
def gres_order(facts: Facts) -> Iterator[Finding]:
    gpus = facts.gpus
    by_file = {f"/dev/nvidia{gpu.minor}": gpu.uuid for gpu in gpus}
    for line, pairs in _gres_lines(facts):
        given, path = pairs.get("uniqueid", ""), pairs.get("file", "")
        if given.startswith("GPU-") and by_file.get(path, given) != given:
            yield problem(f"{line.place}: {path} is {by_file[path]}, not {given}", f"UniqueId={by_file[path]}")
    if _autodetect(facts) in _FINDS_NVIDIA:
        return
    for (index, (line, path)), gpu in zip(enumerate(_gpu_files(facts)), gpus, strict=False):
        digits = re.search(r"(\d+)$", path)
        if digits and gpu.minor not in (None, int(digits[1])):
            right = f"/dev/nvidia{gpu.minor} ({gpu.uuid})"
            fix = "list the files in the order of nvidia-smi -L, with their minor numbers"
            yield problem(f"{line.place}: Slurm's GPU {index} is {path}, the driver's is {right}", fix)


@check(
    "gpu-count",
    "slurm.conf gives this node the GPUs that it has",
    why="Slurm hands out GPUs that are not there, or leaves some idle.",
    where=COMPUTE,
)
def gpu_count(facts: Facts) -> Iterator[Finding]:
    given, node, devices = facts.gpus_in_slurm, facts.node_name, sorted(glob.glob("/dev/nvidia[0-9]*"))
    if given:
        have = len(facts.gpus)
        what = f"slurm.conf: Gres=gpu:{given} for node {node}, which has {have}"
        if given != have:
            yield (problem if given > have else warning)(what, f"Gres=gpu:{have}")
        yield fine(f"{have} GPUs")
    elif devices:
        what = f"slurm.conf gives node {node} no GPU, and it has {', '.join(devices)}"
        yield warning(what, f"slurm.conf: NodeName={node} ... Gres=gpu:{len(devices)}", _NO_GPU)
    elif "gpu" in facts.words("GresTypes"):
        nodes = [pairs for _, pairs in facts.conf.records("NodeName")]
        if not any(count_gpus(pairs.get("gres", "")) for pairs in nodes):
            fix = "slurm.conf: NodeName=... Gres=gpu:N, on the line of each node with GPUs"
            yield warning("slurm.conf has GresTypes=gpu, and gives no node a GPU", fix, _NO_GPU)
