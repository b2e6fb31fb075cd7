"""A process in a container is a client like any other, if the container has what docs/containers.md says.

Charliecloud's image is a directory of mount points, on which the system's own programs are bound. NAMESPACES acts what
Apptainer and enroot do without privileges. container_spank.c acts what pyxis does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.cluster import waits_for

if TYPE_CHECKING:
    from tests.harness.site import Site

STATE_DIRECTORY = "/run/slurm-mps"

#: Makes ~/image, which has no more than an image of others has: no place for the state directory.
IMAGE = """#!/bin/sh
set -eu
mkdir -p ~/image
cd ~/image
mkdir -p usr etc opt dev proc sys tmp home root mnt run/simulated-gpus
touch etc/resolv.conf etc/hosts etc/passwd etc/group run/.containerenv
for one in bin sbin lib lib64; do ln -sfn "usr/$one" "$one"; done
"""

#: Runs "$@" in a user, a mount and a pid namespace and another root, as uid AS. BIND: what of /run it has.
NAMESPACES = """#!/bin/sh
set -eu
export inside=/mnt AS="${AS:-$(id -u)}"
exec unshare --user --map-root-user --mount sh -c '
mount -t tmpfs none "$inside"
for one in usr etc opt dev proc home run/simulated-gpus $BIND; do
	mkdir -p "$inside/$one"
	mount --rbind "/$one" "$inside/$one"
done
[ -z "$BIND" ] || mount -o remount,bind,ro "$inside$BIND"
mkdir -p "$inside/tmp" "$inside/run"
for one in bin sbin lib lib64; do ln -s "usr/$one" "$inside/$one"; done
as="--map-user=$AS --map-group=$AS --pid --fork --kill-child"
exec unshare --user $as --root="$inside" --wd=/ -- "$@"
' sh "$@"
"""

CHARLIECLOUD = """#!/bin/sh
# ch-run makes no mount point in the image, and each image has /run.
if [ "$BIND" ]; then run=/run; else run=/run/simulated-gpus; fi
exec ch-run -u "${AS:-$(id -u)}" -b /usr -b /opt -b /etc -b "$run" ~/image -- "$@"
"""

ENGINES = {"unshare": NAMESPACES, "ch-run": CHARLIECLOUD}


@pytest.fixture(params=ENGINES)
def _engine(request: pytest.FixtureRequest, site: Site) -> None:
    """~/container runs "$@" in a container, which has BIND beside what each has."""
    name: str = request.param
    if site.machine.run(["sh", "-c", f"command -v {name}"]).returncode != 0:
        pytest.skip(f"the root file system of this release of Slurm has no {name}")
    site.machine.write("/home/alice/container", ENGINES[name], mode=0o755, user="alice")
    site.machine.write("/home/alice/image.sh", IMAGE, mode=0o755, user="alice")


@pytest.mark.usefixtures("_engine")
def test_a_rank_in_a_container_is_a_client_beside_one_outside(site: Site) -> None:
    """What the container must see is the state directory, and read-only is enough to connect to the daemon.

    Its pids and its users may be its own: rank 0, which collects the reports, is root there.
    """
    inside = 'BIND=/run/slurm-mps exec ./container "$@"'
    rank = f'case $SLURM_PROCID in 0) AS=0 {inside};; 1) {inside};; *) exec "$@"; esac'
    script = f"./image.sh; srun sh -c '{rank}' sh slurm-mps verify --timeout 5"
    job = site.cluster.sbatch("--mps-threads=25", "--mps-mem=8G", "--gres=gpu:1", "-N1", "-n3", script=script)
    info = site.cluster.wait(job)
    output = site.cluster.output(job)
    assert (info.state, output.count("32/132")) == ("COMPLETED", 3), output
    assert "3 ranks, all clients, each GPU's ranks share one server" in output


@pytest.mark.usefixtures("_engine")
def test_a_container_without_the_directory_fails_and_is_explained(site: Site) -> None:
    script = "./image.sh; srun ./container slurm-mps verify --timeout 5"
    job = site.cluster.sbatch("--mps-threads=25", "--mps-mem=8G", "--gres=gpu:1", "-N1", "-n2", script=script)
    info = site.cluster.wait(job)
    output = site.cluster.output(job)
    assert info.state == "FAILED", output
    assert "ranks, all clients" not in output
    assert f"ranks 0-1 run without MPS: CUDA_MPS_PIPE_DIRECTORY=/run/slurm-mps/jobs/{job}/pipe does not" in output
    assert "CUDA_ERROR_DEVICE_UNAVAILABLE" in output  # EXCLUSIVE_PROCESS: nothing runs without, unnoticed


@pytest.mark.usefixtures("_engine")
def test_a_daemon_for_each_gpu_a_steps_own_limits_and_a_fault_are_as_outside(site: Site) -> None:
    inside = "BIND=/run/slurm-mps exec ./container simulated-gpus client"
    fault = f"if [ $SLURM_PROCID = 1 ]; then {inside} --fault; fi; {inside} --hold 1"
    each = "srun --gpus-per-task=1"
    script = f"./image.sh; {each} sh -c '{inside}'; {each} --mps-threads=25 sh -c '{inside}'; {each} sh -c '{fault}'"
    options = ("--mps=per-gpu", "--mps-threads=50", "--gres=gpu:2", "-N1", "-n2", "-wn1")
    job = site.cluster.sbatch(*options, script=script)
    site.cluster.wait(job)
    output = site.cluster.output(job)
    found = re.findall(r"uuid=(\S+) sms=(\d+) \S+ \S+ mps=([1-9]\d*)", output)
    assert [sms for _, sms, _ in found] == ["66", "66", "32", "32", "66", "66"], output
    assert len({(gpu, server) for gpu, _, server in found}) == len({gpu for gpu, _, _ in found}) == 2
    assert re.search(r"(rank 1|process \d+) hit a GPU fault on GPU-51\S+; no other program was on that GPU", output)


def test_where_nothing_keeps_a_container_from_running_without_mps_it_is_seen_and_told(site: Site) -> None:
    """While it runs status names task and process; at its end the job's output says that no program was a client."""
    site.machine.write("/home/alice/container", NAMESPACES, mode=0o755, user="alice")
    site.configure('[gpus]\ncompute_mode = "unchanged"\n')
    script = f"srun -n2 ./container sh -c 'simulated-gpus client --work 600 & echo up; {waits_for()}; sleep 1; kill $!'"
    job = site.cluster.sbatch("--mps-threads=25", "--gres=gpu:1", "-N1", "-n2", "-wn1", script=script)
    site.cluster.until_output(job, "uuid=", times=2)
    seen = site.node("n1", "/opt/slurm-mps/bin/slurm-mps", "status")
    site.cluster.let_go(job)
    info = site.cluster.wait(job)
    assert (seen.returncode, info.state) == (1, "COMPLETED")
    assert re.search(
        r"job \d+: processes( \d+ \(\d+ in its container\),?){2} run on GPU-51\S+ without the job's control daemon",
        seen.stderr,
    )
    assert sorted(re.findall(r"no MPS +\d+ +0\.([01]) ", seen.stdout)) == ["0", "1"]
    assert "was busy while no program of this step used MPS there" in str(site.cluster.said(site.cluster.output(job)))


