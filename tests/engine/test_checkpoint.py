"""What a checkpoint's files hold: layout, index, casts, companions, card and manifest."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app.sources.safetensors import read_header
from tests.engine.merges import merge, plan_of, tensors_of
from tests.files import HIDDEN, llama_tensors, lora_tensors, write_adapter, write_model
from worker.engine import blocks

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", tie_word_embeddings=True, auto_map={"AutoModel": "code.Model"})
    write_adapter(tmp_path / "sql")
    write_adapter(tmp_path / "json", lora_tensors(seed=2))
    return tmp_path


def recipe(**changes: Any) -> dict[str, Any]:
    models = [{"adapter": "sql"}, {"adapter": "json"}]
    return {"base_model": "base", "merge_method": "task_arithmetic", "models": models, **changes}


def product(folder: Path, module: str = Q) -> torch.Tensor:
    factors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{module}"
    return 2.0 * factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]


def test_every_tensor_of_the_base_is_there_and_only_adapted_ones_changed(root: Path) -> None:
    merge(plan_of(root, recipe()), root / "out")
    found, base = tensors_of(root / "out"), llama_tensors()
    assert sorted(found) == sorted(base)  # no lm_head beside the tied embeddings
    for name, value in base.items():
        expected = value
        if "_proj" in name:
            module = name.removesuffix(".weight")
            expected = value + product(root / "sql", module) + product(root / "json", module)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


def test_the_file_is_safetensors_with_aligned_header_and_the_plans_metadata(root: Path) -> None:
    merge(plan_of(root, recipe()), root / "out")
    path = root / "out" / "model.safetensors"
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert list(read_header(path).tensors) == [tensor.name for tensor in plan_of(root, recipe()).tensors]


def test_sharded_files_have_an_index(root: Path) -> None:
    merge(plan_of(root, recipe(output={"max_shard_size": "600B"})), root / "out")
    index = json.loads((root / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (root / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in llama_tensors().values())
    for name, shard in index["weight_map"].items():
        assert name in load_file(root / "out" / shard)
    merge(plan_of(root, recipe()), root / "whole")
    assert all(torch.equal(value, tensors_of(root / "whole")[name]) for name, value in tensors_of(root / "out").items())


def test_a_sharded_base_gives_the_same_tensors(root: Path) -> None:
    folder = root / "sharded"
    folder.mkdir()
    tensors = llama_tensors()
    places: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[:2], list(tensors)[2:]), start=1):
        filename = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / filename, {"format": "pt"})
        places |= dict.fromkeys(names, filename)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_bytes((root / "base" / "config.json").read_bytes())
    merge(plan_of(root, recipe(base_model="sharded")), root / "out")
    merge(plan_of(root, recipe()), root / "whole")
    expected = tensors_of(root / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in tensors_of(root / "out").items())
    assert not (root / "out" / "model.safetensors.index.json").exists()  # the result is one file


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32", None])
def test_out_dtype_casts_once_from_float32(stored: torch.dtype, wanted: str | None, root: Path) -> None:
    base = llama_tensors(dtype=stored)
    write_model(root / "base", base)
    merge(plan_of(root, recipe(**({"out_dtype": wanted} if wanted else {}))), root / "out")
    dtype = getattr(torch, wanted) if wanted else stored
    found = tensors_of(root / "out")
    assert {value.dtype for value in found.values()} == {dtype}
    exact = base[f"{Q}.weight"].float() + product(root / "sql") + product(root / "json")
    torch.testing.assert_close(found[f"{Q}.weight"].float(), exact.to(dtype).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found["model.norm.weight"], base["model.norm.weight"].to(dtype))


def test_what_cannot_be_merged_is_copied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers, booleans, scalars, empty tensors; in pieces of a few values."""
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 4)
    others = {
        "positions": torch.arange(30).reshape(5, 6),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "cube": torch.arange(60, dtype=torch.float32).reshape(3, 4, 5),
    }
    write_model(root / "base", {**llama_tensors(), **others})
    merge(plan_of(root, recipe(out_dtype="bfloat16")), root / "out")
    found = tensors_of(root / "out")
    for name, value in others.items():
        dtype = torch.bfloat16 if value.dtype.is_floating_point else value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value.to(dtype)), name


