"""The runbook's alerts: each is PromQL, over figures and labels that there are, and says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.records.tally import Tally
from deploy.monitoring import RUNBOOK as runbook  # noqa: N811 — its path
from deploy.monitoring import alerts
from tests.api.serving import ServedApi, serving

RUNBOOK = runbook.read_text()
ALERTS = [(alert.title, alert.expression, alert.text) for alert in alerts(RUNBOOK)]
OF_PROMETHEUS = {"up": {"job", "instance"}}


def parts(expression: Any) -> Iterator[Any]:
    """The expression and everything in it."""
    yield expression
    for name in ("lhs", "rhs", "expr", "vector_selector"):
        if (inner := getattr(expression, name, None)) is not None:
            yield from parts(inner)
    for argument in getattr(expression, "args", ()):
        yield from parts(argument)


@pytest.fixture
def labels(fresh_api: ServedApi) -> dict[str, set[str]]:
    """What labels each sample has, once there is something of everything."""
    fresh_api.published({"config.json": b"{}"})
    fresh_api.queued()
    Tally(fresh_api.jobs.database).count()
    with serving(fresh_api.settings.model_copy(update={"quota_bytes": 10**12})) as api:
        api.http.get("/merges")
        text = api.http.get("/metrics").text
    found = dict(OF_PROMETHEUS)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_section_is_an_alert() -> None:
    section = RUNBOOK[RUNBOOK.index("## Alerts") :]
    assert [heading for heading, _, _ in ALERTS] == re.findall(r"^### (.+)$", section, re.MULTILINE)
    assert len({expression for _, expression, _ in ALERTS}) == len(ALERTS) >= 10


def test_every_expression_asks_for_what_there_is(labels: dict[str, set[str]]) -> None:
    quoted = re.findall(r"`((?:max|min|sum|rate|increase|histogram_quantile)\b[^`]*\([^`]*)`", RUNBOOK)
    assert {expression for _, expression, _ in ALERTS[1:]} <= set(quoted)
    for expression in {*quoted, *(expression for _, expression, _ in ALERTS)}:
        asked: set[str] = set()
        for part in parts(promql.parse(expression)):
            if isinstance(part, promql.VectorSelector):
                assert part.name in labels, f"{expression}: {part.name}"
                asked |= labels[part.name]
                unknown = {matcher.name for matcher in part.matchers.matchers} - labels[part.name]
                assert not unknown, f"{expression}: {unknown}"
        for part in parts(promql.parse(expression)):
            if isinstance(part, promql.AggregateExpr) and part.modifier is not None:
                assert set(part.modifier.labels) <= asked, expression


def test_every_label_that_an_expression_names_has_a_value_that_there_is() -> None:
    """A code or a status that was renamed would make an alert silent for ever."""
    from app.errors import CODES
    from app.records.job import Status
    from app.webhooks.courier import OUTCOMES

    known = {
        "code": set(CODES),
        "status": {*Status, "5..", "401", "429"},
        "route": {"none"},
        "job": {"mergeyard"},
        "kind": {"artifacts", "uploads"},
        "outcome": set(OUTCOMES),
    }
    for _, expression, _ in ALERTS:
        for part in parts(promql.parse(expression)):
            for matcher in part.matchers.matchers if isinstance(part, promql.VectorSelector) else ():
                if matcher.op == promql.MatchOp.NotRe:
                    continue  # what is left out need not be there
                assert set(matcher.value.split("|")) <= known[matcher.name], expression
