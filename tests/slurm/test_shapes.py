"""Which GPU does a task have? Every shape of a job that changes the answer, with devices confined and not.

Each task says three things that do not come from slurm-mps: which GPUs Slurm gave it (its STEP_GPUS or JOB_GPUS; where
devices are confined those number anew from 0 and the kernel is asked, by opening the devices), and which GPUs the CUDA
driver takes it to. The table below says what all of them should be.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.harness.site import PYTHON

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.site import Site

PROGRAM = "/opt/look.py"
LOOK = '''
"""Says in one line what a task has."""
import errno, json, os, subprocess, sys

GPUS_PER_NODE = 4


def may_open(path):
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as error:
        return error.errno != errno.EPERM  # the device cgroup's answer; without a driver it is ENXIO
    return True


def clients():
    """What a CUDA client finds on each of the task's devices, until there is no further device."""
    for ordinal in range(GPUS_PER_NODE + 1):
        client = subprocess.run(
            ["simulated-gpus", "client", "--device", str(ordinal)], capture_output=True, text=True, timeout=20
        )
        if client.returncode != 0:
            return
        yield dict(word.split("=") for word in client.stdout.split())


found = list(clients())
named = os.environ.get("SLURM_STEP_GPUS") or os.environ["SLURM_JOB_GPUS"]
openable = [n for n in range(GPUS_PER_NODE) if may_open(f"/dev/nvidia{n}")]
confined = len(openable) < GPUS_PER_NODE
task = {
    "rank": int(os.environ["SLURM_PROCID"]),
    "node": os.environ["SLURMD_NODENAME"],
    "given": openable if confined else [int(number) for number in named.split(",")],
    "visible": os.environ["CUDA_VISIBLE_DEVICES"].split(","),
    "reached": [client["uuid"] for client in found],
    "servers": sorted({client["mps"] for client in found}),
}
sys.stdout.write(json.dumps(task) + "\\n")  # one write, so that tasks' lines do not mix
'''


@dataclass(frozen=True)
class Task:
    """A task as the program saw it. GPUs by index are Slurm's or the kernel's word, by UUID the CUDA driver's."""

    rank: int
    node: str
    given: list[int]
    visible: list[str]
    reached: list[str]
    servers: list[str]


def tasks_in(output: str) -> list[Task]:
    """The tasks that a job or step printed, by rank."""
    found = [Task(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda task: task.rank)


@pytest.fixture
def look(any_site: Site) -> str:
    """The command that says what a task has."""
    any_site.machine.write(PROGRAM, LOOK)
    return f"{PYTHON} {PROGRAM}"


@pytest.fixture(params=["uuid", "ordinal"])
def naming(request: pytest.FixtureRequest, any_site: Site) -> str:
    """How the site has GPUs named in CUDA_VISIBLE_DEVICES."""
    name = str(request.param)
    any_site.configure(f'[gpus]\nclient_visible_devices = "{name}"\n')
    return name


@contextmanager
def first_two_gpus_taken(site: Site) -> Iterator[None]:
    """Another user's MPS job holds GPUs 0 and 1 of n1."""
    other = site.cluster.sbatch(
        "-wn1", "--gres=gpu:2", "--mps", script="echo started; exec sleep 100", user="bob", until="started"
    )
    assert site.cluster.gpus_of(other) == {"n1": [0, 1]}
    yield
    site.cluster.scancel(other)
    site.cluster.wait(other)


def check(site: Site, tasks: list[Task], gpus: list[list[int]], naming: str) -> None:
    """Each task was given these GPUs by Slurm, names exactly them and reaches exactly them, through one daemon a node.

    The first is no promise of slurm-mps: it makes sure that the shape is the one that the test is about.
    """
    assert [task.given for task in tasks] == gpus
    uuids = {node: [gpu["uuid"] for gpu in site.gpus(node)] for node in site.nodes}
    own = [[uuids[task.node][index] for index in task.given] for task in tasks]
    assert [task.reached for task in tasks] == own
    if naming == "uuid":
        assert [task.visible for task in tasks] == own
    else:
        assert [len(task.visible) for task in tasks] == [len(indices) for indices in gpus]
        assert all(ordinal.isdigit() for task in tasks for ordinal in task.visible)
    for node in {task.node for task in tasks}:
        servers = {server for task in tasks if task.node == node for server in task.servers}
        assert len(servers) == 1
        assert "none" not in servers


def on_each_site(shapes: list[tuple[str, list[list[int]]]]) -> list[tuple[str, str, str, list[list[int]]]]:
    """Each shape with devices confined and not, and with GPUs named either way: the other way in the next row."""
    sites, namings = ("free", "constrained"), ("uuid", "ordinal")
    return [
        (site, namings[(row + column) % 2], options, gpus)
        for row, (options, gpus) in enumerate(shapes)
        for column, site in enumerate(sites)
    ]


SHAPES = [
    ("-N1 -n2 --gres=gpu:2", [[0, 1], [0, 1]]),
    ("-N1 -n2 --gpus-per-task=1", [[0], [1]]),
    ("-N1 -n2 --gpus-per-task=2", [[0, 1], [2, 3]]),
    ("-N2 -n4 --ntasks-per-node=2 --gpus-per-task=1", [[0], [1], [0], [1]]),
    ("-N1 -n2 --gres=gpu:4 --gpu-bind=map_gpu:2,3", [[2], [3]]),
    ("-N1 -n2 --gres=gpu:4 --gpu-bind=map_gpu:3,0", [[3], [0]]),
    ("-N1 -n2 --gres=gpu:4 --gpu-bind=mask_gpu:0x6,0x9", [[1, 2], [0, 3]]),
    ("-N1 -n4 --gres=gpu:2 --gpu-bind=single:1", [[0], [1], [0], [1]]),
    ("-N1 -n4 --gres=gpu:2 --ntasks-per-gpu=2", [[0], [0], [1], [1]]),
    ("-N1 -n4 --gpus=2 --ntasks-per-gpu=2", [[0], [0], [1], [1]]),
]


@pytest.mark.parametrize(
    ("any_site", "naming", "options", "gpus"), on_each_site(SHAPES), indirect=["any_site", "naming"]
)
def test_a_job_of_any_shape(any_site: Site, look: str, naming: str, options: str, gpus: list[list[int]]) -> None:
    """With ConstrainDevices=yes Slurm's variable is 0 for each of several bound tasks."""
    result = any_site.cluster.srun("--mps", *options.split(), *look.split()).check()
    check(any_site, tasks_in(result.stdout), gpus, naming)


SHAPES_OF_STEPS = [
    ("-n2", [[2, 3], [2, 3]]),
    ("-n1 --gpus=1", [[2]]),
    ("-n2 --gpus-per-task=1", [[2], [3]]),
    ("-n4 --overcommit --gres=gpu:2 --gpu-bind=single:1", [[2], [3], [2], [3]]),
    ("-n4 --overcommit --gpus=2 --ntasks-per-gpu=2", [[2], [2], [3], [3]]),
]


@pytest.mark.parametrize(
    ("any_site", "naming", "options", "gpus"), on_each_site(SHAPES_OF_STEPS), indirect=["any_site", "naming"]
)
def test_a_step_of_a_job_on_a_nodes_last_gpus(
    any_site: Site, look: str, naming: str, options: str, gpus: list[list[int]]
) -> None:
    """Slurm's own index means another GPU, or none, to a client of a daemon on two of four GPUs (O18)."""
    with first_two_gpus_taken(any_site):
        output = any_site.cluster.run_batch("-wn1", "-n2", "--gres=gpu:2", "--mps", script=f"srun {options} {look}")
    check(any_site, tasks_in(output), gpus, naming)


def test_the_batch_step_of_a_job_on_a_nodes_last_gpus(any_site: Site, look: str, naming: str) -> None:
    with first_two_gpus_taken(any_site):
        job = any_site.cluster.sbatch(
            "-wn1", "--gres=gpu:2", "--mps", script=f"echo started; {look}; sleep 100", until="}"
        )
        by_the_controller = any_site.cluster.gpus_of(job)
        any_site.cluster.scancel(job)
        any_site.cluster.wait(job)
    assert by_the_controller == {"n1": [2, 3]}
    check(any_site, tasks_in(any_site.cluster.output(job)), [[2, 3]], naming)


def test_an_exclusive_job_has_all_of_its_node(any_site: Site, look: str, naming: str) -> None:
    """It asks for one GPU and is given all four; a step has the one."""
    script = f"{look}\nsrun -n1 {look}"
    output = any_site.cluster.run_batch("-wn1", "-n1", "--exclusive", "--gres=gpu:1", "--mps", script=script)
    check(any_site, tasks_in(output), [[0, 1, 2, 3], [0]], naming)


def test_one_gpu_steps_side_by_side_in_a_job_on_a_nodes_last_gpus(any_site: Site, look: str, naming: str) -> None:
    """Each step waits for the other, so both hold their GPU at once."""
    own = "here.$SLURM_JOB_ID"
    meet = f"touch {own}.$SLURM_STEP_ID; while [ ! -e {own}.0 ] || [ ! -e {own}.1 ]; do sleep 0.1; done"
    step = f"srun --exact -n1 --gres=gpu:1 sh -c '{meet}; {look}'"
    with first_two_gpus_taken(any_site):
        script = f"{step} &\n{step} &\nwait; rm here.$SLURM_JOB_ID.*"
        output = any_site.cluster.run_batch("-wn1", "-n2", "--gres=gpu:2", "--mps", script=script)
    tasks = sorted(tasks_in(output), key=lambda task: task.given)
    check(any_site, tasks, [[2], [3]], naming)
