"""The metrics as Prometheus reads them, by its official client library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .. import __version__
from ..status.node import NodeView
from .totals import BOUNDS, HOOKS, LOG_COUNTS, RECONCILE, Totals

PREFIX = "slurm_mps"
_LOG_WORDS = {
    "gpu_faults": "GPU faults that an MPS server reported",
    "refused_clients": "Programs that an MPS server refused (CUDA errors 807 and 808)",
    "server_deaths": "MPS servers that died, or could not be started",
}
#: So that a query finds them before the first has happened: increase() does not see a counter that begins at 1.
_WORDS = {
    "prolog": ("ready", "refused", "node_fault"),
    "epilog": ("done", "node_fault"),
    "refusal": ("request", "no_gpu", "threads", "memory", "held_gpu", "busy_gpu", "mig", "per_node", "site"),
    RECONCILE: ("repaired", "left"),
}


class _Once:
    """A collector of what is known now."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def text(totals: Totals, view: NodeView) -> bytes:
    """All metrics of this node, in the text format of Prometheus."""
    registry = CollectorRegistry()
    registry.register(_Once([*_counters(totals), *_gauges(view)]))
    return generate_latest(registry)


def _counters(totals: Totals) -> Iterable[Metric]:
    for hook in HOOKS:
        counter = CounterMetricFamily(f"{PREFIX}_{hook}s", f"{hook.title()}s of jobs with MPS", labels=["outcome"])
        for outcome in _WORDS[hook]:
            counter.add_metric([outcome], totals.count_of(hook, outcome))
        yield counter
        count, seconds, *below = totals.durations[hook]
        buckets = [*((str(bound), number) for bound, number in zip(BOUNDS, below, strict=True)), ("+Inf", count)]
        words = f"How long the {hook}s of jobs with MPS took, without the start of Python"
        yield HistogramMetricFamily(f"{PREFIX}_{hook}_duration_seconds", words, buckets=buckets, sum_value=seconds)
    yield _by_word(totals, "refusal", "refusals", "Jobs that could not have what they asked for", "reason")
    yield _by_word(totals, RECONCILE, "reconciliations", "What reconcile repaired, and what it left", "outcome")
    logs = totals.log_totals()
    for name in LOG_COUNTS:
        yield CounterMetricFamily(f"{PREFIX}_{name}", _LOG_WORDS[name], value=logs[name])


def _by_word(totals: Totals, what: str, name: str, words: str, label: str) -> Metric:
    counter = CounterMetricFamily(f"{PREFIX}_{name}", words, labels=[label])
    for word in sorted({*_WORDS[what], *totals.counts.get(what, {})}):
        counter.add_metric([word], totals.count_of(what, word))
    return counter


def _gauges(view: NodeView) -> Iterable[Metric]:
    info = GaugeMetricFamily(f"{PREFIX}_info", "The version of slurm-mps", labels=["version"])
    info.add_metric([__version__], 1)
    yield info
    daemons = [daemon for job in view.jobs for daemon in job.daemons]
    states = (job.state for job in view.jobs)
    yield _counted("jobs", "Jobs with MPS, or refused it, by how they stand", states, ("ready",))
    states = ("gone" if d.pid is None else "silent" if d.problem else "answers" for d in daemons)
    yield _counted("daemons", "Control daemons, by whether they answer", states, ("answers", "silent", "gone"))
    servers = (server.state or "unknown" for daemon in daemons for server in daemon.servers)
    yield _counted("servers", "MPS servers, by their state", servers, ("ACTIVE", "FAULT"))
    yield GaugeMetricFamily(f"{PREFIX}_problems", "Problems that slurm-mps status finds", value=len(view.problems))
    clients = GaugeMetricFamily(f"{PREFIX}_clients", "MPS clients on a GPU", labels=["job", "gpu"])
    used = GaugeMetricFamily(f"{PREFIX}_client_memory_bytes", "Device memory of all clients", labels=["job", "gpu"])
    for job in view.jobs:
        for gpu in (gpu for daemon in job.daemons for gpu in daemon.gpus):
            labels = [str(job.job_id), gpu.uuid]
            clients.add_metric(labels, len(gpu.clients))
            used.add_metric(labels, sum(client.memory_bytes or 0 for client in gpu.clients))
    yield clients
    yield used


def _counted(name: str, words: str, states: Iterable[str], always: Iterable[str] = ()) -> Metric:
    gauge = GaugeMetricFamily(f"{PREFIX}_{name}", words, labels=["state"])
    found = Counter(states)
    for state in sorted({*always, *found}):
        gauge.add_metric([state], found[state])
    return gauge
