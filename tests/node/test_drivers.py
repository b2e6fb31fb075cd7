"""Prolog, epilog and status with each driver that is in use, simulated and with NVIDIA's own control programs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.harness import nvidia
from tests.harness.gpunode import GpuNode, asked
from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import PYTHON

if TYPE_CHECKING:
    from collections.abc import Iterator

PID_FILE = "nvidia-cuda-mps-control.pid"
PROGRAM = "/run/driver/nvidia-cuda-mps-control"
AARCH64 = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00" + bytes(44)


@pytest.fixture(params=["simulated-535", "simulated-550", "nvidia-535", "nvidia-550"], scope="module")
def old_node(request: pytest.FixtureRequest) -> Iterator[tuple[GpuNode, int]]:
    """A node of an older driver, and its branch. NVIDIA's programs start no server, for want of a GPU."""
    kind, _, branch = request.param.partition("-")
    programs = nvidia.programs_of(int(branch)) if kind == "nvidia" else None
    with GpuNode(gpus=2, driver=int(branch), programs=programs) as node:
        yield node, int(branch)


@pytest.mark.parametrize(("mem", "read_back"), [("8G", "8G"), ("1500M", "1G")])
@pytest.mark.parametrize("daemons", [{}, {"SPANK_MPS": "per-gpu"}], ids=["one", "per-gpu"])
def test_a_job_has_its_limits_and_leaves_nothing(
    old_node: tuple[GpuNode, int], daemons: dict[str, str], mem: str, read_back: str
) -> None:
    """Also a limit that the daemon prints rounded down (O95), and with driver 535, whose daemon writes no pid file."""
    node, branch = old_node
    before = node.snapshot()
    node.prolog(4711, **{**asked("25", mem), **daemons}).check()
    verdict = node.verdict(4711)
    assert verdict["status"] == "ready", verdict
    pipe = f"{node.pipe_directory(4711)}{'/../gpu-1' if daemons else ''}"
    environment = {"CUDA_MPS_PIPE_DIRECTORY": os.path.normpath(pipe)}
    lines = "get_default_active_thread_percentage\nget_default_device_pinned_mem_limit 0\n"
    said = node.run("nvidia-cuda-mps-control", env=environment, text=lines).check()
    assert said.stdout == f"25.0\n{read_back}\n"
    assert node.machine.path(f"{os.path.normpath(pipe)}/{PID_FILE}").exists() == (branch >= 550)
    node.epilog(4711).check()
    assert node.snapshot() == before


ASK = """
import sys
from slurm_mps.node.control import ControlDaemon
daemon = ControlDaemon("/usr/bin/nvidia-cuda-mps-control", sys.argv[1], "/tmp")
print([daemon.command(["get_default_active_thread_percentage"], 10) for _ in range(20)])
"""


def test_who_asks_beside_others_gets_its_answer(old_node: tuple[GpuNode, int]) -> None:
    """A daemon talks to one at a time, and these at times send the other away with success and without a word (O90)."""
    node, _ = old_node
    node.prolog(4711, **asked("25")).check()
    environment = {"CUDA_MPS_PIPE_DIRECTORY": node.pipe_directory(4711)}
    others = "for i in $(seq 20); do (echo get_server_list; sleep 0.1) | nvidia-cuda-mps-control; done"
    crowd = node.start("sh", "-c", others, env=environment)
    said = node.run(PYTHON, "-c", ASK, node.pipe_directory(4711)).check()
    assert said.stdout == f"{[['25.0']] * 20}\n"
    crowd.wait(30)
    node.epilog(4711).check()


@pytest.mark.parametrize("branch", [535, 550])
def test_status_shows_a_server_and_its_client(branch: int) -> None:
    """A driver that does not report a server's state is no problem."""
    with GpuNode(gpus=2, driver=branch) as node:
        node.prolog(4711, **asked("25")).check()
        holding = {"CUDA_MPS_PIPE_DIRECTORY": node.pipe_directory(4711)}
        node.start("simulated-gpus", "client", "--device", "0", "--hold", "60", user="alice", env=holding)
        server = ""
        while not server or server not in node.control(4711, "ps").stdout:
            server = node.control(4711, "get_server_list").stdout.strip()
        said = node.run(f"{MOUNT_POINT}/bin/slurm-mps", "status", "-n", "-o", "server,state,threads").check()
        state = "ACTIVE" if branch >= 550 else "RUNNING"
        assert said.stderr == ""
        assert said.stdout.split()[:3] == [server, state, "25%"]


@pytest.mark.parametrize("then", [550, 535])
def test_an_upgrade_of_the_driver_under_a_running_job(then: int) -> None:
    """The old driver's daemon is ended by the epilog, through the new program, and the next job has the new one's."""
    first = 535 if then == 550 else 550
    with GpuNode(gpus=2) as node:
        node.configure(f'[paths]\ncontrol_program = "{PROGRAM}"\n')
        before = node.snapshot()
        for job, branch in ((4711, first), (4712, then)):
            for name in nvidia.PROGRAMS:  # as a package does it: the file of a running program is replaced, not written
                node.machine.path(f"/run/driver/{name}").unlink(missing_ok=True)
                program = (nvidia.programs_of(branch) / name).read_bytes()
                node.machine.write(f"/run/driver/{name}", "", mode=0o755)
                node.machine.path(f"/run/driver/{name}").write_bytes(program)
            if branch == then:
                node.epilog(4711).check()
                assert node.snapshot() == before
            node.prolog(job, **asked("25", "8G")).check()
            assert node.verdict(job)["status"] == "ready"
            assert node.machine.path(f"{node.pipe_directory(job)}/{PID_FILE}").exists() == (branch >= 550)
        node.epilog(4712).check()
        assert node.snapshot() == before


TOO_OLD = "NVIDIA driver 470.57.02 (CUDA 11.4) is too old: slurm-mps needs CUDA 11.5 (driver 495) or newer"
MISSING = (
    "control program /nonexistent: No such file or directory; install the driver's compute utilities, "
    "of CUDA 11.5 (driver 495) or newer"
)
FOREIGN = f"control program {PROGRAM} is built for aarch64, and this node is x86_64; install the driver for x86_64"


@pytest.mark.parametrize("policy", ["drain", "fail_job"])
def test_what_cannot_be_a_drivers_is_named_with_what_was_found_and_what_is_needed(policy: str) -> None:
    """A fault of the node, for no job's user can do anything about it; it leaves nothing."""
    with GpuNode(gpus=2) as node:
        node.machine.write(PROGRAM, "", mode=0o755)
        node.machine.path(PROGRAM).write_bytes(AARCH64)
        for path, message in (("", TOO_OLD), ("/nonexistent", MISSING), (PROGRAM, FOREIGN)):
            program = f'[paths]\ncontrol_program = "{path}"\n' if path else ""
            node.configure(f'{program}[policy]\nnode_fault = "{policy}"\n')
            node.have_driver(580, *([] if path else ["--cuda-version", "11.4"]))
            node.fault(*([] if path else ["driver.version=470.57.02"]))
            before = node.snapshot()
            result = node.prolog(4711)
            assert result.stderr.count(message) == 1, result.stderr
            assert message in node.verdict(4711).get("message", message)
            assert result.returncode == (policy == "drain")
            node.epilog(4711).check()
            assert node.snapshot() == before
        node.configure("")
        node.have_driver(580)
        node.fault('command.set_default_device_pinned_mem_limit=wrong:Unknown command "set"')
        result = node.prolog(4711, **asked(mem="8G"))
        assert "/usr/bin/nvidia-cuda-mps-control has to be that of CUDA 11.5 (driver 495) or newer" in result.stderr
