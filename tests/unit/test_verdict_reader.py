"""What status, logs and explain read of a verdict is what the prolog wrote into it."""

from __future__ import annotations

import pytest

from slurm_mps.state import VERDICT_VERSION, Verdict, refused
from slurm_mps.status.verdict import DaemonPlace, JobVerdict, parse_verdict
from slurm_mps.wordfile import DamagedFileError, NewerFileError, encode

PIPE, LOG = "/run/slurm-mps/jobs/7", "/var/log/slurm-mps/7"
GPUS = ("GPU-51000000-99a9-0495-d04f-b3afe1238f4c", "GPU-51000000-fc4b-2381-c253-bcc185995317")
ROWS = tuple(("gpu", f"{n} {n} {uuid} 142641 143771") for n, uuid in enumerate(GPUS))


def written(*settings: tuple[str, str]) -> JobVerdict:
    return parse_verdict(Verdict("ready", settings=(("thread_percentage", "12.5"), *settings, *ROWS)).encode())


def test_one_daemon_serves_all_gpus() -> None:
    found = written(("daemon", f"{PIPE}/pipe {LOG} 8G"), ("auto", "memory"))
    place = DaemonPlace("", f"{PIPE}/pipe", LOG, 8 << 30, GPUS)
    assert found == JobVerdict("ready", "", "12.5", ("memory",), (place,))


def test_each_gpu_has_its_own_daemon_and_limit() -> None:
    daemons = [("daemon", f"{PIPE}/gpu-{n} {LOG}/gpu-{n} {limit}") for n, limit in enumerate(("8G", "-"))]
    found = written(("daemons", "per-gpu"), *daemons)
    assert [(place.name, place.memory_bytes, place.gpus) for place in found.daemons] == [
        ("gpu-0", 8 << 30, GPUS[:1]),
        ("gpu-1", None, GPUS[1:]),
    ]


def test_a_refusal_has_its_message_and_no_daemon() -> None:
    assert parse_verdict(refused("no GPU").encode()) == JobVerdict("refused", "no GPU")


@pytest.mark.parametrize(
    "settings",
    [
        [("daemon", f"{PIPE}/pipe {LOG} 8G"), ("daemon", f"{PIPE}/gpu-0 {LOG} 8G")],
        [("daemons", "per-gpu"), ("daemon", f"{PIPE}/gpu-0 {LOG} 8G")],
        [("daemon", f"{PIPE}/pipe {LOG}")],
        [("daemon", f"{PIPE}/pipe {LOG} much")],
    ],
    ids=["one too many", "one too few", "no limit word", "no size"],
)
def test_daemons_and_gpus_that_do_not_go_together_are_damage(settings: list[tuple[str, str]]) -> None:
    with pytest.raises(DamagedFileError):
        written(*settings)


def test_a_newer_verdict_is_refused() -> None:
    with pytest.raises(NewerFileError):
        parse_verdict(encode("verdict", VERDICT_VERSION + 1, ["status ready"]))
