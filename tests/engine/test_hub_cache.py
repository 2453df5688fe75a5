"""A hub cache: every file of a model is a link to a blob with another name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.files import write_adapter, write_model
from worker.engine.run import merge_to_folder


def as_hub_cache(folder: Path, blobs: Path) -> None:
    """Move the folder's files to ``blobs`` under their digests, and leave relative links."""
    blobs.mkdir(exist_ok=True)
    for path in list(folder.iterdir()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(Path("..") / "blobs" / blob.name)


def test_linked_files_keep_their_names_through_a_whole_merge(tmp_path: Path) -> None:
    root = tmp_path / "root"
    base = write_model(root / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    as_hub_cache(base, root / "blobs")
    as_hub_cache(write_adapter(root / "sql"), root / "blobs")
    recipe = {"base_model": "base", "merge_method": "ties", "models": [{"adapter": "sql"}]}
    merge_to_folder(make_plan(parse_recipe(recipe), Resolver(roots=[root])), tmp_path / "out")

    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= written
    assert not {path.name for path in (root / "blobs").iterdir()} & written
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {}
    manifest = json.loads((tmp_path / "out" / "mergeyard.json").read_text())
    assert list(manifest["sources"][0]["files"]) == ["model.safetensors"]
    assert set(manifest["sources"][1]["files"]) == {"adapter_model.safetensors", "adapter_config.json"}
