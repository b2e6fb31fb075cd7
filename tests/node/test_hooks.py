"""Prolog and epilog of a job: what it gets, what runs for it, and that nothing of it is left.

The real scripts on real processes; only the NVIDIA driver is simulated. What goes wrong is in test_hooks_*.py.
"""

from __future__ import annotations

import re

import pytest

from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.site import PYTHON, STATE_DIRECTORY

ALICE = 20001


def daemon_pid(node: GpuNode, job_id: int = 4711) -> int:
    return int(node.machine.read(f"{node.pipe_directory(job_id)}/nvidia-cuda-mps-control.pid"))


def server_pid(node: GpuNode, job_id: int = 4711) -> int:
    """The job's server, once it is up: the status command waits for it (O26)."""
    pid = int(node.control(job_id, "get_server_list").stdout)
    assert node.control(job_id, f"get_server_status {pid}").stdout == "ACTIVE\n"
    return pid


def environ(node: GpuNode, pid: int) -> dict[str, str]:
    words = node.run("cat", f"/proc/{pid}/environ").check().stdout.split("\0")
    return dict(word.split("=", 1) for word in words if word)


def descriptors(node: GpuNode, pid: int) -> dict[int, str]:
    shown = node.run("find", f"/proc/{pid}/fd", "-type", "l", "-printf", "%f %l\n").check().stdout
    return {int(number): target for number, target in (line.split(" ", 1) for line in shown.splitlines())}


def imported(node: GpuNode, *arguments: str) -> set[str]:
    """The modules that Python imports to run this, standing in for the script's own call of the hook."""
    environment = job_environment(4711, **asked("25", "8G"))
    result = node.run(PYTHON, "-I", "-S", "-X", "importtime", *arguments, env=environment).check()
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}


# --------------------------------------------------------------------------------------------- what a job gets


@pytest.mark.every_release
def test_the_verdict_says_what_the_tasks_need(gpu_node: GpuNode) -> None:
    """A ready verdict names directories, limits and the job's GPUs by index, device minor and UUID."""
    gpu_node.prolog(4711, gpus="1,3", **asked("12.5", "8192M")).check()
    lines = gpu_node.machine.read(f"{STATE_DIRECTORY}/jobs/4711/verdict").splitlines()
    gpus = gpu_node.uuids
    assert lines[0] == "slurm-mps verdict 1"
    assert lines[1:-1] == [
        "uid 20001",
        "status ready",
        "daemon /run/slurm-mps/jobs/4711/pipe /var/log/slurm-mps/4711 8G",
        "thread_percentage 12.5",
        "thread_percentage_min 0.1",
        "memory_min 1M",
        "context_mib 514",
        f"probe {PYTHON} {gpu_node.package}/task/probe.py",
        f"explain {gpu_node.package}/task/explain.py",
        "clients_per_gpu 48",
        "visible_devices uuid",
        f"gpu 1 1 {gpus[1]} 142641 143771",
        f"gpu 3 3 {gpus[3]} 142641 143771",
    ]


def test_limits_are_what_the_daemon_has_and_what_a_client_gets(gpu_node: GpuNode) -> None:
    """A job's limits are read back from the daemon, and bind on every GPU the job's clients open."""
    gpu_node.prolog(4711, **asked("25", "8G")).check()
    assert gpu_node.control(4711, "get_default_active_thread_percentage").stdout == "25.0\n"
    for device in ("0", "1"):
        assert gpu_node.control(4711, f"get_default_device_pinned_mem_limit {device}").stdout == "8G\n"
        assert " sms=32 free=8047 " in gpu_node.client(4711, "--device", device).check().stdout


def test_a_job_that_names_no_limit_has_the_whole_gpu(gpu_node: GpuNode) -> None:
    """Plain --mps sets no limit: all threads, and all memory less the contexts of server and client."""
    gpu_node.prolog(4711).check()
    assert gpu_node.verdict(4711)["daemon"].endswith(" -")
    client = gpu_node.client(4711).check().stdout
    assert " sms=132 " in client
    assert int(re.findall(r"free=(\d+)", client)[0]) > 142_000


def test_the_server_is_up_for_the_jobs_user_before_any_client(gpu_node: GpuNode) -> None:
    """The daemon runs as root, its server as the job's user and ahead of the first client, who then uses it."""
    gpu_node.prolog(4711, user="bob").check()
    server = server_pid(gpu_node)
    users = {process.pid: process.uid for process in gpu_node.mps_processes()}
    assert users == {daemon_pid(gpu_node): 0, server: 20002}
    assert gpu_node.client(4711, user="bob").check().stdout.endswith(f" mps={server}\n")


