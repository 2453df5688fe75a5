"""What stops a merge: each with its code, and with nothing left of the result."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.sources.source import SourceFile
from tests.engine.merges import Watch, merge, plan_of
from tests.files import llama_tensors, lora_tensors, write_adapter, write_model
from worker.engine import blocks, digests, sinks
from worker.engine.digests import hash_file
from worker.engine.kernels import load
from worker.engine.run import merge_to_folder
from worker.engine.stream import Stream

Q = "model.layers.0.self_attn.q_proj.weight"
LORA_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 24)
    write_model(tmp_path / "base")
    write_model(tmp_path / "tuned", llama_tensors(seed=5))
    write_adapter(tmp_path / "sql")
    before = {path.name for path in tmp_path.iterdir()}
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} - before <= {"tuned2"}, "something was left behind"


def recipe(**changes: Any) -> dict[str, Any]:
    models = [{"adapter": "sql"}, {"model": "tuned"}]
    parameters = {"density": 0.5}
    return {"base_model": "base", "merge_method": "ties", "models": models, "parameters": parameters, **changes}


def refusal(action: Callable[[], object]) -> MergeyardError:
    with pytest.raises(MergeyardError) as caught:
        action()
    return caught.value


@pytest.mark.parametrize("room", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("folder", "tensor"),
    [
        ("base", Q),
        ("base", "model.embed_tokens.weight"),  # the adapter leaves it as it is
        ("tuned", Q),
        ("sql", f"{LORA_Q}.lora_A.weight"),
        ("sql", f"{LORA_Q}.lora_B.weight"),
    ],
)
def test_a_source_that_is_not_finite_is_named(room: Any, bad: float, folder: str, tensor: str, root: Path) -> None:
    values = {"base": llama_tensors(), "tuned": llama_tensors(seed=5), "sql": lora_tensors()}[folder]
    values[tensor].view(-1)[-1] = bad
    (write_adapter if folder == "sql" else write_model)(root / folder, values)
    models = [{"adapter": "sql"}] if tensor == "model.embed_tokens.weight" else [{"adapter": "sql"}, {"model": "tuned"}]
    error = refusal(lambda: merge(plan_of(root, recipe(models=models)), root / "out", room=room))
    assert error.code == "source_not_finite"
    assert tensor in error.message
    assert f"models:{folder}" in error.message


def test_a_nan_that_an_election_would_pass_over_is_found(root: Path) -> None:
    values = llama_tensors(seed=5)
    values[Q].fill_(float("nan"))
    write_model(root / "tuned", values)
    wanted = recipe(parameters={"density": 0.5, "dialect": "article"})
    assert refusal(lambda: merge(plan_of(root, wanted), root / "out")).code == "source_not_finite"


def test_a_result_beyond_its_dtype_is_refused(root: Path) -> None:
    wanted = recipe(out_dtype="float16", parameters={"lambda": 1e6})
    error = refusal(lambda: merge(plan_of(root, wanted), root / "out"))
    assert error.code == "result_not_finite"
    assert "F16" in error.message


def test_a_copied_value_beyond_its_new_dtype_is_refused(root: Path) -> None:
    values = llama_tensors()
    values["model.norm.weight"][0] = 1e6
    write_model(root / "base", values)
    wanted = recipe(out_dtype="float16", models=[{"adapter": "sql"}])
    error = refusal(lambda: merge(plan_of(root, wanted), root / "out"))
    assert error.code == "result_not_finite"
    assert "model.norm.weight" in error.message


def test_a_merge_stops_while_its_sources_are_still_hashed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, write_weights = Watch(), Stream.run

    def written(stream: Stream, *arguments: Any) -> Any:
        result = write_weights(stream, *arguments)
        watch.stop = MergeyardError("cancelled", "Stopped.")
        return result

    def slowly(file: SourceFile, stop: Event) -> Any:
        stop.wait(5)
        return hash_file(file, stop)

    monkeypatch.setattr(Stream, "run", written)
    monkeypatch.setattr(digests, "hash_file", slowly)
    error = refusal(lambda: merge(plan_of(root, recipe()), root / "out", control=watch))
    assert error.code == "cancelled"


@pytest.mark.parametrize("stop_at", [1, 2, 7, 20])
@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_a_merge_stops_at_the_next_block(stop_at: int, dialect: str, root: Path) -> None:
    watch = Watch(stop=MergeyardError("cancelled", "Stopped."), stop_at=stop_at)
    plan = plan_of(root, recipe(parameters={"density": 0.5, "dialect": dialect}))
    assert refusal(lambda: merge(plan, root / "out", control=watch)).code == "cancelled"
    assert watch.checks == stop_at


def test_an_existing_folder_is_kept(root: Path) -> None:
    (root / "sql" / "notes.txt").write_text("mine")
    plan = plan_of(root, recipe())
    assert refusal(lambda: merge_to_folder(plan, root / "sql")).code == "output_exists"
    assert refusal(lambda: merge_to_folder(plan, root / "sql" / "notes.txt")).code == "output_exists"
    assert (root / "sql" / "notes.txt").read_text() == "mine"


def test_a_folder_that_appears_meanwhile_is_kept(root: Path) -> None:
    class Intruder(Watch):
        def stage(self, name: str) -> None:
            (root / "tuned2").mkdir(exist_ok=True)
            (root / "tuned2" / "notes.txt").write_text("mine")

    error = refusal(lambda: merge(plan_of(root, recipe()), root / "tuned2", control=Intruder()))
    assert error.code == "output_exists"
    assert [path.name for path in (root / "tuned2").iterdir()] == ["notes.txt"]


def test_missing_parent_folders_are_made_and_removed_again(root: Path) -> None:
    watch = Watch(stop=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        merge(plan_of(root, recipe()), root / "new" / "deeper" / "out", control=watch)
    assert not (root / "new").exists()


@pytest.mark.parametrize("file", ["base/model.safetensors", "sql/adapter_model.safetensors", "tuned/model.safetensors"])
@pytest.mark.parametrize("change", ["touched", "rewritten", "removed", "truncated"])
def test_a_source_that_changed_after_planning_is_refused(file: str, change: str, root: Path) -> None:
    plan = plan_of(root, recipe())
    alter(root / file, change)
    assert refusal(lambda: merge(plan, root / "out")).code == "source_changed"


@pytest.mark.parametrize("change", ["touched", "removed", "truncated"])
def test_a_source_that_changes_during_the_merge_is_refused(change: str, root: Path) -> None:
    class Saboteur(Watch):
        def check(self) -> None:
            super().check()
            if self.checks == 20:
                alter(root / "tuned" / "model.safetensors", change)

    assert refusal(lambda: merge(plan_of(root, recipe()), root / "out", control=Saboteur())).code == "source_changed"


def test_a_companion_that_changed_is_refused(root: Path) -> None:
    (root / "base" / "tokenizer.json").write_text("{}")
    plan = plan_of(root, recipe())
    status = (root / "base" / "tokenizer.json").stat()
    (root / "base" / "tokenizer.json").write_text("[]")
    os.utime(root / "base" / "tokenizer.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert refusal(lambda: merge(plan, root / "out")).code == "source_changed"


def test_a_source_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    plan = plan_of(root, recipe())
    monkeypatch.setattr(os, "preadv", broken)
    error = refusal(lambda: merge(plan, root / "out"))
    assert error.code == "source_format"
    assert "safetensors" in error.message


def alter(path: Path, change: str) -> None:
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "removed":
        path.unlink()
    elif change == "truncated":
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size // 2)
    else:  # other tensors of the same size at the same time: only the header tells
        status = path.stat()
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"F32"', b'"I32"'))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("place", ["write", "finish", "create", "remember"])
def test_a_full_disk_leaves_nothing(place: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> StoredFile:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = sinks.LocalFile if place in ("write", "finish") else sinks.FolderSink
    monkeypatch.setattr(owner, place, full)
    plan = plan_of(root, recipe())
    error = refusal(lambda: merge_to_folder(plan, root / "out"))
    assert error.code == "disk_full"
    assert str(plan.estimates.output_bytes) in error.message


def test_a_disk_without_room_is_refused_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_free_bytes", lambda folder: 100)
    assert refusal(lambda: merge_to_folder(plan_of(root, recipe()), root / "out")).code == "disk_full"


def test_a_real_limit_on_file_size_is_a_full_disk(root: Path) -> None:
    """The kernel itself refuses the bytes: in a process of its own, with the limit just below the weights' size."""
    script = f"""
        import resource, sys
        from pathlib import Path
        from app.errors import MergeyardError
        from tests.engine.merges import plan_of
        from tests.engine.test_refusals import recipe
        from worker.engine.kernels import load, warm_up
        from worker.engine.run import merge_to_folder
        root = Path({str(root)!r})
        plan = plan_of(root, recipe())
        warm_up(load("auto"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.estimates.output_bytes - 100,) * 2)
        try:
            merge_to_folder(plan, root / "out")
        except MergeyardError as error:
            sys.exit(0 if error.code == "disk_full" else error.code)
        sys.exit("it was written")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_too_little_memory_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 1 << 60)
    kernels = load("cpu")

    def too_much(*_: object) -> object:
        return torch.empty(1 << 55)

    monkeypatch.setattr(type(kernels), "merge", too_much)
    assert refusal(lambda: merge(plan_of(root, recipe()), root / "out")).code == "out_of_memory"


def test_too_little_memory_of_the_gpu_is_named_as_such(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(type(load("cpu")), "merge", too_much)
    found = refusal(lambda: merge(plan_of(root, recipe()), root / "out"))
    assert found.code == "out_of_memory"
    assert "The GPU" in str(found)


def test_an_unforeseen_failure_in_a_thread_is_raised_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr(type(load("cpu")), "collect", broken)
    with pytest.raises(ZeroDivisionError):
        merge(plan_of(root, recipe()), root / "out")


def test_only_sigkill_can_leave_a_hidden_folder_and_never_a_visible_one(root: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from tests.engine.merges import Watch, merge, plan_of
        from tests.engine.test_refusals import recipe
        class Killer(Watch):
            def stage(self, name):
                if name == "publishing":
                    os.kill(os.getpid(), signal.SIGKILL)
        root = Path({str(root)!r})
        merge(plan_of(root, recipe()), root / "out", control=Killer())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (root / "out").exists()
    left = list(root.glob(".out.*.part"))
    assert len(left) == 1
    for path in sorted(left[0].iterdir()):
        path.unlink()
    left[0].rmdir()
