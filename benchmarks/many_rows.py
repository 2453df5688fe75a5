"""How long requests take beside very many merges, against the same requests beside few.

Both databases are there at once, each with an API of its own, and the requests go to one and the other in turn: what
slows the machine slows both.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.records.database import Database
from app.records.job import NewJob
from app.records.key import LOCAL_OWNER, Caller, Scope
from app.records.keys import Keys
from app.records.rows import write_cursor
from app.records.tables import jobs
from app.records.tally import Tally
from app.records.upkeep import Upkeep
from app.settings import Settings
from app.sources.resolver import Resolver
from benchmarks import rows
from benchmarks.latencies import Latencies
from benchmarks.service import migrated, running
from benchmarks.strangers import Strangers
from tests import servers, tiny

FEW = 1_000
WARM = 20  # requests of each kind before the first that counts
Progress = Callable[[str, int, int], None]  # what, how much of it, of how much


def measure(dialect: str, count: int, requests: int, tell: Progress) -> dict[str, Any]:
    """Latencies in seconds of each request and each statement of upkeep, beside ``FEW`` merges and ``count``."""
    with ExitStack() as stack:
        folder = stack.enter_context(servers.short_folder())
        models = tiny.write_root(folder / "models")
        broker = stack.enter_context(servers.valkey(folder / "valkey.sock"))
        databases = {}
        began = time.monotonic()
        for size in (FEW, count):
            database = migrated(stack.enter_context(_database(dialect, folder, size)))
            stack.callback(database.close)
            rows.fill(database, size, _new(models, folder), lambda done, size=size: tell(f"{size:,} rows", done, size))
            databases[size] = database
        filled = time.monotonic() - began
        pairs = {}
        for size, database in databases.items():
            settings = Settings(
                data_dir=folder / f"data-{size}",
                database_url=database.engine.url.render_as_string(hide_password=False),
                broker_url=broker,
                model_roots=str(models),
                rate_requests=0,
                rate_writes=0,
            )
            keys = _keys(database)
            http = stack.enter_context(running(settings))
            pairs[size] = dict(_requests(http, database, keys))
        strangers = Strangers(*databases.values())
        found = _in_turn(pairs, requests, tell)
        upkeep = _in_turn({size: _upkeep(database) for size, database in databases.items()}, 30, tell, warm=2)
        others = strangers.share()
    return {
        "rows": count,
        "few": FEW,
        "filled_seconds": filled,
        "others": others,
        "requests": found,
        "upkeep": upkeep,
    }


@contextmanager
def _database(dialect: str, folder: Path, size: int) -> Iterator[str]:
    if dialect == "sqlite":
        yield f"sqlite:///{folder}/rows-{size}.sqlite3"
        return
    with servers.postgresql() as server, servers.temporary_database(server) as url:
        yield url


def _new(models: Path, folder: Path) -> Callable[[random.Random], NewJob]:
    resolver = Resolver(roots=(models,), uploads=folder / "uploads")

    def new(rng: random.Random) -> NewJob:
        recipe = tiny.recipe(parameters={"lambda": round(rng.uniform(0.5, 1.5), 6)})
        plan = make_plan(parse_recipe(recipe), resolver)
        return NewJob(
            recipe=recipe,
            resolved=plan.recipe,
            method=plan.method,
            plan_digest=plan.digest,
            estimates=asdict(plan.estimates),
            total_bytes=plan.estimates.disk_bytes,
            labels={"team": rng.choice(("search", "chat", "code"))},
        )

    return new


def _keys(database: Database) -> Mapping[str, str]:
    keys, operator = Keys(database), Caller(owner=LOCAL_OWNER)
    anna = keys.create(owner="anna", scopes={Scope.READ, Scope.MERGE}, by=operator)
    admin = keys.create(owner="admin", scopes={Scope.ADMIN}, by=operator)
    return {"owner": anna.text, "admin": admin.text}


def _requests(
    http: httpx.Client, database: Database, keys: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is asked, by name."""
    lists = {
        "GET /merges": "",
        "…?cursor in the middle": f"?cursor={_middle(database)}",
        "…?status=failed": "?status=failed",
        "…?status=queued&status=running": "?status=queued&status=running",
        "…?method=ties": "?method=ties",
        f"…?method={rows.RARE}": f"?method={rows.RARE}",
        "…?method=ties&status=failed": "?method=ties&status=failed",
    }
    for who, key in keys.items():
        header = {"Authorization": f"Bearer {key}"}
        for name, query in lists.items():
            yield f"{name}, {who}", _get(http, f"/merges{query}", header)
    header = {"Authorization": f"Bearer {keys['owner']}"}
    recent = http.get("/merges", headers=header).json()["items"][0]["id"]
    yield "GET /merges/{id}", _get(http, f"/merges/{recent}", header)
    yield "GET /merges/{id}/events", _get(http, f"/merges/{recent}/events", header)
    yield "POST /merges", _post(http, header)
    yield "GET /metrics", _get(http, "/metrics", {"Authorization": f"Bearer {keys['admin']}"})


def _middle(database: Database) -> str:
    """A cursor half-way, by time, between the newest merge and the oldest that a page by status can begin with."""
    with database.read() as connection:
        ended = select(jobs).where(jobs.c.status == "succeeded", jobs.c.deleted_at.is_(None))
        oldest = connection.execute(ended.order_by(jobs.c.created_at, jobs.c.id).limit(1)).one()
        newest = connection.execute(ended.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(1)).one()
        middle = oldest.created_at + (newest.created_at - oldest.created_at) / 2
        earlier = ended.where(jobs.c.created_at <= middle).order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
        return write_cursor(connection.execute(earlier.limit(1)).one())


def _get(http: httpx.Client, path: str, header: Mapping[str, str]) -> Callable[[], None]:
    return lambda: _check(http.get(path, headers=header))


def _post(http: httpx.Client, header: Mapping[str, str]) -> Callable[[], None]:
    return lambda: _check(http.post("/merges", json={"recipe": tiny.recipe(), "queue": "nobody"}, headers=header))


def _check(answer: httpx.Response) -> None:
    assert answer.is_success, answer.text


def _upkeep(database: Database) -> Mapping[str, Callable[[], object]]:
    """What the janitors, the workers and the metrics ask again and again."""
    upkeep, tally = Upkeep(database), Tally(database)
    return {
        "dead leases and doorbells": upkeep.round,
        "leftovers to sweep": upkeep.unswept,
        "jobs waiting in a queue": lambda: upkeep.waiting("default"),
        "counting events": tally.count,
        "load": tally.load,
    }


def _in_turn(
    asked: Mapping[int, Mapping[str, Callable[[], object]]], times: int, tell: Progress, *, warm: int = WARM
) -> dict[str, dict[str, Any]]:
    """The latencies of everything asked: by name, then by the database's size."""
    names = list(next(iter(asked.values())))
    found = {}
    for name in names:
        of_each = {size: Latencies() for size in asked}
        for number in range(-warm, times):
            for size, callables in asked.items():
                began = time.perf_counter()
                callables[name]()
                if number >= 0:
                    of_each[size].add(time.perf_counter() - began)
            tell(name, number + 1, times)
        found[name] = {str(size): latencies.summary() for size, latencies in of_each.items()}
    return found
