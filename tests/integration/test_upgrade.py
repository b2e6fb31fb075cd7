"""A job that began under another version of slurm-mps, or of Slurm, than it ends under.

data/slurm_mps-journal-1.tar.xz is what ran as prolog and epilog when journals had version 1: the package of commit
3fb0dc7 without the parts that only users run. data/spank-verdict-1.tar.xz is that commit's plugin, in source. Both run
here as they are.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slurm_mps.state import JOURNAL_VERSION, VERDICT_VERSION
from tests.harness.gpunode import EPILOG, PROLOG, GpuNode, asked, job_environment
from tests.harness.release import chosen
from tests.harness.site import PLUGIN_DIRECTORY, STATE_DIRECTORY, Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cluster import Job
    from tests.harness.machine import Result

OLD = "/srv/old"
VERDICTS = Path(__file__).parents[1] / "unit/verdicts"
JOURNAL = f"{STATE_DIRECTORY}/jobs/4711/journal"


@pytest.fixture(scope="module")
def node_of_both() -> Iterator[GpuNode]:
    """A node with this version installed, and the old one below OLD with scripts of its own."""
    with GpuNode(gpus=2) as node:
        node.run("rm", "/etc/slurm/mps.toml").check()  # the old one would have it compiled by the new one
        node.machine.make_directory(OLD)
        with tarfile.open(Path(__file__).with_name("data") / "slurm_mps-journal-1.tar.xz") as archive:
            archive.extractall(node.machine.path(OLD))
        yield node


@pytest.fixture
def node(node_of_both: GpuNode) -> Iterator[GpuNode]:
    before = node_of_both.snapshot()
    yield node_of_both
    after = node_of_both.snapshot()
    node_of_both.clean()
    assert after == before


def old(node: GpuNode, hook: str, **spank: str) -> Result:
    """Run the old version's prolog or epilog."""
    script = {"prolog": PROLOG, "epilog": EPILOG}[hook]
    changed = node.machine.read(script).replace(f"package={node.package}", f"package={OLD}/slurm_mps")
    node.machine.write(f"{OLD}/{hook}", changed, mode=0o755)
    return node.run(f"{OLD}/{hook}", env=job_environment(4711, **spank))


def version(node: GpuNode) -> str:
    return node.machine.read(JOURNAL).splitlines()[0].split()[2]


def test_a_job_of_the_old_version_ends_under_the_new_one(node: GpuNode) -> None:
    node.set_compute_modes(2, 0)
    old(node, "prolog", **asked("25", "8G")).check()
    assert version(node) == "1"
    assert "sms=32 " in node.client(4711).check().stdout
    assert node.epilog(4711).stderr == ""
    assert node.files() == []
    assert node.mps_processes() == []
    assert node.compute_modes() == [2, 0]
    node.set_compute_modes(0)


def test_a_second_run_of_a_job_is_brought_up_by_the_new_version(node: GpuNode) -> None:
    """Requeued onto the same node, its second prolog is of the new version, and starts anew."""
    old(node, "prolog", **asked("25")).check()
    environment = job_environment(4711, SLURM_JOB_RESTART_COUNT="1", **asked("50"))
    node.run(PROLOG, env=environment).check()
    assert version(node) == str(JOURNAL_VERSION)
    assert "sms=66 " in node.client(4711).check().stdout
    node.epilog(4711).check()


def test_a_job_of_the_new_version_is_kept_by_the_old_one(node: GpuNode) -> None:
    """After a downgrade: said what is in the way, nothing is touched, and the new version can still end it."""
    node.prolog(4711, **asked("25", "8G")).check()
    whole = node.machine.path(JOURNAL).read_bytes()
    for hook in ("epilog", "prolog"):
        result = old(node, hook, SLURM_JOB_RESTART_COUNT="1", **asked())
        assert result.returncode == 1
        assert f"journal version {JOURNAL_VERSION} is newer than version 1" in result.stderr
        assert node.machine.path(JOURNAL).read_bytes() == whole
    assert "sms=32 " in node.client(4711).check().stdout
    assert node.compute_modes() == [3, 3]
    node.epilog(4711).check()


