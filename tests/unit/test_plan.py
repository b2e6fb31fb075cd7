"""What a job gets, and what it is told when it cannot have it."""

import re
from typing import Any

import pytest

from slurm_mps.config.settings import DEFAULTS, SiteConfig
from slurm_mps.errors import NodeError, RequestError
from slurm_mps.job.actions import (
    AdmitUser,
    HoldGpu,
    JobDaemon,
    MakeDirectories,
    SetLimits,
    StartDaemons,
    StartServers,
)
from slurm_mps.job.joined import JoinGpu, JoinGpus
from slurm_mps.job.plan import Plan, make_plan, refusal_of_default
from slurm_mps.job.request import PER_GPU, JobRequest
from slurm_mps.job.verdict import VERDICT_VERSION, Verdict
from slurm_mps.node.control import ControlDaemon, Limits
from slurm_mps.node.nvml import DEFAULT, EXCLUSIVE_PROCESS, Gpu
from slurm_mps.record import replace
from slurm_mps.units import GIB, MIB

H200 = Gpu("GPU-0", 0, 0, 143771 * MIB, "Simulated H200", 143155 * MIB, (9, 0), (13, 0))
GPUS = (H200, replace(H200, uuid="GPU-1", index=1, minor=1))


def ask(threads: float | None = None, memory: int | None = None) -> JobRequest:
    return JobRequest(4711, 20001, ("0", "1"), threads, memory)


def by_gpu(*limits: tuple[int, int]) -> JobRequest:
    return replace(ask(), daemons=PER_GPU, memory_by_gpu=limits)


def verdict(plan: Plan) -> Verdict:
    """The verdict of a plan whose daemons run."""
    return plan.verdict(
        [ControlDaemon("/p", f"/run/j/{daemon.name}", f"/log/{daemon.name}") for daemon in plan.daemons]
    )


def joins_of(plan: Plan) -> tuple[JoinGpu, ...]:
    (action,) = [one for one in plan.actions if isinstance(one, JoinGpus)]
    return action.joins


def test_slices_have_a_daemon_and_one_job_each_whatever_the_site_says_of_gpus() -> None:
    """Clients are few, in proportion to the smallest; a part of a slice by gres/mps is refused."""
    one = replace(H200, uuid="MIG-1", profile="1g.10gb", slice_index=1, parts=(1, 7), minor=22)
    two = replace(one, uuid="MIG-0", profile="2g.20gb", slice_index=0, parts=(2, 7), minor=31)
    site = SiteConfig(gpus_sharing="joined", gpus_client_visible_devices="ordinal", gpus_clients_max=28)
    plan = make_plan(replace(ask(), slurm_indices=(3, 2)), site, (one, two))
    assert [daemon.gpus for daemon in plan.daemons] == [("MIG-0",), ("MIG-1",)]
    assert [action for action in plan.actions if isinstance(action, HoldGpu)] == [
        HoldGpu("MIG-0", None),
        HoldGpu("MIG-1", None),
    ]
    assert (plan.clients_per_gpu, values(plan, "visible_devices")) == (4, ["uuid"])
    assert [words.split()[:3] for words in values(plan, "gpu")] == [["2", "31", "MIG-0"], ["3", "22", "MIG-1"]]
    with pytest.raises(RequestError, match="a part of a MIG slice"):
        make_plan(replace(ask(), share_percentage=25.0), site, (one,))


def values(plan: Plan, key: str) -> list[str]:
    return [value for name, value in verdict(plan).settings() if name == key]


def test_the_form_of_a_verdict_moves_with_its_number() -> None:
    """A plugin of another slurm-mps knows keys and words by it.

    Changed here? A key that an older plugin may pass over is added to the list; for any other change raise
    VERDICT_VERSION here and in spank/verdict.h.
    """
    request = replace(ask(), daemons=PER_GPU, auto_threads=True, auto_memory=True, client_priority=1)
    part = SiteConfig(gpus_sharing="joined", gpus_shards_per_gpu=4)
    plans = make_plan(request, DEFAULTS, GPUS), make_plan(replace(ask(), share_percentage=25.0), part, GPUS[:1])
    # A clone's path may have blanks.
    short = {"probe": ("/opt/python3", "/opt/probe.py"), "explain": "/opt/explain.py"}
    verdicts = [replace(verdict(plan), **short) for plan in plans]
    forms = {(key, len(value.split(" "))) for one in verdicts for key, value in one.settings()}
    assert (VERDICT_VERSION, sorted(forms)) == (
        1,
        [
            ("auto", 1),
            ("client_priority", 1),
            ("clients_per_gpu", 1),
            ("context_mib", 1),
            ("daemon", 3),
            ("daemons", 1),
            ("explain", 1),
            ("gpu", 5),
            ("joined", 1),
            ("memory_min", 1),
            ("probe", 2),
            ("shards_per_gpu", 1),
            ("share", 1),
            ("share_memory", 1),
            ("status", 1),
            ("thread_percentage", 1),
            ("thread_percentage_min", 1),
            ("visible_devices", 1),
        ],
    )