def test_documents_are_written_and_companions_copied(root: Path) -> None:
    (root / "base" / "tokenizer.json").write_text('{ "spaces":   "kept" }')
    (root / "base" / "generation_config.json").write_text('{"do_sample": false}')
    merge(plan_of(root, recipe(out_dtype="bfloat16")), root / "out")
    assert (root / "out" / "tokenizer.json").read_text() == '{ "spaces":   "kept" }'
    assert (root / "out" / "generation_config.json").read_text() == '{"do_sample": false}'
    config = json.loads((root / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["torch_dtype"] == "bfloat16"


def test_the_manifest_names_every_file_and_source_by_digest(root: Path) -> None:
    plan = plan_of(root, recipe())
    manifest = merge(plan, root / "out", cache=root / "cache")
    written = json.loads((root / "out" / "mergeyard.json").read_text())
    assert written == json.loads(json.dumps(manifest.as_json()))
    assert written["fingerprint"] == plan.digest
    names = {path.name for path in (root / "out").iterdir()} - {"mergeyard.json"}
    assert {file["name"] for file in written["files"]} == names
    for file in written["files"]:
        content = (root / "out" / file["name"]).read_bytes()
        assert (file["size"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert [source["reference"] for source in written["sources"]] == ["models:base", "models:json", "models:sql"]
    for source in written["sources"]:
        for name, digest in source["files"].items():
            folder = root / source["reference"].removeprefix("models:")
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert str(root) not in json.dumps(written)


def test_digests_are_remembered(root: Path) -> None:
    first = merge(plan_of(root, recipe()), root / "out", cache=root / "cache")
    remembered = sorted((root / "cache").iterdir())
    assert len(remembered) == sum(len(source.files) for source in first.sources)
    for path in remembered:
        path.write_text("f" * 64 + "\n")  # so that it shows where a digest came from
    second = merge(plan_of(root, recipe()), root / "again", cache=root / "cache")
    assert {digest for source in second.sources for digest in source.files.values()} == {"f" * 64}


def test_two_files_of_equal_header_size_and_mtime_have_a_digest_each(root: Path) -> None:
    """Fine-tunes of one model out of an archive: nothing but their weights tells them apart."""
    paths = [root / name / "adapter_model.safetensors" for name in ("json", "sql")]
    for path in paths:
        os.utime(path, ns=(0, 0))
    plan = plan_of(root, recipe())
    first, second = (file for source in plan.sources for file in source.files if file.path in paths)
    assert replace(first, path=second.path) == second
    manifest = merge(plan, root / "out", cache=root / "cache")
    found = [source.files["adapter_model.safetensors"] for source in manifest.sources[1:]]
    assert found == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_a_file_rewritten_under_its_old_mtime_gets_its_new_digest(root: Path) -> None:
    path = root / "sql" / "adapter_model.safetensors"
    mtime = path.stat().st_mtime_ns
    merge(plan_of(root, recipe()), root / "out", cache=root / "cache")
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    os.utime(path, ns=(mtime, mtime))
    manifest = merge(plan_of(root, recipe()), root / "again", cache=root / "cache")
    assert manifest.sources[2].files[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_statistics_describe_each_changed_tensor(root: Path) -> None:
    models = [{"adapter": "json", "parameters": {"density": 0.25}}, {"adapter": "sql"}]
    manifest = merge(plan_of(root, recipe(merge_method="ties", models=models)), root / "out")
    assert set(manifest.statistics) == {name for name in llama_tensors() if "_proj" in name}
    entry = manifest.statistics[f"{Q}.weight"]
    assert entry.parameters == HIDDEN * HIDDEN
    assert entry.trimmed == (0.75, 0.0)
    norms = [float(product(root / name).norm()) for name in ("json", "sql")]
    assert entry.source_norms == pytest.approx(norms)
    moved = tensors_of(root / "out")[f"{Q}.weight"] - llama_tensors()[f"{Q}.weight"]
    assert entry.merged_norm == pytest.approx(float(moved.norm()), rel=1e-5)
    # the sources disagree where the one quarter kept of the first has the other sign
    first, second = product(root / "json"), product(root / "sql")
    kept = first.abs() >= first.abs().flatten().kthvalue(49).values
    assert entry.sign_conflict == pytest.approx(float((kept & (first * second < 0)).float().mean()))


def test_the_card_carries_the_recipe(root: Path) -> None:
    plan = plan_of(root, recipe())
    merge(plan, root / "out")
    _, front, body = (root / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["mergeyard", "merge"]
    assert yaml.safe_load(front)["base_model"] == ["models:base"]
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == plan.recipe
