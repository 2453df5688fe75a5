"""Several documents merged in one go: the numbers of merging one by one, and nothing of the earlier ones left."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.planning.plan import Plan
from app.sources.source import SourceFile
from tests import tiny
from tests.engine.merges import Watch, bytes_of, merge, plan_of, tensors_of
from tests.files import llama_tensors, write_adapter, write_model
from tests.words import TOOL, USER, tokenizer, write_speaker
from worker.engine import digests
from worker.engine.digests import DigestCache
from worker.engine.kernels import load
from worker.engine.run import merge_to_folder, run_merge
from worker.engine.sinks import SCRATCH, FolderSink, LocalFile

# `left` is read by both others: a lattice, not a chain.
LEFT = {
    "name": "left",
    "base_model": "base",
    "merge_method": "task_arithmetic",
    "models": [
        {"model": "tuned", "parameters": {"weight": 0.6}},
        {"adapter": "sql", "parameters": {"weight": 0.5}},
    ],
}
RIGHT = {
    "name": "right",
    "base_model": "left",
    "merge_method": "slerp",
    "models": [{"model": "other"}],
    "parameters": {"t": 0.4},
}
RESULT = {
    "base_model": "base",
    "merge_method": "ties",
    "models": [
        {"model": "left", "parameters": {"weight": 0.7}},
        {"model": "right", "parameters": {"weight": 0.3}},
    ],
    "parameters": {"density": 0.6},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "tuned", "other")):
        write_model(tmp_path / name, llama_tensors(seed=seed, dtype=torch.bfloat16), num_hidden_layers=2)
    write_adapter(tmp_path / "sql")
    return tmp_path


def documents(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"documents": [{**part, **changes} for part in parts]}


def one_by_one(root: Path, *parts: dict[str, Any], **changes: Any) -> Path:
    """Each document merged by itself into a folder that the next ones find under its name."""
    for part in parts:
        out = root / part.get("name", "result")
        merge(plan_of(root, {**part, **changes}), out)
    return out


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shards", ["5GB", "600B"])
def test_documents_give_the_bytes_of_merging_one_by_one(root: Path, threads: int, shards: str) -> None:
    changes = {"out_dtype": "float32", "output": {"max_shard_size": shards}}
    merge(plan_of(root, documents(LEFT, RIGHT, RESULT, **changes)), root / "out", threads=threads)
    expected = one_by_one(root, LEFT, RIGHT, RESULT, **changes)
    ours, theirs = bytes_of(root / "out"), bytes_of(expected)
    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {"README.md", "mergeyard.json"}, "they tell of other recipes"


def test_nothing_is_rounded_before_the_result_is(root: Path) -> None:
    merge(plan_of(root, documents(LEFT, RIGHT, RESULT)), root / "out")
    found = tensors_of(root / "out")
    exact = tensors_of(one_by_one(root, LEFT, RIGHT, RESULT, out_dtype="float32"))
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)


def test_what_a_document_leaves_as_it_is_takes_its_type_all_the_same(root: Path) -> None:
    write_model(root / "base", llama_tensors(), num_hidden_layers=2)
    narrow = {**LEFT, "models": [{"adapter": "sql"}], "dtype": "float16"}
    result = {**RIGHT, "name": "result", "dtype": "float32"}
    merge(plan_of(root, {"documents": [narrow, result]}), root / "out")
    merge(plan_of(root, narrow), root / "left")
    merge(plan_of(root, result), root / "expected")
    assert bytes_of(root / "out")["model.safetensors"] == bytes_of(root / "expected")["model.safetensors"]


def test_a_base_with_an_adapter_is_what_peft_merges(tiny_models: Path, tmp_path: Path) -> None:
    base, adapter = f"{tiny.BASE}-f32", tiny.ADAPTERS[0]
    tiny.write_llama(tmp_path / base, dtype=torch.float32)
    tiny.write_llama(tmp_path / "tuned", dtype=torch.float32, seed=4)
    shutil.copytree(tiny_models / adapter, tmp_path / adapter)
    recipe = {
        "base_model": f"{base}+{adapter}",
        "merge_method": "task_arithmetic",
        "models": [{"model": "tuned", "parameters": {"weight": 0.25}}],
    }
    merge(plan_of(tmp_path, recipe), tmp_path / "out")
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / base), tmp_path / adapter)
    expected, tuned = merged.merge_and_unload().state_dict(), tensors_of(tmp_path / "tuned")
    for name, value in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(value, expected[name] + 0.25 * (tuned[name] - expected[name]), rtol=1e-6, atol=1e-6)


def test_an_earlier_document_may_change_the_vocabulary(root: Path) -> None:
    """Its new tokenizer is written by none but the documents that take it over."""
    write_speaker(root / "speaker", tokenizer())
    write_speaker(root / "chat", tokenizer(extra=[USER, TOOL]), seed=1)
    write_speaker(root / "more", tokenizer(extra=[USER, TOOL]), seed=2)
    united = {
        "name": "united",
        "merge_method": "linear",
        "base_model": "speaker",
        "models": [{"model": "speaker"}, {"model": "chat"}],
        "tokenizer_source": "union",
        "chat_template": "chatml",
    }
    result = {"merge_method": "task_arithmetic", "base_model": "united", "models": [{"model": "more"}]}
    for changes in ({}, {"tokenizer_source": "united"}):
        out = root / f"out-{len(changes)}"
        merge(plan_of(root, {"documents": [united, {**result, **changes}]}), out)
        loaded = AutoTokenizer.from_pretrained(out)
        assert loaded.convert_tokens_to_ids([USER, TOOL]) == [len(loaded) - 2, len(loaded) - 1]
        assert "im_start" in loaded.chat_template
    expected = one_by_one(root, united, {**result, "tokenizer_source": "united"})
    ours, theirs = bytes_of(root / "out-1"), bytes_of(expected)
    assert {name for name in ours if ours[name] != theirs[name]} == {"README.md", "mergeyard.json"}


def test_slices_and_grown_depths_pass_from_document_to_document(root: Path) -> None:
    stacked = {
        "name": "stacked",
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in ("base", "tuned")],
    }
    sources = [{"model": "stacked", "layer_range": [1, 3]}, {"model": "other", "layer_range": [0, 2]}]
    result = {"merge_method": "linear", "slices": [{"sources": sources, "parameters": {"weight": 0.5}}]}
    merge(plan_of(root, documents(stacked, result, out_dtype="float32")), root / "out")
    expected = one_by_one(root, stacked, result, out_dtype="float32")
    assert tensors_of(root / "out").keys() == tensors_of(expected).keys()
    assert bytes_of(root / "out")["model.safetensors"] == bytes_of(expected)["model.safetensors"]
    assert bytes_of(root / "out")["config.json"] == bytes_of(expected)["config.json"]


@pytest.mark.parametrize("names", [("tall", "other"), ("tall+sql", "other"), ("base", "tall+sql")])
def test_the_manifest_names_every_file_once_that_a_document_left_alone(names: tuple[str, str], root: Path) -> None:
    slices = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in ("base", "tuned")]
    tall = {"name": "tall", "merge_method": "passthrough", "slices": slices}
    result = {"base_model": names[0], "merge_method": "task_arithmetic", "models": [{"model": names[1]}]}
    manifest = merge(plan_of(root, documents(tall, result)), root / "out").as_json()
    left_alone = {record["reference"]: record["files"] for record in manifest["earlier"][0]["sources"]}
    for name in ("base", "tuned"):
        content = (root / name / "model.safetensors").read_bytes()
        assert left_alone[f"models:{name}"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    made = [record["files"] for record in manifest["sources"] if record["reference"].startswith("tall")]
    assert made and all("model.safetensors" not in files for files in made)


def test_the_manifest_tells_of_every_document_and_of_real_files_alone_beside_them(root: Path) -> None:
    manifest = merge(plan_of(root, documents(LEFT, RIGHT, RESULT)), root / "out").as_json()
    assert [document["name"] for document in manifest["earlier"]] == ["left", "right"]
    assert [len(document["statistics"]) for document in manifest["earlier"]] == [6, 6]
    left = {record["reference"]: record["files"] for record in manifest["earlier"][0]["sources"]}
    assert left.keys() == {"models:base", "models:tuned", "models:sql"}
    read = {record["reference"]: list(record["files"]) for record in manifest["sources"]}
    assert read == {
        "models:base": ["model.safetensors"],
        "left": ["left/model.safetensors"],
        "right": ["right/model.safetensors"],
    }
    card = (root / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model:\n- models:base\nlibrary_name")
    assert "| adapter | models:sql | adapter_model.safetensors |" in card


def test_progress_is_of_all_documents_and_one_line(root: Path) -> None:
    watch = Watch()
    plan = plan_of(root, documents(LEFT, RIGHT, RESULT))
    merge(plan, root / "out", control=watch)
    done = [step for step, _ in watch.steps]
    assert {total for _, total in watch.steps} == {plan.estimates.disk_bytes}
    assert done == sorted(done) and done[-1] == plan.estimates.disk_bytes
    assert watch.stages == ["merging", "publishing"]


@pytest.mark.parametrize("stop_at", [2, 8, 14, 20])
def test_what_stops_a_merge_in_any_document_leaves_nothing(root: Path, stop_at: int) -> None:
    before = sorted(path.name for path in root.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge(
            plan_of(root, documents(LEFT, RIGHT, RESULT)),
            root / "out",
            control=Watch(stop=KeyboardInterrupt(), stop_at=stop_at),
        )
    assert sorted(path.name for path in root.iterdir()) == before


def test_a_full_disk_in_an_earlier_document_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in root.iterdir())
    written = 0

    def write(file: LocalFile, data: memoryview) -> None:
        nonlocal written
        written += data.nbytes
        if written > 3000:
            raise OSError(28, "No space left on device")
        real(file, data)

    real = LocalFile.write
    monkeypatch.setattr(LocalFile, "write", write)
    with pytest.raises(MergeyardError) as failed:
        merge_to_folder(plan_of(root, documents(LEFT, RIGHT, RESULT)), root / "out", device="cpu")
    assert failed.value.code == "disk_full"
    assert sorted(path.name for path in root.iterdir()) == before


def test_what_earlier_documents_write_is_not_put_on_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read back at once and deleted: nobody needs it after a power cut, and memory is where it is wanted."""
    forced: list[str] = []

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def note(descriptor: int, *rest: int) -> None:
            forced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            real(descriptor, *rest)

        return note

    monkeypatch.setattr("app.artifacts.disk._STEP", 8)
    monkeypatch.setattr(os, "fsync", noting(os.fsync))
    monkeypatch.setattr(os, "posix_fadvise", noting(os.posix_fadvise))
    written: list[str] = []
    real = LocalFile.finish

    def finish(file: LocalFile) -> StoredFile:
        written.append(str(file._path))
        return real(file)

    monkeypatch.setattr(LocalFile, "finish", finish)
    merge_to_folder(plan_of(root, documents(LEFT, RIGHT, RESULT)), root / "out", device="cpu")
    assert any(SCRATCH in path for path in written)
    assert any(path.endswith("model.safetensors") for path in forced), "the result is"
    assert [path for path in forced if SCRATCH in path] == []


