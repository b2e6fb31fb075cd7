"""What a user gets through a real Slurm: submissions of every kind, a plugin of their own, the task's environment."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.attacks.weakened import attack
from tests.harness.cluster import LOG_DIRECTORY, REPOSITORY, SAMPLES, Job
from tests.harness.site import Site

if TYPE_CHECKING:
    from tests.harness.machine import Result

HOSTILE_SUBMISSIONS = 40
OPTION = "SLURM_SPANK__SLURM_SPANK_OPTION_mps_mps"
SCRIPT = "echo it ran"
PIECES = (
    "25", "8G", "-1G", "1.5G", "\n", "\r\n", "\t", " ", "\x1b[2J", "\x07", "\x7f", "\udc80", "\udcff", "é", "\u202e",
    "$(touch /tmp/owned)", "`touch /tmp/owned`", ";touch /tmp/owned", "|touch /tmp/owned", "&", "'", '"', "\\", "../",
    "%s%n", "quit\n", "set_default_active_thread_percentage 100\n", "status ready\n", "9" * 500, "A" * 60_000, "=", ",",
)  # fmt: skip


@pytest.fixture(scope="module")
def free_spank(shared_site: Site) -> bytes:
    """A user's own plugin, which sends what it likes to the prolog; built where its Slurm is."""
    target, source = "/home/alice/free.so", REPOSITORY / "tests/slurm/free_spank.c"
    shared_site.machine.run(["cc", "-shared", "-fPIC", "-o", target, source]).check()
    return shared_site.machine.path(target).read_bytes()


def past_the_plugin(site: Site, plugin: bytes, *, names: dict[str, str]) -> dict[str, str]:
    """Alice's environment for a submission with her own plugin in place of the site's."""
    machine = site.machine
    machine.path("/home/alice/free.so").write_bytes(plugin)
    machine.write("/home/alice/plugstack.conf", "required /home/alice/free.so\n")
    conf = machine.read("/etc/slurm/slurm.conf")
    machine.write("/home/alice/slurm.conf", conf.replace("/etc/slurm/plugstack.conf", "/home/alice/plugstack.conf"))
    return {"SLURM_CONF": "/home/alice/slurm.conf", **{f"FREE_{name}": value for name, value in names.items()}}


