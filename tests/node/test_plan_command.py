"""``slurm-mps plan``: it prints what a prolog then does, refuses as plugin and prolog do, and changes nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.machine import USERS
from tests.harness.reports import report as checked
from tests.harness.site import PYTHON, STATE_DIRECTORY

if TYPE_CHECKING:
    from tests.harness.gpunode import GpuNode
    from tests.harness.machine import Result
    from tests.harness.site import Site

COMMAND = [PYTHON, "-I", "-m", "slurm_mps.cli.main", "plan"]
JOB = 4711
#: sbatch's words, and what the plugin carries of them.
CARRIED = {
    "mps": "SPANK_MPS",
    "mps-threads": "SPANK_MPS_THREADS",
    "mps-mem": "SPANK_MPS_MEM",
    "mps-priority": "SPANK_MPS_PRIORITY",
}


def words(options: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]


def spank(options: dict[str, str]) -> dict[str, str]:
    return {"SPANK_MPS": "1", **{CARRIED[name]: value for name, value in options.items() if value}}


def plan(node: GpuNode, *argv: str, status: int = 0) -> dict[str, Any]:
    result = node.run(*COMMAND, "--json", *argv)
    assert result.returncode == status
    return checked(result.stdout, status)


def noted(node: GpuNode) -> list[str]:
    """The undo lines of the job's journal, oldest first."""
    text = node.machine.path(f"{STATE_DIRECTORY}/jobs/{JOB}/journal").read_text()
    return [line.removeprefix("undo ") for line in text.splitlines() if line.startswith("undo ")]


@pytest.mark.parametrize(
    ("config", "gpus", "options"),
    [
        ("", 2, {"mps-threads": "25", "mps-mem": "8G"}),
        ("", 1, {"mps": ""}),
        ("", 4, {"mps": "per-gpu", "mps-mem": "0:8G,3:4g", "mps-priority": "low"}),
        ("", 2, {"mps-threads": "auto", "mps-mem": "auto"}),
        ('[gpus]\ncompute_mode = "unchanged"\n', 2, {"mps": "per-node"}),
        ('[gpus]\nsharing = "separate"\n[limits.memory]\ndefault = "4G"\n', 2, {"mps": ""}),
    ],
)
def test_what_is_planned_is_what_a_prolog_notes(
    gpu_node: GpuNode, config: str, gpus: int, options: dict[str, str]
) -> None:
    """The same undo lines in the same order, the same daemons, the same GPUs."""
    gpu_node.configure(config)
    report = plan(gpu_node, f"--gres=gpu:{gpus}", "--user=alice", *words(options))
    planned = [one["undo"] for one in report["actions"] if one["undo"]]
    gpu_node.prolog(JOB, gpus=",".join(map(str, range(gpus))), **spank(options)).check()
    assert planned == noted(gpu_node)
    assert all(one["undo_means"] for one in report["actions"] if one["undo"])
    held = [uuid.removeprefix("release_gpu gpu=") for uuid in planned if uuid.startswith("release_gpu")]
    assert held == [gpu["uuid"] for gpu in report["gpus"]]


def test_the_commands_are_those_that_the_daemon_gets(gpu_node: GpuNode) -> None:
    """What the plan says of the limits is what a daemon, told so, answers a rank with."""
    report = plan(gpu_node, "--gres=gpu:2", "--mps-threads=25", "--mps-mem=8G")
    (told,) = [one["action"] for one in report["actions"] if one["action"].startswith("tell pipe, and read back: ")]
    gpu_node.prolog(JOB, SPANK_MPS="1", SPANK_MPS_THREADS="25", SPANK_MPS_MEM="8G").check()
    answers = {
        "get_default_active_thread_percentage": "25.0",
        "get_default_device_pinned_mem_limit 0": "8G",
        "get_default_device_pinned_mem_limit 1": "8G",
    }
    commands = told.partition(": ")[2].split(", ")
    assert [command for command in commands if command.startswith("get")] == list(answers)
    for command, answer in answers.items():
        assert gpu_node.control(JOB, command).stdout.strip() == answer


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('[gpus]\ncompute_mode = "unchanged"\n', "for the job, compute mode left alone"),
        ('[gpus]\nsharing = "separate"\n', "compute mode DEFAULT, beside other jobs"),
        ('[limits.memory]\ndefault = "4G"\n', "set_default_device_pinned_mem_limit 0 4G"),
        ("[limits.thread_percentage]\ndefault = 12.5\n", "set_default_active_thread_percentage 12.5"),
    ],
)
def test_the_sites_configuration_counts(gpu_node: GpuNode, config: str, said: str) -> None:
    gpu_node.configure(config)
    assert said in "\n".join(one["action"] for one in plan(gpu_node, "--gres=gpu:1", "--mps")["actions"])


