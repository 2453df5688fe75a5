"""What one owner can do to another's things: asked for by name, one by one, and looked at in the records afterwards."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import httpx
from sqlalchemy import RowMapping, Table, select

from app.api.examples import RECIPE
from app.records.database import Database
from app.records.tables import (
    alias_moves,
    aliases,
    audit,
    events,
    idempotency,
    jobs,
    keys,
    points,
    sessions,
    shards,
    uploads,
)
from tests.contract.holdings import Holdings
from tests.contract.service import Service

# What the janitor and the scrapes of /metrics write beside everybody's rows, and a key's last use.
HOUSEKEEPING = frozenset({"rung_at", "swept", "counted", "last_used_at"})
NEVER_SENT_BACK = frozenset({"date", "x-request-id", "ratelimit", "content-length"})

# With what, and how; {} is the id of a merge.
ASKED: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("GET", "/merges/{}", {}),
    ("GET", "/merges/{}", {"If-None-Match": "*"}),
    ("GET", "/merges/{}/events", {}),
    ("GET", "/merges/{}/events?after=0&limit=1", {}),
    ("GET", "/merges/{}/events", {"Accept": "text/event-stream"}),
    ("GET", "/merges/{}/webhooks", {}),
    ("GET", "/merges/{}/files", {}),
    ("GET", "/merges/{}/files/mergeyard.json", {}),
    ("GET", "/merges/{}/files/model.safetensors", {"Range": "bytes=0-9"}),
    ("HEAD", "/merges/{}/files/model.safetensors", {}),
    ("GET", "/merges/{}/archive.tar", {"If-None-Match": "*"}),
    ("GET", "/merges/{}/archive.tar", {}),
    ("HEAD", "/merges/{}/archive.tar", {}),
    ("GET", "/api/models/merges/{}", {}),
    ("GET", "/api/models/merges/{}/revision/main", {}),
    ("GET", "/api/models/merges/{}/tree/main", {}),
    ("GET", "/merges/{}/resolve/main/mergeyard.json", {}),
    ("HEAD", "/merges/{}/resolve/main/model.safetensors", {}),
    ("PUT", "/aliases/of-another", {}),
    ("POST", "/merges/{}/cancel", {}),
    ("DELETE", "/merges/{}", {}),
)
# {} is the path of a sweep or an evaluation.
SCORED: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("GET", "{}", {}),
    ("GET", "{}/events", {}),
    ("GET", "{}/events", {"Accept": "text/event-stream"}),
    ("GET", "{}/webhooks", {}),
    ("POST", "{}/cancel", {}),
    ("DELETE", "{}", {}),
)
# {} is an alias.
ALIASED: tuple[tuple[str, str], ...] = (
    ("GET", "/aliases/{}"),
    ("GET", "/api/models/aliases/{}"),
    ("GET", "/api/models/aliases/{}/tree/main"),
    ("GET", "/aliases/{}/resolve/main/mergeyard.json"),
    ("DELETE", "/aliases/{}"),
)


@dataclass
class Asked:
    """How many requests were sent for another's things, and where an answer told something."""

    requests: int = 0
    crossings: list[str] = field(default_factory=list)