@pytest.mark.every_release
def test_the_epilog_leaves_nothing(gpu_node: GpuNode) -> None:
    """After the epilog there is no process, no file of the job or its GPUs and no changed compute mode."""
    gpu_node.prolog(4711, **asked("25", "8G")).check()
    gpu_node.client(4711).check()
    gpu_node.epilog(4711).check()
    assert gpu_node.mps_processes() == []
    assert gpu_node.files() == []
    assert gpu_node.compute_modes() == [0, 0, 0, 0]
    assert gpu_node.run("ls", "-A", STATE_DIRECTORY).stdout.split() == ["config", "gpus", "jobs", "lock"]


# ----------------------------------------------------------------------------- what it is given and what it loads


def test_nothing_of_the_hooks_environment_reaches_the_daemon(own_node: GpuNode) -> None:
    """The daemon's environment is made from nothing, whatever is in the prolog's, which cannot change its work."""
    trap = "import os\nopen('/tmp/trapped', 'w').close()\n"
    for name in ("os", "slurm_mps", "sitecustomize", "usercustomize", "ctypes", "select"):
        own_node.machine.write(f"/tmp/traps/{name}.py", trap)
    own_node.machine.write("/tmp/traps/rc", "touch /tmp/trapped\n")
    hostile = {
        **dict.fromkeys(("PYTHONPATH", "PYTHONUSERBASE", "SPANK_LD_LIBRARY_PATH", "SPANK_PATH"), "/tmp/traps"),
        **dict.fromkeys(("PYTHONSTARTUP", "SPANK_LD_PRELOAD", "SPANK_PYTHONSTARTUP"), "/tmp/traps/os.py"),
        "PYTHONHOME": "/nonexistent",
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "ENV": "/tmp/traps/rc",
        "BASH_ENV": "/tmp/traps/rc",
        "IFS": "/",
        "CDPATH": "/tmp/traps",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=1M",
        "CUDA_MPS_PIPE_DIRECTORY": "/tmp/traps",
        **{f"SPANK_VARIABLE_{number}": "x" * 100 for number in range(1000)},
    }
    environment = {**job_environment(4711, **asked("25", "8G")), **hostile}
    assert own_node.run(PROLOG, env=environment).check().stderr == ""
    path = "/usr/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert environ(own_node, daemon_pid(own_node)) == {
        "PATH": path,
        "CUDA_MPS_PIPE_DIRECTORY": "/run/slurm-mps/jobs/4711/pipe",
        "CUDA_MPS_LOG_DIRECTORY": "/var/log/slurm-mps/4711",
        "CUDA_VISIBLE_DEVICES": ",".join(own_node.uuids),
    }
    assert " sms=32 free=8047 " in own_node.client(4711).check().stdout
    assert own_node.run(EPILOG, env=environment).check().stderr == ""
    assert own_node.files() == []
    assert not own_node.machine.path("/tmp/trapped").exists()


def test_slurmds_descriptors_do_not_reach_daemon_and_server(gpu_node: GpuNode) -> None:
    """Daemon and server hold /dev/null, their sockets and files of the job: none that the prolog was started with."""
    leaky = f"exec 7</etc/hostname 8>>/tmp/leaked; exec {PROLOG}"
    gpu_node.run("sh", "-c", leaky, env=job_environment(4711, **asked())).check()
    held_by = [descriptors(gpu_node, pid) for pid in (daemon_pid(gpu_node), server_pid(gpu_node))]
    gpu_node.epilog(4711).check()
    own = re.compile(r"socket:|pipe:|/run/slurm-mps/jobs/4711/pipe/|/var/log/slurm-mps/4711/")
    for held in held_by:
        assert {held[number] for number in (0, 1, 2)} == {"/dev/null"}
        assert [target for number, target in held.items() if number > 2 and not own.match(target)] == []


@pytest.mark.every_release
def test_the_hooks_import_only_what_is_cheap(gpu_node: GpuNode) -> None:
    """Prolog and epilog of a job import a fixed list of modules (docs/decisions/0003), none from site-packages."""
    gpu_node.run_job(4712)  # compiles the site configuration, which is not every job's
    ctypes = "import ctypes, os; type('S', (ctypes.Structure,), {'_fields_': [('n', ctypes.c_int)]})"
    allowed = imported(gpu_node, "-c", ctypes) | {"__future__", "_thread", "encodings.ascii", "errno", "types"}
    allowed |= {"_socket", "binascii", "fcntl", "gc", "select", "resource", "time"}
    hook = f"{gpu_node.package}/hook.py"
    prolog, epilog = imported(gpu_node, hook, "prolog"), imported(gpu_node, hook, "epilog")
    assert {"slurm_mps.job.actions", "slurm_mps.node.nvml"} <= prolog & epilog
    assert sorted(name for name in (prolog | epilog) - allowed if name.partition(".")[0] != "slurm_mps") == []


