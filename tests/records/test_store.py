"""The local artifact store."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import closing
from pathlib import Path

import pytest

from app.artifacts.store import LocalStore, LocalWriter
from worker.engine.sinks import LocalFile


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def write(store: LocalStore, key: str, data: bytes = b"hello world") -> None:
    with store.create(key, len(data)) as writer:
        writer.write(memoryview(data)[:5])
        writer.write(data[5:])


def test_what_is_written_reads_back_from_any_offset(store: LocalStore) -> None:
    write(store, "job/token/folder/model.safetensors")
    key = "job/token/folder/model.safetensors"
    assert store.size(key) == 11 and store.path(key).read_bytes() == b"hello world"
    assert store.sha256(key, lambda: None) == hashlib.sha256(b"hello world").hexdigest()
    with closing(store.open(key, 6)) as file:
        assert file.read(3) == b"wor" and file.read(100) == b"ld" and file.read(1) == b""
        assert file.size == 11


def test_hashing_can_be_stopped_after_any_piece(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.artifacts.store._PIECE", 4)
    write(store, "job/t/a")
    checks = iter([None, KeyboardInterrupt()])

    def check() -> None:
        if (error := next(checks)) is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        store.sha256("job/t/a", check)
    assert list(checks) == [], "once a piece"


@pytest.mark.parametrize("answer", [None, OSError(errno.EINVAL, "no")])
def test_a_large_file_is_put_on_disk_while_it_is_written(
    answer: OSError | None, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []

    def advise(_descriptor: int, start: int, length: int, _advice: int) -> None:
        begun.append((start, length))
        if answer is not None:
            raise answer

    monkeypatch.setattr("app.artifacts.disk._STEP", 8)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    for writer in (store.create("job/t/a", 20), LocalFile(tmp_path / "a", name="a", size=20)):
        begun.clear()
        for piece in (b"12345", b"67890", b"abcde", b"fghij"):
            writer.write(memoryview(piece))
        assert begun == [(0, 10), (10, 10)], "every byte once, a few pieces at a time"
        writer.close() if isinstance(writer, LocalWriter) else writer.finish()
    assert store.path("job/t/a").read_bytes() == (tmp_path / "a").read_bytes() == b"1234567890abcdefghij"


def test_a_file_that_would_take_what_must_stay_free_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    unguarded = LocalStore(tmp_path / "store")
    free = unguarded.free()
    assert free is not None
    guarded = LocalStore(unguarded.folder, keep_free=free + (1 << 40))
    with pytest.raises(OSError, match="must stay free") as refused:
        guarded.create("job/t/a", 100)
    assert refused.value.errno == errno.ENOSPC
    assert list(guarded.keys("job")) == [] and guarded.free() == 0
    with unguarded.create("job/t/a", 100) as writer:
        writer.write(b"abc")


def test_a_disk_that_others_fill_meanwhile_ends_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.artifacts.disk._STEP", 8)
    store = LocalStore(tmp_path / "store", keep_free=1000)
    real, taken = os.fstatvfs, False

    def crowded(descriptor: int) -> os.statvfs_result:
        found = list(real(descriptor))
        found[4] = 0 if taken else found[4]  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "fstatvfs", crowded)
    with pytest.raises(OSError, match="1000 must stay free"), store.create("job/t/a", 100) as writer:
        writer.write(b"1234567890")
        taken = True
        writer.write(b"1234")
        writer.write(b"567890")
    assert list(store.keys("job")) == []


def test_less_than_announced_is_cut_to_what_came(store: LocalStore) -> None:
    with store.create("job/t/a", 1 << 20) as writer:
        writer.write(b"abc")
    assert store.path("job/t/a").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "job/../../x", "job//x", "job/./x", "job/\0x", "job/a\nb", ".trash/x", "job\\..\\x"],
)
def test_no_key_leads_outside(store: LocalStore, key: str) -> None:
    with pytest.raises(ValueError, match="not a store key"):
        store.path(key)


def test_an_aborted_file_leaves_nothing(store: LocalStore) -> None:
    with pytest.raises(ZeroDivisionError), store.create("job/t/a", 100) as writer:
        writer.write(b"abc")
        raise ZeroDivisionError
    assert list(store.keys("job")) == []


def test_a_key_is_written_once(store: LocalStore) -> None:
    write(store, "job/t/a")
    with pytest.raises(FileExistsError):
        store.create("job/t/a")


def test_a_full_disk_shows_before_anything_is_written(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        store.create("job/t/a", 100)
    assert list(store.keys("job")) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve_space_is_written_to_all_the_same(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    write(store, "job/t/a")
    assert store.path("job/t/a").read_bytes() == b"hello world"


def test_closing_syncs_the_file_and_every_folder_that_names_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(store, "job/t/a")
    folder = store.folder
    assert synced == [folder / "job/t/a", folder / "job/t", folder / "job", folder]


def test_deleting_a_prefix_takes_all_of_it_and_nothing_else(store: LocalStore) -> None:
    for key in ("job/t/a", "job/t/b/c", "job2/t/a"):
        write(store, key)
    store.delete_prefix("job")
    store.delete_prefix("job")
    assert list(store.keys("job")) == [] and list(store.keys("job2")) == ["job2/t/a"]
    assert list((store.folder / ".trash").iterdir()) == []


def test_deleting_a_prefix_but_for_some_keys(store: LocalStore) -> None:
    for key in ("job/t/a", "job/t/b/c", "job/u/a"):
        write(store, key)
    store.delete_prefix("job", keep={"job/u/a", "other/key"})
    assert list(store.keys("job")) == ["job/u/a"] and not store.path("job/t").exists()


def test_what_a_crash_left_in_the_trash_goes_with_the_next_deletion(store: LocalStore) -> None:
    leftover = store.folder / ".trash" / "crashed"
    leftover.mkdir(parents=True)
    (leftover / "file").write_bytes(b"x")
    store.delete_prefix("job")
    assert not leftover.exists()


def test_deleting_a_file_twice_is_fine(store: LocalStore) -> None:
    write(store, "job/t/a")
    store.delete("job/t/a")
    store.delete("job/t/a")
    with pytest.raises(FileNotFoundError):
        store.size("job/t/a")
