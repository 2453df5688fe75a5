"""``python -m worker.health``: whether this host's worker said lately that it lives. For a container's health check."""

from __future__ import annotations

import socket
import sys

from app.errors import MergeyardError
from app.records.database import Database
from app.records.workers import Workers, WorkerState
from app.settings import Settings
from worker.presence import HOST_CHARACTERS


def main() -> int:
    """0 where a worker of this host is alive, 1 where none is, or nobody can say."""
    host = socket.gethostname()[:HOST_CHARACTERS]
    settings = Settings()
    database = Database(settings.database, answer_seconds=settings.database_seconds)
    try:
        alive = any(worker.host == host and worker.state is not WorkerState.LOST for worker in Workers(database).list())
    except MergeyardError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    finally:
        database.close()
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
