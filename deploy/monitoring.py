"""What Prometheus and Grafana import: ``python -m deploy.monitoring`` writes both files anew.

``prometheus/alerts.yml`` has the runbook's alerts (docs/operations.md), each with its text; ``grafana/mergeyard.json``
has a panel for every metric that the API exports. A test says when either file is not what this writes.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef
from prometheus_client.core import Metric

from app.main import open_service
from app.records.database import Database
from app.settings import Settings

FOLDER = Path(__file__).parent
RUNBOOK = FOLDER.parent / "docs" / "operations.md"
ALERTS, DASHBOARD = FOLDER / "prometheus" / "alerts.yml", FOLDER / "grafana" / "mergeyard.json"

# ── alerts ──────────────────────────────────────────────────────────────────────────────────────

_ALERT = re.compile(
    r"^### (?P<title>.+)\n`(?P<expression>.+)`(?: for (?P<count>\d+) (?P<unit>min|h))?(?P<critical>, critical)?\n\n"
    r"(?P<text>(?:.+\n?)+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert of the runbook. ``lasting``: as Prometheus writes durations, empty where it fires at once."""

    title: str
    expression: str
    lasting: str
    critical: bool
    text: str

    @property
    def name(self) -> str:
        return "Mergeyard" + "".join(word[:1].upper() + word[1:] for word in re.findall(r"\w+", self.title))


def alerts(runbook: str) -> Sequence[Alert]:
    """In the runbook's order."""
    return [
        Alert(
            title=found["title"],
            expression=found["expression"],
            lasting=f"{found['count']}{found['unit'][0]}" if found["count"] else "",
            critical=bool(found["critical"]),
            text=found["text"].strip(),
        )
        for found in _ALERT.finditer(runbook)
    ]


def rules(found: Iterable[Alert]) -> str:
    """The alerts as a file of Prometheus' rules."""
    group = {"name": "mergeyard", "rules": [_rule(alert) for alert in found]}
    text = yaml.safe_dump({"groups": [group]}, sort_keys=False, width=1000, allow_unicode=True)
    return f"# Made from docs/operations.md by `python -m deploy.monitoring`; do not edit.\n{text}"


def _rule(alert: Alert) -> dict[str, Any]:
    lasting = {"for": alert.lasting} if alert.lasting else {}
    return {
        "alert": alert.name,
        "expr": alert.expression,
        **lasting,
        "labels": {"severity": "critical" if alert.critical else "warning"},
        "annotations": {"summary": alert.title, "description": " ".join(alert.text.split())},
    }


# ── the dashboard ───────────────────────────────────────────────────────────────────────────────

# Every metric is in one of these rows.
ROWS: Mapping[str, Sequence[str]] = {
    "Waiting and running": (
        "mergeyard_ready",
        "mergeyard_queue_jobs",
        "mergeyard_queue_oldest_seconds",
        "mergeyard_jobs",
        "mergeyard_jobs_without_room",
    ),
    "Merges": (
        "mergeyard_submitted",
        "mergeyard_finished",
        "mergeyard_failures",
        "mergeyard_stage_seconds",
        "mergeyard_written_bytes",
        "mergeyard_published_bytes",
        "mergeyard_expired",
    ),
    "Attempts": ("mergeyard_attempts", "mergeyard_retries", "mergeyard_leases_lost", "mergeyard_handed_back"),
    "Space": (
        "mergeyard_disk_free_bytes",
        "mergeyard_disk_size_bytes",
        "mergeyard_used_bytes",
        "mergeyard_reserved_bytes",
        "mergeyard_quota_bytes",
    ),
    "Requests": ("mergeyard_http_requests", "mergeyard_http_request_seconds", "mergeyard_event_streams"),
    "Webhooks": ("mergeyard_webhooks_pending", "mergeyard_webhooks_oldest_seconds", "mergeyard_webhook_attempts"),
    "API processes": (
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_cpu_seconds",
        "process_open_fds",
        "process_max_fds",
        "process_start_time_seconds",
        "mergeyard_build",
    ),
}
# What each API process counts for itself is added up, but for what is a process's own business; everything else comes
# from the database, and every process tells the same.
ADDED = (
    "mergeyard_http_requests",
    "mergeyard_http_request_seconds",
    "mergeyard_event_streams",
    "mergeyard_webhook_attempts",
)
OF_A_PROCESS = ROWS["API processes"]
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS, HEIGHT = 24, 8


