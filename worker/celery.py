"""The worker process: a Celery worker with one warm pool child, which does the merging."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import billiard  # type: ignore[import-untyped]
from celery import Celery
from celery.exceptions import SecurityWarning
from celery.signals import worker_ready, worker_shutting_down
from celery.worker import state

from app import logs
from app.records.bell import CELERY, Bell, queue_names
from app.records.database import Database
from app.records.jobs import Jobs
from app.records.upkeep import Upkeep
from app.records.workers import NewWorker
from app.settings import Settings
from worker.deafness import DeafnessWatch
from worker.deaths import Undertaker
from worker.pool import StoppingPool
from worker.presence import introduce, present

log = logging.getLogger("mergeyard.worker")

LEAVE_SECONDS = 10.0  # a deaf worker may take this long to stop in good order
START_SECONDS = 600.0  # a child may take this long to import torch and to compile the kernels


def run_worker(settings: Settings, *, tasks: str = "worker.tasks") -> None:
    """Serve ``settings.queue`` until SIGTERM, then exit; a merge in progress is handed back at its next check. A worker
    that went deaf exits with code 1, so that whoever watches it starts another.

    ``tasks`` is the module that answers the doorbell. Raises MergeyardError (``database_unavailable``, ``not_ready``,
    ``broker_unavailable``, ``not_supported`` for the device) before anything is started.
    """
    if settings.device == "cuda":
        from worker.engine.kernels import load  # noqa: PLC0415 — the parent imports torch only to refuse

        load(settings.device)
    _check_reachable(settings)
    logs.set_up(settings.log_format)
    warnings.simplefilter("ignore", SecurityWarning)  # root in a container: it warns of pickles, which we refuse
    introduced = introduce(settings)
    app = make_celery(settings, introduced.name, tasks=tasks)
    worker_shutting_down.connect(_ask_children_to_stop)
    deaf = threading.Event()
    try:
        worker = app.Worker(
            hostname=f"mergeyard-{os.getpid()}@{socket.gethostname()}",
            pool=StoppingPool,
            queues=list(queue_names(settings.queue)),
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
        )
        with _watched(settings, introduced, deaf):
            worker.start()
    finally:
        worker_shutting_down.disconnect(_ask_children_to_stop)
    sys.exit(1 if deaf.is_set() else worker.exitcode)


def make_celery(settings: Settings, name: str, *, tasks: str = "worker.tasks") -> Celery:
    """The Celery app of the worker ``name``. Its configuration carries that and the settings to the spawned child."""
    app = Celery("mergeyard", broker=settings.broker, include=[tasks])
    app.conf.update(CELERY)
    app.conf.update(
        # CUDA does not survive a fork; and one merge takes the whole GPU, or every core.
        worker_pool_start_method="spawn",
        worker_concurrency=1,
        # No task limit: the child stays warm, since importing torch and compiling take seconds.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_proc_alive_timeout=START_SECONDS,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_max_retries=None,  # Celery's 100 would end the worker in an outage of an hour
        worker_soft_shutdown_timeout=5.0,
        # A child that ended itself, or was killed, has no result to wait for: its row says everything.
        worker_lost_wait=0.5,
        worker_enable_remote_control=False,
        worker_redirect_stdouts=False,
        mergeyard_settings=settings.model_dump_json(),
        mergeyard_worker=name,
    )
    return app


def _check_reachable(settings: Settings) -> None:
    database, bell = Database(settings.database, answer_seconds=settings.database_seconds), Bell(settings.broker)
    try:
        database.check()
        bell.check()
    finally:
        database.close()
        bell.close()


@contextmanager
def _watched(settings: Settings, worker: NewWorker, deaf: threading.Event) -> Iterator[None]:
    """Says that the worker lives, ends the attempts of its children that die, and itself where it goes deaf."""
    database, bell = Database(settings.database, answer_seconds=settings.database_seconds), Bell(settings.broker)
    jobs = Jobs(database, retry_seconds=settings.retry_seconds)
    undertaker = Undertaker(jobs, bell, worker=worker.name, seconds=settings.lease_seconds)

    def leave() -> None:
        deaf.set()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LEAVE_SECONDS)  # what hangs in a dead connection does not come to its end either
        os._exit(1)

    watch = DeafnessWatch(
        Upkeep(database),
        bell,
        queue=settings.queue,
        seconds=settings.deaf_seconds,
        busy=lambda: bool(state.reserved_requests or state.active_requests),
        heard=lambda: state.all_total_count[0],
        leave=leave,
    )

    def listening(**_: Any) -> None:
        watch.start()

    worker_ready.connect(listening)
    undertaker.start()
    try:
        with present(worker, database):
            yield
    finally:
        worker_ready.disconnect(listening)
        watch.stop()
        undertaker.stop()
        bell.close()
        database.close()


def _ask_children_to_stop(**_: Any) -> None:
    """Celery waits for the running task on SIGTERM; this tells it to come to its end."""
    if state.active_requests:
        for child in billiard.active_children():
            os.kill(child.pid, signal.SIGTERM)
