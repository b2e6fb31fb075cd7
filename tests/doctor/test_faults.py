"""Faults planted in a real site: doctor names each by its check, and names nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING

import pytest

from slurm_mps import __version__
from slurm_mps.doctor.checks.slurm import TRIED
from slurm_mps.doctor.examine import all_checks
from slurm_mps.job.verdict import VERDICT_VERSION
from tests.harness.release import RELEASES, chosen
from tests.harness.site import PARTITIONS, PLUGIN_DIRECTORY, STATE_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.doctor.conftest import Patient

SLURM, GRES, CGROUP = "/etc/slurm/slurm.conf", "/etc/slurm/gres.conf", "/etc/slurm/cgroup.conf"
PLUGSTACK, MPS = "/etc/slurm/plugstack.conf", "/etc/slurm/mps.toml"
PLUGIN = f"{PLUGIN_DIRECTORY}/spank_mps.so"
PROLOG, EPILOG = "/etc/slurm/prolog.d/10-slurm-mps.sh", "/etc/slurm/epilog.d/95-slurm-mps.sh"
STATE = STATE_DIRECTORY
ANOTHER_RELEASE = next(name for name in RELEASES if name != chosen().name)
#: What a fault may keep doctor from looking at, beside the files that it changes.
DRIVER, HOOK, PLUGIN_LINE, COMMANDS = "the driver", "our prolog", "the plugin's line", "Slurm's commands"


@dataclass(frozen=True)
class Plant:
    """What is done to a node. Two of them can be done together when they touch nothing in common."""

    do: Callable[[Patient], object]
    touches: frozenset[str]

    def __call__(self, patient: Patient) -> None:
        self.do(patient)


@dataclass(frozen=True)
class Fault:
    """What is done to the node, and which checks are to name it: id to severity. `alone`: with no other fault."""

    plant: Plant
    named: dict[str, str]
    alone: bool = False


def problem(*ids: str) -> dict[str, str]:
    return dict.fromkeys(ids, "problem")


def warning(*ids: str) -> dict[str, str]:
    return dict.fromkeys(ids, "warning")


def not_checked(*ids: str) -> dict[str, str]:
    """It did not answer, and what to do about it is said."""
    return dict.fromkeys(ids, "not checked")


def plant(do: Callable[[Patient], object], *touches: str) -> Plant:
    return Plant(do, frozenset(touches))


def line(key: str, value: str) -> Plant:
    """Give slurm.conf another value for a key, or the key."""

    def do(patient: Patient) -> None:
        text = patient.read(SLURM)
        new = re.sub(rf"^{key}=.*\n", "", text, flags=re.MULTILINE | re.IGNORECASE)
        patient.write(SLURM, new + (f"{key}={value}\n" if value else ""))

    return plant(do, key)


def together(*plants: Plant | str) -> Plant:
    """Several, and names of more that they touch."""
    steps = [one for one in plants if isinstance(one, Plant)]
    touches = frozenset(one for one in plants if isinstance(one, str)).union(*(one.touches for one in steps))

    def do(patient: Patient) -> None:
        for one in steps:
            one(patient)

    return Plant(do, touches)


def write(path: str, text: str, mode: int = 0o644) -> Plant:
    return plant(lambda patient: patient.write(path, text, mode), path)


def append(path: str, text: str) -> Plant:
    return plant(lambda patient: patient.append(path, text), path)


def edit(path: str, old: str, new: str) -> Plant:
    return plant(lambda patient: patient.edit(path, old, new), path)


def remove(path: str) -> Plant:
    return plant(lambda patient: patient.remove(path), path)


def chmod(path: str, mode: int) -> Plant:
    return plant(lambda patient: patient.chmod(path, mode), path)


def shell(text: str, undo: str, *touches: str) -> Plant:
    return plant(lambda patient: patient.shell(text, undo), *touches)


def script(path: str, text: str, mode: int = 0o755) -> Plant:
    return write(path, f"#!/bin/sh\n{text}\n", mode)


def stack(text: str) -> Plant:
    """Another plugstack.conf."""
    return together(write(PLUGSTACK, text), PLUGIN_LINE)


def single(key: str, text: str) -> Plant:
    """Let slurmd run one script of the site's own, as Prolog or Epilog."""
    path = f"/etc/slurm/{key.lower()}.sh"
    return together(script(path, text), line(key, path))


def beside(key: str, name: str, text: str, mode: int = 0o755) -> Plant:
    """Another script of the site's that slurmd runs."""
    return together(script(f"/etc/slurm/{key.lower()}.d/{name}", text, mode), key)


def hook(key: str, value: str) -> Plant:
    """Have the prolog name another Python or package."""

    def do(patient: Patient) -> None:
        patient.write(PROLOG, re.sub(rf"^{key}=.*$", f"{key}={value}", patient.read(PROLOG), flags=re.MULTILINE), 0o755)

    return plant(do, HOOK, "Prolog")


def driver(*settings: str) -> Plant:
    return plant(lambda patient: patient.site.fault("n1", *settings), DRIVER)


def another_slurm(release: str, *programs: str) -> Plant:
    """Let Slurm's programs, or some of them, say that they are of another release."""
    text = f'[ "$1" != -V ] || {{ echo slurm {release}; exit; }}\nexec /usr/%s "$@"'
    named = programs or ("sbin/slurmd", "bin/srun", "bin/scontrol")
    return together(*(script(f"/usr/local/{one}", text % one) for one in named), COMMANDS, PLUGIN_LINE)


