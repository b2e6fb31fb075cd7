"""What the prolog does when a job cannot have MPS: the user's mistake, the node's fault, and no time left.

The user's mistake ends with exit 0 and a refusal, or Slurm would drain the node; the node's fault by the site's policy.
"""

from __future__ import annotations

from time import monotonic

import pytest

from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.site import PYTHON, STATE_DIRECTORY

RECORDER = "/run/recorder"
SHORT = "[deadlines]\ndaemon_start = 0.3\ncommand = 0.3\nquit = 0.3\nsignal = 0.3\n"


def assert_nothing_left(node: GpuNode, what: str) -> None:
    assert (node.files(), node.mps_processes()) == ([], []), what
    assert set(node.compute_modes()) == {0}, what


def record_control_program(node: GpuNode) -> None:
    """Put a recorder in the control program's place: it notes that it ran, and with what."""
    script = f'#!/bin/sh\n{{ echo "$0 $*"; cat; }} >>{RECORDER}.out\n'
    node.machine.write(RECORDER, script, mode=0o755)
    node.machine.path(f"{RECORDER}.out").unlink(missing_ok=True)
    node.configure(f'[paths]\ncontrol_program = "{RECORDER}"\n')


# ---------------------------------------------------------------------------------------------- the user's mistake

NO_PERCENTAGE = ("0", "101", "-1", "abc", "", "25\n", "25\nquit", "1e1", "12.55")
NO_SIZE = ("0", "8X", "-1G", "1.5G", "", "8", "8388608K", "1 MiB", "8G\nquit -t 0", "99999999999G")
HOSTILE = ("25;touch /tmp/owned", "$(touch /tmp/owned)", "../../tmp/owned", "%s%n", "\udcff\x1b[2J", "9" * 120_000)


@pytest.mark.parametrize(
    ("variable", "option", "values"),
    [
        ("SPANK_MPS_THREADS", "--mps-threads", NO_PERCENTAGE + HOSTILE),
        ("SPANK_MPS_MEM", "--mps-mem", NO_SIZE + HOSTILE),
    ],
    ids=["threads", "mem"],
)
def test_a_value_that_is_none_is_refused(
    gpu_node: GpuNode, variable: str, option: str, values: tuple[str, ...]
) -> None:
    """Whatever a user sends past the plugin is refused in words, and no control program ever runs for it."""
    record_control_program(gpu_node)
    for value in values:
        result = gpu_node.prolog(4711, SPANK_MPS="1", **{variable: value})
        verdict = gpu_node.verdict(4711)
        assert (result.returncode, result.stderr) == (0, ""), value[:50]
        assert verdict["status"] == "refused", value[:50]
        assert verdict["message"].startswith(f"{option}="), value[:50]
        assert ": expected a" in verdict["message"], value[:50]
        assert len(verdict["message"]) < 200, value[:50]
        assert gpu_node.compute_modes() == [0, 0, 0, 0], value[:50]
    gpu_node.epilog(4711).check()
    assert not gpu_node.machine.path(f"{RECORDER}.out").exists()
    assert not gpu_node.machine.path("/tmp/owned").exists()
    gpu_node.prolog(4711)
    assert gpu_node.machine.path(f"{RECORDER}.out").exists(), "the recorder does not record"


def test_a_job_that_cannot_have_it_is_told_why(gpu_node: GpuNode) -> None:
    """A request that this node cannot fulfil is the user's: exit 0, a refusal that says what would be right."""
    for spank, gpus, message in (
        (asked(), "", "this job has no GPU on this node; ask for one, such as --gres=gpu:1"),
        (asked(mem="141G"), "0", "--mps-mem=141G is more than GPU-"),
        (asked(mem="1T"), "0,1", "ask for at most 143771M, or leave it out for no limit"),
        (asked(mem="256M"), "0", "less than a CUDA context costs with 100 % of the threads (about 514 MiB)"),
        (asked("25", "145M"), "0", "less than a CUDA context costs with 25 % of the threads (about 145 MiB)"),
        ({**asked(), "SPANK_MPS_FOO": "1"}, "0", "the request has SPANK_MPS_FOO, which slurm-mps on this node"),
    ):
        result = gpu_node.prolog(4711, gpus=gpus, **spank)
        assert (result.returncode, result.stderr) == (0, ""), message
        assert gpu_node.verdict(4711)["status"] == "refused", message
        assert message in gpu_node.verdict(4711)["message"]
        assert (gpu_node.mps_processes(), gpu_node.compute_modes()) == ([], [0, 0, 0, 0]), message


