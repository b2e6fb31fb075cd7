"""The order of things: every rank looks, rank 0 has some of them ask on behalf of others, and tells all how it ends.

No rank leaves before all have asked: the control daemon knows only those who are still there. And none leaves before
the result is shown: with ``srun --kill-on-bad-exit`` the first that ends badly takes rank 0 along.
"""

from __future__ import annotations

from time import monotonic

from ..record import record
from . import report as wire
from .judge import Findings, problems
from .link import LinkError
from .look import ask_card, ask_daemon, look

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .link import Link
    from .report import Message, Report
    from .step import Step

FINE, PROBLEM, NOT_HERE = 0, 1, 3


@record
class Result:
    """How it ended, as rank 0 knows it."""

    status: int
    problems: list[str]
    findings: Findings


def verify(
    step: Step, environment: Mapping[str, str], link: Link, timeout_seconds: float, show: Callable[[Result], None]
) -> int:
    """Run this rank's part; rank 0 shows the result. Returns: the exit status, the same for all.

    Raises: LinkError when rank 0 is not reached any more; on rank 0 what show() raises.
    """
    start = monotonic()
    # A driver that hangs is to be reported by its rank before rank 0 gives that up.
    mine = look(step, environment, timeout_seconds * 0.6)
    reports = _reports(link.gather(wire.to_message(mine), start + timeout_seconds))
    orders = link.broadcast(_orders(reports), monotonic() + 2 * timeout_seconds)
    answers = link.gather(_obey(mine, orders, environment, timeout_seconds / 3), monotonic() + timeout_seconds)
    if step.rank:
        return _status_once_shown(link, timeout_seconds)
    findings = _findings(reports, answers, step.size, timeout_seconds)
    wrong = problems(findings)
    status = PROBLEM if wrong else FINE
    if all(one.no_driver for one in reports.values()):
        status = NOT_HERE
    link.broadcast({"status": status}, monotonic() + timeout_seconds)
    last = PROBLEM
    try:
        show(Result(status, wrong, findings))
        last = status
    finally:
        link.broadcast({"status": last}, monotonic() + timeout_seconds)
    return last


def _status_once_shown(link: Link, timeout_seconds: float) -> int:
    """What rank 0 says of how it ends, before it shows that and after; the second word comes late where nobody reads.

    Raises: LinkError when it does not say the first.
    """
    status = int(link.broadcast({}, monotonic() + 2 * timeout_seconds).get("status", PROBLEM))
    try:
        return int(link.broadcast({}, monotonic() + 2 * timeout_seconds).get("status", status))
    except LinkError:
        return status


def _reports(messages: Mapping[int, Message]) -> dict[int, Report]:
    """Those that are reports, and of the rank that sent them."""
    found = {}
    for rank, message in messages.items():
        try:
            one = wire.from_message(message)
        except ValueError:
            continue
        if one.rank == rank:
            found[rank] = one
    return found


def _orders(reports: Mapping[int, Report]) -> Message:
    """Who asks which control daemon, and who asks for the whole of a GPU: for each one rank that can."""
    daemons: dict[tuple[str, str], int] = {}
    cards: dict[tuple[str, str], int] = {}
    for rank, one in sorted(reports.items()):
        if not one.pipe_problem:
            daemons.setdefault((one.host, one.pipe_directory), rank)
        if one.gpu:
            cards.setdefault((one.host, one.gpu), rank)
    return {"daemon": list(daemons.values()), "card": list(cards.values())}


def _listed(orders: Message, name: str, rank: int) -> bool:
    ranks = orders.get(name)
    return isinstance(ranks, list) and rank in ranks


def _obey(mine: Report, orders: Message, environment: Mapping[str, str], timeout_seconds: float) -> Message:
    answer: Message = {"daemon": None, "card": None}
    if _listed(orders, "daemon", mine.rank):
        answer["daemon"] = wire.daemon_message(ask_daemon(mine.pipe_directory, environment, timeout_seconds))
    if _listed(orders, "card", mine.rank):
        answer["card"] = vars(ask_card(mine.gpu, environment, timeout_seconds))
    return answer


def _findings(
    reports: Mapping[int, Report], answers: Mapping[int, Message], size: int, waited_seconds: float
) -> Findings:
    daemons, cards = {}, {}
    for one, answer in _pairs(reports, answers):
        try:
            if answer["daemon"] is not None:
                daemons[one.host, one.pipe_directory] = wire.daemon_from_message(answer["daemon"])
            if answer["card"] is not None:
                cards[one.gpu] = int(answer["card"]["multiprocessors"])
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # not an answer: as if none had come
    return Findings(list(reports.values()), daemons, cards, size, waited_seconds)


def _pairs(reports: Mapping[int, Report], answers: Mapping[int, Message]) -> Iterable[tuple[Report, Message]]:
    return ((reports[rank], answer) for rank, answer in answers.items() if rank in reports)
