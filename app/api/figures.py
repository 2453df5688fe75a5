"""What /metrics tells, as Prometheus' families: this process's requests, and what the database says of all jobs.

Every API process has its own registry, for its own requests; workers have none. What they do is counted from their
events in the database (``records/tally.py``), so every API process tells the same about jobs, and no worker's death
takes figures with it. Hence no multi-process mode of prometheus_client with its files of dead processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import app
from app.api.readiness import Readiness
from app.errors import CODES
from app.records.database import Database
from app.records.deliveries import Deliveries, Pending
from app.records.job import Status
from app.records.quotas import Quotas, Usage
from app.records.tally import BOUND_NAMES, Load, Tally, Totals, Waiting
from app.records.transitions import LOST
from app.webhooks.courier import OUTCOMES

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
QUEUES = 50  # that are told by name: whoever submits may name any
OTHER_QUEUES = "(others)"

# Of what ``Tally`` counts: its name there, the metric's, the label's name where there is one, and what it is.
COUNTED = (
    ("submitted", "mergeyard_submitted", "", "Merges accepted."),
    ("claimed", "mergeyard_attempts", "", "Attempts begun by workers."),
    ("handed_back", "mergeyard_handed_back", "", "Attempts handed back by workers that were told to stop."),
    ("retried", "mergeyard_retries", "code", "Attempts that failed by a fault of the system and are tried again."),
    ("lost", "mergeyard_leases_lost", "reason", "Attempts whose worker stopped answering, or stalled."),
    ("finished", "mergeyard_finished", "status", "Merges that ended; `reused` is none of `succeeded`."),
    ("failed", "mergeyard_failures", "code", "Merges that failed, by the code of the error."),
    ("written_bytes", "mergeyard_written_bytes", "", "Weight files that attempts finished, in bytes."),
    ("expired", "mergeyard_expired", "", "Merges deleted because their time was over."),
    ("published_bytes", "mergeyard_published_bytes", "", "Everything published, in bytes."),
)


# Told from the start, as 0: Prometheus sees no increase in a series that begins with a 1.
_FAULTS = frozenset(code for code, meaning in CODES.items() if meaning.fault == "system")
KNOWN: Mapping[str, Collection[str]] = {
    "retried": _FAULTS,
    "failed": _FAULTS,
    "lost": LOST,
    "finished": [*(str(status) for status in Status if status.finished), "reused"],
}


class DiskUsage(NamedTuple):
    """Of a disk, in bytes."""

    total: int
    used: int
    free: int


class Figures:
    """The metrics of one API process. Safe to share between threads."""

    def __init__(
        self,
        database: Database,
        readiness: Readiness,
        quotas: Quotas,
        folders: Mapping[str, Path],
        quota_bytes: int | None,
    ) -> None:
        """``folders`` by name: the free space of each one's disk is told. ``quota_bytes``: the whole service's."""
        self.folders = folders
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "mergeyard_http_requests",
            "Answers of this process. Routes are templates; none is a path that no route has, or a refused caller.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "mergeyard_http_request_seconds",
            "From a request's arrival to the beginning of its answer.",
            ("method", "route"),
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.open_streams = Gauge(
            "mergeyard_event_streams", "Event streams that are open in this process.", registry=self.registry
        )
        self._webhooks = Counter(
            "mergeyard_webhook_attempts",
            "Attempts of this process to send a webhook; what failed is tried again, what is given up is not.",
            ("outcome",),
            registry=self.registry,
        )
        for outcome in OUTCOMES:
            self._webhooks.labels(outcome)
        self.registry.register(_Recorded(database, readiness, quotas, folders, quota_bytes))
        ProcessCollector(registry=self.registry)

    def note(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        method = method if method in METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def note_webhook(self, outcome: str) -> None:
        """Count an attempt by its outcome, one of ``OUTCOMES``."""
        self._webhooks.labels(outcome).inc()


class _Recorded(Collector):
    """What is looked up for each scrape. Where the database is away, nothing of jobs is told."""

    def __init__(
        self,
        database: Database,
        readiness: Readiness,
        quotas: Quotas,
        folders: Mapping[str, Path],
        quota_bytes: int | None,
    ) -> None:
        self._quotas, self._quota_bytes = quotas, quota_bytes
        self._dialect = database.dialect
        self._tally, self._deliveries = Tally(database), Deliveries(database)
        self._readiness = readiness
        self._folders = folders

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily(
            "mergeyard_build", "This version.", {"version": app.__version__, "database": self._dialect}
        )
        found = self._readiness.look()
        ready = GaugeMetricFamily("mergeyard_ready", "Whether a part of the service can work.", labels=["part"])
        for part, error in found.items():
            ready.add_metric([part], error is None)
        yield ready
        yield from _disk_families(self._folders)
        if found["database"] is None:
            yield from load_families(self._tally.load())
            yield from total_families(self._tally.totals())
            yield from usage_families(self._quotas.of_all(), self._quota_bytes)
            yield from webhook_families(self._deliveries.pending())


def load_families(load: Load) -> Iterator[Metric]:
    """Gauges of what waits and what runs."""
    depth = GaugeMetricFamily("mergeyard_queue_jobs", "Jobs that wait, by queue.", labels=["queue"])
    age = GaugeMetricFamily(
        "mergeyard_queue_oldest_seconds", "Since the oldest waiting job was submitted.", labels=["queue"]
    )
    for waiting in _named(load.queues):
        depth.add_metric([waiting.queue], waiting.jobs)
        age.add_metric([waiting.queue], waiting.oldest_seconds)
    jobs = GaugeMetricFamily("mergeyard_jobs", "Jobs that have not ended, by status.", labels=["status"])
    jobs.add_metric(["queued"], sum(waiting.jobs for waiting in load.queues))
    jobs.add_metric(["running"], load.running)
    jobs.add_metric(["cancelling"], load.cancelling)
    roomless = GaugeMetricFamily("mergeyard_jobs_without_room", "Of the queued jobs, those that wait for disk.")
    roomless.add_metric([], load.without_room)
    yield from (depth, age, jobs, roomless)


def usage_families(usage: Usage, quota_bytes: int | None) -> Iterator[Metric]:
    """Gauges of what is kept and reserved."""
    kept = GaugeMetricFamily("mergeyard_used_bytes", "What is kept, by kind.", labels=["kind"])
    kept.add_metric(["artifacts"], usage.artifacts)
    kept.add_metric(["uploads"], usage.uploads)
    reserved = GaugeMetricFamily("mergeyard_reserved_bytes", "What unfinished merges reserve of the store.")
    reserved.add_metric([], usage.reserved)
    quota = GaugeMetricFamily("mergeyard_quota_bytes", "What used and reserved bytes may come to, where that is set.")
    if quota_bytes is not None:
        quota.add_metric([], quota_bytes)
    yield from (kept, reserved, quota)


def webhook_families(pending: Pending) -> Iterator[Metric]:
    """Gauges of what the courier still has to send."""
    count = GaugeMetricFamily("mergeyard_webhooks_pending", "Webhooks that are neither delivered nor given up.")
    count.add_metric([], pending.count)
    age = GaugeMetricFamily("mergeyard_webhooks_oldest_seconds", "Since the oldest pending webhook's merge ended.")
    age.add_metric([], pending.oldest_seconds)
    yield from (count, age)


def total_families(totals: Totals) -> Iterator[Metric]:
    """Counters of what happened, and the histogram of stages."""
    for name, metric, label, text in COUNTED:
        family = CounterMetricFamily(metric, text, labels=[label] if label else [])
        found = {**dict.fromkeys(KNOWN.get(name, ("",)), 0), **totals.counts.get(name, {})}
        for value, count in found.items():
            family.add_metric([value] if label else [], count)
        yield family
    stages = HistogramMetricFamily("mergeyard_stage_seconds", "How long merges were in each stage.", labels=["stage"])
    for stage, durations in totals.stages.items():
        buckets = list(zip(BOUND_NAMES, map(float, durations.at_most), strict=True))
        stages.add_metric([stage], buckets, durations.seconds)
    yield stages


def _named(queues: Sequence[Waiting]) -> Iterator[Waiting]:
    """The longest queues by name, and the others together."""
    yield from queues[:QUEUES]
    if others := queues[QUEUES:]:
        yield Waiting(
            queue=OTHER_QUEUES,
            jobs=sum(waiting.jobs for waiting in others),
            oldest_seconds=max(waiting.oldest_seconds for waiting in others),
        )


def disks(folders: Mapping[str, Path]) -> Iterator[tuple[str, DiskUsage]]:
    """Each folder's disk; of a folder that is not there yet, the one on which it will be."""
    for name, folder in folders.items():
        existing = next((path for path in (folder, *folder.parents) if path.is_dir()), None)
        if existing is not None:
            total, used, free = shutil.disk_usage(existing)
            yield name, DiskUsage(total, used, free)


def _disk_families(folders: Mapping[str, Path]) -> Iterator[Metric]:
    free = GaugeMetricFamily("mergeyard_disk_free_bytes", "Free space of a folder's disk.", labels=["folder"])
    size = GaugeMetricFamily("mergeyard_disk_size_bytes", "Size of a folder's disk.", labels=["folder"])
    for name, usage in disks(folders):
        free.add_metric([name], usage.free)
        size.add_metric([name], usage.total)
    yield from (free, size)
