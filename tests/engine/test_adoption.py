"""A retry takes over the shards an earlier attempt finished, and its result is the same to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.artifacts.manifest import StoredFile, TensorStatistics
from app.planning.plan import Plan
from tests.engine.merges import Watch, plan_of
from tests.files import lora_tensors, write_adapter, write_model
from worker.engine.digests import DigestCache
from worker.engine.kernels import load
from worker.engine.run import build_manifest, run_merge
from worker.engine.sinks import FileWriter, LocalFile, statistics_as_json, statistics_from_json


@dataclass
class Store:
    """A sink over a folder, which a second attempt may be given too. Statistics pass through JSON, as on disk."""

    folder: Path
    keep_free: int = 0
    adoptable: dict[str, StoredFile] = field(default_factory=dict)
    remembered: dict[str, str] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)

    def adopt(self, filename: str, check: Callable[[], None]) -> StoredFile | None:
        check()
        return self.adoptable.get(filename)

    def recall(self, filename: str) -> Mapping[str, TensorStatistics] | None:
        text = self.remembered.get(filename)
        return None if text is None else statistics_from_json(json.loads(text))

    def remember(self, filename: str, statistics: Mapping[str, TensorStatistics]) -> None:
        self.remembered[filename] = json.dumps(statistics_as_json(statistics))

    def create(self, filename: str, size: int) -> FileWriter:
        self.created.append(filename)
        (self.folder / filename).unlink(missing_ok=True)
        return LocalFile(self.folder / filename, name=filename, size=size)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "sql")
    write_adapter(tmp_path / "json", lora_tensors(seed=2))
    recipe: dict[str, Any] = {
        "base_model": "base",
        "merge_method": "ties",
        "models": [{"adapter": "sql"}, {"adapter": "json"}],
        "parameters": {"density": 0.3, "dialect": "paper"},
        "output": {"max_shard_size": "600B"},
    }
    return plan_of(tmp_path, recipe)


def run(plan: Plan, store: Store, watch: Watch | None = None) -> dict[str, Any]:
    output = run_merge(plan, store, kernels=load("cpu"), threads=2, control=watch or Watch(), digests=DigestCache(None))
    return build_manifest(plan, output).as_json()


def test_a_retry_writes_only_what_is_missing(plan: Plan, tmp_path: Path) -> None:
    whole = Store(tmp_path / "whole")
    expected = run(plan, whole)
    store = Store(tmp_path / "store")
    files = {file["name"]: StoredFile(key=file["name"], **file) for file in run(plan, store)["files"]}
    shards = [shard.filename for shard in plan.shards]
    store.adoptable = {name: files[name] for name in (shards[0], shards[2])}
    store.created.clear()
    watch = Watch()
    assert run(plan, store, watch) == expected
    assert [name for name in store.created if name in shards] == [
        name for name in shards if name not in store.adoptable
    ]
    done = [step for step, _ in watch.steps]
    assert done == sorted(done)
    assert done[-1] == watch.steps[-1][1]
    for name in expected["files"]:
        assert (tmp_path / "store" / name["name"]).read_bytes() == (tmp_path / "whole" / name["name"]).read_bytes()


def test_when_everything_was_finished_no_weight_is_read(plan: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    expected = run(plan, store)
    store.adoptable = {file["name"]: StoredFile(key=file["name"], **file) for file in expected["files"]}
    watch = Watch()
    assert run(plan, store, watch) == expected
    assert len(watch.steps) == 1


def test_a_shard_whose_statistics_are_lost_is_merged_again(plan: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    expected = run(plan, store)
    store.adoptable = {file["name"]: StoredFile(key=file["name"], **file) for file in expected["files"]}
    lost = plan.shards[1].filename
    del store.remembered[lost]
    store.created.clear()
    assert run(plan, store) == expected
    assert [name for name in store.created if name.endswith(".safetensors")] == [lost]