def test_a_disk_too_small_for_what_earlier_documents_write_is_refused_before_the_work(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(root, documents(LEFT, RIGHT, RESULT))
    monkeypatch.setattr("worker.engine.sinks._free_bytes", lambda _: plan.estimates.disk_bytes - 1)
    with pytest.raises(MergeyardError) as failed:
        merge_to_folder(plan, root / "out", device="cpu")
    assert failed.value.code == "disk_full" and str(plan.estimates.disk_bytes) in failed.value.message


def test_an_earlier_result_that_changes_while_it_is_read_is_noticed(root: Path) -> None:
    class Meddling(Watch):
        def check(self) -> None:
            super().check()
            for path in root.glob(".out.*/.earlier/0/model.safetensors"):
                if (path.parent.parent / "1").exists():
                    path.touch()

    with pytest.raises(MergeyardError) as failed:
        merge(plan_of(root, documents(LEFT, RIGHT, RESULT)), root / "out", control=Meddling())
    assert failed.value.code == "source_changed"


def test_nan_in_an_earlier_document_names_the_source(root: Path) -> None:
    tensors = llama_tensors(seed=1, dtype=torch.bfloat16)
    tensors["model.norm.weight"][0] = float("nan")
    write_model(root / "tuned", tensors)
    with pytest.raises(MergeyardError) as failed:
        merge(plan_of(root, documents(LEFT, RIGHT, RESULT)), root / "out")
    assert failed.value.code == "source_not_finite" and "models:tuned" in failed.value.message


def test_every_real_file_is_read_for_its_digest_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[SourceFile] = []
    real = digests.hash_file

    def noting(file: SourceFile, stop: Any) -> Any:
        hashed.append(file)
        return real(file, stop)

    monkeypatch.setattr(digests, "hash_file", noting)
    merge(plan_of(root, documents(LEFT, RIGHT, RESULT)), root / "out")
    assert sorted(file.path.parent.name for file in hashed) == ["base", "other", "sql", "sql", "tuned"]


def test_scratch_is_gone_before_the_folder_is_seen(root: Path) -> None:
    """Even of an artifact that is never published."""
    plan: Plan = plan_of(root, documents(LEFT, RIGHT, RESULT))
    with FolderSink(root / "out") as sink:
        run_merge(plan, sink, kernels=load("cpu"), control=Watch(), digests=DigestCache(None))
        (part,) = root.glob(".out.*.part")
        assert sorted(path.name for path in part.iterdir()) == ["README.md", "config.json", "model.safetensors"]