def test_the_smallest_limit_that_is_taken_lets_a_client_start(gpu_node: GpuNode) -> None:
    """What the refusal for a context's cost advises is enough for a program to begin."""
    for threads, mem in (("100", "515M"), ("25", "146M")):
        gpu_node.prolog(4711, gpus="0", **asked(threads, mem)).check()
        assert gpu_node.verdict(4711)["status"] == "ready", mem
        gpu_node.client(4711).check()
        gpu_node.epilog(4711).check()


# --------------------------------------------------------------------------------------------------- the node's fault


FAULTS = [
    ("daemon.start=exit:1", "0,1", "nvidia-cuda-mps-control -d ended with status 1"),
    ("daemon.start=noop", "0,1", "reported success, but no control daemon runs"),
    ("daemon.after_start=die", "0,1", "control daemon"),
    ("command.set_default_device_pinned_mem_limit=ignore", "0,1", "it reads back '25.0 25.0 No default pinned"),
    ("command.get_default_device_pinned_mem_limit=wrong:1G", "0,1", "it reads back '25.0 25.0 1G 1G' instead of"),
    ("command.get_default_active_thread_percentage=wrong:100.0", "0", "it reads back '25.0 100.0 8G' instead of"),
    ("command.set_default_active_thread_percentage=wrong:100.0", "0", "it reads back '100.0 100.0 8G' instead of"),
    ("nvml.init=9", "0,1", "this node's NVIDIA driver: nvmlInit_v2: Driver Not Loaded (NVML error 9)"),
    ("nvml.GetComputeMode=999", "0,1", "nvmlDeviceGetComputeMode: Unknown Error (NVML error 999)"),
    ("nvml.SetComputeMode=4", "0,1", "nvmlDeviceSetComputeMode: Insufficient Permissions (NVML error 4)"),
    ("nvml.SetComputeMode=noop", "0,1", "EXCLUSIVE_PROCESS was set, but NVML reads back DEFAULT"),
    ("gpu.1=lost", "0,1", "GPU 1: nvmlDeviceGetHandleByIndex_v2: GPU is lost"),
    ("", "9", "GPU 9: nvmlDeviceGetHandleByIndex_v2: Invalid Argument"),
    ("", "GPU-00000000-0000-0000-0000-000000000000", "nvmlDeviceGetHandleByUUID: Not Found"),
    ("", "0,0", "Slurm names the same GPU twice: 0, 0"),
    ("", "0,gpu:1", "slurmd gave the prolog a GPU it cannot name: 'gpu:1'"),
]
HANGS = [
    ("daemon.start=hang", "0,1", "did not answer within 0.3 s"),
    ("command.get_default_active_thread_percentage=hang", "0,1", "did not answer within 0.3 s"),
]


@pytest.mark.parametrize("policy", ["drain", "fail_job"])
def test_a_fault_of_the_node_leaves_nothing_and_goes_by_policy(gpu_node: GpuNode, policy: str) -> None:
    """Drain: exit 1 with the node as before. Fail the job: exit 0 with a refusal; its epilog finds nothing to do."""
    every = 1 if policy == "drain" else 3  # how it is told does not hang on the fault
    for deadlines, cases in (("", FAULTS[::every]), (SHORT, HANGS[::every])):
        gpu_node.configure(f'{deadlines}[policy]\nnode_fault = "{policy}"\n')
        for faults, gpus, message in cases:
            what = f"{faults} on GPUs {gpus}"
            gpu_node.fault(*faults.split())
            result = gpu_node.prolog(4711, gpus=gpus, **asked("25", "8G"))
            verdict = gpu_node.verdict(4711)
            assert result.stderr.startswith("slurm-mps: job 4711: "), what
            assert message in result.stderr, what
            assert "a bug" not in result.stderr, what
            assert (gpu_node.mps_processes(), gpu_node.compute_modes()) == ([], [0, 0, 0, 0]), what
            if policy == "drain":
                assert (result.returncode, verdict) == (1, {}), what
            else:
                assert (result.returncode, verdict["status"]) == (0, "refused"), what
                assert verdict["message"].startswith("this node cannot give it MPS: "), what
                assert message in verdict["message"], what
                gpu_node.epilog(4711).check()
            assert gpu_node.files() == [], what