# -------------------------------------------------------------------------------------------- a job without MPS


@pytest.mark.every_release
def test_a_job_that_did_not_ask_starts_no_python_and_touches_nothing(own_node: GpuNode) -> None:
    """Both scripts leave at once for a job without MPS, whatever else is in its environment."""
    own_node.machine.write("/run/recorder", "#!/bin/sh\ntouch /run/python-ran\n", mode=0o755)
    for script in (PROLOG, EPILOG):
        own_node.run("sed", "-i", "s|^python=.*|python=/run/recorder|", script).check()
    plain = {**job_environment(4711), "SPANK_OTHER": "1", "SPANK_MPSX": "1", "SLURM_JOB_RESTART_COUNT": "0"}
    assert own_node.run(PROLOG, env=plain).check().stderr == ""
    assert own_node.run(EPILOG, env=plain).check().stderr == ""
    assert not own_node.machine.path("/run/python-ran").exists()
    assert not own_node.machine.path(STATE_DIRECTORY).exists()
    own_node.prolog(4711)
    assert own_node.machine.path("/run/python-ran").exists(), "the recorder does not record"


# ------------------------------------------------------------------------------------------- twice, and again


def test_a_second_prolog_keeps_what_is_there(gpu_node: GpuNode) -> None:
    """A prolog that runs again for the same run of a job keeps daemon, server and verdict."""
    gpu_node.prolog(4711, **asked("25", "8G")).check()
    before = daemon_pid(gpu_node), server_pid(gpu_node), gpu_node.verdict(4711)
    gpu_node.prolog(4711, **asked("25", "8G")).check()
    assert (daemon_pid(gpu_node), server_pid(gpu_node), gpu_node.verdict(4711)) == before


def test_two_prologs_of_one_job_at_once_start_one_daemon(gpu_node: GpuNode) -> None:
    """Prologs of the same job wait for one another; the second finds the first's work."""
    gpu_node.fault("daemon.start=slow:200")  # time for the second to come between the first's steps
    both = [gpu_node.start(PROLOG, env=job_environment(4711, **asked())) for _ in range(2)]
    assert [one.wait(30) for one in both] == [0, 0]
    assert [process.uid for process in gpu_node.mps_processes()].count(0) == 1
    gpu_node.epilog(4711).check()