def other_plugin_version(patient: Patient) -> None:
    data = patient.site.machine.path(PLUGIN, node="n1").read_bytes()
    mark = f"plugin {__version__} verdict".encode()
    assert data.count(mark) == 1
    patient.write(PLUGIN, data.replace(mark, b"plugin 0.0.9 verdict"))


def another_plugin(patient: Patient) -> None:
    patient.write(PLUGIN, patient.site.machine.path(f"{PLUGIN_DIRECTORY}/auth_munge.so").read_bytes())


def copied_package(place: str, change: str) -> Plant:
    """Let the hooks run a copy of the package that is changed by a sed command."""

    def do(patient: Patient) -> None:
        package = re.search(r"^package=(.*)$", patient.read(PROLOG), re.MULTILINE)
        assert package
        patient.shell(
            f"mkdir {place} && cp -r {package[1]} {place} && cd {place}/slurm_mps && {change}", f"rm -r {place}"
        )

    return together(plant(do), hook("package", f"{place}/slurm_mps"), PLUGIN)


def mounted(options: str, undo: str = "") -> Plant:
    """Another file system for the state."""
    lay = f"mkdir -m 711 {STATE}/jobs; mkdir -m 700 {STATE}/gpus; : > {STATE}/lock" if undo else "true"
    return shell(f"mkdir -p {STATE} && mount {options} {STATE}; {lay}", f"umount {STATE}", STATE)


def crashed_job(patient: Patient) -> None:
    """A job that Slurm does not know, brought up, and its processes killed."""
    given = "SLURM_JOB_ID=999 SLURM_JOB_UID=20001 SLURM_JOB_GPUS=1 SLURMD_NODENAME=n1 SPANK_MPS=1"
    patient.shell(f"{given} {PROLOG}", f"{given} {EPILOG}")


def held_by_a_stranger(patient: Patient) -> None:
    client = patient.site.machine.popen(["simulated-gpus", "client", "--hold", "60"], node="n1", user="alice")
    inside = patient.site.machine.pid_inside(client)
    patient.shell("true", undo=f"kill -9 {inside}")
    end = monotonic() + 10
    while "plain" not in patient.shell("simulated-gpus show"):
        assert monotonic() < end
        sleep(0.02)


def a_daemon_of_somebody(patient: Patient) -> None:
    where = "CUDA_MPS_PIPE_DIRECTORY=/tmp/nvidia-mps CUDA_MPS_LOG_DIRECTORY=/tmp/nvidia-mps"
    patient.shell(
        f"mkdir /tmp/nvidia-mps && {where} nvidia-cuda-mps-control -d",
        f"pid=$(cat /tmp/nvidia-mps/*.pid); echo quit | {where} nvidia-cuda-mps-control; "
        "while kill -0 $pid 2>/dev/null; do sleep 0.02; done; rm -r /tmp/nvidia-mps",
    )


