"""The site configuration file: TOML, checked against the schema, every problem at once with its path.

Slow to import (tomllib, jsonschema); the prolog runs it in a process of its own when the file has changed.
"""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

from jsonschema import Draft202012Validator, ValidationError

from ..units import printable
from .settings import ConfigError, SiteConfig, compile_site, from_settings, joins_all, memory_bytes

_TYPE_WORDS = {"object": "a table", "integer": "an integer", "number": "a number", "string": "a string"}


def schema() -> dict[str, Any]:
    """The JSON Schema that ships with the package."""
    loaded: dict[str, Any] = json.loads(resources.files(__package__).joinpath("schema.json").read_text())
    return loaded


def _allowed(error: ValidationError) -> str:
    """Describe the values that the file may have there."""
    rule, wanted = error.validator, cast("Any", error.validator_value)
    if "propertyNames" in error.absolute_schema_path:
        return f"{printable(str(error.instance), 40)} is no name of a partition"
    if rule == "enum":
        return "expected one of " + ", ".join(f'"{value}"' for value in wanted)
    if rule == "type":
        return f"expected {_TYPE_WORDS[str(wanted)]}"
    if rule == "minimum":
        return f"{error.instance} is less than {wanted}"
    if rule == "maximum":
        return f"{error.instance} is greater than {wanted}"
    if rule == "pattern" and "MGT" in str(wanted):
        return 'expected a size such as "8G" or "512M"' + (' or "none"' if "none" in str(wanted) else "")
    if rule == "pattern" and "prom" in str(wanted):
        return 'expected an absolute path that ends in .prom, or "none"'
    if rule == "pattern":
        return "expected an absolute path of plain characters"
    return error.message


def _unknown_keys(error: ValidationError) -> Iterator[str]:
    known = cast("dict[str, Any]", error.schema)["properties"]
    for key in cast("dict[str, Any]", error.instance):
        if key not in known:
            path = ".".join([*map(str, error.absolute_path), key])
            yield f"{path}: unknown; expected one of {', '.join(known)}"


def _schema_problems(document: dict[str, Any]) -> Iterator[str]:
    errors = Draft202012Validator(schema()).iter_errors(document)
    for error in sorted(errors, key=lambda e: [str(part) for part in e.absolute_path]):
        if error.validator == "additionalProperties":
            yield from _unknown_keys(error)
        else:
            yield f"{'.'.join(map(str, error.absolute_path))}: {_allowed(error)}"


def _order_problems(config: SiteConfig) -> Iterator[str]:
    """What a schema cannot say: a default outside its own limits, and all users on a server without any."""
    low, default, high = (
        config.limits_thread_percentage_min,
        config.limits_thread_percentage_default,
        config.limits_thread_percentage_max,
    )
    for name, percent in (("default", default), ("min", low), ("max", high)):
        if abs(percent * 10 - round(percent * 10)) > 1e-6:
            yield f"limits.thread_percentage.{name}: {percent:g} has more than one decimal"
    if not low <= default <= high:
        yield f"limits.thread_percentage: default {default:g} is not between min {low:g} and max {high:g}"
    memory = config.limits_memory_min, config.limits_memory_default, config.limits_memory_max
    sizes = [size for setting in memory if (size := memory_bytes(setting)) is not None]
    if sizes != sorted(sizes):
        yield f"limits.memory: default {memory[1]} is not between min {memory[0]} and max {memory[2]}"
    if joins_all(config) and memory[2] == "none":
        yield 'gpus.joined_users: "all" needs a limits.memory.max, which the server keeps each program to'


def _daemon_problems(config: SiteConfig, general: SiteConfig) -> Iterator[str]:
    """What a partition cannot have of its own where jobs are joined: their daemon has one highest limit for all."""
    if config.gpus_sharing == "joined":
        for name in ("thread_percentage", "memory"):
            if getattr(config, f"limits_{name}_max") != getattr(general, f"limits_{name}_max"):
                yield f"limits.{name}.max: jobs of all partitions are joined on one daemon, which has one"


def _settings(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _is_nowhere(value: object) -> bool:
    """Whether this is TOML's nan or inf, which pass every comparison or none."""
    return isinstance(value, float) and not math.isfinite(value)


def parse_config(text: bytes, path: str) -> SiteConfig:
    """Read a configuration file's text: the settings of jobs in no partition with a table of its own.

    Raises: ConfigError, as parse_site() does.
    """
    return parse_site(text, path)[""]


def parse_site(text: bytes, path: str) -> dict[str, SiteConfig]:
    """Read a configuration file's text: the settings for each partition that it names, and as "" for all others.

    Raises: ConfigError with every problem, each as ``path: setting: what is wrong``.
    """
    try:
        document = tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    except (RecursionError, ValueError):
        raise ConfigError([f"{path}: too deeply nested, or a number out of range"]) from None
    problems = [f"{name}: {value} is no number" for name, value in _settings(document) if _is_nowhere(value)]
    problems += _schema_problems(document)
    site: dict[str, SiteConfig] = {}
    if not problems:
        partitions: dict[str, Any] = document.pop("partition", {})
        everywhere = dict(_settings(document))
        site[""] = from_settings(everywhere)
        problems = general = list(_order_problems(site[""]))
        for name, own in partitions.items():
            site[name] = from_settings({**everywhere, **dict(_settings(own))})
            wrongs = (*_order_problems(site[name]), *_daemon_problems(site[name], site[""]))
            problems = problems + [f"partition.{name}.{wrong}" for wrong in wrongs if wrong not in general]
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return site


@dataclass(frozen=True)
class Setting:
    """One setting: its name as in the file, what holds, the default, and which table gives it: "" that of all jobs,
    ``partition.NAME`` that of a partition, None no table.
    """

    name: str
    value: object
    default: object
    table: str | None


def _defaults(part: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, inner in part.get("properties", {}).items():
        yield from [(prefix + key, inner["default"])] if "default" in inner else _defaults(inner, f"{prefix}{key}.")


def effective(text: bytes, path: str, partition: str = "") -> list[Setting]:
    """Every setting as it applies to jobs in a partition, in the schema's order.

    Raises: ConfigError.
    """
    parse_site(text, path)
    document = tomllib.loads(text.decode("utf-8"))
    own = document.pop("partition", {}).get(partition, {})
    given = {name: (value, "") for name, value in _settings(document)}
    given |= {name: (value, f"partition.{partition}") for name, value in _settings(own)}
    found = ((name, default, *given.get(name, (default, None))) for name, default in _defaults(schema()))
    return [Setting(name, value, default, table) for name, default, value, table in found]


def main() -> int:
    """Compile the file on standard input; ``argv[1]`` is its name for messages."""
    try:
        site = parse_site(sys.stdin.buffer.read(), sys.argv[1])
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 1
    print("\n".join(compile_site(site)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
