"""The doorbell's answer, in a pool child. Importing this module registers it with Celery, which is Celery's way.

The parent process imports it too and must stay free of torch (and of CUDA, once there is a GPU): what works lives in
``worker.job``, imported by the child alone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any

from celery import Task, current_app, shared_task
from celery.signals import setup_logging, task_postrun, worker_process_init

from app import logs
from app.records.bell import TASK
from app.settings import Settings
from worker.deaths import MergeRequest
from worker.lease import StopRequest

if TYPE_CHECKING:
    from worker.job import Workplace

log = logging.getLogger("mergeyard.tasks")


# Celery is untyped: hence the ignores at its base class and decorators.


class Doorbell(Task):  # type: ignore[misc]
    """The task of one process."""

    Request = MergeRequest

    @cached_property
    def place(self) -> Workplace:
        """What this process works with; opening it imports torch and compiles the kernels."""
        from worker.job import open_workplace  # noqa: PLC0415 — the parent must not import torch

        settings = Settings.model_validate_json(self.app.conf.mergeyard_settings)
        return open_workplace(settings, self.app.conf.mergeyard_worker)


@shared_task(name=TASK, base=Doorbell, bind=True, ignore_result=True)  # type: ignore[untyped-decorator]
def answer(self: Doorbell, job_id: str) -> None:
    """Work on the job. A process in which an attempt failed is not trusted with another."""
    from worker.job import Ending, work  # noqa: PLC0415

    logs.about(merge=job_id)
    stop = StopRequest()
    with _sigterm(stop):
        ending = work(self.place, job_id, stop)
    if ending in (Ending.FAILED, Ending.LOST):
        leave()


def leave() -> None:
    """End this pool child; the pool starts another. The row is closed, so nothing can be lost."""
    log.info("this process makes room for a fresh one")
    sys.stderr.flush()
    os._exit(0)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _warm(**_: Any) -> None:
    logs.set_up(Settings.model_validate_json(current_app.conf.mergeyard_settings).log_format)
    try:
        _ = current_app.tasks[TASK].place
    except Exception:
        # The pool would start another child that fails the same way, for ever; stopping tells whoever watches.
        log.critical("this process cannot start, so its worker stops", exc_info=True)
        os.kill(os.getppid(), signal.SIGTERM)


@task_postrun.connect  # type: ignore[untyped-decorator]
def _put_down(**_: Any) -> None:
    logs.about(merge=None)


@setup_logging.connect  # type: ignore[untyped-decorator]
def leave_logging_alone(**_: Any) -> None:
    """What Celery does where this signal is answered: ``run_worker`` and ``_warm`` have set it up."""
    # A child that made room (``leave``) is no accident; one that was killed has another exit code, and is told of.
    logging.getLogger("celery.worker.request").addFilter(lambda record: "exitcode 0" not in record.getMessage())


@contextmanager
def _sigterm(stop: StopRequest) -> Iterator[None]:
    """While a job runs, SIGTERM asks it to stop at its next check instead of ending the process."""

    def ask(_signal: int, _frame: FrameType | None) -> None:
        stop.made = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