def a_job_without_its_daemon(patient: Patient) -> None:
    """A job that runs, with a client on its GPU, whose control daemon somebody killed."""
    cluster = patient.site.cluster
    script = "simulated-gpus client --hold 60; sleep 60"
    job = cluster.sbatch("--gres=gpu:1", "--mps", "-wn1", script=script)
    patient.shell(
        "true", f"scancel {job}; for i in $(seq 100); do [ -e {STATE}/jobs/{job} ] || exit 0; sleep 0.1; done"
    )
    cluster.until_output(job, "uuid=")
    pid = patient.shell(f"cat {STATE}/jobs/{job}/pipe/nvidia-cuda-mps-control.pid").strip()
    patient.shell(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.02; done")


def control_program(lay: str, name: str) -> Plant:
    """Another control program in a directory of its own, that mps.toml names."""
    made = shell(f"mkdir /usr/local/mps; cd /usr/local/mps; {lay}", "rm -r /usr/local/mps")
    return together(made, write(MPS, f'[paths]\ncontrol_program = "/usr/local/mps/{name}"\n'))


SERVER_PROGRAM = "/usr/bin/nvidia-cuda-mps-server"
AARCH64 = r"\177ELF\2\1\1\0\0\0\0\0\0\0\0\0\2\0\267\0"
SLOW_PYTHON = "/usr/local/slow/python3"
OLD_PROGRAM = "printf '#!/bin/sh\\necho \"  start_server -uid <user id>\"\\n' >control; chmod 755 control"


def gpus_again(options: str) -> Plant:
    return shell(f"simulated-gpus create 4 --seed n1 {options}", "simulated-gpus create 4 --seed n1", DRIVER)


def gpus_in_slurm_conf(text: str) -> Plant:
    do = edit(SLURM, "Port=17001 Gres=gpu:4", f"Port=17001 {text}").do
    return plant(do, "Gres", GRES, DRIVER, MPS)


def set_mode(mode: int) -> Plant:
    return shell(f"simulated-gpus set-mode 2 {mode}", "simulated-gpus set-mode 2 0", DRIVER)


REVERSED = "".join(f"NodeName=n1,n2 Name=gpu File=/dev/nvidia{number}\n" for number in (3, 2, 1, 0))
DEEPOPS = "for pid in $(nvidia-smi --query-compute-apps=pid --format=csv,noheader); do\n  kill -9 $pid\ndone"
TMPFS = together(line("PrologFlags", "Contain"), line("JobContainerType", "job_container/tmpfs"))
CONTAINER = "/etc/slurm/job_container.conf"
OLD, NEW = "/usr/local/lib/old", "/usr/local/lib/new"
NEWER_VERDICTS = f"s/^VERDICT_VERSION = {VERDICT_VERSION}/VERDICT_VERSION = {VERDICT_VERSION + 1}/"

#: Slurm up to 25.05 has faults in sharing GPUs.
OLD_SHARING = warning("gres-shared") if chosen().name < "25.11" else {}

#: What keeps every user from Slurm's commands.
CLOSED = {
    "a slurm.conf that users cannot read": chmod(SLURM, 0o600),
    "a directory of slurm.conf that users cannot enter": chmod("/etc/slurm", 0o700),
    "an included file that users cannot read": together(
        append(SLURM, "Include /etc/slurm/more.conf"), write("/etc/slurm/more.conf", "# nothing yet\n", 0o600)
    ),
    "a plugstack.conf that users cannot read": chmod(PLUGSTACK, 0o600),
    "a file of plugstack.conf that users cannot read": together(
        append(PLUGSTACK, "include plugstack.conf.d/*"),
        write("/etc/slurm/plugstack.conf.d/x11.conf", "# nothing yet\n", 0o600),
    ),
}

FAULTS = {
    **{name: Fault(one, problem("slurm-files"), alone="slurm.conf" in name) for name, one in CLOSED.items()},
    # Slurm
    "an Include that is not there": Fault(
        together(append(SLURM, "Include /etc/slurm/none.conf"), COMMANDS), problem("slurm-conf")
    ),
    "a slurm.conf that Slurm refuses": Fault(
        together(line("JobContainerType", "job_container/tmpfs"), "PrologFlags", COMMANDS), problem("slurm-conf")
    ),
    "a key that Slurm does not know": Fault(together(line("PrologFlag", "Alloc"), COMMANDS), problem("slurm-conf")),
    "a Slurm too old": Fault(another_slurm("21.08.8"), problem("slurm-version", "plugin-file")),
    **{
        f"a Slurm that nobody tried, {release}": Fault(
            another_slurm(release), {**warning("slurm-version"), **problem("plugin-file")}
        )
        for release in ("23.02.7", "25.11.0", "27.05.1")
    },
    "programs of two releases": Fault(another_slurm("23.11.0", "bin/scontrol"), problem("slurm-version")),
    "a plugin of another release": Fault(another_slurm(f"{ANOTHER_RELEASE}.4"), problem("plugin-file")),
    "a line not taken over": Fault(together(line("MessageTimeout", "30"), COMMANDS), warning("config-in-force")),
    "a line taken out, but not taken over": Fault(
        together(line("GresTypes", ""), COMMANDS), {**problem("gres-types"), **warning("config-in-force")}
    ),
    "no slurmd": Fault(plant(lambda patient: patient.without_slurmd()), warning("slurmd")),
    "a slurmd whose restart ends all": Fault(
        write("/etc/systemd/system/slurmd.service.d/kill.conf", "[Service]\nKillMode=control-group\n"),
        warning("slurmd"),
    ),
    "a drained node": Fault(
        shell(
            "scontrol update NodeName=n1 State=DRAIN Reason='Prolog error'",
            "scontrol update NodeName=n1 State=RESUME",
            COMMANDS,
        ),
        warning("node-drained"),
    ),
    "slurmd not as root": Fault(line("SlurmdUser", "slurm"), problem("slurmd-user")),
    "no PrologFlags": Fault(line("PrologFlags", ""), problem("prolog-flags")),
    "PrologFlags without Alloc": Fault(line("PrologFlags", "Serial"), problem("prolog-flags")),
    "processes tracked by group": Fault(line("ProctrackType", "proctrack/pgid"), warning("proctrack")),
    "jobs joined where devices are not confined": Fault(
        write(MPS, '[gpus]\nsharing = "joined"\n'), problem("cgroup-conf")
    ),
    "devices confined by nobody": Fault(
        edit(CGROUP, "ConstrainDevices=no", "ConstrainDevices=yes"), problem("cgroup-conf")
    ),
    "the other cgroup version": Fault(
        together(line("TaskPlugin", "task/cgroup"), edit(CGROUP, "cgroup/v1", "cgroup/v2")), problem("cgroup-conf")
    ),
    "a cgroup version that Slurm has not": Fault(
        together(
            line("TaskPlugin", "task/cgroup"),
            shell(f"mv {PLUGIN_DIRECTORY}/cgroup_v1.so /opt", f"mv /opt/cgroup_v1.so {PLUGIN_DIRECTORY}", CGROUP),
        ),
        problem("cgroup-conf"),
    ),
    "no cgroups for cgroups": Fault(
        together(line("TaskPlugin", "task/cgroup"), edit(CGROUP, "cgroup/v1", "disabled")), problem("cgroup-conf")
    ),
    "a short PrologEpilogTimeout": Fault(line("PrologEpilogTimeout", "5"), problem("slurm-timeouts")),
    "a PrologEpilogTimeout too short for the epilog": Fault(
        line("PrologEpilogTimeout", "20"), problem("slurm-timeouts")
    ),
    "a MessageTimeout shorter than the prolog": Fault(
        write(MPS, "[deadlines]\nprolog = 9\n"), warning("slurm-timeouts")
    ),
    "a /run for each job": Fault(
        together(TMPFS, write(CONTAINER, "BasePath=/x Dirs=/tmp,/run\n")), problem("private-directories")
    ),
    "a /dev/shm for each job and an older driver": Fault(
        together(TMPFS, driver("driver.version=535.54.03")), warning("private-directories")
    ),
    # the plugin
    "no plugstack.conf": Fault(together(remove(PLUGSTACK), PLUGIN_LINE), problem("plugstack")),
    "plugstack.conf without the plugin": Fault(stack("# nothing\n"), problem("plugstack")),
    "a Required plugin": Fault(stack("Required spank_mps.so\n"), problem("plugstack")),
    "an Include in plugstack.conf": Fault(
        together(
            stack("Include plugstack.conf.d/*\n"), write("/etc/slurm/plugstack.conf.d/mps.conf", f"required {PLUGIN}\n")
        ),
        problem("plugstack"),
    ),
    "an optional plugin": Fault(stack("optional spank_mps.so\n"), problem("plugstack")),
    "an optional plugin in an included file": Fault(
        together(
            stack("include plugstack.conf.d/*\n"), write("/etc/slurm/plugstack.conf.d/mps.conf", f"optional {PLUGIN}\n")
        ),
        problem("plugstack"),
    ),
    "pyxis after the plugin": Fault(stack("required spank_mps.so\noptional spank_pyxis.so\n"), warning("pyxis-order")),
    "a container engine without the directory": Fault(
        write("/etc/apptainer/apptainer.conf", "# bind path = /run/slurm-mps\nbind path = /etc/hosts\n"),
        warning("containers"),
    ),
    "a container engine that is to bind a missing directory": Fault(
        together(
            shell(f"mv {STATE} {STATE}.away", f"mv {STATE}.away {STATE}", STATE),
            write("/etc/apptainer/apptainer.conf", "bind path = /run/slurm-mps\n"),
        ),
        problem("containers"),
        alone=True,
    ),
    "the plugin twice": Fault(stack("required spank_mps.so\nrequired spank_mps.so\n"), warning("plugstack")),
    "no plugin": Fault(together(remove(PLUGIN), stack("required spank_mps.so\n")), problem("plugin-file")),
    "another file for the plugin": Fault(
        together(plant(another_plugin, PLUGIN), stack("required spank_mps.so\n")), problem("plugin-file")
    ),
    "a plugin of another slurm-mps": Fault(plant(other_plugin_version, PLUGIN, HOOK), problem("plugin-version")),
    "a plugin from before the hooks' verdicts": Fault(
        copied_package(NEW, f"sed -i '{NEWER_VERDICTS}' job/verdict.py"), problem("plugin-version")
    ),
    "a plugin that all can write": Fault(chmod(PLUGIN, 0o666), problem("owner")),
    "a plugin that users cannot read": Fault(together(chmod(PLUGIN, 0o600), PLUGIN_LINE), problem("slurm-files")),
    "a plugin where users cannot go": Fault(
        together(
            shell(f"mkdir -m 700 /opt/slurm && cp {PLUGIN} /opt/slurm", "rm -r /opt/slurm", PLUGIN),
            stack("required /opt/slurm/spank_mps.so\n"),
        ),
        problem("slurm-files"),
    ),
    "a plugstack.conf of a user": Fault(
        plant(lambda patient: patient.chown(PLUGSTACK, 20001), PLUGSTACK), problem("owner")
    ),
    # prolog and epilog
    "no Prolog": Fault(line("Prolog", ""), problem("prolog-wired")),
    "a Prolog that is another": Fault(line("Prolog", "/etc/slurm/prolog/*"), problem("prolog-wired")),
    "no Epilog": Fault(line("Epilog", ""), problem("epilog-wired")),
    "no script of ours among the epilogs": Fault(together(remove(EPILOG), "Epilog"), problem("epilog-wired")),
    "a prolog that resets GPUs after ours": Fault(
        beside("Prolog", "05-gpus.sh", "nvidia-smi --gpu-reset -i 0"), warning("script-order")
    ),
    "an epilog that kills before ours": Fault(beside("Epilog", "99-exclusive-gpu", DEEPOPS), warning("script-order")),
    "another prolog that sets modes": Fault(
        beside("Prolog", "50-mode.sh", "nvidia-smi -c 3"), warning("other-scripts")
    ),
    "another prolog that starts MPS": Fault(
        beside("Prolog", "50-mps.sh", "nvidia-cuda-mps-control -d"), warning("other-scripts")
    ),
    "a single prolog that does not run ours": Fault(single("Prolog", "exit 0"), problem("prolog-wired")),
    "a single prolog with our line commented out": Fault(
        single("Prolog", f"# {PROLOG} || exit 1\nexit 0 # was {PROLOG}"), problem("prolog-wired")
    ),
    "a single epilog that only speaks of ours": Fault(
        single("Epilog", "logger slurm-mps was here; systemctl start slurm-mps-reconcile"), problem("epilog-wired")
    ),
    "a single epilog that may run ours in a loop": Fault(
        single("Epilog", 'dir=$(dirname "$0")\nfor one in "$dir/epilog.d"/*; do $one || exit 1; done'),
        warning("epilog-wired"),
    ),
    "a single prolog that may run ours by run-parts": Fault(
        single("Prolog", "run-parts /etc/slurm/prolog.d"), warning("prolog-wired")
    ),
    "our epilog gone, and another that speaks of it": Fault(
        together(remove(EPILOG), beside("Epilog", "50-site", "# replaces slurm-mps\ntrue")), problem("epilog-wired")
    ),
    "an epilog that kills and only speaks of ours": Fault(
        beside("Epilog", "99-clean", "# must not disturb slurm-mps\npkill -9 nvidia\nnvidia-smi -c 0"),
        warning("script-order", "other-scripts"),
    ),
    "a single epilog that kills before it runs ours": Fault(
        single("Epilog", f"pkill -u $SLURM_JOB_USER\n{EPILOG} || exit 1"), warning("script-order")
    ),
    "a single prolog that sets modes after it ran ours": Fault(
        single("Prolog", f"{PROLOG} || exit 1\nnvidia-smi -c 0"), warning("script-order", "other-scripts")
    ),
    "a single prolog whose script of ours is not executable": Fault(
        together(single("Prolog", f"{PROLOG} || exit 1"), chmod(PROLOG, 0o644), HOOK), problem("scripts-executable")
    ),
    "the epilog twice by a single script": Fault(
        together(
            single("Epilog", f"{EPILOG} || exit 1\n/etc/slurm/old/slurm-mps.sh"),
            plant(lambda patient: patient.write("/etc/slurm/old/slurm-mps.sh", patient.read(EPILOG), 0o755)),
        ),
        warning("epilog-wired"),
    ),
    "the prolog twice": Fault(
        plant(lambda patient: patient.write(PROLOG.replace("10-", "20-"), patient.read(PROLOG), 0o755), HOOK, "Prolog"),
        warning("prolog-wired"),
    ),
    "a prolog that is not executable": Fault(
        together(chmod(PROLOG, 0o644), HOOK, "Prolog"), problem("scripts-executable")
    ),
    "a backup among the epilogs": Fault(
        beside("Epilog", "50-site.sh~", "exit 0", 0o644), problem("scripts-executable")
    ),
    "an epilog of a user": Fault(
        plant(lambda patient: patient.chown(EPILOG, 20001), EPILOG, "Epilog"), problem("owner")
    ),
    "a prolog.d that a group can write": Fault(
        together(chmod("/etc/slurm/prolog.d", 0o775), HOOK, "Prolog"), problem("owner")
    ),
    "no Python for the hooks": Fault(hook("python", "/opt/gone/bin/python3"), problem("hooks-python")),
    "a Python of the hooks that does not answer": Fault(
        together(write(SLOW_PYTHON, "#!/bin/sh\nexec sleep 60\n", 0o755), hook("python", SLOW_PYTHON)),
        not_checked("hooks-python"),
    ),
    "no package for the hooks": Fault(hook("package", "/opt/gone/slurm_mps"), problem("hooks-python")),
    "a Python that does not run": Fault(
        together(
            script("/usr/local/bin/python-broken", "echo cannot >&2; exit 1"),
            hook("python", "/usr/local/bin/python-broken"),
        ),
        problem("hooks-python"),
    ),
    "hooks of another slurm-mps": Fault(
        copied_package(OLD, f"sed -i s/{__version__}/0.0.9/ __init__.py"), problem("hooks-python", "plugin-version")
    ),
    "no jsonschema for the hooks": Fault(hook("python", "/usr/bin/python3"), problem("hooks-python")),
    "a Python where users cannot go": Fault(
        together(shell("ln -s /usr/bin/python3 /root/python3", "rm /root/python3"), hook("python", "/root/python3")),
        problem("python-for-users", "hooks-python"),
    ),
    **{
        f"a TaskProlog that says {text}": Fault(
            together(
                line("TaskProlog", "/etc/slurm/task-prolog.sh"),
                script("/etc/slurm/task-prolog.sh", f"# export CUDA_VISIBLE_DEVICES=0\necho {text}"),
            ),
            problem("task-prolog"),
        )
        for text in ("export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps", "unset CUDA_VISIBLE_DEVICES")
    },
    # the site
    "a mistake in mps.toml": Fault(write(MPS, "[gpus]\nclients = 3\n"), problem("site-config")),
    "a partition in mps.toml that Slurm has not": Fault(
        write(MPS, "[partition.gpus.policy]\n"), warning("site-config")
    ),
    "a partition that gives MPS to jobs that do not ask, by a wrong word": Fault(
        write(f"{PARTITIONS}/gpu", "all\n"), problem("site-config")
    ),
    "a partition that gives MPS to jobs that may share a GPU, which is refused": Fault(
        together(write(f"{PARTITIONS}/gpu", "per-node\n"), line("GresTypes", "gpu,shard")),
        {**warning("gres-types"), **OLD_SHARING},
        alone=not OLD_SHARING,  # beside a plugin for an old Slurm it would be named
    ),
    "a default of a partition that no job can have": Fault(
        write(MPS, '[partition.gpu.limits.memory]\ndefault = "400M"\n'), problem("memory-default")
    ),
    "an mps.toml that all can write": Fault(chmod(MPS, 0o666), problem("owner")),
    "an mps.toml that is a link": Fault(
        shell(f"mv {MPS} /etc/mps.toml; ln -s /etc/mps.toml {MPS}", f"rm {MPS}; mv /etc/mps.toml {MPS}", MPS),
        problem("site-config"),
    ),
    "an mps.toml with a second name": Fault(
        shell(f"ln {MPS} /etc/slurm/second", "rm /etc/slurm/second", MPS), problem("site-config")
    ),
    "an mps.toml that is a directory": Fault(
        shell(f"mv {MPS} /etc/kept; mkdir {MPS}", f"rmdir {MPS}; mv /etc/kept {MPS}", MPS), problem("site-config")
    ),
    "a slurm.conf of a user": Fault(plant(lambda patient: patient.chown(SLURM, 20001)), problem("owner"), alone=True),
    "a state directory that is a link": Fault(
        shell(
            f"mv {STATE} /run/kept; mkdir /run/x; ln -s /run/x {STATE}",
            f"rm {STATE}; rmdir /run/x; mv /run/kept {STATE}",
            STATE,
        ),
        problem("state-directory"),
    ),
    "a state directory that all can write": Fault(
        shell(f"chmod 777 {STATE}", f"chmod 711 {STATE}", STATE), problem("owner")
    ),
    "a state directory closed to users": Fault(
        shell(f"chmod 700 {STATE}", f"chmod 711 {STATE}", STATE), problem("state-directory")
    ),
    "a /run without ACLs": Fault(mounted("-t ramfs none"), problem("state-directory")),
    "a full /run": Fault(mounted("-t tmpfs -o size=64k none", "laid"), problem("run-space")),
    "a /run with little room": Fault(mounted("-t tmpfs -o size=8m none", "laid"), warning("run-space")),
    "logs below nothing": Fault(write(MPS, '[paths]\nlogs = "/var/log/none/mps"\n'), warning("logs-directory")),
    "a crashed job": Fault(plant(crashed_job), problem("stale-state"), alone=True),
    "MPS for everybody": Fault(
        write("/etc/profile.d/mps.sh", "export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps\n"), warning("mps-variables")
    ),
    # the GPUs
    "no gres/gpu": Fault(line("GresTypes", "craynetwork"), problem("gres-types")),
    "gres/mps where GPUs are not shared": Fault(line("GresTypes", "gpu,mps"), {**problem("gres-types"), **OLD_SHARING}),
    "shards of an old Slurm": Fault(line("GresTypes", "gpu,shard"), OLD_SHARING, alone=not OLD_SHARING),
    "no gres.conf": Fault(remove(GRES), problem("gres-conf")),
    "a gres.conf for other nodes": Fault(
        write(GRES, "NodeName=n2 Name=gpu File=/dev/nvidia[0-3]\n"), problem("gres-conf")
    ),
    "GPUs without device files": Fault(write(GRES, "Name=gpu Count=4\n"), problem("gres-conf")),
    "a device that is not there": Fault(
        together(write(GRES, "Name=gpu File=/dev/nvidia[0-2],/dev/nvidia99\n"), DRIVER),
        problem("gres-conf", "gres-order"),
    ),
    "AutoDetect of others' GPUs": Fault(write(GRES, "AutoDetect=rsmi\n"), problem("gres-conf")),
    "GPUs in another order": Fault(together(write(GRES, REVERSED), DRIVER), problem("gres-order")),
    "a card that was changed": Fault(
        together(write(GRES, "Name=gpu File=/dev/nvidia0 UniqueId=GPU-0\nName=gpu File=/dev/nvidia[1-3]\n"), DRIVER),
        problem("gres-order"),
    ),
    "more GPUs than there are": Fault(gpus_in_slurm_conf("Gres=gpu:8"), problem("gpu-count")),
    "fewer GPUs than there are": Fault(gpus_in_slurm_conf("Gres=gpu:tesla:2(S:0-1)"), warning("gpu-count")),
    "a node that slurm.conf gives no GPU": Fault(gpus_in_slurm_conf(""), warning("gpu-count")),
    "a cluster that has GresTypes=gpu and no GPU": Fault(
        together(
            edit(SLURM, " Gres=gpu:4", ""),
            shell("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3", "umount /dev"),
        ),
        warning("gpu-count"),
        alone=True,
    ),
    "a driver of another version": Fault(driver("nvml.init=18"), problem("driver")),
    "a driver that does not answer": Fault(driver("nvml.init=hang"), warning("driver")),
    "a control program that does not answer": Fault(
        driver("command.get_default_active_thread_percentage=hang"), not_checked("control-program")
    ),
    "a lost GPU": Fault(driver("gpu.2=lost"), problem("driver")),
    "a CUDA without memory limits": Fault(gpus_again("--cuda-version 11.4"), problem("driver-version")),
    "a driver that names no processes": Fault(driver("driver.version=470.57.02"), warning("driver-version")),
    "all users on a server of an older driver": Fault(
        together(
            gpus_again("--driver 550"),
            edit(CGROUP, "ConstrainDevices=no", "ConstrainDevices=yes"),
            line("TaskPlugin", "task/cgroup"),
            write(MPS, '[gpus]\nsharing = "joined"\njoined_users = "all"\n[limits.memory]\nmax = "8G"\n'),
        ),
        problem("driver-version"),
    ),
    "GPUs older than Volta": Fault(gpus_again("--compute-capability 6.0"), warning("driver-version")),
    "no control program": Fault(
        write(MPS, '[paths]\ncontrol_program = "/usr/local/mps"\n'), problem("control-program")
    ),
    "no server program": Fault(
        shell(f"mount --bind /dev/null {SERVER_PROGRAM}", f"umount {SERVER_PROGRAM}"), problem("control-program")
    ),
    "another architecture's control program": Fault(
        control_program(f"printf '{AARCH64}' >control; chmod 755 control", "control"), problem("control-program")
    ),
    "an old control program": Fault(
        control_program(f"cp /usr/bin/nvidia-cuda-mps-server .; {OLD_PROGRAM}", "control"), problem("control-program")
    ),
    "no persistence mode": Fault(driver("nvml.GetPersistenceMode=off"), warning("persistence-mode")),
    "MIG without AutoDetect": Fault(driver("nvml.GetMigMode=on"), warning("mig")),
    "MIG mode that waits for a reset": Fault(driver("nvml.GetMigMode=changed"), warning("mig")),
    "a PROHIBITED GPU": Fault(set_mode(2), problem("compute-mode")),
    "an EXCLUSIVE_PROCESS that nobody holds": Fault(set_mode(3), warning("compute-mode")),
    "a default limit that no GPU has": Fault(
        together(write(MPS, '[limits.memory]\ndefault = "500G"\n'), DRIVER),
        problem("memory-default"),
    ),
    "a default limit that a slice has not": Fault(
        together(
            shell("simulated-gpus mig 3 1g.10gb 2g.20gb", "simulated-gpus mig 3", DRIVER),
            write(MPS, '[limits.memory]\ndefault = "15G"\n'),
        ),
        {**problem("memory-default"), **warning("mig")},
    ),
    "a default limit that a context uses up": Fault(
        write(MPS, '[limits.memory]\ndefault = "100M"\n'), problem("memory-default")
    ),
    "a job whose control daemon was killed": Fault(plant(a_job_without_its_daemon), problem("job-daemon"), alone=True),
    "a stranger on a GPU": Fault(plant(held_by_a_stranger, DRIVER), warning("foreign-processes")),
    "a daemon of somebody": Fault(plant(a_daemon_of_somebody, DRIVER), warning("other-daemon")),
}
if chosen().no_run_in_job:
    FAULTS["the prolog in the job, where that drains"] = Fault(
        line("PrologFlags", "Alloc,RunInJob"),
        problem("prolog-flags") if chosen().knows_run_in_job else problem("prolog-flags", "slurm-conf"),
    )
FAULTS |= {f"a short {key}": Fault(line(key, "5"), problem("slurm-timeouts")) for key in chosen().own_timeouts}


def rounds() -> list[list[str]]:
    """The faults in groups, each for one run of doctor: no two of a group touch or are named by the same thing."""
    found: list[list[str]] = []
    alone = [[name] for name, fault in FAULTS.items() if fault.alone]
    for name, fault in FAULTS.items():
        for group in found if not fault.alone else ():
            others = [FAULTS[other] for other in group]
            taken = set().union(*(other.plant.touches | other.named.keys() for other in others))
            if not taken & (fault.plant.touches | fault.named.keys()):
                group.append(name)
                break
        else:
            found += [[name]] if not fault.alone else []
    return [*alone, *found]


@pytest.mark.parametrize("names", rounds(), ids=lambda names: f"{names[0]} and {len(names) - 1} more")
def test_planted_faults_are_named(patient: Patient, names: list[str]) -> None:
    """By their ids, with what to do, and nothing else is blamed, but that slurmctld has not taken the file over."""
    for name in names:
        FAULTS[name].plant(patient)
    named = {check: severity for name in names for check, severity in FAULTS[name].named.items()}
    found = patient.examine()
    faults = {
        check: severity for check, severity in found.faults.items() if check in named or check != "config-in-force"
    }
    silent = {check for check, severity in named.items() if severity == "not checked"}
    assert faults == {check: severity for check, severity in named.items() if check not in silent}, found.findings
    assert silent <= {one["check"] for one in found.findings if one["severity"] == "not checked" and one["fix"]}
    assert found.status == int("problem" in named.values())
    bad = [one for one in found.findings if one["severity"] in ("problem", "warning")]
    assert all(one["what"] and one["why"] and one["fix"] for one in bad)


def test_a_node_before_install_has_one_problem(patient: Patient) -> None:
    """One cause, one finding; the plugin of a package that is not switched on yet makes no difference."""
    for line_of_ours in (PLUGSTACK, PROLOG, EPILOG):
        patient.remove(line_of_ours)
    line("Prolog", "")(patient)
    line("Epilog", "")(patient)
    for elsewhere, fix in ((False, "as root: slurm-mps install"), (True, "as root: slurm-mps install --login-node")):
        found = patient.examine(elsewhere=elsewhere)
        assert found.of("problem").keys() == {"installed"}
        assert found.findings[0]["fix"] == fix
        assert found.of("not checked")["plugin-file"] == "slurm-mps is not installed on this host"


def test_one_reason_for_many_checks_is_in_the_summary(patient: Patient) -> None:
    patient.edit(SLURM, "Port=17001 Gres=gpu:4", "Port=17001")
    _, out, _ = patient.run("doctor")
    assert re.search(r"^\d\d checks left out: slurm.conf gives this node no GPU$", out, re.MULTILINE)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["node", "login"])