def test_a_wrong_configuration_is_the_nodes_fault(gpu_node: GpuNode) -> None:
    """In the admin's words, as the prolog would tell them."""
    gpu_node.configure("[gpus]\nclients = 3\n")
    report = plan(gpu_node, "--gres=gpu:1", "--mps", status=1)
    result = gpu_node.prolog(JOB)
    assert result.returncode == 1
    assert f"job {JOB}: {report['problem']}" in result.stderr
    assert report["meaning"] == "a fault of this node"


def test_a_configuration_that_only_root_may_read_is_no_fault_of_the_node(gpu_node: GpuNode) -> None:
    """As of `config check`: it is not the user's to see."""
    gpu_node.configure("")
    gpu_node.run("chmod", "600", "/etc/slurm/mps.toml").check()
    result = gpu_node.run(*COMMAND, "--json", "--gres=gpu:1", "--mps", user="alice")
    assert (result.returncode, result.stderr) == (4, "slurm-mps: /etc/slurm/mps.toml: Permission denied\n")
    assert checked(result.stdout, 4)["error"] == "/etc/slurm/mps.toml: Permission denied"
    assert plan(gpu_node, "--gres=gpu:1", "--mps")["actions"]
    gpu_node.run("rm", "/etc/slurm/mps.toml").check()


@pytest.mark.parametrize(
    ("gpus", "options"),
    [
        ("0,1", {"mps-threads": "250"}),
        ("0,1", {"mps-mem": "1.5G"}),
        ("0,1", {"mps-mem": "0:8G"}),
        ("0,1", {"mps-mem": "200G"}),
        ("0,1", {"mps-mem": "256M"}),
        ("0", {"mps": "per-gpu", "mps-mem": "1:8G"}),
        ("0", {"mps": "per-core"}),
        ("", {"mps": ""}),
    ],
)
def test_a_mistake_is_told_in_the_words_of_the_job(gpu_node: GpuNode, gpus: str, options: dict[str, str]) -> None:
    """The message that the job's tasks would fail with, and status 1."""
    gres = [f"--gres=gpu:{len(gpus.split(','))}"] if gpus else []
    report = plan(gpu_node, *gres, *words(options), status=1)
    gpu_node.prolog(JOB, gpus=gpus, **spank(options)).check()
    assert report["problem"] == gpu_node.verdict(JOB)["message"]
    assert report["actions"] == []


VALUES = {
    "mps": ["per-node", "per-gpu", "off", "1", "per-job", "PER-GPU"],
    "mps-threads": ["25", "12.5", "0", "100.1", "025", "auto", "", "25%", "1e1"],
    "mps-mem": ["8G", "8g", "8", "0G", "8.0G", "auto", "", "8GB", "1T"],
    "mps-priority": ["low", "normal", "high", ""],
}


@pytest.mark.parametrize("option", VALUES)
def test_it_takes_what_the_plugin_takes(site: Site, option: str) -> None:
    """And refuses what sbatch refuses."""
    for value in VALUES[option]:
        word = f"--{option}={value}"
        sbatch = site.cluster.try_sbatch("--test-only", "--gres=gpu:1", word, script="true")
        planned = site.node("n1", *COMMAND, "--gres=gpu:1", word)
        said = re.search(r"mps: (--\S*): (.*)", sbatch.stderr)
        if said:
            assert planned.stderr.startswith(f"slurm-mps: {said[1]}: {said[2]}"), (word, planned, sbatch)
        else:
            assert sbatch.returncode == 0, (word, sbatch)
            assert "expected" not in planned.stderr, (word, planned)


CHANGES = re.compile(
    r"\b(mkdir|unlink|rename|rmdir|link|symlink|chmod|chown|setxattr|utime|truncate|mount|mknod|kill|connect)\w*\("
    r"|open(at)?\([^)]*(O_WRONLY|O_RDWR|O_CREAT|O_TRUNC)"
)
#: The simulated driver's own memory, which stands for /dev/nvidia*; the console; a look-up of users that is not there.
DRIVERS_OWN = ("/run/simulated-gpus/", "/dev/nvidia", "/dev/null", "/dev/tty", "/nscd/socket")


def test_it_changes_nothing(gpu_node: GpuNode) -> None:
    """No file opened to be written, nothing made, renamed or removed, no socket, no process but the config's reader.

    Of the state, which is there, the lock is opened as every reader does, and not taken.
    """
    gpu_node.run_job(JOB, gpus="3")
    gpu_node.configure('[gpus]\nsharing = "separate"\n')
    traced: Result = gpu_node.run(
        "strace", "-f", "-qq", "-e", "trace=file,desc,network,kill,process", *COMMAND, "--gres=gpu:2", "--mps"
    )
    assert traced.returncode == 0, traced.stderr
    calls = traced.stderr.splitlines()
    bad = [call for call in calls if CHANGES.search(call) and not any(own in call for own in (*DRIVERS_OWN, '"lock"'))]
    assert not bad
    assert not [call for call in calls if "F_SETLK" in call]
    started = [call for call in calls if 'execve("' in call and "= -1" not in call]
    assert len(started) == 2
    assert "slurm_mps.config.file" in started[1]