def test_a_gpu_that_a_job_of_each_version_holds_gets_back_its_mode(node: GpuNode) -> None:
    """Ledgers are read by both: the last to leave puts back what the first one found."""
    old(node, "prolog", **asked("25")).check()
    assert node.prolog(4712, gpus="0").returncode == 0
    refused = node.verdict(4712)
    node.epilog(4712).check()
    assert "is held by MPS job 4711" in refused["message"]
    node.epilog(4711).check()
    assert node.compute_modes() == [0, 0]


@pytest.mark.skipif(not chosen().upgrades_from, reason="no other release here can be upgraded to this one")
@pytest.mark.parametrize(
    "autodetect",
    [pytest.param(True, id="by UUID, confined", marks=pytest.mark.every_release), pytest.param(False, id="by index")],
)
def test_a_job_goes_on_and_ends_while_slurm_is_upgraded(autodetect: bool) -> None:
    """Its daemon serves on, a step of the new Slurm has its limits, and the new epilog leaves nothing.

    With AutoDetect the old prolog was told indices, and the new Slurm speaks of UUIDs; devices are confined then. The
    job's verdict names the package of the old Debian's Python: after a step that ended badly the server is tried when
    the link of docs/admins.md is there.
    """
    found = chosen().autodetect if autodetect else ""
    with Site(nodes=1, upgraded_from=chosen().upgrades_from, autodetect=found, constrain_devices=bool(found)) as site:
        before = site.snapshot()
        version = site.machine.run(["srun", "--version"]).stdout
        client = "simulated-gpus client"
        waits = "while [ ! -e %s ]; do sleep 0.1; done"
        back = "until timeout 10 srun true; do sleep 1; done"  # now and then the first srun after it waits for ever
        bad = f"{back}; srun {client}; srun false; srun {client}"
        steps = [client, waits % "go", bad, waits % "linked", f"srun {client}"]
        job = site.cluster.sbatch("--gres=gpu:2", "--mps-threads=25", script="; ".join(steps))
        site.cluster.until_output(job, "uuid=")
        old_package = package_of(site, job)
        site.upgrade()
        assert site.machine.run(["srun", "--version"]).stdout != version
        site.machine.write("/home/alice/go", "")
        path = f"/home/alice/slurm-{job}.out"  # slurmctld has forgotten where it is
        refusal = "was slurm-mps moved or removed?"  # an srun that found slurmd not back yet tries again after 30 s
        site.cluster.until("a refusal", lambda: refusal in site.machine.read(path) or None, 90)
        new_python = site.node("n1", "sh", "-c", "cd /opt/slurm-mps/lib && ls -d python3.*").check().stdout.strip()
        assert new_python not in old_package
        old_python = f"/opt/slurm-mps/lib/{old_package.split('/')[4]}"
        site.node("n1", "ln", "-s", new_python, old_python).check()
        site.machine.write("/home/alice/linked", "")
        state = site.cluster.wait(job).state
        output = site.machine.read(path)
        site.node("n1", "rm", old_python).check()
        after = site.cluster.srun("--gres=gpu:2", "--mps-threads=50", "simulated-gpus", "client")
        site.cluster.wait_idle()
        drained = site.cluster.node_states()["n1"].drained
        left = site.snapshot()
    assert (state, output.count(" sms=32 ")) == ("COMPLETED", 3), output
    assert len(set(re.findall(r"uuid=\S+", output))) == 1, output
    assert " sms=66 " in after.stdout, after
    assert not drained
    assert left == before


def package_of(site: Site, job: Job) -> str:
    """The program that tries a job's server, as its verdict names it."""
    verdict = site.machine.read(f"{STATE_DIRECTORY}/jobs/{job}/verdict", node="n1")
    (words,) = re.findall("^probe (.*)", verdict, re.MULTILINE)
    return str(words.split()[1])


