"""The worker's Celery app: what its parent process loads, and how it takes an outage of the broker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from app.settings import Settings
from tests.worker.yard import REPOSITORY
from worker.celery import make_celery

PARENT = """
import sys
from app.records.bell import TASK
from app.settings import Settings
from worker.celery import make_celery

app = make_celery(Settings(data_dir=sys.argv[1]), "w")
app.loader.import_default_modules()
assert TASK in app.tasks
print(*sorted({"torch", "numba", "numpy"} & set(sys.modules)))
"""


def test_the_parent_process_loads_the_task_but_neither_torch_nor_numba(tmp_path: Path) -> None:
    """Seconds and hundreds of MB beside every child; and CUDA, once loaded, does not survive a fork."""
    loaded = subprocess.run(
        [sys.executable, "-c", PARENT, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (loaded.returncode, loaded.stdout.split()) == (0, []), loaded.stderr


def test_a_worker_waits_for_its_broker_for_ever(tmp_path: Path) -> None:
    assert make_celery(Settings(data_dir=tmp_path), "w").conf.broker_connection_max_retries is None
