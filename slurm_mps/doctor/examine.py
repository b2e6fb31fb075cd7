"""All checks, or some of them, on this host."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from ..errors import MpsError
from ..slurm.host import NotKnownError
from .checks import gpus, hooks, plugin, site, slurm
from .facts import Facts
from .finding import ANYWHERE, CHECKS, FINE, GPU_NODE, NOT_CHECKED, PROBLEM, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .finding import Check


#: The modules whose checks register themselves, in the order in which they are told.
_MODULES = (slurm, plugin, hooks, site, gpus)
_PAGE = "docs/doctor.md"


def all_checks() -> dict[str, Check]:
    """Every check by its id, in order."""
    names = [module.__name__ for module in _MODULES]
    return {one.id: one for one in sorted(CHECKS.values(), key=lambda one: names.index(one.body.__module__))}


def examine(environment: Mapping[str, str], ids: Sequence[str] = ()) -> list[Finding]:
    """Run the checks of these ids, or all of them: one finding or more for each, in the order of the checks.

    Raises: KeyError for an id that is none.
    """
    facts = Facts(environment)
    facts.begin()
    checks = all_checks()
    chosen = [checks[check_id] for check_id in ids] or list(checks.values())
    try:
        return [finding for one in chosen for finding in _run(one, facts)]
    finally:
        facts.close()


def page_of(check_id: str) -> str:
    """Where a check is explained: a path where this installation has its pages, or else the page of the sources."""
    return f"{_page()}#{check_id}"


@cache
def _page() -> str:
    """doctor.md in a checkout, or below the prefix of a site-packages, where pip and the packages put it."""
    top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    prefix = os.path.dirname(os.path.dirname(os.path.dirname(top)))
    for place in (f"{top}/{_PAGE}", f"{prefix}/share/doc/slurm-mps/{_PAGE}", f"{top}/share/doc/slurm-mps/{_PAGE}"):
        if os.path.exists(place):
            return place
    return _PAGE


def _run(one: Check, facts: Facts) -> list[Finding]:
    def finding(severity: str, what: str, cure: str = "", why: str = "", *, needs_root: bool = False) -> Finding:
        why = (why or one.why) if severity in (WARNING, PROBLEM) else ""
        return Finding(one.id, severity, what, why, cure, page_of(one.id), needs_root)

    if one.where != ANYWHERE and not facts.is_compute:
        return [finding(NOT_CHECKED, "this is no compute node of slurm.conf")]
    if one.where == GPU_NODE and not facts.gpus_in_slurm:
        return [finding(NOT_CHECKED, "slurm.conf gives this node no GPU")]
    found: list[Finding] = []
    try:
        found += [finding(said.severity, said.what, said.cure, said.why) for said in one.body(facts)]
    except NotKnownError as error:
        found.append(finding(NOT_CHECKED, str(error), needs_root=error.needs_root))
    except MpsError as error:
        found.append(finding(NOT_CHECKED, str(error)))
    except Exception as error:  # one check's bug leaves the others their say
        found.append(finding(WARNING, f"a bug in slurm-mps: {error!r}", "report it", "This was not looked at."))
    found = list(dict.fromkeys(found))  # two prologs may run the same script
    bad = [one for one in found if one.severity != FINE]
    return bad or found or [finding(FINE, one.question)]