def hostile_environment(site: Site, plugin: bytes, choose: random.Random) -> dict[str, str]:
    """One of the ways in, with values of every kind that an environment can hold."""
    value = "".join(choose.choices(PIECES, k=choose.randint(1, 5)))[:100_000]
    other = "".join(choose.choices(PIECES, k=choose.randint(0, 3)))[:2000]
    name = choose.choice(("MPS", "MPS_THREADS", "MPS_MEM", "MPS_PRIORITY", "MPS_X", "MPS_\x1b[2J", "MPS_ a;b"))
    ways: tuple[dict[str, str], ...] = (
        past_the_plugin(site, plugin, names={name: value, "MPS_THREADS": other}),
        past_the_plugin(site, plugin, names={f"X{number}": "y" * 300 for number in range(200)} | {name: value}),
        {f"{OPTION}_threads": value, f"{OPTION}_mem": other},
        {"SLURM_SPANK_MPS": "1", "SLURM_SPANK_MPS_THREADS": value, "SPANK_MPS_THREADS": value},
        {"CUDA_VISIBLE_DEVICES": value, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": value, OPTION: "", f"{OPTION}_mem": "2G"},
    )
    return choose.choice(ways)


def submit(site: Site, env: dict[str, str], *args: str) -> Result:
    return site.cluster.try_sbatch("--gres=gpu:1", *args, script=SCRIPT, env=env)


def test_forty_hostile_submissions_drain_no_node(site: Site, free_spank: bytes) -> None:
    """Refused where they are typed, or failed with a message, or without MPS; the fixture sees to all the rest."""
    choose = random.Random(4711)
    log = site.machine.path(f"{LOG_DIRECTORY}/slurmctld.log")
    before = log.stat().st_size
    submitted = 0
    for number in range(HOSTILE_SUBMISSIONS):
        args = ("--export=NONE",) if number % 2 else ()
        result = submit(site, hostile_environment(site, free_spank, choose), *args)
        submitted += result.returncode == 0
    site.cluster.wait_idle(90)
    assert submitted > HOSTILE_SUBMISSIONS // 2
    assert b"Prolog error" not in log.read_bytes()[before:]
    assert not any(site.machine.path("/tmp/owned", node=node).exists() for node in site.nodes)
    assert all(state.state in ("IDLE", "IDLE+PLANNED") for state in site.cluster.node_states().values())


@pytest.mark.every_release
@attack("a user's mistake is not the node's fault")
def test_a_mistake_drains_no_node(cluster: Site, free_spank: bytes, works: bool) -> None:
    """The weaker build shows that the test above can fail: one such job takes the node."""
    env = past_the_plugin(cluster, free_spank, names={"MPS": "1", "MPS_THREADS": "0"})
    job = Job(int(submit(cluster, env, "--export=NONE", "--no-requeue").stdout), "alice")

    def look() -> bool | None:
        drained = any(state.drained for state in cluster.cluster.node_states().values())
        return True if drained else False if cluster.cluster.job_info(job).state == "FAILED" else None

    assert cluster.cluster.until("a failed job or a drained node", look, 30) is works


@attack("a task's memory limit is one that the driver can use")
def test_a_job_that_lifts_its_limit_by_a_variable(cluster: Site, works: bool) -> None:
    """A value that the driver cannot use takes the daemon's limit away altogether (O12)."""
    env = {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "junk"}
    result = cluster.cluster.srun("--gres=gpu:1", "--mps-mem=8G", "simulated-gpus", "client", env=env)
    free = int(result.stdout.partition(" free=")[2].partition(" ")[0])
    assert (free > 8192) is works


def too_long(site: Site, plugin: bytes) -> dict[str, str]:
    """One variable over 128 KiB, more than execve(2) takes."""
    return past_the_plugin(site, plugin, names={"X": "9" * (128 * 1024 - len("FREE_X=") - 1)})


def test_a_request_that_no_prolog_can_be_given_drains_the_node(site: Site, free_spank: bytes) -> None:
    """Slurm takes a prolog that cannot be started for one that failed; so it is on any site that has one."""
    result = submit(site, too_long(site, free_spank), "--export=NONE", "--no-requeue")
    assert result.returncode == 0

    def drained() -> list[str] | None:
        return [name for name, state in site.cluster.node_states().items() if state.drained] or None

    (node,) = site.cluster.until("a drained node", drained, 20)
    site.cluster.wait_idle()
    site.cluster.resume(node)


class GuardedSite(Site):
    """A site whose controller refuses such a request."""

    def configure(self, text: str) -> None:
        super().configure(text)
        self.machine.write("/etc/slurm/job_submit.lua", (SAMPLES / "job_submit.lua").read_text())


def test_a_request_that_no_prolog_can_be_given_is_refused_by_the_controller(free_spank: bytes) -> None:
    """With etc/job_submit.lua: one variable that is too long, or many that are together; others are let through."""
    with GuardedSite(nodes=1, extra_slurm_conf="JobSubmitPlugins=lua") as site:
        refused = submit(site, too_long(site, free_spank), "--export=NONE")
        many = submit(site, past_the_plugin(site, free_spank, names={f"X{n}": "y" * 4000 for n in range(20)}))
        fine = submit(site, past_the_plugin(site, free_spank, names={"X": "9" * 4000}))
        site.cluster.wait_idle()
        assert "the variables that plugins send along with this job are too long" in refused.stderr
        assert (refused.returncode, many.returncode, fine.returncode) == (1, 1, 0)
        assert not site.cluster.node_states()["n1"].drained
