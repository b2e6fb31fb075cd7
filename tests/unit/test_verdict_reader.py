"""What the prolog writes into a verdict is what status, logs and explain read of it."""

from __future__ import annotations

import pytest

from slurm_mps.job.verdict import (
    VERDICT_VERSION,
    DaemonPlace,
    Verdict,
    VerdictGpu,
    parse_verdict,
    refused,
    without,
)
from slurm_mps.node.wordfile import DamagedFileError, NewerFileError, encode
from slurm_mps.record import replace

PIPE, LOG = "/run/slurm-mps/jobs/7", "/var/log/slurm-mps/7"
UUIDS = ("GPU-51000000-99a9-0495-d04f-b3afe1238f4c", "GPU-51000000-fc4b-2381-c253-bcc185995317")
ONE = Verdict(
    "ready",
    uid=20001,
    daemons=(DaemonPlace("", f"{PIPE}/pipe", LOG, 8 << 30, UUIDS),),
    gpus=tuple(VerdictGpu(number, number, uuid, 142641, 143771) for number, uuid in enumerate(UUIDS)),
    thread_percentage=12.5,
    thread_percentage_min=5.0,
    memory_min="2M",
    context_mib=514,
    clients_per_gpu=48,
    auto=("memory",),
    client_priority=1,
    share_percentage=25.0,
    shards_per_gpu=4,
    share_memory=True,
    visible_devices="ordinal",
    probe=("/opt/slurm-mps/bin/python3", "/opt/slurm-mps/probe.py"),
    explain="/opt/slurm-mps/explain.py",
    unguarded=True,
)
EACH = replace(
    ONE,
    per_gpu=True,
    daemons=tuple(
        DaemonPlace(f"gpu-{number}", f"{PIPE}/gpu-{number}", f"{LOG}/gpu-{number}", limit, (UUIDS[number],))
        for number, limit in enumerate((8 << 30, None))
    ),
)


JOINED = replace(
    EACH,
    daemons=tuple(
        DaemonPlace(
            f"gpu-{number}",
            f"{PIPE}/joined-{number}",
            f"/var/log/slurm-mps/{uuid}",
            8 << 30,
            (uuid,),
            f"/run/d/{uuid}.7",
        )
        for number, uuid in enumerate(UUIDS)
    ),
)


@pytest.mark.parametrize(
    "verdict", [ONE, EACH, JOINED, refused("no GPU", "no_gpu"), without("no daemon")], ids=lambda one: one.status
)
def test_it_is_read_as_it_was_written(verdict: Verdict) -> None:
    assert parse_verdict(verdict.encode()) == verdict


def test_each_field_is_read_as_it_was_written() -> None:
    """A field that is new, and that the verdicts above do not set, would be forgotten unseen."""
    unset = Verdict("")
    seen = [ONE, EACH, JOINED, refused("no GPU", "no_gpu")]
    assert [name for name in vars(unset) if all(getattr(one, name) == getattr(unset, name) for one in seen)] == []


def changed(verdict: Verdict, key: str, *values: str) -> bytes:
    """A verdict with other lines of one key."""
    kept = [f"{name} {value}" for name, value in verdict.settings() if name != key]
    return encode("verdict", VERDICT_VERSION, [*kept, *(f"{key} {value}" for value in values)])


@pytest.mark.parametrize(
    ("verdict", "daemons"),
    [
        (ONE, [f"{PIPE}/pipe {LOG} 8G", f"{PIPE}/gpu-0 {LOG} 8G"]),
        (EACH, [f"{PIPE}/gpu-0 {LOG} 8G"]),
        (ONE, []),
        (ONE, [f"{PIPE}/pipe {LOG}"]),
        (ONE, [f"{PIPE}/pipe {LOG} much"]),
    ],
    ids=["one too many", "one too few", "none", "no limit word", "no size"],
)
def test_daemons_and_gpus_that_do_not_go_together_are_damage(verdict: Verdict, daemons: list[str]) -> None:
    with pytest.raises(DamagedFileError):
        parse_verdict(changed(verdict, "daemon", *daemons))


def test_a_newer_verdict_is_refused() -> None:
    with pytest.raises(NewerFileError):
        parse_verdict(encode("verdict", VERDICT_VERSION + 1, ["status ready"]))