@pytest.mark.parametrize("fault", ["exit:1", "hang", "ignore"])
def test_a_server_that_is_not_started_ahead_costs_only_time(gpu_node: GpuNode, fault: str) -> None:
    """Once the job's user is let in they could be the reason: the job is ready, the first client gets its server."""
    gpu_node.configure(SHORT)
    gpu_node.fault(f"command.start_server={fault}")
    result = gpu_node.prolog(4711, **asked("25", "8G"))
    gpu_node.fault()
    assert (result.returncode, gpu_node.verdict(4711)["status"]) == (0, "ready")
    assert " sms=32 free=8047 " in gpu_node.client(4711).stdout


def test_what_cannot_be_undone_stays_for_the_epilog(gpu_node: GpuNode) -> None:
    """A prolog whose undo fails, too, keeps the journal; the epilog finishes the work once the node is well."""
    gpu_node.configure('[paths]\ncontrol_program = "/run/breaks-nvml"\n')
    breaks = """#!/bin/sh
[ $# = 0 ] || exec nvidia-cuda-mps-control "$@"
read -r line
case $line in quit*) echo "$line" | exec nvidia-cuda-mps-control ;; esac
simulated-gpus fault nvml.SetComputeMode=4
exit 1
"""
    gpu_node.machine.write("/run/breaks-nvml", breaks, mode=0o755)
    result = gpu_node.prolog(4711, gpus="0")
    assert result.returncode == 1
    assert "; and it could not be undone: " in result.stderr
    assert gpu_node.compute_modes() == [3, 0, 0, 0]
    assert gpu_node.epilog(4711).returncode == 1, "nothing has changed yet"
    gpu_node.fault()
    gpu_node.epilog(4711).check()


# ------------------------------------------------------------------------------------------------- the state directory


def test_a_state_directory_that_others_may_write_is_not_used(own_node: GpuNode) -> None:
    """Group- or world-writable, a link, a user's or no directory: the prolog fails and writes nothing through it."""
    writable = "can be written by others than root"
    for prepare, message in (
        ("mkdir -m 775 $D", f"{STATE_DIRECTORY} {writable}"),
        ("mkdir -m 757 $D", f"{STATE_DIRECTORY} {writable}"),
        ("mkdir $D && chown alice $D", f"{STATE_DIRECTORY} {writable}"),
        ("ln -s /run/other $D", f"{STATE_DIRECTORY}: "),
        ("touch $D", f"{STATE_DIRECTORY}: Not a directory"),
        ("mkdir -p $D/jobs && chown alice $D/jobs", f"{STATE_DIRECTORY}/jobs {writable}"),
        ("mkdir -p $D && ln -s /run/other $D/gpus", f"{STATE_DIRECTORY}/gpus: "),
        ("mkdir -p $D/jobs/4711 && chmod 770 $D/jobs/4711", f"jobs/4711 {writable}"),
        ("mkdir -p $D/jobs && ln -s /run/other $D/jobs/4711", f"{STATE_DIRECTORY}/jobs/4711: "),
    ):
        again = f"D={STATE_DIRECTORY}; rm -rf $D /run/other; mkdir /run/other; {prepare}"
        own_node.run("sh", "-c", again).check()
        result = own_node.prolog(4711)
        assert result.returncode == 1, prepare
        assert message in result.stderr, prepare
        assert "a bug" not in result.stderr, prepare
        assert (own_node.mps_processes(), own_node.compute_modes()) == ([], [0, 0]), prepare
        assert own_node.run("find", "/run/other", "-mindepth", "1").stdout == "", prepare


def test_a_file_system_without_acls_is_said_so_and_left_clean(own_node: GpuNode) -> None:
    """Without POSIX ACLs there is no gate, so no daemon: the prolog says so and leaves nothing of the job."""
    own_node.machine.make_directory(STATE_DIRECTORY, mode=0o711)
    own_node.run("mount", "-t", "ramfs", "none", STATE_DIRECTORY).check()
    result = own_node.prolog(4711)
    assert result.returncode == 1
    assert "the file system has no POSIX ACLs" in result.stderr
    assert_nothing_left(own_node, "ramfs")


