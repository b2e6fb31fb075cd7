"""The site configuration file: TOML, checked against the schema, every problem at once with its path.

Slow to import (tomllib, jsonschema); the prolog runs it in a process of its own when the file has changed.
"""

from __future__ import annotations

import json
import math
import sys
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

from jsonschema import Draft202012Validator

from .settings import ConfigError, SiteConfig, from_settings, memory_bytes, to_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jsonschema.exceptions import ValidationError


_TYPE_WORDS = {"object": "a table", "integer": "an integer", "number": "a number", "string": "a string"}


def schema() -> dict[str, Any]:
    """The JSON Schema that ships with the package."""
    loaded: dict[str, Any] = json.loads(resources.files(__package__).joinpath("schema.json").read_text())
    return loaded


def _allowed(error: ValidationError) -> str:
    """Say what would have been right, in words a reader of the file understands."""
    rule, wanted = error.validator, cast("Any", error.validator_value)
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
    """What a schema cannot say: a default outside its own limits."""
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
    """Read a configuration file's text.

    Raises: ConfigError with every problem, each as ``path: setting: what is wrong``.
    """
    try:
        document = tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    except (RecursionError, ValueError):
        raise ConfigError([f"{path}: holds what no configuration needs"]) from None
    problems = [f"{name}: {value} is no number" for name, value in _settings(document) if _is_nowhere(value)]
    problems += _schema_problems(document)
    if not problems:
        config = from_settings(dict(_settings(document)))
        problems = list(_order_problems(config))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return config


@dataclass(frozen=True)
class Setting:
    """One setting: its name as in the file, what holds, the default, and whether the file gives it."""

    name: str
    value: object
    default: object
    given: bool


def _defaults(part: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, inner in part.get("properties", {}).items():
        yield from [(prefix + key, inner["default"])] if "default" in inner else _defaults(inner, f"{prefix}{key}.")


def effective(text: bytes, path: str) -> list[Setting]:
    """What holds with a configuration file of this text, in the schema's order.

    Raises: ConfigError.
    """
    parse_config(text, path)
    given = dict(_settings(tomllib.loads(text.decode("utf-8"))))
    return [Setting(name, given.get(name, default), default, name in given) for name, default in _defaults(schema())]


def main() -> int:
    """Compile the file on standard input; ``argv[1]`` is its name for messages."""
    try:
        config = parse_config(sys.stdin.buffer.read(), sys.argv[1])
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 1
    print("\n".join(to_lines(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
