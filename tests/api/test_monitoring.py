"""What monitoring imports: metrics that follow Prometheus' rules, a dashboard and alerts made of what there is."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from app.records.tally import Tally
from deploy import monitoring
from tests.api.serving import ServedApi, serving
from tests.api.test_alerts import parts


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: prometheus); .ci/run installs it")
    return found


@pytest.fixture
def scraped(fresh_api: ServedApi) -> str:
    """/metrics of an API that has something to tell of everything."""
    fresh_api.published({"config.json": b"{}"})
    fresh_api.queued()
    Tally(fresh_api.jobs.database).count()
    with serving(fresh_api.settings.model_copy(update={"quota_bytes": 10**12})) as api:
        api.http.get("/merges")
        return api.http.get("/metrics").text


def run(promtool: str, *words: str, text: str = "") -> tuple[int, str]:
    """`promtool check WORDS`: its exit code, and all it says."""
    command = [promtool, "check", *words]
    found = subprocess.run(command, check=False, input=text, capture_output=True, text=True, timeout=30)
    return found.returncode, found.stdout + found.stderr


def expressions() -> Iterator[tuple[str, str]]:
    """Of the dashboard's panels: title and PromQL, with Grafana's variable as Grafana fills it in."""
    for panel in json.loads(monitoring.DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")


def test_the_metrics_are_as_prometheus_wants_them(scraped: str, promtool: str) -> None:
    assert run(promtool, "metrics", text=scraped) == (0, "")


def test_the_lint_finds_what_is_wrong(promtool: str) -> None:
    bad = "# TYPE merges counter\nmerges 1\n"
    code, said = run(promtool, "metrics", text=bad)
    assert code != 0 and "_total" in said


def test_the_rules_are_as_prometheus_wants_them(promtool: str) -> None:
    code, said = run(promtool, "rules", str(monitoring.ALERTS))
    assert code == 0, said


@pytest.mark.parametrize("path", [monitoring.ALERTS, monitoring.DASHBOARD], ids=lambda path: path.name)
def test_the_files_are_what_is_written_now(path: Any) -> None:
    assert path.read_text() == monitoring.written()[path], "run `make monitoring`"


def test_the_rules_have_every_alert_of_the_runbook_with_its_time_and_text() -> None:
    runbook = monitoring.RUNBOOK.read_text()
    (group,) = yaml.safe_load(monitoring.ALERTS.read_text())["groups"]
    assert len(group["rules"]) == runbook[runbook.index("## Alerts") :].count("\n### ")
    by_title = {rule["annotations"]["summary"]: rule for rule in group["rules"]}
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])
    waits = by_title["The queue grows"]
    assert (waits["for"], waits["labels"]) == ("1h", {"severity": "warning"})
    assert "start more workers" in waits["annotations"]["description"]
    assert by_title["A part cannot work"]["labels"] == {"severity": "critical"}
    assert sum(f"`{rule['expr']}`" in runbook for rule in group["rules"]) == len(group["rules"])


def test_the_dashboard_asks_for_every_metric_and_for_nothing_else(scraped: str) -> None:
    families = list(text_string_to_metric_families(scraped))
    samples = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    asked = set()
    for title, expression in expressions():
        for part in parts(promql.parse(expression)):
            if isinstance(part, promql.VectorSelector):
                assert part.name in samples, f"{title}: {part.name}"
                asked.add(part.name)
            if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
                (inner,) = [p for p in parts(part) if isinstance(p, promql.VectorSelector)]
                assert set(part.modifier.labels) <= samples[inner.name] | {"instance"}, f"{title}: {expression}"
    for family in families:  # since when a series is there is nobody's panel
        told = {sample.name for sample in family.samples if not sample.name.endswith("_created")}
        assert not told or asked & told, family.name


def test_a_metric_without_a_row_stops_the_making() -> None:
    with pytest.raises(ValueError, match="mergeyard_new"):
        monitoring.dashboard([GaugeMetricFamily("mergeyard_new", "New.", 1)])


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """No id of one Grafana's database, and the data source is a variable."""
    found = json.loads(monitoring.DASHBOARD.read_text())
    assert found.get("id") is None and found["uid"] and found["title"] and found["schemaVersion"] >= 36
    (source,) = found["templating"]["list"]
    assert (source["type"], source["query"], source["name"]) == ("datasource", "prometheus", "datasource")
    panels = [panel for panel in found["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"]["uid"] == "${datasource}" and panel["description"] for panel in panels)
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in found["panels"]]
    assert all(x + w <= monitoring.COLUMNS for x, _, w, _ in places) and len(set(places)) == len(places)