def test_a_full_state_directory_leaves_nothing_at_any_fill(own_node: GpuNode) -> None:
    """However little room a full tmpfs has left, a job is either ready or, with exit 1, nothing of it is there."""
    own_node.machine.make_directory(STATE_DIRECTORY, mode=0o711)
    own_node.run("mount", "-t", "tmpfs", "-o", "size=64k,mode=711", "none", STATE_DIRECTORY).check()
    own_node.prolog(4711).check()  # compiles the configuration
    own_node.epilog(4711).check()
    came_to = []
    for free_pages in range(12):
        fill = f"cd {STATE_DIRECTORY}; cat /dev/zero >fill 2>/dev/null; truncate -s -$(({free_pages} * 4096)) fill"
        own_node.run("sh", "-c", fill).check()
        result = own_node.prolog(4711, **asked("25", "8G"))
        came_to.append(result.returncode)
        if result.returncode == 0:
            assert " sms=32 free=8047 " in own_node.client(4711).check().stdout, free_pages
            assert own_node.epilog(4711).returncode == 0, free_pages
        assert_nothing_left(own_node, f"{free_pages} pages free, prolog exit {result.returncode}")
    assert came_to[0] == 1
    assert came_to[-1] == 0


DAMAGE = {
    "data = data[:-20]": "not a whole journal of version 1",
    "data = data.replace(b'uid=20001', b'uid=20002')": "not a whole journal of version 1",
    "data = b''": "not a whole journal of version 1",
    "data = bytes(len(data))": "not a whole journal of version 1",
    "data = b'#!/bin/sh\\n' * 10": "not a whole journal of version 1",
    "data = encode('journal', 2, [*decode(data, 'journal', 1), 'something new'])": "version 2 is newer than version 1",
}


def test_a_journal_that_cannot_be_read_is_left_as_it_is(own_node: GpuNode) -> None:
    """A damaged journal is not guessed at, and a newer one is kept for the version that wrote it: both hooks fail.

    The job's daemons have been told to quit by then, as at every job's end (docs/decisions/0020).
    """
    own_node.prolog(4711).check()
    journal = own_node.machine.path(f"{STATE_DIRECTORY}/jobs/4711/journal")
    whole = journal.read_bytes()
    for damage, message in DAMAGE.items():
        rewrite(own_node, damage)
        damaged = journal.read_bytes()
        assert damaged != whole
        for script in (PROLOG, EPILOG):
            result = own_node.run(script, env=job_environment(4711, SLURM_JOB_RESTART_COUNT="1", **asked()))
            assert result.returncode == 1, damage
            assert message in result.stderr, damage
            assert journal.read_bytes() == damaged, damage
        assert own_node.compute_modes() == [3, 3], damage
        journal.write_bytes(whole)
    own_node.epilog(4711).check()
    assert_nothing_left(own_node, "once it is whole again")


def test_an_undo_that_is_not_known_keeps_no_other_from_its_work(own_node: GpuNode) -> None:
    """Of a whole journal with a line that this version cannot undo, the rest is undone; the line stays, with exit 1."""
    own_node.prolog(4711).check()
    rewrite(own_node, "data = encode('journal', 1, [*decode(data, 'journal', 1), 'undo something else'])")
    for _ in range(2):
        result = own_node.epilog(4711)
        assert result.returncode == 1
        assert "the journal has an unknown undo 'something'" in result.stderr
        assert (own_node.mps_processes(), own_node.compute_modes()) == ([], [0, 0])
        assert "undo something else\n" in own_node.machine.read(f"{STATE_DIRECTORY}/jobs/4711/journal")


def rewrite(node: GpuNode, statement: str) -> None:
    """Change the journal's bytes, `data`, with the project's own reader and writer at hand."""
    program = f"""
from slurm_mps.node.wordfile import decode, encode
path = "{STATE_DIRECTORY}/jobs/4711/journal"
data = open(path, "rb").read()
{statement}
open(path, "wb").write(data)
"""
    node.run(PYTHON, "-c", program).check()


# --------------------------------------------------------------------------------------------------------- deadlines


