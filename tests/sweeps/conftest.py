"""A root with a chat model, two adapters on it and a task for each; an API over it, and somebody who does its work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from tests.api.serving import ServedApi, serving
from tests.evaluation.chat import write_chat, write_chat_root
from tests.worker.attempts import lonely_yard, place_in
from worker.job import Ending, work
from worker.lease import StopRequest


@pytest.fixture(scope="session")
def chat_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat-models")
    write_chat_root(root)
    (root / "empty.jsonl").write_text("")
    (root / "unfinished.jsonl").write_text('{"prompt": "hi"}\n')
    write_chat(root / "silent", template=False)
    return root


@pytest.fixture
def yard_api(database_url: str, tmp_path: Path, chat_root: Path) -> Iterator[ServedApi]:
    """An API with nothing in it, on each database; there is no broker, and nobody works but ``do``."""
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        broker_url=f"redis+socket://{tmp_path}/nobody.sock",
        model_roots=str(chat_root),
        threads=1,
    )
    with serving(settings) as served:
        yield served


@pytest.fixture
def do(yard_api: ServedApi, tmp_path: Path, chat_root: Path) -> Iterator[Callable[[str], Ending]]:
    """What a worker does on hearing the doorbell of a job."""
    given: dict[str, Any] = {"database_url": yard_api.settings.database, "model_roots": str(chat_root)}
    with lonely_yard(tmp_path / "worker", chat_root, data_dir=yard_api.settings.root, **given) as yard:
        place = place_in(yard)
        yield lambda job_id: work(place, job_id, StopRequest())