def test_the_actions_in_order() -> None:
    one = (JobDaemon("pipe", ("GPU-0", "GPU-1"), Limits(25.0, 8 * GIB)),)
    assert make_plan(ask(25.0, 8 * GIB), DEFAULTS, GPUS).actions == (
        HoldGpu("GPU-0", EXCLUSIVE_PROCESS),
        HoldGpu("GPU-1", EXCLUSIVE_PROCESS),
        MakeDirectories(("pipe",)),
        StartDaemons((("pipe", ("GPU-0", "GPU-1")),)),
        SetLimits(one),
        AdmitUser(20001),
        StartServers(20001, ("pipe",)),
    )


def test_per_gpu_each_gpu_has_a_daemon_with_limits_of_its_own() -> None:
    request = replace(ask(25.0), daemons=PER_GPU, memory_by_gpu=((1, 4 * GIB), (0, 8 * GIB)))
    plan = make_plan(request, DEFAULTS, GPUS)
    assert plan.daemons == (
        JobDaemon("gpu-0", ("GPU-0",), Limits(25.0, 8 * GIB)),
        JobDaemon("gpu-1", ("GPU-1",), Limits(25.0, 4 * GIB)),
    )
    assert values(plan, "daemon") == ["/run/j/gpu-0 /log/gpu-0 8G", "/run/j/gpu-1 /log/gpu-1 4G"]
    assert values(plan, "daemons") == ["per-gpu"]


def test_a_gpu_without_a_limit_in_the_list_has_the_sites_default() -> None:
    request = replace(ask(), daemons=PER_GPU, memory_by_gpu=((1, 4 * GIB),))
    plan = make_plan(request, SiteConfig(limits_memory_default="16G"), GPUS)
    assert [daemon.limits.memory_bytes for daemon in plan.daemons] == [16 * GIB, 4 * GIB]


def test_auto_leaves_the_daemon_at_the_sites_most_and_tells_the_plugin_what_there_is_to_share() -> None:
    """The number of ranks is known where a step starts; what the daemon allows can only be lowered there."""
    config = SiteConfig(limits_thread_percentage_default=10.0, limits_thread_percentage_max=80.0)
    plan = make_plan(replace(ask(), auto_threads=True, auto_memory=True), config, GPUS)
    assert plan.daemons[0].limits == Limits(80.0, None)
    assert values(plan, "auto") == ["threads", "memory"]
    assert values(plan, "gpu") == [f"{n} {n} GPU-{n} {143155 - 514} 143771" for n in range(2)]


@pytest.mark.parametrize(
    ("capability", "cuda", "setting", "clients"),
    [
        ((6, 1), (13, 0), 0, 16),
        ((7, 0), (12, 4), 0, 48),
        ((9, 0), (13, 0), 0, 48),
        ((9, 0), (13, 1), 0, 60),
        ((9, 0), (13, 1), 24, 24),
    ],
)
def test_how_many_clients_a_gpu_takes(
    capability: tuple[int, int], cuda: tuple[int, int], setting: int, clients: int
) -> None:
    gpu = replace(H200, compute_capability=capability, cuda_version=cuda)
    plan = make_plan(ask(), SiteConfig(gpus_clients_max=setting), (gpu,))
    assert values(plan, "clients_per_gpu") == [str(clients)]


def test_gpus_stand_in_the_daemons_order_whatever_slurm_says() -> None:
    """The daemon ignores the order of its list (O19)."""
    plan = make_plan(ask(), DEFAULTS, GPUS[::-1])
    assert [value.split()[:3] for value in values(plan, "gpu")] == [["0", "0", "GPU-0"], ["1", "1", "GPU-1"]]


