"""The artifact store on a real S3 server."""

from __future__ import annotations

import hashlib
import random
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.artifacts.bucket import PART_BYTES
from app.artifacts.objects import ObjectStore
from app.artifacts.store import read_whole
from app.errors import MergeyardError
from app.settings import Settings
from tests.objects.s3 import Bucket

LARGE = random.Random(3).randbytes(PART_BYTES + (5 << 20))  # two parts


def store_of(bucket: Bucket, folder: Path, **changes: Any) -> ObjectStore:
    return ObjectStore.of(Settings(data_dir=folder, min_free_bytes=0, **(bucket.settings() | changes)))


@pytest.fixture
def store(bucket: Bucket, tmp_path: Path) -> ObjectStore:
    return store_of(bucket, tmp_path)


def write(store: ObjectStore, key: str, data: bytes = b"hello world") -> None:
    """Through one buffer that is used again, as the engine does it."""
    buffer = bytearray(1 << 20)
    with store.create(key, len(data)) as writer:
        for start in range(0, len(data), len(buffer)):
            piece = data[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            writer.write(memoryview(buffer)[: len(piece)])
        buffer[:] = bytes(len(buffer))


@pytest.mark.parametrize("data", [b"", b"hello world", LARGE], ids=["empty", "small", "two parts"])
def test_what_is_written_is_an_object_of_these_bytes(store: ObjectStore, bucket: Bucket, data: bytes) -> None:
    key = "job/token/folder/model.safetensors"
    write(store, key, data)
    assert bucket.sizes() == {f"artifacts/{key}": len(data)} and bucket.unfinished() == []
    assert bucket.read(f"artifacts/{key}") == data and store.size(key) == len(data)
    assert store.sha256(key, lambda: None) == hashlib.sha256(data).hexdigest()
    assert read_whole(store, key) == data


def test_it_is_read_from_any_offset(store: ObjectStore) -> None:
    write(store, "job/t/a", LARGE)
    with closing(store.open("job/t/a", 1000)) as file:
        assert file.size == len(LARGE) and file.local is None
        first, second = file.read(10), file.read(5 << 20)
        assert first + second == LARGE[1000 : 1010 + len(second)] and len(second) > 1 << 20


def test_what_is_given_up_leaves_neither_an_object_nor_its_parts(store: ObjectStore, bucket: Bucket) -> None:
    with pytest.raises(ZeroDivisionError), store.create("job/t/a") as writer:
        for start in range(0, len(LARGE), 1 << 20):
            writer.write(LARGE[start : start + (1 << 20)])
        raise ZeroDivisionError
    assert bucket.sizes() == {} and bucket.unfinished() == []
    assert not [thread for thread in threading.enumerate() if thread.name == "upload"]


def test_nothing_is_seen_of_a_file_before_all_of_it_is_there(store: ObjectStore, bucket: Bucket) -> None:
    with store.create("job/t/a") as writer:
        writer.write(LARGE)
        assert bucket.sizes() == {} and list(store.keys("job")) == []
    assert list(store.keys("job")) == ["job/t/a"]


def test_keys_and_folders_are_those_of_the_prefix_alone(store: ObjectStore, bucket: Bucket) -> None:
    for key in ("job/t/b", "job/t/a", "job/u/a", "job2/t/a"):
        write(store, key)
    bucket.write("other/job/t/c", b"another's")
    assert list(store.keys("job")) == ["job/t/a", "job/t/b", "job/u/a"]
    assert list(store.keys("job/t")) == ["job/t/a", "job/t/b"]
    assert list(store.folders()) == ["job", "job2"]


def test_deleting_a_prefix_takes_all_of_it_but_what_is_kept(store: ObjectStore, bucket: Bucket) -> None:
    for key in ("job/t/a", "job/t/b", "job/u/a", "job2/t/a"):
        write(store, key)
    scratch = store.scratch("job/t/.earlier")
    (scratch / "x").write_bytes(b"x")
    assert "job/t/.earlier/x" in list(store.keys("job")) and list(store.scratched()) == ["job"]
    store.delete_prefix("job", keep={"job/u/a"})
    assert sorted(bucket.sizes()) == ["artifacts/job/u/a", "artifacts/job2/t/a"]
    assert not scratch.exists()
    store.delete("job/u/a")
    store.delete("job/u/a")
    assert list(store.keys("job")) == []


def test_what_is_not_there_is_file_not_found(store: ObjectStore) -> None:
    for ask in (store.size, store.open, lambda key: store.sha256(key, lambda: None)):
        with pytest.raises(FileNotFoundError):
            ask("job/t/nothing")
    store.delete("job/t/nothing")
    store.delete_prefix("nothing")
    store.check()


@pytest.mark.parametrize("key", ["../a", "job/../a", "job//a", "/a", "job/a\n", "job/."])
def test_no_key_leads_outside(store: ObjectStore, key: str) -> None:
    for ask in (store.size, store.create, store.delete, store.signed_url):
        with pytest.raises(ValueError, match="not a store key"):
            ask(key)


def test_a_signed_url_is_for_everybody_and_this_object(store: ObjectStore, bucket: Bucket) -> None:
    write(store, "job/t/a")
    url = store.signed_url("job/t/a")
    assert httpx2.get(url, headers={"Range": "bytes=6-"}).text == "world"
    assert httpx2.get(url.partition("?")[0]).status_code in (400, 403)
    assert httpx2.get(url.replace("/t/a", "/t/b")).status_code == 403
    assert bucket.settings()["s3_secret_access_key"] not in url


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"s3_secret_access_key": "wrong"}, "refuses the service's credentials"),
        ({"s3_endpoint": "http://127.0.0.1:9"}, "cannot be used just now"),
        ({"artifact_store": "s3://no-such-bucket/x"}, "cannot be used just now"),
    ],
)
def test_a_store_that_cannot_be_used_says_so_and_tells_no_secret(
    bucket: Bucket, tmp_path: Path, changes: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.artifacts.bucket.RETRY", {"max_retries": 0})
    store = store_of(bucket, tmp_path, **changes)

    def fill() -> None:
        with store.create("job/t/a") as writer:
            writer.write(LARGE)

    for ask in (store.check, fill, lambda: list(store.keys("job")), lambda: store.delete_prefix("job")):
        with pytest.raises(MergeyardError, match=says) as refused:
            ask()
        assert refused.value.code == "store_unavailable" and refused.value.fault == "system"
        assert "wrong" not in str(refused.value) and "127.0.0.1" not in str(refused.value)