@pytest.mark.parametrize("name", CLOSED)
def test_what_keeps_users_from_slurm_is_a_problem_for_them_too(patient: Patient, name: str, *, elsewhere: bool) -> None:
    """And nothing else is blamed for it: what they cannot look at was not checked."""
    CLOSED[name](patient)
    found = patient.examine(user="alice", elsewhere=elsewhere)
    assert (found.status, set(found.of("problem"))) == (1, {"slurm-files"}), found.findings
    assert "users cannot" in found.of("problem")["slurm-files"]


def test_a_controller_that_is_no_node_may_keep_its_files_closed(patient: Patient) -> None:
    """Users run nothing there; on a login node the same is a problem."""
    patient.chmod(SLURM, 0o600)
    patient.chmod(PLUGSTACK, 0o600)
    assert set(patient.examine(elsewhere=True).of("problem")) == {"slurm-files"}
    text = re.sub(r"^SlurmctldHost=[^(\n]*", "SlurmctldHost=login1", patient.read(SLURM), flags=re.MULTILINE)
    patient.write(SLURM, text, 0o600)
    assert patient.examine(elsewhere=True).of("problem") == {}


def test_a_server_that_is_left_of_a_job_whose_daemon_was_killed_is_not_to_be_ended(patient: Patient) -> None:
    """The job is. Users cannot tell whose the server is, and are told nothing wrong."""
    patient.shell("simulated-gpus fault server.alone=stay", "simulated-gpus fault --clear")
    a_job_without_its_daemon(patient)
    found = patient.examine()
    assert found.faults == {"job-daemon": "problem"}
    assert "kill" not in "".join(one["fix"] for one in found.findings)
    assert "only root sees whose processes" in patient.examine(user="alice").of("not checked")["foreign-processes"]


