"""The prolog's environment as a JobRequest; SPANK_* is any user's text, SLURM_* is slurmd's."""

import pytest

from slurm_mps.errors import NodeError, RequestError
from slurm_mps.job.request import PER_GPU, PER_NODE, JobRequest, read_request
from slurm_mps.units import GIB

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_UID": "20001", "SLURM_JOB_GPUS": "2,3", "CUDA_VISIBLE_DEVICES": "2,3"}


def test_a_full_request() -> None:
    request = read_request({**SLURM, "SPANK_MPS": "1", "SPANK_MPS_THREADS": "12.5", "SPANK_MPS_MEM": "8G"})
    assert request == JobRequest(4711, 20001, ("2", "3"), 12.5, 8 * GIB)


@pytest.mark.parametrize(("text", "daemons"), [("1", ""), ("per-node", PER_NODE), ("per-gpu", PER_GPU)])
def test_how_many_daemons(text: str, daemons: str) -> None:
    assert read_request({**SLURM, "SPANK_MPS": text}).daemons == daemons


@pytest.mark.parametrize("text", ["", "0", "per-rank", "per-gpu\n"])
def test_any_other_number_of_daemons_is_the_users_mistake(text: str) -> None:
    with pytest.raises(RequestError, match=r"--mps=.*expected per-node, per-gpu or off"):
        read_request({**SLURM, "SPANK_MPS": text})


def test_a_limit_for_each_gpu() -> None:
    request = read_request({**SLURM, "SPANK_MPS": "per-gpu", "SPANK_MPS_MEM": "0:8G,1:4G"})
    assert request.memory_by_gpu == ((0, 8 * GIB), (1, 4 * GIB))
    assert request.memory_limit_bytes is None


def test_a_limit_for_each_gpu_needs_a_daemon_for_each() -> None:
    """One daemon applies its limits by the client's ordinal (O13)."""
    with pytest.raises(RequestError, match="cannot tell its GPUs apart; ask for --mps=per-gpu"):
        read_request({**SLURM, "SPANK_MPS": "1", "SPANK_MPS_MEM": "0:8G,1:4G"})


def test_auto_is_no_number_yet() -> None:
    request = read_request({**SLURM, "SPANK_MPS": "1", "SPANK_MPS_THREADS": "auto", "SPANK_MPS_MEM": "auto"})
    assert (request.auto_threads, request.auto_memory) == (True, True)
    assert (request.thread_percentage, request.memory_limit_bytes) == (None, None)


@pytest.mark.parametrize(("text", "priority"), [("normal", 0), ("low", 1)])
def test_a_client_priority(text: str, priority: int) -> None:
    assert read_request({**SLURM, "SPANK_MPS": "1", "SPANK_MPS_PRIORITY": text}).client_priority == priority


@pytest.mark.parametrize("text", ["", "high", "1", "LOW", "low\n"])
def test_a_bad_client_priority_is_the_users_mistake(text: str) -> None:
    with pytest.raises(RequestError, match=r"--mps-priority=.*expected normal or low"):
        read_request({**SLURM, "SPANK_MPS": "1", "SPANK_MPS_PRIORITY": text})


def test_plain_mps_leaves_the_limits_to_the_site() -> None:
    request = read_request({**SLURM, "SPANK_MPS": "1"})
    assert request.thread_percentage is None
    assert request.memory_limit_bytes is None


def test_uuids_are_taken_where_slurm_gives_them() -> None:
    """From 25.11 on CUDA_VISIBLE_DEVICES holds UUIDs in the prolog, SLURM_JOB_GPUS indices as ever (S17)."""
    request = read_request({**SLURM, "CUDA_VISIBLE_DEVICES": "GPU-aa-1,GPU-bb-2"})
    assert request.gpus == ("GPU-aa-1", "GPU-bb-2")
    assert request.slurm_indices == (2, 3)


@pytest.mark.parametrize("indices", ["", "2", "2,3,4", "2-3", "a,b"])
def test_indices_that_do_not_go_with_the_uuids_are_left_out(indices: str) -> None:
    request = read_request({**SLURM, "CUDA_VISIBLE_DEVICES": "GPU-aa-1,GPU-bb-2", "SLURM_JOB_GPUS": indices})
    assert (request.gpus, request.slurm_indices) == (("GPU-aa-1", "GPU-bb-2"), ())


@pytest.mark.parametrize("left_out", ["SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"])
def test_either_variable_may_be_missing(left_out: str) -> None:
    """gres.conf's Flags can keep Slurm from setting CUDA_VISIBLE_DEVICES."""
    request = read_request({name: value for name, value in SLURM.items() if name != left_out})
    assert (request.gpus, request.slurm_indices) == (("2", "3"), ())


def test_a_job_without_gpu_variables_has_no_gpu() -> None:
    assert read_request({"SLURM_JOB_ID": "1", "SLURM_JOB_UID": "2", "SPANK_MPS": "1"}).gpus == ()


@pytest.mark.parametrize("value", ["0", "101", "abc", "25\n", "25\nquit", "$(id)", "\x1b[2J", "9" * 10**6])
def test_a_bad_percentage_is_the_users_mistake_and_says_the_option(value: str) -> None:
    with pytest.raises(RequestError, match="--mps-threads=") as caught:
        read_request({**SLURM, "SPANK_MPS": "1", "SPANK_MPS_THREADS": value})
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", ["8X", "-1G", "1.5G", "0", "8G\nquit", "", "AUTO", "0:8G,"])
def test_a_bad_size_is_the_users_mistake_and_says_the_option(value: str) -> None:
    with pytest.raises(RequestError, match="--mps-mem="):
        read_request({**SLURM, "SPANK_MPS": "1", "SPANK_MPS_MEM": value})


def test_a_request_of_a_newer_plugin_is_refused_rather_than_half_obeyed() -> None:
    with pytest.raises(RequestError, match="SPANK_MPS_SECRET"):
        read_request({**SLURM, "SPANK_MPS": "1", "SPANK_MPS_SECRET": "low"})


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_UID"])
@pytest.mark.parametrize("value", ["", "-1", "../../etc", "4294967296"])
def test_what_slurmd_says_wrongly_is_the_nodes_fault(name: str, value: str) -> None:
    with pytest.raises(NodeError, match=name):
        read_request({**SLURM, "SPANK_MPS": "1", name: value})


def test_more_than_a_gpu_is_the_users_mistake() -> None:
    """Slurm counts the parts of several GPUs as a percentage of the first; no node drains for it."""
    with pytest.raises(RequestError, match="200 % of a GPU"):
        read_request({**SLURM, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "200"})


def test_a_part_of_a_gpu_cannot_be_had_without_mps() -> None:
    """The job would have all of a GPU of which others have parts, too."""
    with pytest.raises(RequestError, match=r"--mps=off: only MPS limits"):
        read_request({**SLURM, "SPANK_NO_MPS": "1", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25"})


def test_mig_slices_go_by_uuid_beside_slurms_numbers() -> None:
    request = read_request({**SLURM, "CUDA_VISIBLE_DEVICES": "MIG-0123,MIG-4567", "SLURM_JOB_GPUS": "2,4"})
    assert (request.gpus, request.slurm_indices) == (("MIG-0123", "MIG-4567"), (2, 4))


def test_a_gpu_slurm_cannot_mean_is_the_nodes_fault() -> None:
    with pytest.raises(NodeError):
        read_request({**SLURM, "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0;reboot"})