def prolog_seconds(node: GpuNode, expected: int) -> tuple[float, str]:
    """How long the prolog took to end with this status, and what it said."""
    start = monotonic()
    result = node.prolog(4711, **asked("25", "8G"))
    took = monotonic() - start
    assert result.returncode == expected, result.stderr
    return took, result.stderr


AMPLE = "prolog = 4\ndaemon_start = 0.5\ncommand = 0.3\nquit = 0.3\nsignal = 0.3\n"
PROPORTIONS = "prolog = 1.6\ndaemon_start = 0.8\ncommand = 0.6\nquit = 1.0\nsignal = 0.6\n"  # the defaults' own, by 5
TIGHT = "prolog = 0.6\ndaemon_start = 4\ncommand = 3\nquit = 5\nsignal = 3\n"


@pytest.mark.alone
@pytest.mark.parametrize(
    ("deadlines", "faults"),
    [
        (AMPLE, "command.*=hang daemon.sigterm=ignore"),
        (PROPORTIONS, "command.*=hang daemon.sigterm=ignore"),
        (TIGHT, "command.*=hang"),
        (TIGHT, "daemon.start=hang"),
    ],
    ids=["ample", "proportions", "tight", "tight-start"],
)
def test_a_daemon_that_hangs_costs_no_more_than_the_prologs_deadline(
    gpu_node: GpuNode, deadlines: str, faults: str
) -> None:
    """Whatever of the daemon hangs, the prolog ends in its time, with exit 1, and has ended the daemon."""
    gpu_node.configure(f"[deadlines]\n{deadlines}")
    gpu_node.run_job(4711, **asked("0"))  # compiles the configuration
    gpu_node.fault(*faults.split())
    took, said = prolog_seconds(gpu_node, expected=1)
    assert took < float(deadlines.split()[2]) + 1, said
    assert_nothing_left(gpu_node, said)


@pytest.mark.alone
def test_a_driver_that_hangs_is_ended_by_the_watchdog(gpu_node: GpuNode) -> None:
    """Inside NVML no deadline reaches; the prolog ends itself, says what hangs, and leaves nothing."""
    gpu_node.configure("[deadlines]\nprolog = 0.5\n")
    gpu_node.fault("nvml.init=hang")
    took, said = prolog_seconds(gpu_node, expected=1)
    assert "job 4711: not done after 0.5 s; the NVIDIA driver may hang" in said
    assert took < 3.0


@pytest.mark.alone
def test_a_driver_that_answers_too_late_leaves_nothing(gpu_node: GpuNode) -> None:
    """What was done ahead is undone when bringing up has had its time; the answer that comes then changes nothing."""
    gpu_node.configure("[deadlines]\nprolog = 1.5\n")
    gpu_node.run_job(4711)  # compiles the configuration
    gpu_node.fault("nvml.init=slow:1100")
    _, said = prolog_seconds(gpu_node, expected=1)
    assert said == "slurm-mps: job 4711: out of time (deadlines.prolog and deadlines.epilog of mps.toml)\n"


@pytest.mark.alone
def test_a_driver_that_hangs_in_a_claim_leaves_no_daemon(gpu_node: GpuNode) -> None:
    """The journal stays, for the mode may or may not be set; epilog or reconcile go by it when the driver is well."""
    gpu_node.configure("[deadlines]\nprolog = 1.5\n")
    gpu_node.run_job(4711)  # compiles the configuration
    gpu_node.fault("nvml.SetComputeMode=hang")
    _, said = prolog_seconds(gpu_node, expected=1)
    left = gpu_node.mps_processes()
    gpu_node.fault()
    gpu_node.epilog(4711).check()
    assert "not done after 1.5 s; the NVIDIA driver may hang" in said
    assert left == []


@pytest.mark.alone
def test_a_driver_that_hangs_fails_the_job_where_the_site_says_so(gpu_node: GpuNode) -> None:
    """The watchdog goes by the site's policy as every other fault of the node does."""
    gpu_node.configure('[deadlines]\nprolog = 0.5\n[policy]\nnode_fault = "fail_job"\n')
    gpu_node.fault("nvml.init=hang")
    prolog_seconds(gpu_node, expected=0)
    assert "the NVIDIA driver may hang" in gpu_node.verdict(4711)["message"]
