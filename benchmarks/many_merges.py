"""Very many queued merges of a tiny model, every recipe different, by a few workers: what each request takes meanwhile.

One client submits as fast as it is answered, and looks at an earlier merge after each submission; then it goes on
looking, as fast as it is answered, until all are done. So the last submissions meet the longest queue, the last looks
the largest table, and the workers share the machine with the client from the first request to the last.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

from app.records.bell import Bell
from app.records.database import Database
from app.records.tables import events, jobs
from app.records.upkeep import Upkeep
from app.settings import Settings
from benchmarks.latencies import Latencies
from benchmarks.service import migrated, running
from benchmarks.strangers import Strangers
from tests import servers, tiny

SPAN = 1_000  # requests at the beginning and at the end that are compared
QUEUE = "default"
COUNT_SECONDS = 1.0  # between counts of what is done
SAMPLE_SECONDS = 2.0  # between counts of the doorbells
STUCK_SECONDS = 300.0  # without a merge that ends: given up

Progress = Callable[[str, int, int], None]


def measure(dialect: str, merges: int, workers: int, tell: Progress) -> dict[str, Any]:
    """Latencies in seconds over the first and the last requests, the doorbells, and how all merges ended."""
    with ExitStack() as stack:
        folder = stack.enter_context(servers.short_folder())
        models = tiny.write_root(folder / "models")
        broker = stack.enter_context(servers.valkey(folder / "valkey.sock"))
        database = migrated(stack.enter_context(_database(dialect, folder)))
        stack.callback(database.close)
        settings = Settings(
            data_dir=folder / "data",
            database_url=database.engine.url.render_as_string(hide_password=False),
            broker_url=broker,
            model_roots=str(models),
            threads=1,
            device="cpu",
        )
        bell = Bell(broker)
        stack.callback(bell.close)
        http = stack.enter_context(running(settings, workers=workers))
        _warm(http, database, workers)
        strangers = Strangers(database)
        load = _Load(http, database, bell)
        load.submit(merges, tell)
        load.watch(merges, tell)
        found = {"merges": merges, "workers": workers, "others": strangers.share()}
        return {**found, **load.found(), **_ends(database)}


@contextmanager
def _database(dialect: str, folder: Path) -> Any:
    if dialect == "sqlite":
        yield f"sqlite:///{folder}/merges.sqlite3"
        return
    with servers.postgresql() as server, servers.temporary_database(server) as url:
        yield url


def _warm(http: httpx.Client, database: Database, workers: int) -> None:
    """Until every worker has finished a merge: their start, and Numba's compilation, are not measured."""
    known: set[str] = set()
    submitted = 0
    deadline = time.monotonic() + 600
    while len(known) < workers:
        assert time.monotonic() < deadline, "the workers do not start"
        if _unfinished(database) < workers:
            submitted += 1
            _submit(http, -submitted)
        time.sleep(0.1)
        with database.read() as connection:
            claims = connection.execute(select(events.c.data).where(events.c.type == "claimed")).scalars()
            known = {claim["worker"] for claim in claims}
    while _unfinished(database):
        time.sleep(0.2)


