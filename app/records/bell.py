"""The doorbell: a Celery message that carries nothing but a job's id.

The message is a doorbell; the row is the job. A lost message is rung again by the janitor, a duplicate finds the row
already claimed. Hence the settings below: acknowledged at once, never redelivered, no results kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from app.errors import MergeyardError

TASK = "mergeyard.merge"

# Facts behind each line: celery #5935, #4354, #7950 and kombu #305 (a visibility timeout redelivers what still runs,
# and late acknowledgement loses what a killed child held), so that only the lease in the database says who lives.
CELERY: Mapping[str, Any] = {
    "task_acks_late": False,
    "task_ignore_result": True,
    "task_reject_on_worker_lost": False,
    "task_serializer": "json",
    "accept_content": ["json"],
    "broker_connection_retry_on_startup": True,
    "broker_transport_options": {
        "visibility_timeout": 3600,
        "health_check_interval": 30,
        "socket_keepalive": True,
        "queue_order_strategy": "sorted",  # priorities are queues, named so that they sort by urgency
    },
}

# A submission must be answered soon even when the broker is away or hangs: two tries of at most a second each.
_RETRY = {"max_retries": 1, "interval_start": 0.1, "interval_step": 0.0, "interval_max": 0.1}
_SENDER_TRANSPORT = {"socket_connect_timeout": 1.0, "socket_timeout": 1.0, **_RETRY}


def queue_names(queue: str) -> tuple[str, str, str]:
    """The broker's queues of ``queue``, the most urgent first, which is also their alphabetical order."""
    return f"{queue}.1-high", f"{queue}.2-normal", f"{queue}.3-low"


def queue_name(queue: str, priority: int) -> str:
    """The broker's queue for a job: a positive priority is served first, a negative one last."""
    high, normal, low = queue_names(queue)
    return high if priority > 0 else low if priority < 0 else normal


class Bell:
    """Rings workers through the broker at ``broker_url`` (``redis://``, ``rediss://``, ``redis+socket://``).

    Safe to share between threads. Every method raises MergeyardError ``broker_unavailable`` within about two
    seconds where the broker cannot be reached.
    """

    def __init__(self, broker_url: str) -> None:
        self._celery = Celery("mergeyard", broker=broker_url, set_as_current=False)
        self._celery.conf.update(CELERY)
        self._celery.conf.broker_transport_options = {
            **CELERY["broker_transport_options"],
            **_SENDER_TRANSPORT,
        }

    def ring(self, job_id: str, queue: str, priority: int = 0) -> None:
        """Tell the workers of ``queue`` that the job waits."""
        try:
            self._celery.send_task(
                TASK, args=(job_id,), queue=queue_name(queue, priority), retry=True, retry_policy=_RETRY
            )
        except (OperationalError, RedisError, OSError) as error:
            raise _unavailable() from error

    def waiting(self, queue: str) -> int:
        """How many doorbells of ``queue`` no worker has answered yet."""
        try:
            with self._celery.connection_for_write() as connection:
                client = connection.default_channel.client
                return sum(int(client.llen(name)) for name in queue_names(queue))
        except (OperationalError, RedisError, OSError) as error:
            raise _unavailable() from error

    def check(self) -> None:
        """Raise unless the broker answers."""
        try:
            with self._celery.connection_for_write() as connection:
                connection.default_channel.client.ping()
        except (OperationalError, RedisError, OSError) as error:
            raise _unavailable() from error

    def close(self) -> None:
        """Close every pooled connection."""
        self._celery.close()


def _unavailable() -> MergeyardError:
    return MergeyardError("broker_unavailable", "The queue's broker cannot be reached; check MERGEYARD_BROKER_URL.")