def test_slurms_own_indices_go_with_the_gpus_that_it_names_by_uuid() -> None:
    """Slurm counts by gres.conf, NVML by PCI address."""
    plan = make_plan(replace(ask(), gpus=("GPU-1", "GPU-0"), slurm_indices=(0, 3)), DEFAULTS, GPUS[::-1])
    assert [value.split()[:3] for value in values(plan, "gpu")] == [["3", "0", "GPU-0"], ["0", "1", "GPU-1"]]


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        (SiteConfig(gpus_compute_mode="unchanged"), None),
        (SiteConfig(gpus_compute_mode="unchanged", gpus_sharing="separate"), None),
        (SiteConfig(gpus_sharing="separate"), DEFAULT),
        (DEFAULTS, EXCLUSIVE_PROCESS),
    ],
)
def test_the_compute_mode_is_the_one_that_the_jobs_servers_need(config: SiteConfig, mode: int | None) -> None:
    plan = make_plan(ask(), config, GPUS)
    assert [action.mode for action in plan.actions if isinstance(action, HoldGpu)] == [mode, mode]


@pytest.mark.parametrize(
    ("request_", "config", "limits"),
    [
        (ask(), {}, Limits(25.0, 35654 * MIB)),
        (ask(10.0, 2 * GIB), {}, Limits(10.0, 2 * GIB)),
        (ask(), {"limits_memory_of_share": "default"}, Limits(25.0, None)),
        (ask(), {"limits_thread_percentage_max": 20.0, "limits_memory_max": "8G"}, Limits(20.0, 8 * GIB)),
        (replace(ask(), auto_threads=True, auto_memory=True), {}, Limits(25.0, None)),
        (replace(ask(), share_percentage=100.0), {}, Limits(100.0, None)),
    ],
)
def test_a_part_of_a_gpu_is_that_part_of_its_threads_and_memory(
    request_: JobRequest, config: dict[str, Any], limits: Limits
) -> None:
    """Slurm's word for it (gres/mps) is what a job has that does not say, and the most that it may say of threads."""
    request = replace(request_, share_percentage=request_.share_percentage or 25.0)
    plan = make_plan(request, SiteConfig(gpus_sharing="separate", **config), GPUS)
    assert plan.daemons[0].limits == limits


def test_site_defaults_apply_to_a_job_that_does_not_say() -> None:
    config = SiteConfig(limits_thread_percentage_default=50.0, limits_memory_default="4G")
    assert make_plan(ask(), config, GPUS).daemons[0].limits == Limits(50.0, 4 * GIB)
    assert make_plan(ask(), DEFAULTS, GPUS).daemons[0].limits == Limits(100.0, None)