def state_of(service: Service, holdings: Holdings) -> dict[str, str]:
    """Everything that is kept of an owner, by what it is: rows of every table, files by their digests."""
    with closing(Database(service.settings.database)) as database, database.read() as connection:
        owners = select(jobs.c.id).where(jobs.c.owner == holdings.owner)
        mine = select(keys.c.id).where(keys.c.owner == holdings.owner)
        tables: Mapping[Table, Any] = {
            jobs: jobs.c.owner == holdings.owner,
            events: events.c.job_id.in_(owners),
            shards: shards.c.job_id.in_(owners),
            points: points.c.job_id.in_(owners),
            uploads: uploads.c.owner == holdings.owner,
            aliases: aliases.c.owner == holdings.owner,
            alias_moves: alias_moves.c.owner == holdings.owner,
            idempotency: idempotency.c.owner == holdings.owner,
            keys: keys.c.owner == holdings.owner,
            sessions: sessions.c.key_id.in_(mine),
            audit: audit.c.owner == holdings.owner,
        }
        found = {
            f"{table.name}: {row[0]}, {row[1]}": json.dumps(_kept(row._mapping), default=str, sort_keys=True)
            for table, condition in tables.items()
            for row in connection.execute(select(table).where(condition))
        }
    folders = [service.settings.artifacts / merge for merge in holdings.ids]
    folders.append(service.settings.uploads / holdings.uploaded.rpartition("-")[2])
    kept = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return found | {f"file: {path}": hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What is no longer as it was."""
    return [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def ask_for(http: httpx.Client, theirs: Holdings) -> Asked:
    """Ask for each thing of another owner in every way there is, and for what never was.

    The answers must be the same but for the name that was asked for.
    """
    asked = Asked()
    for merge in theirs.ids:
        never = f"mrg-{secrets.token_hex(13)}"
        for method, path, headers in ASKED:
            wanted, nothing = (_send(http, method, path, headers, one) for one in (merge, never))
            _compare(asked, wanted, nothing, merge, never, theirs)
        _compare_recipes(asked, http, f"merge:{merge}", f"merge:{never}", theirs)
    for path, job in theirs.scorings.items():
        never = f"{job[:4]}{secrets.token_hex(13)}"
        for method, ending, headers in SCORED:
            wanted, nothing = (_send(http, method, ending, headers, f"{path}/{one}") for one in (job, never))
            _compare(asked, wanted, nothing, job, never, theirs)
        asked.crossings += [f"{job} is in a list" for _ in _listed(http, asked, theirs, path)]
    _compare_recipes(asked, http, theirs.uploaded, f"upload:sha256-{secrets.token_hex(32)}", theirs)
    for method, path in ALIASED:
        wanted, nothing = (_send(http, method, path, {}, one) for one in (theirs.alias, "nobodys-own"))
        _compare(asked, wanted, nothing, theirs.alias, "nobodys-own", theirs)
    asked.crossings += [f"{merge} is in a list" for merge in _listed(http, asked, theirs)]
    for path in ("/sources", "/metrics", "/audit", "/session", "/aliases", "/queues", "/workers", "/webhooks"):
        _look(asked, http.get(path), theirs)
    return asked


def _send(http: httpx.Client, method: str, path: str, headers: Mapping[str, str], name: str) -> httpx.Response:
    body = {"json": {"merge": name}} if method == "PUT" else {}
    with http.stream(method, path.format(name), headers=headers, **body) as answer:
        if "event-stream" in answer.headers.get("content-type", ""):  # of whoever may listen it has no end
            return httpx.Response(answer.status_code, headers=answer.headers, request=answer.request)
        answer.read()
        return answer


def audited(service: Service, theirs: Holdings) -> list[str]:
    """Entries of the audit, in which anybody else did something to the owner's things."""
    subjects = {*theirs.everything, theirs.uploaded}
    with closing(Database(service.settings.database)) as database, database.read() as connection:
        rows = connection.execute(select(audit).where(audit.c.owner != theirs.owner))
        return [f"{row.owner} {row.action} {row.subject}" for row in rows if row.subject in subjects]


def _listed(http: httpx.Client, asked: Asked, theirs: Holdings, of: str = "/merges") -> Iterator[str]:
    """Jobs of the other owner in all pages of all lists of a kind."""
    for query in ("", *(f"&status={status}" for status in theirs.merges)):
        path = f"{of}?limit=200{query}"
        while path:
            page = http.get(path)
            asked.requests += 1
            if page.status_code == 403:
                break
            yield from (merge["id"] for merge in page.json()["items"] if merge["id"] in theirs.everything)
            path = page.links.get("next", {}).get("url", "")


def _compare_recipes(asked: Asked, http: httpx.Client, theirs: str, never: str, holdings: Holdings) -> None:
    for path in ("/merges/plan", "/merges"):
        bodies = [{"recipe": {**RECIPE, "base_model": one}} for one in (theirs, never)]
        wanted, nothing = (http.post(path, json=body) for body in bodies)
        _compare(asked, wanted, nothing, theirs, never, holdings)


def _compare(
    asked: Asked, wanted: httpx.Response, nothing: httpx.Response, name: str, never: str, theirs: Holdings
) -> None:
    asked.requests += 2
    what = f"{wanted.request.method} {wanted.request.url.path} ({wanted.status_code})"
    if wanted.status_code < 400:
        asked.crossings.append(f"{what} answers with another owner's")
    if _told(wanted, name) != _told(nothing, never):
        asked.crossings.append(f"{what} tells it from what never was: {_told(wanted, name)} {_told(nothing, never)}")
    _look(asked, wanted, theirs)


def _look(asked: Asked, answer: httpx.Response, theirs: Holdings) -> None:
    asked.requests += 1
    shown = [mark for mark in theirs.marks if mark in answer.text or mark in str(answer.headers)]
    if shown:
        asked.crossings.append(f"{answer.request.method} {answer.request.url.path} shows {shown}")


def _told(answer: httpx.Response, name: str) -> tuple[int, dict[str, str], str]:
    """An answer without what differs for every request; the ids are of different lengths in no part that is kept."""
    headers = {key: value for key, value in answer.headers.items() if key not in NEVER_SENT_BACK}
    request_id = answer.headers["x-request-id"]
    text = (
        answer.text.replace(request_id, "REQUEST").replace(name, "NAME").replace(name.partition(":")[2] or name, "NAME")
    )
    return answer.status_code, headers, text


def _kept(row: RowMapping) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in HOUSEKEEPING}