class UpgradedSite:
    """A cluster that has the old version, the new one, or one's hooks with the other's plugin."""

    def __init__(self, site: Site, plugins: dict[str, bytes], packages: dict[str, str]) -> None:
        self.site = site
        self._plugins = plugins
        self._packages = packages

    def install(self, *, plugin: str, hooks: str) -> None:
        """Put a version's files in place as its own installer would: each whole, by rename."""
        machine = self.site.machine
        machine.run(["rm", "-f", "/etc/slurm/mps.toml"]).check()  # the old one would have it compiled by the new one
        machine.path(f"{PLUGIN_DIRECTORY}/.next").write_bytes(self._plugins[plugin])
        machine.run(["mv", f"{PLUGIN_DIRECTORY}/.next", f"{PLUGIN_DIRECTORY}/spank_mps.so"]).check()
        for script in (PROLOG, EPILOG):
            machine.run(["sed", "-i", f"s|^package=.*|package={self._packages[hooks]}|", script]).check()

    def start(self, script: str, *options: str) -> Job:
        """A job of two ranks that has come to its first waiting place."""
        asked = ("-n2", "--gres=gpu:2", "--mps-threads=25", "--mps-mem=8G")
        job = self.site.cluster.sbatch("-wn1", *options, *asked, script=WAIT + script)
        self.site.cluster.until("the job", lambda: "waits" in self.site.cluster.output(job) or None, 20)
        return job

    def go(self) -> None:
        self.site.machine.write("/home/alice/go", "")

    def head(self, job: Job) -> str:
        return self.site.machine.read(f"{STATE_DIRECTORY}/jobs/{job}/verdict", node="n1").splitlines()[0]


CLIENT = "simulated-gpus client"
#: As a GPU shows itself to a rank with the job's limits.
RIGHT = r"uuid=GPU-\S+ sms=32 free=8047 "
WAIT = "wait_for_go() { echo waits; while [ ! -e go ]; do sleep 0.1; done; }\n"


@pytest.fixture(scope="module")
def site_of_both() -> Iterator[UpgradedSite]:
    """A site with this version installed, and the old one below OLD, its plugin built for the Slurm that runs there."""
    with Site(gpus_per_node=2) as site:
        machine = site.machine
        machine.make_directory(OLD)
        for name in ("slurm_mps-journal-1", "spank-verdict-1"):
            with tarfile.open(Path(__file__).with_name("data") / f"{name}.tar.xz") as archive:
                archive.extractall(machine.path(OLD))
        machine.run(["make", "-s", "-C", f"{OLD}/spank", f"BUILD={OLD}/built"]).check()
        package = next(line for line in machine.read(PROLOG).splitlines() if line.startswith("package="))
        plugins = {"old": f"{OLD}/built/spank_mps.so", "new": f"{PLUGIN_DIRECTORY}/spank_mps.so"}
        yield UpgradedSite(
            site,
            {name: machine.path(path).read_bytes() for name, path in plugins.items()},
            {"old": f"{OLD}/slurm_mps", "new": package.removeprefix("package=")},
        )


@pytest.fixture
def upgraded(site_of_both: UpgradedSite) -> Iterator[UpgradedSite]:
    """A site of the new version; whatever the test did, no node is drained and nothing is left."""
    site = site_of_both.site
    before = site.snapshot()
    yield site_of_both
    site.machine.path("/home/alice/go").unlink(missing_ok=True)
    site.machine.run(["scancel", "--user=alice"])
    after = site.snapshot()
    drained = [name for name, state in site.cluster.node_states().items() if state.drained]
    site_of_both.install(plugin="new", hooks="new")
    assert after == before
    assert not drained


