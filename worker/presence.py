"""A worker's row: a thread of the parent process says that it lives, whatever its child does."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import app
from app.errors import MergeyardError
from app.records.database import Database
from app.records.key import random_text
from app.records.workers import BEAT_SECONDS, NewWorker, Workers
from app.settings import Settings

log = logging.getLogger("mergeyard.worker")

HOST_CHARACTERS = 96  # of a host's name in its worker's


def introduce(settings: Settings) -> NewWorker:
    """This process as a worker. Its name has a random end: containers have the same process ids, and may share a host's
    name.
    """
    host, process = socket.gethostname()[:HOST_CHARACTERS], os.getpid()
    return NewWorker(
        name=f"{host}-{process}-{random_text(4)}",
        host=host,
        process=process,
        queues=(settings.queue,),
        version=app.__version__,
    )


@contextmanager
def present(worker: NewWorker, database: Database, *, every: float = BEAT_SECONDS) -> Iterator[None]:
    """Keep the worker's row while the block runs, beating ``every`` so many seconds, and remove it at its end."""
    rows, stopping = Workers(database), threading.Event()
    started_at = database.now()
    device = rows.beat(worker, started_at=started_at, device=None)

    def beat() -> None:
        nonlocal device
        while not stopping.wait(every):
            try:
                device = rows.beat(worker, started_at=started_at, device=device)
            except MergeyardError as error:  # it works without, and is shown as lost meanwhile
                log.warning("cannot say that this worker lives: %s", error)
            except Exception:
                log.exception("cannot say that this worker lives")

    thread = threading.Thread(target=beat, name="presence", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        try:
            rows.leave(worker.name)
        except MergeyardError as error:
            log.warning("this worker's row stays until it is forgotten: %s", error)
