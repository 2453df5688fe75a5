"""A worker's row in the face of trouble; ``test_worker.py`` has a real worker's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from app.records.database import Database
from app.records.workers import Workers
from app.settings import Settings
from worker.presence import introduce, present


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def test_a_worker_beats_and_comes_back_with_its_device_after_its_row_was_forgotten(
    database: Database, tmp_path: Path
) -> None:
    worker, rows = introduce(Settings(data_dir=tmp_path, queue="fast")), Workers(database)
    with present(worker, database, every=0.02):
        (first,) = rows.list()
        rows.set_device(worker.name, "cpu")
        until(lambda: rows.list()[0].seen_at > first.seen_at)
        seen = rows.list()[0].seen_at
        until(lambda: rows.list()[0].seen_at > seen)
        rows.leave(worker.name)
        until(lambda: len(rows.list()) == 1)
        (again,) = rows.list()
        assert (again.device, again.queues, again.started_at) == ("cpu", ["fast"], first.started_at)
    assert rows.list() == []


def test_workers_of_one_host_and_process_have_names_of_their_own(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert len({introduce(settings).name for _ in range(20)}) == 20
