"""The commands, and what they print with ``--json``, held to docs/reports.schema.json (docs/json.md)."""

from __future__ import annotations

import argparse
import json
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from slurm_mps import __version__

from .cluster import REPOSITORY


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((REPOSITORY / "docs/reports.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return schema


@cache
def kinds() -> dict[str, str]:
    """The name in the schema of each report, by its kind and version."""
    shapes = _schema()["$defs"]
    found = {shape.get("properties", {}).get("report", {}).get("const"): name for name, shape in shapes.items()}
    return {kind: name for kind, name in found.items() if kind}


def report(stdout: str, status: int | None = None) -> dict[str, Any]:
    """The one report that stdout is, as documented; `status`: the exit status that the command ended with."""
    document: dict[str, Any] = json.loads(stdout)
    assert document["slurm_mps"] == __version__
    assert status is None or document["status"] == status
    failed = "error" in document and "ranks" not in document
    name = "failed" if failed else kinds()[document["report"]]
    assert document["report"] in kinds()
    shape = {**_schema(), "oneOf": [{"$ref": f"#/$defs/{name}"}]}
    errors = [f"{error.json_path}: {error.message[:300]}" for error in _all(Draft202012Validator(shape), document)]
    assert errors == []
    return document


def _all(validator: Draft202012Validator, document: dict[str, Any]) -> list[Any]:
    return [inner for error in validator.iter_errors(document) for inner in [*(error.context or []), error]]


def command_names(parser: argparse.ArgumentParser) -> list[str]:
    """The names of a parser's commands; none where it has options only."""
    found = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001
    return [*next(found, ())]
