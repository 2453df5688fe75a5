"""The pool of the worker's one child, which comes to its end when the worker is told to stop."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from celery.concurrency.prefork import TaskPool


class StoppingPool(TaskPool):  # type: ignore[misc]
    """Celery's, but a worker that stops waits neither for a child that is still importing torch, nor for a merge that
    began after SIGTERM: the child had the doorbell already, and was not at work yet when the others were told.
    """

    def on_stop(self) -> None:
        """Tell every child once more: one that is idle or starting ends, one at work hands its job back."""
        if self._pool is not None:
            self._pool.close()  # from here on no child is started in another's place
            for child in list(self._pool._pool):
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)
        super().on_stop()