@pytest.mark.parametrize(
    ("thing", "file", "fix"),
    [
        (f"{STATE}/jobs/998", "/journal", "end the processes of that job, then rm -r "),
        (f"{STATE}/gpus/GPU-00000000", "", "end the processes of that job, then rm -r "),
        (f"{STATE}/stranger", "", "move it away: "),
    ],
    ids=["a damaged journal", "a damaged ledger", "a stranger"],
)
def test_what_reconcile_leaves_is_fixed_by_hand(patient: Patient, thing: str, file: str, fix: str) -> None:
    """The fix is not a command that then says that it leaves it."""
    patient.shell(f"{'mkdir -p' if file else ':'} {thing}; echo x > {thing}{file}", f"rm -r {thing}")
    (found,) = [one for one in patient.examine("stale-state").findings if one["severity"] == "problem"]
    assert found["fix"] == f"slurm-mps reconcile leaves it; {fix}{thing}"


@pytest.mark.parametrize("whose", ["script", "program", "directory"])
def test_root_runs_nothing_that_a_user_can_write(patient: Patient, whose: str) -> None:
    """A prolog that alice can change, or that names what she can: it is named, and nothing of hers runs."""
    hers = "/usr/local/hers/python3"
    patient.write(hers, "#!/bin/sh\ntouch /run/was-run\n", 0o755)
    hook("python", hers)(patient)
    patient.chown({"script": PROLOG, "program": hers, "directory": "/usr/local/hers"}[whose], 20001)
    found = patient.examine()
    assert found.faults.keys() - {"config-in-force"} == {"owner"}
    assert "can be written by others than root, and is not run" in found.of("not checked")["hooks-python"]
    assert not patient.site.machine.path("/run/was-run", node="n1").exists()


