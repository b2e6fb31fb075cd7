"""The site and the man pages, from the same markdown; ``make docs`` builds both, and a warning is an error.

What is not written by hand is made here, each time, and not kept: a page for each command from the parser
(docs/generated), and mps.toml(5)'s list of keys from the schema. So they cannot say other things than the program.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from slurm_mps import __version__  # noqa: E402
from slurm_mps.cli.main import build_parser  # noqa: E402
from slurm_mps.config.file import schema  # noqa: E402

project = "slurm-mps"
release = version = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
root_doc = "index"
exclude_patterns = ["examples/**"]
html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_title = f"slurm-mps {__version__}"
html_copy_source = False
smartquotes = False
html_show_copyright = False

GENERATED = HERE / "generated"


# ------------------------------------------------------------------------------------------- pages of the commands


def subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """A parser's commands, each with its line of help."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to walk a parser
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            return {name: (one, helps.get(name, "")) for name, one in action.choices.items()}
    return {}


def synopsis(parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().removeprefix("usage: ").replace("\n       ", "\n")
    return f"```text\n{usage}```\n"


def options(parser: argparse.ArgumentParser) -> str:
    """A definition list of what the command takes."""
    formatter = parser._get_formatter()  # noqa: SLF001
    items = []
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:  # noqa: SLF001
            continue
        value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))  # noqa: SLF001
        names = [f"`{name} {value}`" if value else f"`{name}`" for name in action.option_strings]
        term = ", ".join(names) or f"`{formatter._format_args(action, action.dest)}`"  # noqa: SLF001
        text = formatter._expand_help(action) if action.help else ""  # noqa: SLF001
        items.append(f"{term}\n: {escape(text) or '-'}\n")
    return "\n".join(items)


def escape(text: str) -> str:
    """Text as it is, where markdown would see something in it."""
    return re.sub(r"([\\`*_<>\[\]$|])", r"\\\1", text)


def page(name: str, parser: argparse.ArgumentParser, purpose: str) -> str:
    """The page of a command, with those of its own commands."""
    parts = [f"# slurm-mps {name}\n", "## Synopsis\n", synopsis(parser)]
    parts += ["## Description\n", f"{escape(parser.description or purpose)}\n"]
    inner = subcommands(parser)
    for one, (sub, text) in inner.items():
        parts += [f"## slurm-mps {name} {one}\n", f"{escape(sub.description or text)}\n", synopsis(sub), options(sub)]
    if not inner:
        parts += ["## Options\n", options(parser)]
    example = HERE / f"examples/{name}.md"
    if example.exists():
        parts += ["## Examples\n", example.read_text()]
    return "\n".join([*parts, "## See also\n", "slurm-mps(1), slurm-mps(7), mps.toml(5)\n"])


def write(directory: Path, texts: dict[str, str]) -> None:
    """Write the pages that differ from those that are there, and take others away."""
    directory.mkdir(exist_ok=True)
    for old in directory.iterdir():
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        target = directory / name
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


COMMAND_PARSERS = subcommands(build_parser())
INDEX = """# Commands

Each command has a man page, too: slurm-mps-install(1) and so on.

{list}
```{{toctree}}
:hidden:
:glob:

*
```
"""
LIST = "".join(f"[`slurm-mps {name}`]({name}.md)\n: {escape(text)}\n\n" for name, (_, text) in COMMAND_PARSERS.items())


# --------------------------------------------------------------------------------------------- keys of mps.toml


WORDS = {
    "memory": 'a size such as `"8G"` or `"512M"`',
    "memory_or_none": 'a size such as `"8G"` or `"512M"`, or `"none"`',
    "path": "an absolute path",
    "seconds": "seconds",
}


def allowed(key: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a key may hold, in words."""
    if "enum" in key:
        return ", ".join(f"`{json.dumps(value)}`" for value in key["enum"])
    reference = key.get("$ref", "").rpartition("/")[2]
    kind = {**definitions.get(reference, {}), **key}
    words = WORDS.get(reference) or {"integer": "an integer", "number": "a number"}.get(kind.get("type", ""), "")
    bounds = [f"{word} {kind[name]}" for name, word in (("minimum", "from"), ("maximum", "to")) if name in kind]
    return " ".join([words, *bounds]).strip()


def keys(properties: dict[str, Any], definitions: dict[str, Any], prefix: str = "") -> str:
    """A definition list of the keys, tables first said what they are for."""
    items = []
    for name, key in properties.items():
        if "properties" in key:
            items += [f"### [{prefix}{name}]\n", f"{escape(key.get('description', ''))}\n"]
            items.append(keys(key["properties"], definitions, f"{prefix}{name}."))
            continue
        text = [escape(key["description"])] if "description" in key else []
        may = allowed(key, definitions)
        text += [f"Allowed: {may}."] if may else []
        text += [f"Default: `{json.dumps(key['default'])}`."] if "default" in key else []
        items.append(f"`{name}`\n: {' '.join(text)}\n")
    return "\n".join(items)


# ------------------------------------------------------------------------------------------ reports for programs


def fields(shape: dict[str, Any], path: str = "") -> list[str]:
    """A line for each field of a report, those inside it after it."""
    kinds = shape.get("type", [])
    if "array" in kinds and "items" in shape:
        return fields(shape["items"], f"{path}[]")
    lines = []
    for name, one in shape.get("properties", {}).items():
        whole = f"{path}.{name}".removeprefix(".")
        kind = one.get("type", [])
        words = [f"`{whole}`", f"({kind if isinstance(kind, str) else ' or '.join(kind)})"]
        may = ", ".join(f"`{value}`" for value in one.get("enum", ()))
        words += (
            [f": {'; '.join(filter(None, [may, one.get('description', '')]))}"] if may or "description" in one else []
        )
        lines += [" ".join(words[:2]) + "".join(words[2:])] if "const" not in one else []
        lines += fields(one, whole)
    return lines


def reports() -> str:
    """What each report has, from its schema."""
    shapes = json.loads((HERE / "reports.schema.json").read_text())["$defs"]
    parts = []
    for shape in shapes.values():
        if "const" in shape.get("properties", {}).get("report", {}):
            parts += [f"## {shape['properties']['report']['const']}: {shape['title']}\n", f"{shape['description']}\n"]
            parts += [f"- {line}" for line in fields(shape)] + [""]
    return "\n".join(parts)


SCHEMA = schema()
write(
    GENERATED,
    {
        "index.md": INDEX.format(list=LIST),
        "reports.inc": reports(),
        "commands.inc": "".join(
            f"`slurm-mps-{name}`(1)\n: {escape(text)}\n\n" for name, (_, text) in COMMAND_PARSERS.items()
        ),
        "keys.inc": keys(SCHEMA["properties"], SCHEMA.get("$defs", {})),
        **{f"{name}.md": page(name, parser, text) for name, (parser, text) in COMMAND_PARSERS.items()},
    },
)

man_pages = [
    ("man/slurm-mps.1", "slurm-mps", "see and check CUDA MPS on a Slurm cluster, install and repair it", [], 1),
    ("man/mps.toml.5", "mps.toml", "site configuration of slurm-mps", [], 5),
    ("man/slurm-mps.7", "slurm-mps", "CUDA MPS as an option of Slurm", [], 7),
    *((f"generated/{name}", f"slurm-mps-{name}", text, [], 1) for name, (_, text) in COMMAND_PARSERS.items()),
]