def test_a_step_runs_across_the_upgrade_and_the_next_ones_have_what_the_job_has(upgraded: UpgradedSite) -> None:
    """Two nodes, old prolog, old step; new plugin and hooks while it runs; then new steps, one of them a bad one."""
    upgraded.install(plugin="old", hooks="old")
    script = f"""
        srun -n2 sh -c '{CLIENT}; [ $SLURM_PROCID = 0 ] && echo waits; while [ ! -e go ]; do sleep 0.1; done; {CLIENT}'
        echo step $?
        echo next; srun -n2 {CLIENT}
        echo lower; srun -n1 --mps-threads=10 --mps-mem=4G {CLIENT}
        echo higher; srun -n1 --mps-threads=50 echo ran
        echo auto; srun -n2 --mps-mem=auto echo ran
        echo bad; srun -n1 false; srun -n2 {CLIENT}
        echo end; ls /run/slurm-mps/jobs/$SLURM_JOB_ID; slurm-mps status --noheader
    """
    job = upgraded.start(script, "-N2", "-wn1,n2")
    upgraded.install(plugin="new", hooks="new")
    head = upgraded.head(job)
    upgraded.go()
    state = upgraded.site.cluster.wait(job).state
    output = upgraded.site.cluster.output(job)
    parts = re.split(r"^(next|lower|higher|auto|bad|end)$", output, flags=re.MULTILINE)
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert head == "slurm-mps verdict 1"
    assert state == "COMPLETED", output
    assert len(re.findall(RIGHT, parts[0])) == 4, output
    assert "step 0" in parts[0]
    assert len(re.findall(RIGHT, said["next"])) == 2, output
    assert len(re.findall(r" sms=12 free=4025 ", said["lower"])) == 1, output
    assert "--mps-threads=50 is more than the job has (25)" in said["higher"]
    assert "--mps-mem=auto: the job began under an older slurm-mps" in said["auto"]
    assert "ran" not in output.split()
    assert len(re.findall(RIGHT, said["bad"])) == 2, output
    assert "error: mps" not in parts[0] + said["next"] + said["lower"] + said["bad"]
    assert said["end"].split()[:5] == ["config", "journal", "pipe", "verdict", str(job)]  # and no mark


def test_a_job_of_the_new_prolog_under_the_old_plugin_fails_and_drains_nothing(upgraded: UpgradedSite) -> None:
    """An upgrade that forgot the plugin, or a downgrade of it: loud, before any program starts."""
    upgraded.install(plugin="old", hooks="new")
    result = upgraded.site.cluster.srun("-wn1", "--gres=gpu:1", "--mps-threads=25", "echo", "ran")
    assert result.returncode != 0
    assert "ran" not in result.stdout
    assert "cannot be understood; are spank_mps.so and the prolog of the same version?" in result.stderr


def test_a_job_of_the_old_prolog_under_the_new_plugin_has_what_it_asked_for(upgraded: UpgradedSite) -> None:
    """The plugin came first."""
    upgraded.install(plugin="new", hooks="old")
    result = upgraded.site.cluster.srun(
        "-wn1", "-n2", "--gres=gpu:2", "--mps-threads=25", "--mps-mem=8G", *CLIENT.split()
    )
    assert len(re.findall(RIGHT, result.stdout)) == 2, result


@pytest.mark.parametrize("form", sorted(VERDICTS.iterdir()), ids=lambda form: form.name)
def test_a_step_of_a_job_that_any_older_prolog_began(upgraded: UpgradedSite, form: Path) -> None:
    """The file is as that prolog wrote it, but for the job's own number and GPUs."""
    job = upgraded.start(f"wait_for_go\nsrun -n2 {CLIENT}\n")
    place = upgraded.site.machine.path(f"{STATE_DIRECTORY}/jobs/{job}/verdict", node="n1")
    uuids = re.findall(r"^gpu \S+ \S+ (\S+)", place.read_text(), re.MULTILINE)
    text = form.read_text().replace("/4711", f"/{job}")
    for recorded, uuid in zip(re.findall(r"^gpu \S+ \S+ (\S+)", text, re.MULTILINE), uuids, strict=True):
        text = text.replace(recorded, uuid)
    place.write_text(text)
    upgraded.go()
    upgraded.site.cluster.wait(job)
    output = upgraded.site.cluster.output(job)
    assert len(re.findall(RIGHT, output)) == 2, output
    assert "error: mps" not in output


def test_a_step_that_meets_a_newer_verdict_is_refused_by_its_number(upgraded: UpgradedSite) -> None:
    job = upgraded.start("wait_for_go\nsrun -n2 echo ran\n")
    place = upgraded.site.machine.path(f"{STATE_DIRECTORY}/jobs/{job}/verdict", node="n1")
    place.write_text(place.read_text().replace(f"verdict {VERDICT_VERSION}", f"verdict {VERDICT_VERSION + 1}"))
    upgraded.go()
    upgraded.site.cluster.wait(job)
    output = upgraded.site.cluster.output(job)
    newer = f"verdict version {VERDICT_VERSION + 1}, and the plugin reads up to {VERDICT_VERSION}"
    assert len(re.findall(r"error: mps: job .*newer slurm-mps than spank_mps\.so", output)) == 1, output
    assert newer in output
    assert "ran" not in output.split()
