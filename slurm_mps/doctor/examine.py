"""All checks, or some of them, on this host."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import MpsError
from ..node.reading import read_text
from ..slurm.host import NotKnownError
from .checks import gpus, gres, hooks, installed, plugin, site, slurm
from .facts import Facts, NoAnswerError
from .finding import ANYWHERE, CHECKS, FINE, GPU_NODE, NOT_CHECKED, PROBLEM, WARNING, Check, Finding

#: The modules whose checks register themselves, in the order in which findings are shown.
_MODULES = (installed, slurm, plugin, hooks, site, gres, gpus)
#: Those that look at what `slurm-mps install` puts there. Without it their findings would be many for one cause.
_OF_INSTALLED = (plugin.__name__, hooks.__name__)
_PAGE = "docs/doctor.md"


def all_checks() -> dict[str, Check]:
    """Every check by its id, in order."""
    names = [module.__name__ for module in _MODULES]
    return {one.id: one for one in sorted(CHECKS.values(), key=lambda one: names.index(one.body.__module__))}


def examine(environment: Mapping[str, str], ids: Sequence[str] = ()) -> list[Finding]:
    """Run the checks of these ids, or all of them: one finding or more for each, in the order of the checks.

    Raises: KeyError for an id that no check has.
    """
    facts = Facts(environment)
    facts.begin()
    checks = all_checks()
    chosen = [checks[check_id] for check_id in ids] or list(checks.values())
    try:
        return [finding for one in chosen for finding in _run(one, facts)]
    finally:
        facts.close()


def explain(check_id: str) -> str:
    """A check's section of docs/doctor.md and the page's path; without the page the check's own question and
    reason.
    """
    top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    prefix = os.path.dirname(os.path.dirname(os.path.dirname(top)))  # of a site-packages: pip, and the packages
    for place in (f"{top}/{_PAGE}", f"{prefix}/share/doc/slurm-mps/{_PAGE}", f"{top}/share/doc/slurm-mps/{_PAGE}"):
        try:
            _, heading, rest = read_text(place).partition(f"### {check_id}\n")
        except OSError:
            continue
        text, _, _ = rest.partition("\n#")
        return f"{heading}{text.strip()}\n\n({place})"
    one = all_checks()[check_id]
    return f"### {check_id}\n{one.question}. {one.why}"


def _run(one: Check, facts: Facts) -> list[Finding]:
    found: list[Finding] = []
    try:
        left_out = _why_left_out(one, facts)
        found += [Finding(NOT_CHECKED, left_out)] if left_out else one.body(facts)
    except NoAnswerError as error:
        its_own = error.check == one.id
        severity = WARNING if its_own and error.service else NOT_CHECKED
        found.append(Finding(severity, error.message, error.hint if its_own else "", "It hangs, or this node is slow."))
    except NotKnownError as error:
        found.append(Finding(NOT_CHECKED, str(error), needs_root=error.needs_root))
    except MpsError as error:
        found.append(Finding(NOT_CHECKED, str(error)))
    except Exception as error:  # a bug in one check does not keep the others from being made
        found.append(Finding(WARNING, f"a bug in slurm-mps: {error!r}", "report it", "This was not looked at."))
    found = list(dict.fromkeys(found))  # two prologs may run the same script
    found = [finding for finding in found if finding.severity != FINE] or found or [Finding(FINE, one.question)]
    bad = (WARNING, PROBLEM)
    return [replace(it, check=one.id, why=(it.why or one.why) if it.severity in bad else "") for it in found]


def _why_left_out(one: Check, facts: Facts) -> str:
    if one.where != ANYWHERE and not facts.is_compute:
        return "this is no compute node of slurm.conf"
    if one.where == GPU_NODE and not facts.gpus_in_slurm:
        return "slurm.conf gives this node no GPU"
    if one.body.__module__ in _OF_INSTALLED and _is_missing(facts):
        return "slurm-mps is not installed on this host"
    return ""


def _is_missing(facts: Facts) -> bool:
    try:
        return not facts.is_installed
    except NotKnownError:
        return False  # the check itself says what cannot be read