@pytest.mark.parametrize(
    "other",
    [
        {"SLURM_JOB_RESTART_COUNT": "1"},
        {"SLURM_JOB_START_TIME": "1795000000"},
        {"user": "bob"},
        {"gpus": "2"},
        {"SPANK_MPS_MEM": "8G"},
        {"SPANK_MPS": "per-gpu"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_run_under_the_same_id_starts_anew(gpu_node: GpuNode, other: dict[str, str]) -> None:
    """A requeued job, or another job where the controller's state was lost and ids began anew."""
    gpu_node.prolog(4711, **asked("25")).check()
    first = daemon_pid(gpu_node)
    given = {"gpus": "0,1", "user": "alice", **asked("50"), **other}
    gpu_node.prolog(4711, **given).check()
    pipe = "gpu-0" if other == {"SPANK_MPS": "per-gpu"} else "pipe"
    daemons = [process.pid for process in gpu_node.mps_processes() if process.uid == 0]
    assert first not in daemons
    assert gpu_node.verdict(4711)["thread_percentage"] == "50"
    assert gpu_node.verdict(4711)["daemon"].split("/")[5].split(" ")[0].startswith(pipe[:3])
    assert gpu_node.compute_modes() == ([0, 0, 3, 0] if "gpus" in other else [3, 3, 0, 0])


def test_a_job_without_mps_under_the_same_id_has_none(gpu_node: GpuNode) -> None:
    """What was left of the other job is taken down, and nothing comes in its place."""
    gpu_node.prolog(4711, **asked("25")).check()
    gpu_node.run(PROLOG, env=job_environment(4711)).check()
    assert (gpu_node.files(), gpu_node.mps_processes(), gpu_node.compute_modes()) == ([], [], [0, 0, 0, 0])


def test_a_prolog_does_not_trust_what_an_earlier_boot_brought_up(own_node: GpuNode) -> None:
    """A ready journal of another boot describes a daemon that is gone: the prolog starts one."""
    own_node.prolog(4711).check()
    own_node.machine.write("/tmp/age.py", AGE_JOURNAL)
    own_node.run(PYTHON, "/tmp/age.py").check()
    for process in own_node.mps_processes():
        own_node.run("kill", "-9", str(process.pid))
    own_node.prolog(4711).check()
    assert own_node.control(4711, "get_default_active_thread_percentage").stdout == "100.0\n"
    own_node.epilog(4711).check()
    assert own_node.files() == []


AGE_JOURNAL = f"""
import re
from slurm_mps.node.wordfile import decode, encode
path = "{STATE_DIRECTORY}/jobs/4711/journal"
lines = decode(open(path, "rb").read(), "journal", 1)
lines[0] = re.sub("boot=[^ ]*", "boot=00000000-0000-0000-0000-000000000000", lines[0])
open(path, "wb").write(encode("journal", 1, lines))
"""


@pytest.mark.parametrize("begin", ["ready", "refused", "failed", "never"])
def test_an_epilog_is_right_whatever_the_prolog_came_to(gpu_node: GpuNode, begin: str) -> None:
    """An epilog, and another one, leaves nothing after a prolog that was ready, refused, failed or never ran."""
    if begin == "ready":
        gpu_node.prolog(4711).check()
    elif begin == "refused":
        gpu_node.prolog(4711, **asked("0")).check()
    elif begin == "failed":
        gpu_node.fault("daemon.start=exit:1")
        assert gpu_node.prolog(4711).returncode == 1
    for _ in range(2):
        result = gpu_node.epilog(4711)
        assert (result.returncode, result.stderr) == (0, "")
        assert gpu_node.files() == []
    hook = gpu_node.run(PYTHON, "-I", "-S", f"{gpu_node.package}/hook.py", "epilog", env=job_environment(4711))
    assert (hook.returncode, hook.stderr) == (0, ""), "the hook itself, past the script's look"


# --------------------------------------------------------------------------------------- the epilog works from disk


def test_the_epilog_needs_nothing_but_the_job_id(gpu_node: GpuNode) -> None:
    """Slurm may lose options and GPUs on the way to the epilog (S1-S3): it restores all with SLURM_JOB_ID alone."""
    gpu_node.set_compute_modes(2, 0, 0, 0)
    gpu_node.prolog(4711, **asked("25", "8G")).check()
    assert gpu_node.run("env", "-i", "SLURM_JOB_ID=4711", EPILOG).check().stderr == ""
    assert gpu_node.files() == []
    assert gpu_node.compute_modes() == [2, 0, 0, 0]
    gpu_node.set_compute_modes(0)


def test_hooks_without_roots_rights_say_so(gpu_node: GpuNode) -> None:
    """slurmstepd of Slurm 24.11 starts an epilog so now and then (PrologFlags=RunInJob); reconcile can go on."""
    gpu_node.prolog(4711).check()
    epilog = gpu_node.run(EPILOG, user="alice", env=job_environment(4711))
    prolog = gpu_node.run(PROLOG, user="alice", env=job_environment(4712, **asked()))
    for result, job in ((epilog, 4711), (prolog, 4712)):
        assert result.returncode == 1
        said = f"slurm-mps: job {job}: runs as uid 20001, not as root; take RunInJob out of PrologFlags"
        assert result.stderr.startswith(said)


@pytest.mark.parametrize(
    "now",
    [
        "this is no TOML",
        '[paths]\ncontrol_program = "/nonexistent"\nlogs = "/var/log/other"\n[deadlines]\nepilog = 0.1\n',
        None,
    ],
    ids=["broken", "changed", "gone"],
)
def test_the_epilog_goes_by_the_configuration_the_job_began_with(own_node: GpuNode, now: str | None) -> None:
    """A site configuration that breaks, changes or goes while a job runs does not keep its epilog from its work."""
    own_node.configure('[paths]\nlogs = "/var/log/first"\n')
    own_node.prolog(4711).check()
    if now is None:
        own_node.machine.path("/etc/slurm/mps.toml").unlink()
    else:
        own_node.configure(now)
    assert own_node.epilog(4711).check().stderr == ""
    assert (own_node.files(), own_node.mps_processes(), own_node.compute_modes()) == ([], [], [0, 0])
    assert own_node.run("ls", "/var/log").stdout.split() == ["first"]
