"""``slurm-mps status`` inside jobs of the real Slurm, by their user."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.harness.runtime import MOUNT_POINT

if TYPE_CHECKING:
    from tests.harness.site import Site

COMMAND = f"{MOUNT_POINT}/bin/slurm-mps"


def test_a_user_sees_their_job_from_within_it(any_site: Site) -> None:
    """Devices confined or not: every rank with its GPU, its cap, its limit and what it uses."""
    script = f"""
        srun -n4 --overlap simulated-gpus client --device 0 --alloc-mib 500 --hold 15 >/dev/null &
        for i in $(seq 100); do
            {COMMAND} status --json > st
            [ $(grep -c '"rank": [0-9]' st) = 4 ] && break
        done
        sleep 1 # a client is listed before it has its memory
        {COMMAND} status --json
        scancel -s TERM $SLURM_JOB_ID.0
        wait
    """
    job = any_site.cluster.sbatch("-wn1", "-n5", "--gres=gpu:2", "--mps-threads=25", "--mps-mem=8G", script=script)
    any_site.cluster.wait(job)
    said = any_site.cluster.output(job)
    assert "status/1" in said, said
    report = json.JSONDecoder().raw_decode(said[said.index('{\n  "report"') :])[0]
    (daemon,) = report["jobs"][0]["daemons"]
    clients = [client for gpu in daemon["gpus"] for client in gpu["clients"]]
    given = {(client["step"], client["thread_percentage"], client["limit_bytes"]) for client in clients}
    assert (report["status"], report["problems"], report["jobs"][0]["job_id"]) == (0, [], job.id)
    assert sorted(client["rank"] for client in clients) == [0, 1, 2, 3]
    assert given == {("0", 25, 8 << 30)}
    assert all(client["memory_bytes"] > 500 << 20 for client in clients)
    assert [gpu["compute_mode"] for gpu in daemon["gpus"]] == ["EXCLUSIVE_PROCESS"] * 2