@pytest.mark.parametrize("program", ["srun -n1 simulated-gpus client", "./container simulated-gpus client"])
def test_a_script_of_whose_job_no_program_was_a_client_is_told(site: Site, program: str) -> None:
    """No log says whether it used a GPU, and not every program does at its end."""
    site.machine.write("/home/alice/container", NAMESPACES, mode=0o755, user="alice")
    site.configure('[gpus]\ncompute_mode = "unchanged"\n')
    job = site.cluster.sbatch("--mps", "--gres=gpu:1", "-N1", script=program)
    site.cluster.wait(job)
    words = f"job {job}: no program of this job used MPS on this node; any that used a GPU ran without limits"
    said = [line for _, line in site.cluster.said(site.cluster.output(job))]
    assert [f"{words} (in a container, bind /run/slurm-mps)" in line for line in said] == [True] * (
        "srun" not in program
    )


def test_a_step_that_ran_without_mps_is_told_on_each_of_its_nodes(site: Site) -> None:
    """Beside steps of clients and steps without a GPU program, of which nothing is said; also of srun's own job."""
    site.machine.write("/home/alice/container", NAMESPACES, mode=0o755, user="alice")
    site.configure('[gpus]\ncompute_mode = "unchanged"\n')
    asked, work = ("--mps-threads=25", "--gres=gpu:1", "-N2", "-n2"), "simulated-gpus client --work 1"
    script = f"srun true; srun {work}; srun true; srun ./container {work}; srun true; srun {work}"
    job = site.cluster.sbatch(*asked, script=script)
    site.cluster.wait(job)
    said = [line for _, line in site.cluster.said(site.cluster.output(job))]
    own = site.cluster.srun(*asked, "./container", *work.split())
    uuids = sorted(site.gpus(node)[0]["uuid"] for node in site.nodes)
    words = r"(GPU-\S+) was busy while no program of this step used MPS there; any that ran did so without limits \("
    assert sorted(re.findall(words, "\n".join(said))) == uuids, said
    assert len(said) == 2
    assert sorted(re.findall(words, own.stderr)) == uuids, own


# ------------------------------------------------------------------------------ a container that a SPANK plugin enters

PLUGSTACK, CONTAINER = "/etc/slurm/plugstack.conf", "/etc/slurm/container.so"
SEEN = ("/usr", "/etc", "/opt", "/dev", "/proc", "/home", "/tmp", "/run/simulated-gpus")


@pytest.mark.parametrize("user", ["user", "root"])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_a_plugin_that_enters_a_container(site: Site, first: bool, user: str) -> None:
    """Called after it, in the container, ours has its verdict from before, and its variables win over the image's.

    Called before it, the image's variable wins, and no program runs without MPS unnoticed.
    """
    ours, source = site.machine.read(PLUGSTACK), Path(__file__).with_name("container_spank.c")
    sees = ", ".join(f'"{path}"' for path in (*SEEN, STATE_DIRECTORY))
    site.machine.run(["cc", "-shared", "-fPIC", f"-DSEES={sees}", "-o", CONTAINER, source]).check()
    is_in = f"[ ! -e /var ] && [ $(id -u) = {0 if user == 'root' else '$SLURM_JOB_UID'} ] && echo in the container"
    theirs = f"required {CONTAINER}\n"
    site.machine.write(PLUGSTACK, theirs + ours if first else ours + theirs)
    try:
        script = f"CONTAINER_AS={user} srun --gpus-per-task=1 sh -c '{is_in}; exec slurm-mps verify --timeout 5'"
        job = site.cluster.sbatch("--gres=gpu:2", "--mps-threads=25", "-N1", "-n2", "-wn1", script=script)
        info = site.cluster.wait(job)
    finally:
        site.machine.write(PLUGSTACK, ours)
        site.machine.path(CONTAINER).unlink()
    output = site.cluster.output(job)
    assert output.count("in the container") == 2, output
    if first:
        assert (info.state, output.count("32/132")) == ("COMPLETED", 2), output
        assert "2 ranks, all clients" in output
    else:
        assert info.state == "FAILED", output
        assert "ranks 0-1 run without MPS: CUDA_MPS_PIPE_DIRECTORY=/tmp/nvidia-mps does not exist" in output
