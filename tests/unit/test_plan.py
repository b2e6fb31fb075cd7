"""What a job gets, and what it is told when it cannot have it."""

import pytest

from slurm_mps.config import DEFAULTS, SiteConfig
from slurm_mps.errors import NodeError, RequestError
from slurm_mps.node.control import Limits
from slurm_mps.node.gpus import EXCLUSIVE_PROCESS, Gpu
from slurm_mps.plan import make_plan
from slurm_mps.request import JobRequest
from slurm_mps.steps import AdmitUser, HoldGpu, MakeDirectories, SetLimits, StartDaemon, StartServer
from slurm_mps.units import GIB, MIB

GPUS = tuple(Gpu(f"GPU-{n}", n, n, 143771 * MIB, "Simulated H200") for n in range(2))


def ask(threads: float | None = None, memory: int | None = None) -> JobRequest:
    return JobRequest(4711, 20001, 0, ("0", "1"), threads, memory)


def test_the_steps_in_order() -> None:
    limits = Limits(25.0, 8 * GIB)
    assert make_plan(ask(25.0, 8 * GIB), DEFAULTS, GPUS).steps == (
        HoldGpu("GPU-0", EXCLUSIVE_PROCESS, may_share=False),
        HoldGpu("GPU-1", EXCLUSIVE_PROCESS, may_share=False),
        MakeDirectories(),
        StartDaemon(("GPU-0", "GPU-1")),
        SetLimits(limits, 2),
        AdmitUser(20001),
        StartServer(20001),
    )


def test_gpus_stand_in_the_daemons_order_whatever_slurm_says() -> None:
    """The daemon ignores the order of its list (O19)."""
    plan = make_plan(ask(), DEFAULTS, GPUS[::-1])
    assert [value for key, value in plan.verdict("/p", "/l").settings if key == "gpu"] == ["0 0 GPU-0", "1 1 GPU-1"]


@pytest.mark.parametrize(
    "config", [SiteConfig(gpus_compute_mode="unchanged"), SiteConfig(gpus_sharing="share")], ids=["unchanged", "share"]
)
def test_the_mode_is_left_alone_where_the_site_says_so(config: SiteConfig) -> None:
    plan = make_plan(ask(), config, GPUS)
    assert [step.mode for step in plan.steps if isinstance(step, HoldGpu)] == [None, None]


def test_site_defaults_apply_to_a_job_that_does_not_say() -> None:
    config = SiteConfig(limits_thread_percentage_default=50.0, limits_memory_default="4G")
    assert make_plan(ask(), config, GPUS).limits == Limits(50.0, 4 * GIB)
    assert make_plan(ask(), DEFAULTS, GPUS).limits == Limits(100.0, None)


@pytest.mark.parametrize(
    ("request_", "config", "message"),
    [
        (ask(75.0), SiteConfig(limits_thread_percentage_max=50.0), "--mps-threads=75: this site allows 0.1 to 50"),
        (
            ask(memory=150 * GIB),
            DEFAULTS,
            r"150G is more than GPU-0 has \(140.4 GiB\); ask for at most 143771M",
        ),
        (ask(memory=64 * MIB), DEFAULTS, r"--mps-mem=64M is less than a CUDA context costs.*514 MiB.*more than 514M"),
        (ask(25.0, 145 * MIB), DEFAULTS, "about 145 MiB"),
        (ask(memory=9 * GIB), SiteConfig(limits_memory_max="8G"), "--mps-mem=9G: this site allows at most 8G"),
        (ask(memory=GIB), SiteConfig(limits_memory_min="2G"), "--mps-mem=1G: this site allows 2G and more"),
    ],
)
def test_refusals_say_the_number(request_: JobRequest, config: SiteConfig, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_plan(request_, config, GPUS)


def test_a_limit_just_above_what_a_context_costs_is_taken() -> None:
    assert make_plan(ask(25.0, 146 * MIB), DEFAULTS, GPUS).limits.memory_bytes == 146 * MIB
    assert make_plan(ask(memory=1 * MIB), SiteConfig(limits_memory_context_mib=0), GPUS).limits.memory_bytes == MIB


def test_a_job_without_gpu_is_told_how_to_get_one() -> None:
    with pytest.raises(RequestError, match="this job has no GPU on this node; ask for one, such as --gres=gpu:1"):
        make_plan(ask(), DEFAULTS, ())


def test_one_gpu_named_twice_is_slurms_mistake() -> None:
    with pytest.raises(NodeError, match="twice"):
        make_plan(ask(), DEFAULTS, (GPUS[0], GPUS[0]))
