"""What Schemathesis' process loads: requests that mean something, a check for things of other owners, and the counts.

``CONTRACT_RUN`` names a JSON file that says who sends, what they can merge, and what they must not see.
"""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
import yaml
from hypothesis import strategies as st
from schemathesis.core.failures import AcceptedNegativeData, Failure

from app.api.examples import EVALUATION, SWEEP

RUN = json.loads(Path(os.environ["CONTRACT_RUN"]).read_text())
UPLOAD = [(name, Path(path).read_bytes()) for name, path in RUN["upload"]]
UNKNOWN = "x-schemathesis-unknown-property"
UPLOAD_NAMES = [name for name, _ in UPLOAD]
# A body of POST /merges by what it holds; None leaves the generated one as it is.
GOOD = [None, None, *({"recipe": recipe} for recipe in RUN["recipes"]), *RUN["retries"]]
SCORED = {"/sweeps": SWEEP, "/evaluations": EVALUATION, "/sweeps/{id}/merges": {"point": 0}}
LISTED = ("/merges", "/sweeps", "/evaluations")
QUEUES = ("default", "nobody-serves-this")

counts: Counter[tuple[str, str, str, str]] = Counter()


# Schemathesis takes the first that it registered of a family, so all of them.
YAML_TYPES = tuple(
    f"{main}/{name}" for main in ("application", "text") for name in ("yaml", "x-yaml", "yml", "vnd.yaml")
)


@schemathesis.serializer(*YAML_TYPES)
def send_text_as_it_is(_context: schemathesis.SerializationContext, value: Any) -> bytes:
    """The schema of a YAML body is its text. Schemathesis would quote that once more."""
    text = value if isinstance(value, str) else yaml.safe_dump(value)
    return text.encode("utf-8", "surrogatepass")


@schemathesis.hook("flatmap_case").apply_to(method="POST", path=["/merges", "/merges/plan"])
def with_a_recipe_that_can_be_merged(_context: schemathesis.HookContext, case: schemathesis.Case) -> Any:
    """No generator makes up names of models. Retries lead to merges that have finished, so to files and archives."""
    if _is_negative(case):
        return st.just(case)
    return st.tuples(st.sampled_from(GOOD), st.sampled_from(QUEUES)).map(lambda drawn: _filled(case, *drawn))


@schemathesis.hook("flatmap_case").apply_to(method="POST", path=["/sweeps", "/evaluations", "/sweeps/{id}/merges"])
def with_what_can_be_scored(_context: schemathesis.HookContext, case: schemathesis.Case) -> Any:
    """In a queue that nobody serves: these models have no tokenizer, so a worker would only fail."""
    if _is_negative(case):
        return st.just(case)
    good = SCORED[case.path]
    return st.booleans().map(lambda real: _with_body(case, {**good, "queue": QUEUES[1]}) if real else case)


@schemathesis.hook("flatmap_case").apply_to(method="POST", path="/uploads")
def with_files_that_are_an_adapter(_context: schemathesis.HookContext, case: schemathesis.Case) -> Any:
    if _is_negative(case):
        return st.just(case)
    return st.booleans().map(lambda real: _with_body(case, {"files": UPLOAD_NAMES}) if real else case)


@schemathesis.hook("flatmap_case").apply_to(method="PUT", path="/aliases/{alias}")
def with_a_merge_that_there_is(_context: schemathesis.HookContext, case: schemathesis.Case) -> Any:
    if _is_negative(case):
        return st.just(case)
    return st.sampled_from([None, *RUN["ids"]]).map(lambda one: _with_body(case, {"merge": one}) if one else case)


@schemathesis.hook
def before_call(_context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """The files of an adapter with their names, which OpenAPI has no words for."""
    if case.body == {"files": UPLOAD_NAMES}:
        kwargs["files"] = [("files", part) for part in UPLOAD]


@schemathesis.hook
def filter_failure(
    _context: schemathesis.HookContext, failure: Failure, case: schemathesis.Case, _response: schemathesis.Response
) -> bool:
    """Headers that nobody knows are ignored (RFC 9110, 5.1) and no bad data.

    Schemathesis knows that, but not where it sends them beside a header that is a number.
    """
    return not (isinstance(failure, AcceptedNegativeData) and UNKNOWN in case.headers)


@schemathesis.check
def nothing_of_other_owners(
    _context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Another owner's merge is a 404, and nothing of theirs is in any answer. Counts the case, too: checks see all."""
    _count(case, response)
    asked = _asked(response)
    theirs = [merge for merge in RUN["theirs"] if merge in asked]
    if theirs and response.status_code < 400:
        raise AssertionError(f"{case.method} {case.path} names {theirs} of another owner: {response.status_code}")
    if any(
        f"/{kind}/{job}" in asked for job in theirs for kind in ("merges", "sweeps", "evaluations")
    ):  # also below /api/models
        assert response.status_code in (401, 403, 404, 405, 422), f"{theirs} is told from what never was"
    shown = response.content.decode("utf-8", "replace") + json.dumps(dict(response.headers))
    seen = [mark for mark in (*RUN["marks"], *RUN["theirs"]) if mark in shown and mark not in asked]
    assert not seen, f"{case.method} {case.path} shows {seen} of another owner"
    if (
        RUN["owner"]
        and case.path in ("/merges", "/sweeps", "/evaluations")
        and case.method == "GET"
        and response.status_code == 200
    ):
        owners = {merge["owner"] for merge in response.json()["items"]}
        assert owners <= {RUN["owner"]}, f"the list shows merges of {owners}"


@atexit.register
def write_counts() -> None:
    Path(RUN["counts"]).write_text(json.dumps([[*key, count] for key, count in counts.items()]))


def _count(case: schemathesis.Case, response: schemathesis.Response) -> None:
    phase = str(case.meta.phase.name.value) if case.meta else "other"
    known = case.method.upper() == case.operation.method.upper()
    label = case.operation.label if known else "methods that a path does not have"
    counts[phase, label, "negative" if _is_negative(case) else "positive", str(response.status_code)] += 1


def _is_negative(case: schemathesis.Case) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_negative


def _filled(case: schemathesis.Case, good: dict[str, Any] | None, queue: str) -> schemathesis.Case:
    if good is None:
        return case
    if not isinstance(case.body, dict):
        return _with_body(case, yaml.safe_dump(good.get("recipe") or good["body"]["recipe"]))
    if "recipe" in good:
        return _with_body(case, {**case.body, "recipe": good["recipe"], "queue": queue})
    if case.path == "/merges":
        case.headers["Idempotency-Key"] = good["idempotency_key"]
    return _with_body(case, good["body"])


def _with_body(case: schemathesis.Case, body: Any) -> schemathesis.Case:
    case.body = body
    return case


def _asked(response: schemathesis.Response) -> str:
    """All that was sent, as text."""
    request = response.request
    body = request.body or b""
    text = body if isinstance(body, str) else body.decode("utf-8", "replace")
    headers = {
        name: value for name, value in request.headers.items() if name.lower() not in ("authorization", "cookie")
    }
    return f"{request.url} {headers} {text}"