@pytest.mark.parametrize(
    ("request_", "config", "message"),
    [
        (ask(75.0), SiteConfig(limits_thread_percentage_max=50.0), "--mps-threads=75: this site allows 0.1 to 50"),
        (
            replace(ask(50.0), share_percentage=25.0),
            SiteConfig(gpus_sharing="separate"),
            r"--mps-threads=50 is more than --gres=mps gives the job of a GPU \(25 %\); ask for --mps-threads=25",
        ),
        (
            replace(ask(), share_percentage=1.0),
            SiteConfig(gpus_sharing="separate", limits_thread_percentage_min=5.0),
            "--gres=mps gives it 1 % of a GPU: this site allows 5 and more",
        ),
        (replace(ask(), share_percentage=25.0), DEFAULTS, "this site gives MPS jobs whole ones"),
        (
            ask(memory=150 * GIB),
            DEFAULTS,
            r"150G is more than GPU-0 has \(140.4 GiB\); ask for at most 143771M",
        ),
        (ask(memory=64 * MIB), DEFAULTS, r"--mps-mem=64M is less than a CUDA context costs.*514 MiB.*more than 514M"),
        (ask(25.0, 145 * MIB), DEFAULTS, "about 145 MiB"),
        (ask(memory=9 * GIB), SiteConfig(limits_memory_max="8G"), "--mps-mem=9G: this site allows at most 8G"),
        (ask(memory=GIB), SiteConfig(limits_memory_min="2G"), "--mps-mem=1G: this site allows 2G and more"),
        (
            ask(),
            SiteConfig(limits_memory_default="500G"),
            r"^the site's default limit .limits.memory.default .*500G, is more than .*; give --mps-mem=143771M or less",
        ),
        (
            ask(),
            SiteConfig(limits_memory_default="100M"),
            r"^the site's default limit .*, 100M, is less than a CUDA context.*; give --mps-mem with more than 514M",
        ),
        (ask(memory=150 * GIB), SiteConfig(limits_memory_default="4G"), "ask for at most 143771M$"),
        (by_gpu((0, GIB), (2, GIB)), DEFAULTS, "a limit for GPU 2, but this job has 2 GPUs on this node, 0 to 1"),
        (by_gpu((0, 4 * GIB), (1, 64 * MIB)), DEFAULTS, "--mps-mem=1:64M is less than a CUDA context costs"),
        (by_gpu((1, 150 * GIB)), DEFAULTS, "--mps-mem=1:150G is more than GPU-1 has"),
    ],
)
def test_refusals_say_the_number(request_: JobRequest, config: SiteConfig, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_plan(request_, config, GPUS)


@pytest.mark.parametrize(
    ("threads", "limit", "refused"),
    [(100.0, "514M", True), (100.0, "515M", False), (10.0, "100M", False), (100.0, "500G", False)],
)
def test_a_default_is_refused_before_a_job_meets_it(threads: float, limit: str, refused: bool) -> None:
    """By the configuration alone where its own numbers say so, and by a GPU where that is smaller."""
    config = SiteConfig(limits_thread_percentage_default=threads, limits_memory_default=limit)
    assert bool(refusal_of_default(config)) == refused
    assert refusal_of_default(DEFAULTS, "GPU-0", MIB) == ""
    on_gpu = refusal_of_default(config, H200.uuid, H200.memory_bytes)
    if on_gpu:
        with pytest.raises(RequestError, match=re.escape(on_gpu)):
            make_plan(ask(), config, GPUS)
    else:
        make_plan(ask(), config, GPUS)


def test_all_users_on_a_server_have_a_limit_and_a_driver_that_can() -> None:
    """A job without a limit has the site's most, and is counted with it; a part of a GPU has its part."""
    config = SiteConfig(gpus_sharing="joined", gpus_joined_users="all", limits_memory_max="64G")
    plan = make_plan(ask(), config, GPUS[:1])
    (join,) = joins_of(plan)
    assert plan.daemons[0].limits.memory_bytes == 64 * GIB
    assert (join.way, join.server_uid, join.limits.memory_bytes, join.mib) == ("joined-all", 0, 64 * GIB, 64 * 1024)
    (join,) = joins_of(make_plan(ask(), replace(config, gpus_shards_per_gpu=4), GPUS[:1]))
    assert join.mib == 0  # of its shards, which Slurm counts
    older = tuple(replace(gpu, cuda_version=(12, 4)) for gpu in GPUS[:1])
    with pytest.raises(RequestError, match="this node has too old a driver; tell your admin: it needs driver 580"):
        make_plan(ask(), config, older)


def test_a_limit_just_above_what_a_context_costs_is_taken() -> None:
    assert make_plan(ask(25.0, 146 * MIB), DEFAULTS, GPUS).daemons[0].limits.memory_bytes == 146 * MIB
    any_limit = SiteConfig(limits_memory_context_mib=0)
    assert make_plan(ask(memory=1 * MIB), any_limit, GPUS).daemons[0].limits.memory_bytes == MIB


def test_a_job_without_gpu_is_told_how_to_get_one() -> None:
    with pytest.raises(RequestError, match="this job has no GPU on this node; ask for one, such as --gres=gpu:1"):
        make_plan(ask(), DEFAULTS, ())


def test_one_gpu_named_twice_is_slurms_mistake() -> None:
    with pytest.raises(NodeError, match="twice"):
        make_plan(ask(), DEFAULTS, (GPUS[0], GPUS[0]))


def test_tasks_of_a_joined_job_are_counted_once_and_not_on_each_gpu() -> None:
    config = SiteConfig(gpus_sharing="joined")
    request = replace(ask(memory=20 * GIB), daemons=PER_GPU, tasks=3)
    assert [join.mib for join in joins_of(make_plan(request, config, GPUS))] == [2 * 20 * 1024] * 2
