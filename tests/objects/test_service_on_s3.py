"""The whole service with its artifacts in a bucket: merges, downloads, hub clients, deletion, and what goes wrong."""

from __future__ import annotations

import hashlib
import io
import logging
import random
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.artifacts.manifest import MANIFEST_NAME
from app.artifacts.objects import ObjectStore
from app.artifacts.opening import open_store
from app.artifacts.store import LocalStore, read_whole
from app.records.bell import Bell
from app.records.database import Database
from app.records.janitor import Janitor
from app.records.job import Job, Status
from app.records.jobs import Jobs
from app.settings import Settings
from mergeyard import Client
from tests import servers
from tests.api.serving import ServedApi, serving, write_sources
from tests.hub.clients import python_of
from tests.hub.conftest import Client as HubClient
from tests.objects.s3 import Bucket, new_bucket
from tests.worker.attempts import attempt, digests, failing, lonely_yard, place_in
from tests.worker.yard import SHARDED, Yard, open_yard, pool_child, worker
from worker.engine.sinks import SCRATCH
from worker.job import Ending

FILES = {
    "model.safetensors": random.Random(1).randbytes(21_000_000),
    "config.json": b'{"model_type": "llama"}',
    "chat_template.jinja": b"",
}


@pytest.fixture(scope="module")
def one_bucket(s3_endpoint: str) -> Bucket:
    return new_bucket(s3_endpoint)


@pytest.fixture(scope="module", params=["stream", "redirect"])
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, one_bucket: Bucket
) -> Iterator[ServedApi]:
    """A served API whose store is the bucket, once for each way that bytes go out."""
    data = tmp_path_factory.mktemp("api")
    (data / "records.sqlite3").write_bytes(sqlite_template.read_bytes())
    with servers.short_folder() as folder, servers.valkey(folder / "valkey.sock") as broker:
        settings = Settings(
            data_dir=data,
            database_url=f"sqlite:///{data / 'records.sqlite3'}",
            broker_url=broker,
            model_roots=str(write_sources(data / "models")),
            rate_requests=0,
            janitor_seconds=3600,
            s3_downloads=request.param,
            **one_bucket.settings(),
        )
        with serving(settings) as served:
            yield served


def url(api: ServedApi, job: Job, path: str = "files/model.safetensors") -> str:
    return f"{api.url}/merges/{job.id}/{path}"


@pytest.fixture(scope="module")
def job(api: ServedApi) -> Job:
    return api.published(FILES)


