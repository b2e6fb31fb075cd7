"""The plugin's C under AddressSanitizer and UBSan: its parsers by libFuzzer, and all of it in a real slurmstepd."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from tests.attacks.weakened import attack, build_plugin, changes, lay_sources
from tests.fuzz import SECONDS
from tests.fuzz.seeds import SEEDS
from tests.harness.cluster import TERMINAL_STATES
from tests.harness.site import PLUGIN_DIRECTORY, STATE_DIRECTORY, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent / "plugin"
TARGETS = ("fuzz.c", "parsers.c", "step.c", "file.c")
PLUGIN = ("options.c", "limits.c", "gpus.c", "task.c")  # the targets have the others in them
SANITIZERS = "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all"


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """Builds the fuzz targets, of the plugin's sources as they are or with walls taken down."""

    @cache
    def build(walls: tuple[str, ...]) -> Path:
        place = tmp_path_factory.mktemp("fuzz")
        source = lay_sources(place, changes(walls))
        sources = [*(HERE / name for name in TARGETS), *(source / name for name in PLUGIN)]
        flags = [*SANITIZERS.split(), "-fsanitize=fuzzer,address,undefined", "-std=c11", "-D_GNU_SOURCE", f"-I{source}"]
        subprocess.run(["clang", *flags, "-o", place / "fuzz", *sources], check=True)
        return place / "fuzz"

    return build


@pytest.fixture
def fuzzer(build: Callable[[tuple[str, ...]], Path], walls_down: tuple[str, ...]) -> Path:
    return build(walls_down)


def breaks(fuzzer: Path, target: str) -> bool:
    """Whether an input of this target's breaks a promise; FUZZ_SECONDS says how long to look for one."""
    options = [f"-max_total_time={SECONDS:g}", "-max_len=40000", "-seed=4711", "-timeout=2", f"-dict={HERE}/words.dict"]
    with TemporaryDirectory(dir="/dev/shm") as place:  # the files of the target "file" are made there
        corpus = Path(place, "corpus")
        corpus.mkdir()
        for name, seed in SEEDS[target].items():
            (corpus / name).write_bytes(seed)
        done = subprocess.run(
            [fuzzer, *options, "corpus"],
            cwd=place,
            env={**os.environ, "FUZZ": target},
            capture_output=True,
            text=True,
            timeout=SECONDS + 60,
            check=False,
        )
    broken = done.returncode != 0
    assert (" cov: " in done.stderr) is not broken, done.stderr[-3000:]
    print(f"{target}: {done.stderr[-3000:]}")
    return broken


@attack("a value is copied whole or not at all")
def test_no_input_breaks_the_parsers(fuzzer: Path, works: bool) -> None:
    assert breaks(fuzzer, "parsers") is works


@attack("what is too long for a variable is taken away")
def test_no_variables_of_a_task_break_a_step(fuzzer: Path, works: bool) -> None:
    """What the plugin does for a step: the servers' health, the task's environment, why tasks ended badly."""
    assert breaks(fuzzer, "step") is works


@attack("only root's file is a verdict")
def test_nothing_in_a_verdicts_place_is_believed(fuzzer: Path, works: bool) -> None:
    """Files of every kind, size, mode and owner; links, fifos, directories, sockets, devices."""
    assert breaks(fuzzer, "file") is works


@pytest.fixture
def sanitized(tmp_path: Path, walls_down: tuple[str, ...]) -> Iterator[Site]:
    """A site whose slurmstepd has the sanitizers' library loaded first, as a sanitized plugin needs it."""
    flags = f"{SANITIZERS} -fsanitize=address,undefined"
    make = ("CC=gcc", f"CFLAGS={flags}", "HARDENING=")
    plugin = build_plugin(tmp_path, changes(walls_down), *make).read_bytes()
    with Site(nodes=1) as site:
        machine = site.machine
        machine.path(f"{PLUGIN_DIRECTORY}/.sanitized").write_bytes(plugin)
        machine.run(["mv", f"{PLUGIN_DIRECTORY}/.sanitized", f"{PLUGIN_DIRECTORY}/spank_mps.so"]).check()
        real = machine.run(["readlink", "-f", "/usr/sbin/slurmstepd"]).check().stdout.strip()
        environment = " ".join(f"{name}={value}" for name, value in sanitizer_environment().items())
        machine.run(["rm", "/usr/sbin/slurmstepd"]).check()
        machine.write("/usr/sbin/slurmstepd", f'#!/bin/sh\nexec env {environment} {real} "$@"\n', mode=0o755)
        yield site


def sanitizer_environment() -> dict[str, str]:
    library = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(library.stdout.strip()).resolve()
    return {"LD_PRELOAD": str(path), "ASAN_OPTIONS": "detect_leaks=0:log_path=/tmp/sanitizer"}


def reports(site: Site) -> str:
    """What the sanitizers said, on the node and where the job was submitted."""
    show = ["sh", "-c", "cat /tmp/sanitizer.* 2>/dev/null; true"]
    return site.machine.run(show).stdout + site.node("n1", *show).stdout


@attack("a value is copied whole or not at all")
def test_a_sanitized_plugin_in_slurmstepd(sanitized: Site, works: bool) -> None:
    """A job from submission to its tasks, and then a step that finds a verdict with a value longer than any room."""
    script = """
    srun --overlap /usr/bin/env -u LD_PRELOAD /usr/bin/simulated-gpus client
    touch ready; while ! [ -e go ]; do sleep 0.05; done
    srun --overlap echo it ran
    """
    options = ("--gres=gpu:1", "--mps-threads=25", "--mps-mem=8G", "--mps-priority=low", "--export=NONE")
    job = sanitized.cluster.sbatch(*options, script=with_sanitizer(script), env=sanitizer_environment())
    machine = sanitized.machine
    sanitized.cluster.until("the first step", lambda: machine.path("/home/alice/ready").exists() or None, 30)
    healthy = reports(sanitized)
    place = f"{STATE_DIRECTORY}/jobs/{job}/verdict"
    verdict = machine.read(place, node="n1")
    end = verdict.rindex("end ")
    machine.write(place, f"{verdict[:end]}message {'x' * 30000}\n{verdict[end:]}", node="n1")
    machine.write("/home/alice/go", "")

    def look() -> bool | None:
        if "global-buffer-overflow" in reports(sanitized):
            return True
        return False if sanitized.cluster.job_info(job).state in TERMINAL_STATES else None

    overflowed = sanitized.cluster.until("a report, or the job's end", look, 30)
    output = sanitized.cluster.output(job)
    assert healthy == ""
    assert " sms=32 free=8047 " in output
    assert overflowed is works
    assert works or "the prolog's verdict on this node cannot be understood" in output


def with_sanitizer(script: str) -> str:
    """The job's own srun loads the plugin, too."""
    exports = "\n".join(f"export {name}={value}" for name, value in sanitizer_environment().items())
    return f"{exports}\n{script}"