def test_a_control_program_of_a_user_is_not_run(patient: Patient) -> None:
    """Whoever can write mps.toml does not choose what root's doctor runs."""
    patient.write("/usr/local/bin/hers", "#!/bin/sh\ntouch /run/was-run\n", 0o755)
    patient.write(MPS, '[paths]\ncontrol_program = "/usr/local/bin/hers"\n')
    patient.chown(MPS, 20001)
    assert patient.examine().faults["owner"] == "problem"
    assert not patient.site.machine.path("/run/was-run", node="n1").exists()


def test_a_plugstack_conf_with_tabs_is_none(patient: Patient) -> None:
    """Slurm takes it, and the include with a tab, too."""
    patient.write("/etc/slurm/plugstack.conf.d/mps.conf", f"\trequired\t{PLUGIN}\t# ours\n")
    patient.write(PLUGSTACK, "include\tplugstack.conf.d/*\n")
    assert "--mps" in patient.shell("srun --help 2>&1")
    assert patient.examine().faults == {}


@pytest.mark.parametrize("word", ["Required", "REQUIRED", "Include"])
def test_slurm_takes_the_words_of_plugstack_conf_in_small_letters_alone(patient: Patient, word: str) -> None:
    """What doctor calls ignored is ignored, and the finding shows the word and the line that works."""
    patient.write("/etc/slurm/plugstack.conf.d/mps.conf", f"required {PLUGIN}\n")
    patient.write(PLUGSTACK, f"{word} {'plugstack.conf.d/*' if word == 'Include' else PLUGIN}\n")
    assert "--mps" not in patient.shell("srun --help 2>&1")
    (finding,) = (one for one in patient.examine().findings if one["severity"] == "problem")
    if word != "Include":
        assert finding["what"] == f"{PLUGSTACK}:1: Slurm ignores a line that begins with '{word}'"
        assert finding["fix"] == f"{PLUGSTACK}:1: required {PLUGIN}"