def test_people_read_numbered_actions(gpu_node: GpuNode) -> None:
    lines = gpu_node.run(*COMMAND, "--devices=1", "--mps", "--user=alice").check().stdout.splitlines()
    actions = [line for line in lines if re.match(r" ?\d+\. ", line)]
    assert len(actions) == 7
    assert actions[0].endswith("for the job, compute mode EXCLUSIVE_PROCESS")
    assert f"let uid {USERS['alice']} into the job's directory" in actions[4]
    assert lines[1].strip().startswith("undo, noted first: release_gpu gpu=GPU-51000000-")


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--gres=gpu:1"], 2, "add --mps: for a job without an --mps option the prolog does nothing"),
        (["--mps", "--user=nobody-here"], 2, "--user=nobody-here: there is no such user"),
        (["--mps", "--gres=gpu:5"], 1, "--gres=gpu:5: this node has no GPU 4 that answers (this node"),
        (["--mps", "--gres=gpu:x:y:z"], 1, "--gres=gpu:x:y:z: expected a list such as gpu:2 or gpu:h200:2"),
        (["--mps", "--devices=0,4"], 1, "--devices=0,4: this node has no GPU 4 that answers (this node"),
        (["--mps", "--devices=GPU-1234"], 1, "--devices=GPU-1234: this node has no GPU GPU-1234 that answers"),
        (["--mps", "--devices=0-1"], 2, "--devices=0-1: expected indices or UUIDs of GPUs, with commas"),
        (["--mps", "--devices=1,1"], 2, "--devices=1,1: it names a GPU twice"),
        (["--mps", "--devices=MIG-1234"], 1, "--devices=MIG-1234: this node has no GPU MIG-1234 that answers"),
    ],
)
def test_what_cannot_be_planned_is_said(gpu_node: GpuNode, argv: list[str], status: int, said: str) -> None:
    result = gpu_node.run(*COMMAND, *argv)
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.startswith(f"slurm-mps: {said}")


def test_root_is_told_whose_job_holds_a_gpu(gpu_node: GpuNode) -> None:
    """As the prolog of such a job refuses it; where GPUs are shared, or are others, there is a plan."""
    gpu_node.prolog(JOB, gpus="1").check()
    report = plan(gpu_node, "--devices=0,1", "--mps", status=1)
    gpu_node.prolog(JOB + 1, gpus="0,1").check()
    assert report["problem"] == gpu_node.verdict(JOB + 1)["message"]
    assert f"is held by MPS job {JOB}, and this site shares no GPU" in report["problem"]
    gpu_node.epilog(JOB + 1).check()
    assert plan(gpu_node, "--devices=0,2", "--mps")["holders_seen"] is True
    gpu_node.epilog(JOB).check()
    gpu_node.configure('[gpus]\nsharing = "separate"\n')
    gpu_node.prolog(JOB, gpus="1").check()
    plan(gpu_node, "--devices=0,1", "--mps")


def test_a_thread_limit_of_jobs_that_take_turns_is_pointed_out(gpu_node: GpuNode) -> None:
    """It multiplies with the time that the job has (O86)."""
    gpu_node.configure('[gpus]\nsharing = "separate"\n')
    result = gpu_node.run(*COMMAND, "--gres=mps:25").check()
    assert "take turns on a GPU here, and in its turns this one has 25 % of the threads" in result.stderr
    assert gpu_node.run(*COMMAND, "--gres=gpu:1", "--mps").check().stderr == ""


def test_a_user_is_told_that_holders_were_not_looked_at(gpu_node: GpuNode) -> None:
    gpu_node.prolog(JOB, gpus="1").check()
    result = gpu_node.run(*COMMAND, "--devices=1", "--mps", "--json", user="alice")
    assert (result.returncode, checked(result.stdout)["holders_seen"]) == (0, False)
    assert result.stderr == "slurm-mps: only root sees whether another job holds these GPUs now\n"


def test_a_driver_that_fails_is_the_nodes_fault(gpu_node: GpuNode) -> None:
    gpu_node.fault("nvml.init=18")
    result = gpu_node.run(*COMMAND, "--gres=gpu:1", "--mps")
    assert result.returncode == 1
    assert re.fullmatch(r"slurm-mps: this node's NVIDIA driver: .*mismatch.* \(a fault of this node\)\n", result.stderr)