class _Load:
    """The client, and what it saw."""

    def __init__(self, http: httpx.Client, database: Database, bell: Bell) -> None:
        self._http, self._database, self._bell = http, database, bell
        self._upkeep = Upkeep(database)
        self._rng = random.Random(0)
        self._before = _finished(database)
        self._began = time.monotonic()
        self._submitted_after = 0.0
        self._sampled = 0.0
        self._ids: list[str] = []
        self.posts, self.gets, self.lists = Latencies(), Latencies(), Latencies()
        self.gets_beside_posts = 0
        self.longest = 0  # jobs that waited
        self.most_repeated = 0  # doorbells more than jobs that waited

    def submit(self, merges: int, tell: Progress) -> None:
        for number in range(merges):
            began = time.perf_counter()
            self._ids.append(_submit(self._http, number))
            self.posts.add(time.perf_counter() - began)
            self._look()
            if number % 10 == 0:
                self._list()
                self._sample()
                tell("submitted", number + 1, merges)
        tell("submitted", merges, merges)
        self._submitted_after = time.monotonic() - self._began
        self.gets_beside_posts = len(self.gets.seconds)

    def watch(self, merges: int, tell: Progress) -> None:
        """Until all are done. Raises AssertionError where none ends for ``STUCK_SECONDS``."""
        moved, done, counted = time.monotonic(), -1, 0.0
        while done < merges:
            self._look()
            self._sample()
            if time.monotonic() - counted < COUNT_SECONDS:
                continue
            counted = time.monotonic()
            now = merges - _unfinished(self._database)
            if now != done:
                moved, done = time.monotonic(), now
                tell("done", done, merges)
            assert time.monotonic() - moved < STUCK_SECONDS, f"{done} of {merges} are done, and no more end"

    def found(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._began
        beside = self.gets.seconds[: self.gets_beside_posts]
        return {
            "seconds": seconds,
            "submitted_after": self._submitted_after,
            "longest_queue": self.longest,
            "most_repeated_doorbells": self.most_repeated,
            "requests": {
                "POST /merges": _spans(self.posts.seconds, SPAN),
                "GET /merges/{id}, beside submissions": _spans(beside, SPAN),
                "GET /merges/{id}, to the end": _spans(self.gets.seconds, SPAN),
                "GET /merges, beside submissions": _spans(self.lists.seconds, SPAN // 10),
            },
        }

    def _look(self) -> None:
        merge_id = self._rng.choice(self._ids)
        began = time.perf_counter()
        answer = self._http.get(f"/merges/{merge_id}")
        self.gets.add(time.perf_counter() - began)
        assert answer.status_code == 200, answer.text

    def _list(self) -> None:
        began = time.perf_counter()
        answer = self._http.get("/merges")
        self.lists.add(time.perf_counter() - began)
        assert answer.status_code == 200, answer.text

    def _sample(self) -> None:
        if time.monotonic() - self._sampled < SAMPLE_SECONDS:
            return
        self._sampled = time.monotonic()
        doorbells = self._bell.waiting(QUEUE)  # first: what is answered in between makes fewer of them, not more
        waiting = self._upkeep.waiting(QUEUE)
        self.longest = max(self.longest, waiting)
        self.most_repeated = max(self.most_repeated, doorbells - waiting)


def _submit(http: httpx.Client, number: int) -> str:
    recipe = tiny.recipe(parameters={"lambda": 1.0 + number * 1e-6})
    answer = http.post("/merges", json={"recipe": recipe, "queue": QUEUE})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def _spans(seconds: list[float], span: int) -> dict[str, dict[str, float]]:
    """The first and the last ``span`` requests, or thirds where there are fewer."""
    span = min(span, max(1, len(seconds) // 3))
    return {"first": Latencies(seconds[:span]).summary(), "last": Latencies(seconds[-span:]).summary()}


def _unfinished(database: Database) -> int:
    with database.read() as connection:
        waiting = select(func.count()).where(jobs.c.status.in_(("queued", "running", "cancelling")))
        return connection.execute(waiting).scalar_one()


def _finished(database: Database) -> int:
    with database.read() as connection:
        return connection.execute(select(func.count()).where(jobs.c.finished_at.is_not(None))).scalar_one()


def _ends(database: Database) -> dict[str, Any]:
    """How all ended; ``published``: how many artifacts differ, which must be as many as succeeded."""
    with database.read() as connection:
        ends = connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status))
        attempts = connection.execute(select(func.count()).where(events.c.type == "claimed")).scalar_one()
        manifests = connection.execute(select(events.c.data).where(events.c.type == "succeeded")).scalars()
        return {
            "ends": {str(status): count for status, count in ends},
            "attempts": attempts,
            "published": len({found["manifest_sha256"] for found in manifests}),
        }