def test_the_fix_of_a_single_script_is_a_line_in_it(patient: Patient) -> None:
    """What install says, too; never another Epilog=, which would drop the site's own script and its conditions."""
    by_hand = f"/etc/slurm/epilog.sh, as its first line: {EPILOG} || exit 1"
    loop = 'for one in /etc/slurm/epilog.d/*; do [ -x "$one" ] && "$one"; done'
    for text in ("exit 0", loop):
        single("Epilog", text)(patient)
        (finding,) = patient.examine("epilog-wired").findings
        assert finding["fix"] == by_hand
    assert finding["what"].startswith(f"not checked: whether /etc/slurm/epilog.sh runs {EPILOG}, ")
    single("Epilog", f"{EPILOG} || exit 1\n{loop}\npkill -u $SLURM_JOB_USER; [ -x /usr/bin/pkill ]")(patient)
    assert patient.examine().faults.keys() <= {"config-in-force"}


def test_a_fifo_among_the_scripts_holds_nobody_up(patient: Patient) -> None:
    """It is executable to nobody, and nobody waits for it to be written."""
    fifo = "/etc/slurm/prolog.d/70-fifo"
    patient.shell(f"mkfifo -m 644 {fifo}", f"rm {fifo}")
    assert patient.examine().faults == {"scripts-executable": "problem"}


def test_the_releases_that_doctor_knows_are_those_that_the_tests_run_on() -> None:
    assert [f"{year}.{month:02d}" for year, month in TRIED] == list(RELEASES)


def test_every_check_has_a_fault_that_it_names() -> None:
    """And there are forty faults at least."""
    assert {check for fault in FAULTS.values() for check in fault.named} | {
        "slurmctld",
        "installed",
        "gres-shared",
    } == all_checks().keys()
    assert len(FAULTS) >= 40
