"""The site configuration: every problem at once, each with its path."""

import json
import tomllib
from pathlib import Path

import pytest

from slurm_mps.config.file import effective, parse_config, parse_site, schema
from slurm_mps.config.settings import DEFAULTS, ConfigError, compile_site, from_lines, to_lines

ROOT = Path(__file__).parents[2]


def test_the_sample_file_is_exactly_the_defaults() -> None:
    """etc/mps.toml promises that every line shows its default."""
    sample = (ROOT / "etc/mps.toml").read_bytes()
    assert parse_config(sample, "mps.toml") == DEFAULTS
    tables = tomllib.loads(sample.decode())
    limits = tables.pop("limits")
    assert sum(map(len, [*tables.values(), *limits.values()])) == len(vars(DEFAULTS))


def test_the_schemas_defaults_are_the_defaults() -> None:
    def walk(node: dict[str, object], prefix: str) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, child in node.get("properties", {}).items():  # type: ignore[attr-defined]
            if "default" in child:
                found[prefix + name] = child["default"]
            found |= walk(child, f"{prefix}{name}_")
        return found

    assert walk(schema(), "") == vars(DEFAULTS)


def test_an_empty_file_is_the_defaults() -> None:
    assert parse_config(b"", "mps.toml") == DEFAULTS


def test_all_problems_come_at_once_with_their_paths() -> None:
    text = b"""
[limits.thread_percentage]
max = 150
[limits.memory]
default = "8X"
[gpus]
compute_mode = "exclusive"
colour = "red"
[deadlines]
quit = "soon"
"""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "/etc/slurm/mps.toml")
    assert sorted(caught.value.problems) == [
        "/etc/slurm/mps.toml: deadlines.quit: expected a number",
        (
            "/etc/slurm/mps.toml: gpus.colour: unknown; "
            "expected one of compute_mode, sharing, joined_users, shards_per_gpu, client_visible_devices, clients_max"
        ),
        '/etc/slurm/mps.toml: gpus.compute_mode: expected one of "exclusive_process", "unchanged"',
        '/etc/slurm/mps.toml: limits.memory.default: expected a size such as "8G" or "512M" or "none"',
        "/etc/slurm/mps.toml: limits.thread_percentage.max: 150 is greater than 100",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"[limits", "mps.toml: "),
        (b"\xff", "mps.toml: "),
        (b"[limits.thread_percentage]\ndefault = 60\nmax = 50", "default 60 is not between min 0.1 and max 50"),
        (b"[limits.thread_percentage]\nmin = 0.15", "0.15 has more than one decimal"),
        (
            b'[gpus]\nsharing = "joined"\njoined_users = "all"',
            'gpus.joined_users: "all" needs a limits.memory.max, which the server keeps each program to',
        ),
        (b'[limits.memory]\ndefault = "9G"\nmax = "8G"', "default 9G is not between"),
        (b'[paths]\nlogs = "relative"', "paths.logs: expected an absolute path"),
        (b"gpus = 1", "gpus: expected a table"),
        (b"[logs]\nmax_jobs = true", "logs.max_jobs: expected an integer"),
        *(
            (f"[deadlines]\nprolog = {it}".encode(), f"deadlines.prolog: {it} is no number")
            for it in ("nan", "inf", "-inf")
        ),
        (b"[partition.gpu.logs]\nmax_jobs = 1", "partition.gpu.logs: unknown; expected one of limits, policy"),
        (b'[partition."a b".policy]', "partition: a b is no name of a partition"),
        (b"partition = 1", "partition: expected a table"),
        (b"[partition.gpu]\nlimits = 1", "partition.gpu.limits: expected a table"),
        (b"[partition.gpu.limits.memory]\nmin = 1", "partition.gpu.limits.memory.min: expected a string"),
        (
            b'[gpus]\nsharing = "joined"\n[partition.gpu.limits.memory]\nmax = "8G"',
            "partition.gpu.limits.memory.max: jobs of all partitions are joined on one daemon, which has one",
        ),
        (
            b"[partition.gpu.limits.thread_percentage]\nmax = 50",
            "partition.gpu.limits.thread_percentage: default 100 is not between min 0.1 and max 50",
        ),
    ],
)
def test_one_problem(text: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_config(text, "mps.toml")


def test_the_compiled_form_is_the_same_configuration() -> None:
    config = parse_config(b'[deadlines]\nquit = 2.5\n[logs]\nmax_jobs = 7\n[limits.memory]\nmax = "8G"', "x")
    assert from_lines(to_lines(config)) == config
    assert config != DEFAULTS


PARTITIONS = b"""
[limits.thread_percentage]
default = 50
[partition.shared.limits]
memory = { default = "8G" }
thread_percentage = { default = 25 }
[partition.whole.policy]
node_fault = "fail_job"
"""


def test_a_partition_has_its_own_settings_over_those_for_all_jobs() -> None:
    site = parse_site(PARTITIONS, "x")
    lines = compile_site(site)
    seen = {name: from_lines(lines, name) for name in ("", "shared", "whole", "another")}
    assert seen == {**site, "another": site[""]}
    threads = [one.limits_thread_percentage_default for one in seen.values()]
    assert (threads, seen["shared"].limits_memory_default) == ([50, 25, 50, 50], "8G")
    assert [one.policy_node_fault for one in seen.values()] == ["drain", "drain", "fail_job", "drain"]


def test_a_setting_is_shown_with_the_table_that_gives_it() -> None:
    shown = {one.name: (one.value, one.table) for one in effective(PARTITIONS, "x", "shared")}
    assert shown["limits.thread_percentage.default"] == (25, "partition.shared")
    assert shown["limits.thread_percentage.max"] == (100, None)
    assert {one.table for one in effective(PARTITIONS, "x", "whole")} == {"", "partition.whole", None}


def test_a_mistake_of_all_jobs_is_told_once() -> None:
    text = (
        b"[limits.thread_percentage]\nmax = 50\n[partition.a.policy]\n[partition.b.limits.memory]\nmin='9G'\nmax='8G'"
    )
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "x")
    assert caught.value.problems == [
        "x: limits.thread_percentage: default 100 is not between min 0.1 and max 50",
        "x: partition.b.limits.memory: default none is not between min 9G and max 8G",
    ]


def test_a_compiled_form_of_another_version_is_read_as_far_as_both_know() -> None:
    """A job that was brought up before an upgrade must be taken down after it."""
    config = parse_config(b"[deadlines]\nquit = 2.5", "x")
    assert from_lines([*to_lines(config)[1:], "colour=red"]) == config


def test_the_schema_is_itself_valid() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json.loads(json.dumps(schema())))
