"""docs/client.md: its examples run in order, against a service with a worker."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.artifacts.store import LocalStore
from app.records.bell import Bell
from app.records.job import Kind, Status
from app.sources.hub.hub import Hub, HubSettings
from mergeyard import errors
from tests import files
from tests.api.serving import ServedApi
from tests.client.test_scoring import work as give_scores
from worker.engine.digests import DigestCache
from worker.engine.kernels import load
from worker.job import Workplace, work
from worker.lease import StopRequest

TEXT = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
HERE = "http://127.0.0.1:8000"


@pytest.fixture
def merging(service: ServedApi) -> Iterator[ServedApi]:
    """The service, and a thread that does what workers do."""
    stop = threading.Event()
    thread = threading.Thread(target=_merge_what_waits, args=(service, stop))
    thread.start()
    yield service
    stop.set()
    thread.join()


def test_its_examples_run(merging: ServedApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_adapter(tmp_path / "adapters" / "style", files.lora_tensors(seed=9))
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block.replace(HERE, merging.url), "docs/client.md", "exec"), known)
    assert len(BLOCKS) == 7
    for folder in ("merged", "merged-async"):
        assert (tmp_path / folder / "model.safetensors").is_file()


def test_it_names_every_kind_of_error() -> None:
    kinds = {name for name, kind in vars(errors).items() if name.endswith("Error") and kind is not errors.ApiError}
    assert set(re.findall(r"^\| `(\w+Error)` \|", TEXT, re.MULTILINE)) == kinds


def _merge_what_waits(served: ServedApi, stop: threading.Event) -> None:
    place = Workplace(
        settings=served.settings,
        jobs=served.jobs,
        bell=Bell(served.settings.broker),
        hub=Hub(HubSettings.of(served.settings)),
        store=LocalStore(served.settings.artifacts),
        kernels=load("reference"),
        digests=DigestCache(None),
        worker="test-1",
    )
    while not stop.wait(0.05):
        for job in served.jobs.list(status=Status.QUEUED).jobs:
            work(place, job.id, StopRequest())
        for kind in (Kind.SWEEP, Kind.EVALUATION):
            for job in served.jobs.list(status=Status.QUEUED, kind=kind).jobs:
                give_scores(served, job.id)
    place.bell.close()