def exported(settings: Settings) -> Sequence[Metric]:
    """The metrics of an API with these settings, which has a migrated database."""
    service = open_service(settings)
    service.figures.note("GET", "/merges", 200, 0.0)  # for its labels
    try:
        return list(service.figures.registry.collect())
    finally:
        service.limits.close()
        service.bell.close()
        service.database.close()


def dashboard(metrics: Iterable[Metric]) -> str:
    """Grafana's JSON. Raises KeyError for a row's metric that there is none of, ValueError for one that has no row."""
    found = {metric.name: metric for metric in metrics}
    if missing := set(found) - {name for names in ROWS.values() for name in names}:
        raise ValueError(f"in no row of the dashboard: {sorted(missing)}")
    made = (
        Dashboard("Mergeyard")
        .uid("mergeyard")
        .tags(["mergeyard"])
        .refresh("30s")
        .time("now-6h", "now")
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for title, names in ROWS.items():
        made = made.with_row(Row(title))
        for name in names:
            made = made.with_panel(_panel(found[name]))
    return json.dumps(json.loads(JSONEncoder(sort_keys=True, indent=2).encode(made.build())), indent=2) + "\n"


def _panel(metric: Metric) -> Panel:
    panel = (
        Panel()
        .title(metric.name.removeprefix("mergeyard_").replace("_", " "))
        .description(metric.documentation)
        .datasource(SOURCE)
        .unit(_unit(metric))
        .min(0)
        .span(COLUMNS // 3)
        .height(HEIGHT)
        .legend(
            VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        )
    )
    for expression, legend in _queries(metric):
        panel = panel.with_target(Dataquery().expr(expression).legend_format(legend).datasource(SOURCE))
    return panel


def _queries(metric: Metric) -> Iterator[tuple[str, str]]:
    """PromQL and the legend of each line."""
    labels = [name for name in _labels(metric) if name != "le"]
    gather = "sum" if metric.name in ADDED else "max"
    if metric.name in OF_A_PROCESS:
        labels, gather = ["instance", *labels], "max"
    legend = " ".join(f"{{{{{name}}}}}" for name in labels)
    by = f" by ({', '.join(labels)})" if labels else ""
    if metric.type == "histogram":
        by = f" by ({', '.join([*labels, 'le'])})"
        rate = f"{gather}{by} (rate({metric.name}_bucket[$__rate_interval]))"
        for share in (0.5, 0.95):
            yield f"histogram_quantile({share}, {rate})", f"p{share * 100:.0f} {legend}".strip()
    elif metric.type == "counter":
        counted = f"{metric.name}_total"
        often = metric.name in ADDED or metric.name in OF_A_PROCESS or metric.name.endswith("_bytes")
        change = f"rate({counted}[$__rate_interval])" if often else f"increase({counted}[1h])"  # merges are few
        yield f"{gather}{by} ({change})", legend or metric.name
    else:
        name = f"{metric.name}_info" if metric.type == "info" else metric.name
        yield f"{gather}{by} ({name})", legend or name


def _labels(metric: Metric) -> Sequence[str]:
    """What the metric is told by: of a family that has no sample yet, what it was made with."""
    declared = getattr(metric, "_labelnames", ())
    return sorted(declared) or sorted({name for sample in metric.samples for name in sample.labels})


def _unit(metric: Metric) -> str:
    if metric.name.endswith("start_time_seconds"):
        return "dateTimeFromNow"
    if metric.name == "process_cpu_seconds":
        return "percentunit"
    if metric.name.endswith("_bytes"):
        return "Bps" if metric.type == "counter" else "bytes"
    if metric.name.endswith("_seconds"):
        return "s"
    return "reqps" if metric.name == "mergeyard_http_requests" else "short"


def main() -> None:
    for path, text in written().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def written() -> Mapping[Path, str]:
    """Both files, as they have to be."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), quota_bytes=1, database_url=f"sqlite:///{folder}/records.sqlite3")
        database = Database(settings.database)
        database.migrate()
        database.close()
        metrics = exported(settings)
    return {ALERTS: rules(alerts(RUNBOOK.read_text())), DASHBOARD: dashboard(metrics)}


if __name__ == "__main__":
    main()