class TestDownloads:
    def test_a_file_whole_and_in_part(self, api: ServedApi, job: Job) -> None:
        weights = FILES["model.safetensors"]
        with httpx.Client(follow_redirects=True) as http:
            whole = http.get(url(api, job))
            part = http.get(url(api, job), headers={"Range": "bytes=20000000-20000009"})
            rest = http.get(url(api, job), headers={"Range": "bytes=-7"})
        assert whole.status_code == 200 and whole.content == weights
        assert part.status_code == 206 and part.content == weights[20_000_000:20_000_010]
        assert rest.status_code == 206 and rest.content == weights[-7:]
        asked = api.http.get(f"/merges/{job.id}/files/model.safetensors")
        if api.settings.s3_downloads == "redirect":
            assert asked.status_code == 307 and asked.content == b"" and asked.headers["cache-control"] == "no-store"
            assert httpx.get(asked.headers["location"]).content == weights, "no key is needed there"
        else:
            assert asked.headers["etag"] == f'"{hashlib.sha256(weights).hexdigest()}"'
            assert "repr-digest" in asked.headers and asked.headers["content-length"] == str(len(weights))

    def test_what_the_api_can_answer_itself_it_does(self, api: ServedApi, job: Job) -> None:
        etag = f'"{hashlib.sha256(FILES["model.safetensors"]).hexdigest()}"'
        path = f"/merges/{job.id}/files/model.safetensors"
        assert api.http.get(path, headers={"If-None-Match": etag}).status_code == 304
        assert api.http.get(path, headers={"Range": "bytes=21000000-"}).status_code == 416
        assert api.http.head(path).headers["content-length"] == "21000000"
        another = api.http.get(path, headers={"Range": "bytes=5-", "If-Range": '"another"'})
        assert another.status_code == 200 and another.content == FILES["model.safetensors"]

    def test_everything_as_one_tar(self, api: ServedApi, job: Job) -> None:
        answer = api.http.get(f"/merges/{job.id}/archive.tar")
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            found = {name: archive.extractfile(name).read() for name in archive.getnames()}
        assert {name: content for name, content in found.items() if name != MANIFEST_NAME} == FILES
        middle = api.http.get(f"/merges/{job.id}/archive.tar", headers={"Range": "bytes=1000-1999999"})
        assert middle.content == answer.content[1000:2_000_000]

    def test_our_client_brings_all_of_it_and_goes_on_where_it_was(
        self, api: ServedApi, job: Job, tmp_path: Path
    ) -> None:
        (tmp_path / "model.safetensors.part").write_bytes(FILES["model.safetensors"][:20_000_000])
        seen: list[int] = []
        with Client(api.url, "mrg_a_key_that_is_not_for_the_bucket") as client:
            client.download(job.id, tmp_path, on_progress=lambda done, *_: seen.append(done))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != MANIFEST_NAME} == FILES

    def test_hub_clients_get_the_bytes_and_no_redirect(self, api: ServedApi, job: Job, tmp_path: Path) -> None:
        client = HubClient(python_of("2.4"), "2.4", tmp_path / "hf", api.url, "mrg_secret")
        [found] = client.run(("snapshot", {"repo_id": f"merges/{job.id}"}))
        assert found["model.safetensors"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()

    def test_what_is_not_in_the_bucket_is_an_error_and_no_empty_file(self, api: ServedApi) -> None:
        job = api.published({"model.safetensors": b"x" * 100})
        assert job.artifact is not None
        api.store.delete(job.artifact["files"][1]["key"])
        answer = api.http.get(f"/merges/{job.id}/files/model.safetensors")
        assert answer.status_code == 500 and answer.json()["code"] == "internal"


def test_deleting_a_merge_deletes_its_objects(api: ServedApi, one_bucket: Bucket) -> None:
    job = api.published({"config.json": b"{}"})
    assert any(job.id in key for key in one_bucket.sizes())
    assert api.http.delete(f"/merges/{job.id}").status_code == 204
    assert not any(job.id in key for key in one_bucket.sizes())


def test_it_is_ready_and_tells_of_no_disk_that_the_store_has_not(api: ServedApi) -> None:
    assert api.http.get("/readyz").status_code == 200
    told = api.http.get("/metrics").text
    assert 'disk_free_bytes{folder="data"}' in told and 'folder="store"' not in told
    assert api.http.get("/ui", follow_redirects=True).status_code == 200


def test_a_bucket_that_is_away_makes_it_not_ready_and_downloads_fail_with_a_code(
    tmp_path: Path,
    sqlite_url: str,
    one_bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("app.artifacts.bucket.RETRY", {"max_retries": 0})
    with servers.short_folder() as folder, servers.valkey(folder / "valkey.sock") as broker:
        settings = Settings(
            data_dir=tmp_path / "data",
            database_url=sqlite_url,
            broker_url=broker,
            janitor_seconds=3600,
            **one_bucket.settings(),
        )
        with serving(settings) as served:
            job = served.published({"config.json": b"{}"})
        away = settings.model_copy(update={"s3_endpoint": "http://127.0.0.1:9"})
        with serving(away) as served:
            ready = served.http.get("/readyz")
            assert ready.status_code == 503 and "store" in ready.text and "s3://" in ready.text
            answer = served.http.get(f"/merges/{job.id}/files/config.json")
            assert answer.status_code == 503 and answer.json()["code"] == "store_unavailable"
            assert served.http.delete(f"/merges/{job.id}").status_code == 204, "its files are the janitor's"
        janitor = Janitor(Jobs(Database(sqlite_url)), Bell(broker), 60, open_store(away))
        with caplog.at_level(logging.WARNING, "mergeyard.janitor"):
            janitor.round()
        assert "leftovers stay" in caplog.text
        assert any(job.id in key for key in one_bucket.sizes())
        Janitor(Jobs(Database(sqlite_url)), Bell(broker), 60, open_store(settings)).round()
        assert not any(job.id in key for key in one_bucket.sizes())


class TestAttempts:
    @pytest.fixture
    def yard(self, tmp_path: Path, tiny_models: Path, bucket: Bucket) -> Iterator[Yard]:
        with lonely_yard(tmp_path, tiny_models, **bucket.settings()) as opened:
            yield opened

    def test_the_artifact_is_the_same_as_in_a_folder(
        self, yard: Yard, bucket: Bucket, tmp_path: Path, tiny_models: Path
    ) -> None:
        job = yard.submit(ring=False, **SHARDED)
        assert attempt(place_in(yard), job) is Ending.PUBLISHED
        (tmp_path / "other").mkdir()
        with lonely_yard(tmp_path / "other", tiny_models) as folder:
            same = folder.submit(ring=False, **SHARDED)
            assert attempt(place_in(folder), same) is Ending.PUBLISHED
            assert isinstance(folder.store, LocalStore) and digests(folder, same) == digests(yard, job)
        artifact = yard.jobs.get(job.id).artifact
        assert artifact is not None
        for file in artifact["files"]:
            assert hashlib.sha256(bucket.read(f"artifacts/{file['key']}")).hexdigest() == file["sha256"]
        assert sorted(bucket.sizes()) == sorted(f"artifacts/{file['key']}" for file in artifact["files"])
        assert not (yard.settings.root / "artifacts").exists()

    def test_a_retry_adopts_what_is_in_the_bucket_and_makes_again_what_is_damaged(
        self, yard: Yard, bucket: Bucket
    ) -> None:
        straight, broken = yard.submit(ring=False, **SHARDED), yard.submit(ring=False, **SHARDED)
        place = place_in(yard)
        attempt(place, straight)
        assert attempt(place, broken, failing(MemoryError())) is Ending.FAILED
        damaged, *kept = yard.jobs.shards(broken.id)
        assert kept and bucket.unfinished() == []
        bucket.write(f"artifacts/{damaged.file.key}", b"\0" * damaged.file.size)
        assert attempt(place, broken) is Ending.PUBLISHED
        assert digests(yard, broken) == digests(yard, straight)
        published = {file["key"] for file in (yard.jobs.get(broken.id).artifact or {})["files"]}
        assert {shard.file.key for shard in kept} <= published and damaged.file.key not in published

    def test_a_store_that_goes_away_costs_an_attempt_and_says_so(self, yard: Yard) -> None:
        job = yard.submit(ring=False, max_attempts=1)
        place = place_in(yard)
        away = ObjectStore.of(yard.settings.model_copy(update={"s3_secret_access_key": "wrong"}))
        place = replace(place, store=away)
        assert attempt(place, job) is Ending.FAILED
        error = yard.jobs.get(job.id).error
        assert error is not None and error["code"] == "store_unavailable" and error["fault"] == "system"

    def test_a_merge_in_the_bucket_is_a_source(self, yard: Yard, bucket: Bucket) -> None:
        place = place_in(yard)
        first = yard.submit(ring=False, **SHARDED)
        attempt(place, first)
        again = {
            "merge_method": "linear",
            "models": [{"model": f"merge:{first.id}", "parameters": {"weight": 1.0}}],
            "output": SHARDED["output"],
        }
        asked: list[str] = []
        opened = yard.store.open
        yard.store.open = lambda key, offset=0: (asked.append(key), opened(key, offset))[1]  # type: ignore[method-assign]
        second = yard.submit(again, ring=False)
        planned = [key for key in asked if key.endswith(".safetensors")]
        assert planned, "of weights the headers are read in the bucket"
        assert attempt(place, second) is Ending.PUBLISHED
        stages = [event.data["stage"] for event in yard.jobs.events(second.id) if event.type == "stage"]
        assert stages[0] == "downloading"
        weights = {name: sha for name, sha in digests(yard, first).items() if name.endswith(".safetensors")}
        assert weights.items() <= digests(yard, second).items()

    def test_a_source_that_was_damaged_in_the_bucket_is_noticed(self, yard: Yard, bucket: Bucket) -> None:
        place = place_in(yard)
        first = yard.submit(ring=False)
        attempt(place, first)
        [weights] = [
            file for file in (yard.jobs.get(first.id).artifact or {})["files"] if file["name"].endswith(".safetensors")
        ]
        recipe = {"merge_method": "linear", "models": [{"model": f"merge:{first.id}", "parameters": {"weight": 1.0}}]}
        second = yard.submit(recipe, ring=False, max_attempts=1)
        content = bytearray(read_whole(yard.store, weights["key"]))
        content[-1] ^= 1
        bucket.write(f"artifacts/{weights['key']}", bytes(content))
        assert attempt(place, second) is Ending.FAILED
        assert (yard.jobs.get(second.id).error or {})["code"] == "digest_mismatch"

    def test_documents_have_their_scratch_on_this_machine_and_leave_none_of_it(
        self, yard: Yard, bucket: Bucket
    ) -> None:
        adapters = [{"adapter": f"models:{name}"} for name in ("sql", "json")]
        base = {"base_model": "models:tiny-llama", "merge_method": "task_arithmetic"}
        recipe = {
            "documents": [
                {"name": "first", **base, "models": adapters[:1]},
                {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1.0}}]},
            ]
        }
        job = yard.submit(recipe, ring=False)
        assert attempt(place_in(yard), job) is Ending.PUBLISHED
        assert not any(SCRATCH in key for key in bucket.sizes())
        assert list(yard.store.scratched()) == []


def test_a_killed_worker_costs_an_attempt_and_another_adopts_its_shards(
    tmp_path: Path, tiny_models: Path, broker_url: str, queue: str, database_url: str, bucket: Bucket
) -> None:
    settings: dict[str, Any] = {"database_url": database_url, **bucket.settings()}
    with open_yard(tmp_path, tiny_models, broker_url, queue, **settings) as yard:
        job = yard.submit(**SHARDED)
        with worker(yard) as first:
            yard.until_shards(job, 2)
            child = pool_child(yard, job)
            first.send_signal(signal.SIGKILL)
            first.wait(10)
            yard.until(lambda: not child.is_running())
        finished = {shard.file.key for shard in yard.jobs.shards(job.id)}
        with worker(yard):
            done = yard.finish(job)
        assert done.status is Status.SUCCEEDED and done.attempt == 2, done.error
        published = {file["key"]: file for file in (done.artifact or {})["files"]}
        assert finished <= published.keys()
        yard.until(lambda: sorted(bucket.sizes()) == sorted(f"artifacts/{key}" for key in published))
        for key, file in published.items():
            assert hashlib.sha256(bucket.read(f"artifacts/{key}")).hexdigest() == file["sha256"]
