"""``slurm-mps metrics``: what hooks, logs and the node say, as Prometheus reads it; and nothing where it is off."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slurm_mps.metrics.totals import BOUNDS, Totals, decode_totals
from slurm_mps.node.wordfile import DamagedFileError
from tests.harness.gpunode import asked
from tests.harness.runtime import MOUNT_POINT
from tests.harness.site import STATE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.gpunode import GpuNode
    from tests.harness.machine import Result

ROOT = Path(__file__).parents[2]
COMMAND = f"{MOUNT_POINT}/bin/slurm-mps"
PLACE = "/var/lib/node_exporter"
FILE = f"{PLACE}/slurm-mps.prom"
ON = f'[metrics]\ntextfile = "{FILE}"\n'
EVENTS = f"{STATE_DIRECTORY}/events"


@pytest.fixture
def node(gpu_node: GpuNode) -> Iterator[GpuNode]:
    """A node with metrics switched on, on which nothing was counted yet."""
    kept = "events events-taken metrics last-fault"
    forget = f"cd {STATE_DIRECTORY} 2>/dev/null && rm -f {kept}; rm -rf {PLACE} /var/log/slurm-mps"
    gpu_node.run("sh", "-c", forget)
    gpu_node.run("mkdir", "-p", PLACE).check()
    gpu_node.configure(ON)
    yield gpu_node
    gpu_node.run("sh", "-c", forget)


def metrics(node: GpuNode, *options: str, user: str | None = None) -> Result:
    return node.run(COMMAND, "metrics", *options, user=user)


def samples(text: str) -> dict[str, float]:
    """Every sample of a textfile, as Prometheus's own parser reads it."""
    return {
        sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def written(node: GpuNode) -> dict[str, float]:
    metrics(node).check()
    return samples(node.machine.read(FILE))


def test_what_hooks_did_is_counted_once(node: GpuNode) -> None:
    node.prolog(1).check()
    node.prolog(2, gpus="").check()
    node.prolog(3, gpus="2", **asked(mem="900G")).check()
    node.fault("daemon.start=exit:1")
    assert node.prolog(4, gpus="3").returncode == 1
    node.fault()
    for job in (1, 2, 3):
        node.epilog(job).check()
    first, second = written(node), written(node)
    assert first == second, "a second look counts nothing twice"
    outcomes = {"ready": 1, "refused": 2, "node_fault": 1}
    assert {word: first[f"slurm_mps_prologs_total|outcome={word}"] for word in outcomes} == outcomes
    assert first["slurm_mps_epilogs_total|outcome=done"] == 3
    assert first["slurm_mps_refusals_total|reason=no_gpu"] == 1
    assert first["slurm_mps_refusals_total|reason=memory"] == 1
    assert first["slurm_mps_prolog_duration_seconds_count"] == 4
    assert first["slurm_mps_prolog_duration_seconds_bucket|le=+Inf"] == 4
    assert 0 < first["slurm_mps_prolog_duration_seconds_sum"] < 20
    node.run_job(5)
    assert written(node)["slurm_mps_prologs_total|outcome=ready"] == 2, "counters go on from what is on disk"


def test_what_is_on_the_node_is_shown(node: GpuNode) -> None:
    node.prolog(1).check()
    uuid = node.run("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader").stdout.split()[0]
    child = node.start(
        "simulated-gpus",
        *("client", "--alloc-mib", "1000", "--hold", "60"),
        user="alice",
        env={"CUDA_MPS_PIPE_DIRECTORY": node.pipe_directory(1)},
    )
    for _ in range(100):
        found = written(node)
        if found[f"slurm_mps_clients|gpu={uuid}|job=1"]:
            break
    node.machine.signal(child, 9)
    child.wait(5)
    assert found[f"slurm_mps_clients|gpu={uuid}|job=1"] == 1
    assert found[f"slurm_mps_client_memory_bytes|gpu={uuid}|job=1"] > 1000 * 1024**2
    assert found["slurm_mps_daemons|state=answers"] == found["slurm_mps_servers|state=ACTIVE"] == 1
    assert found["slurm_mps_jobs|state=ready"] == 1
    log = node.machine.read("/var/log/slurm-mps/1/control.log")
    assert "Cmd:get_server_list" in log
    assert "Cmd:ps" not in log, "each minute; what NVML tells is not written into the daemon's log again and again"
    assert (found["slurm_mps_problems"], found["slurm_mps_daemons|state=gone"]) == (0, 0)


def test_what_happens_on_a_daemon_of_joined_jobs_is_counted_once(node: GpuNode) -> None:
    """While they run, when each of them has kept the logs, and when those are gone; the next daemon counts anew."""
    node.confine_devices()
    node.configure(f'{ON}[gpus]\nsharing = "joined"\n')
    faults = []
    for _ in range(2):
        for job in (1, 2, 3):
            node.prolog(job, gpus="0").check()
        node.client(None, "--fault", CUDA_MPS_PIPE_DIRECTORY=f"{STATE_DIRECTORY}/jobs/1/joined-0")
        faults.append(written(node)["slurm_mps_gpu_faults_total"])
        for job in (1, 2, 3):
            node.epilog(job).check()
        faults.append(written(node)["slurm_mps_gpu_faults_total"])
    node.run("sh", "-c", "rm -r /var/log/slurm-mps/*").check()
    faults.append(written(node)["slurm_mps_gpu_faults_total"])
    node.run("rmdir", f"{STATE_DIRECTORY}/daemons").check()
    assert faults == [1, 1, 2, 2, 2]


def test_faults_are_counted_from_the_logs_while_jobs_run_and_after_their_logs_are_gone(node: GpuNode) -> None:
    """Jobs that were over before the first count are history and not counted."""
    node.prolog(1).check()
    node.client(1, "--fault")
    node.epilog(1).check()
    assert written(node)["slurm_mps_gpu_faults_total"] == 0
    node.prolog(2).check()
    node.client(2, "--fault")
    assert written(node)["slurm_mps_gpu_faults_total"] == 1
    node.client(2, "--trap")
    node.epilog(2).check()
    assert written(node)["slurm_mps_gpu_faults_total"] == 2
    node.run("rm", "-r", "/var/log/slurm-mps/2").check()
    assert written(node)["slurm_mps_gpu_faults_total"] == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_count_that_was_killed_half_way_is_neither_lost_nor_doubled(node: GpuNode, when: str) -> None:
    """Between setting the events aside and forgetting them; before or after their count was on disk."""
    node.run_job(1)
    state = node.machine.path(STATE_DIRECTORY)
    if when == "after":
        events = (state / "events").read_bytes()
        changed = (state / "events").stat().st_mtime_ns
        metrics(node).check()
        (state / "events-taken").write_bytes(events)
        inode = (state / "events-taken").stat().st_ino
        os.utime(state / "events-taken", ns=(changed, changed))
        text = (state / "metrics").read_bytes()
        counted = decode_totals(text)
        counted.taken = f"{inode}:{changed}"
        (state / "metrics").write_bytes(counted.encode())
    else:
        (state / "events").rename(state / "events-taken")
    assert written(node)["slurm_mps_prologs_total|outcome=ready"] == 1
    assert not (state / "events-taken").exists()


def test_where_metrics_are_off_hooks_note_nothing(node: GpuNode) -> None:
    node.configure("")
    node.run_job(1)
    assert not node.machine.path(EVENTS).exists()
    said = metrics(node)
    assert (said.returncode, said.stdout) == (3, "")
    assert "metrics are off" in said.stderr
    assert not node.machine.path(FILE).exists()


def test_what_was_written_before_a_reboot_does_not_stay(node: GpuNode) -> None:
    """Zeros take its place before the first job: Prometheus shows that job's refusal only as an increase."""
    node.run_job(1, **asked(mem="900G"))
    assert written(node)["slurm_mps_refusals_total|reason=memory"] == 1
    node.run("rm", "-r", STATE_DIRECTORY).check()
    assert written(node)["slurm_mps_refusals_total|reason=memory"] == 0


def test_print_changes_nothing(node: GpuNode) -> None:
    node.prolog(1).check()
    before = node.machine.read(EVENTS)
    said = metrics(node, "--print")
    node.epilog(1).check()
    assert samples(said.stdout)["slurm_mps_prologs_total|outcome=ready"] == 1
    assert node.machine.read(EVENTS).startswith(before)
    assert not node.machine.path(FILE).exists()
    assert not node.machine.path(f"{STATE_DIRECTORY}/metrics").exists()


def test_reconcile_is_counted_and_minds_none_of_the_files(node: GpuNode) -> None:
    node.run_job(1)
    metrics(node).check()
    node.run(COMMAND, "reconcile").check()
    assert written(node)["slurm_mps_reconciliations_total|outcome=repaired"] == 0


def test_a_directory_that_others_can_write_is_not_written_to(node: GpuNode) -> None:
    """A link that somebody puts there would have root write where it points."""
    node.run_job(1)
    node.run("chown", "alice", PLACE).check()
    said = metrics(node)
    assert said.returncode == 1
    assert said.stderr == f"slurm-mps: {PLACE} can be written by others than root\n"
    assert not list(node.machine.path(PLACE).iterdir())


def test_only_root_writes_metrics_and_all_can_read_them(node: GpuNode) -> None:
    node.run_job(1)
    assert metrics(node, user="alice").returncode == 4
    metrics(node).check()
    assert node.machine.path(FILE).stat().st_mode & 0o777 == 0o644
    assert node.machine.path(EVENTS).exists() is False
    node.run("cat", FILE, user="alice").check()


def test_the_events_have_a_bound(node: GpuNode) -> None:
    node.prolog(1).check()
    path = node.machine.path(EVENTS)
    path.write_bytes(b"x" * 1024**2)
    node.epilog(1).check()
    assert path.stat().st_size == 1024**2
    assert written(node)["slurm_mps_epilogs_total|outcome=done"] == 0


def test_a_hook_that_cannot_note_does_its_work(node: GpuNode) -> None:
    node.prolog(1).check()
    path = node.machine.path(EVENTS)
    path.unlink()
    path.symlink_to("/etc/passwd")
    before = node.machine.read("/etc/passwd")
    assert node.epilog(1).returncode == 0
    assert node.machine.read("/etc/passwd") == before
    path.unlink()


# ---------------------------------------------------------------------------------------------------- without a node


def test_what_was_counted_is_read_back() -> None:
    totals = Totals()
    totals.count_events("prolog ready 0.1 -\nprolog refused 0.3 no_gpu\nepilog done 40 -\nreconcile would repair 2 -\n")
    totals.logs["7"] = ("10:2", [1, 0, 2])
    totals.taken = "7:9"
    again = decode_totals(totals.encode())
    assert again.durations == totals.durations
    assert again.durations["prolog"][:2] == [2, pytest.approx(0.4)]
    assert again.durations["prolog"][2:] == [float(bound >= 0.1) + (bound >= 0.3) for bound in BOUNDS]
    assert again.durations["epilog"][2:] == [0] * len(BOUNDS)
    assert (list(again.logs["7"]), again.taken, again.log_totals()) == (["10:2", [1, 0, 2]], "7:9", totals.log_totals())
    assert again.count_of("refusal", "no_gpu") == 1


@pytest.mark.parametrize(
    "line", ["", "prolog", "prolog ready x -", "prolog ready nan -", "prolog ready -1 -", "x y 1 -"]
)
def test_a_line_that_is_no_event_is_left_out(line: str) -> None:
    totals = Totals()
    totals.count_events(f"{line}\n")
    assert totals.counts == {}


def test_counts_that_were_damaged_are_begun_anew() -> None:
    with pytest.raises(DamagedFileError):
        decode_totals(Totals().encode().replace(b"duration", b"duratiom"))


# --------------------------------------------------------------------------------------------- what lies beside it


def _series(before: dict[str, float], after: dict[str, float]) -> list[dict[str, str]]:
    """A node's samples for promtool: two minutes of each, one every minute."""
    found = []
    for name, value in after.items():
        metric, *labels = name.split("|")
        pairs = [label.partition("=")[::2] for label in labels] + [("instance", "n1")]
        quoted = ",".join(f'{key}="{value}"' for key, value in pairs)
        old = before.get(name, "_")
        found.append({"series": f"{metric}{{{quoted}}}", "values": f"{old} {old} {value} {value}"})
    return found


def test_each_panel_of_the_dashboard_shows_what_happened(node: GpuNode, tmp_path: Path) -> None:
    """Prometheus's own evaluator, on what a node wrote before and after something of each kind happened."""
    dashboard = json.loads((ROOT / "etc/grafana-slurm-mps.json").read_text())
    node.run_job(1)
    before = written(node)
    node.run_job(1, **asked(mem="900G"))
    node.prolog(2).check()
    node.client(2, "--fault")
    node.run("sh", "-c", f"printf '%s\\n' 'reconcile repaired 1 -' >> {EVENTS}; chmod 600 {EVENTS}").check()
    after = written(node)
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) >= 8
    assert set(re.findall(r"slurm_mps_\w+", " ".join(queries))) <= {name.partition("|")[0] for name in after}
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed, `make test-accounting` installs it; that the metrics exist was seen")
    nothing = "refused_clients", "server_deaths"  # of these, that none happened
    checks = []
    for query in queries:
        moves = re.search(r"rate\(|increase\(", query) and not any(name in query for name in nothing)
        judged = f"{'max' if moves else 'count'}({query.replace('$node', '.*')}) > bool 0"
        checks.append({"expr": judged, "eval_time": "3m", "exp_samples": [{"labels": "{}", "value": 1}]})
    test = {"interval": "1m", "input_series": _series(before, after), "promql_expr_test": checks}
    (tmp_path / "test.yml").write_text(json.dumps({"evaluation_interval": "1m", "tests": [test]}))
    evaluate = ["promtool", "test", "rules", str(tmp_path / "test.yml")]
    said = subprocess.run(evaluate, capture_output=True, text=True, timeout=30, check=False)
    assert said.returncode == 0, said.stderr + said.stdout


@pytest.mark.parametrize("name", ["slurm-mps-metrics.service", "slurm-mps-metrics.timer"])
def test_the_units_name_each_other_and_a_command_that_there_is(node: GpuNode, name: str) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "etc" / name)
    if name.endswith(".timer"):
        assert unit["Timer"]["OnUnitActiveSec"]
        return
    program, *words = unit["Service"]["ExecStart"].split()
    assert program == COMMAND
    assert "usage:" in node.run(program, *words, "--help").check().stdout
