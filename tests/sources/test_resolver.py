"""References lead where the operator allows and nowhere else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from app.errors import MergeyardError
from app.sources.catalogue import catalogue
from app.sources.resolver import Resolver
from app.sources.source import FoundFiles
from app.sources.uploads import UploadStore
from tests.files import listing, write_adapter, write_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "root" / "org" / "base")
    write_adapter(tmp_path / "root" / "adapters" / "sql")
    write_model(tmp_path / "secret" / "base")
    return tmp_path / "root"


def code_of(resolver: Resolver, reference: str) -> str:
    with pytest.raises(MergeyardError) as caught:
        resolver.model(reference)
    return caught.value.code


def test_two_spellings_of_one_model_are_one_reference(root: Path) -> None:
    resolver = Resolver(roots=[root])
    assert resolver.canonical("org/base") == resolver.canonical("models:org/./base/") == "models:org/base"


def test_the_first_root_that_has_it_wins(root: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "first" / "org" / "base", model_type="first")
    assert Resolver(roots=[tmp_path / "first", root]).model("org/base").config["model_type"] == "first"


@pytest.mark.parametrize("path", ["../secret/base", "models:../secret/base", "models:org/../../secret/base"])
def test_dots_do_not_lead_out(root: Path, path: str) -> None:
    assert code_of(Resolver(roots=[root]), path) == "path_outside_roots"


def test_an_absolute_path_is_outside(root: Path, tmp_path: Path) -> None:
    assert code_of(Resolver(roots=[root]), str(tmp_path / "secret" / "base")) == "path_outside_roots"
    assert code_of(Resolver(roots=[root]), f"models:{root}/org/base") == "path_outside_roots"


def test_a_folder_link_does_not_lead_out(root: Path, tmp_path: Path) -> None:
    (root / "link").symlink_to(tmp_path / "secret" / "base")
    assert code_of(Resolver(roots=[root]), "link") == "path_outside_roots"


def test_a_file_link_does_not_lead_out(root: Path, tmp_path: Path) -> None:
    weights = root / "org" / "base" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "secret" / "base" / "model.safetensors")
    assert code_of(Resolver(roots=[root]), "org/base") == "path_outside_roots"


def test_a_link_inside_the_root_is_followed_as_in_a_hub_cache(root: Path) -> None:
    weights = root / "org" / "base" / "model.safetensors"
    weights.rename(root / "blob")
    weights.symlink_to(Path("../../blob"))
    assert Resolver(roots=[root]).model("org/base").tensors


def test_a_loop_of_links_is_not_found(root: Path) -> None:
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    assert code_of(Resolver(roots=[root]), "a") == "source_not_found"


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("models:missing", "source_not_found"),
        ("missing/model", "source_not_found"),
        ("upload:sha256-" + "0" * 64, "source_not_found"),
        ("upload:nonsense", "reference_invalid"),
        ("merge:nope", "source_not_found"),
        ("merge:../x", "reference_invalid"),
        ("hf:org/name@main", "hub_not_allowed"),
        ("s3://bucket/key", "bucket_not_allowed"),
        ("s3://bucket", "reference_invalid"),
        ("ftp:x", "reference_invalid"),
        ("", "reference_invalid"),
        ("a\x00b", "reference_invalid"),
        ("x" * 2000, "reference_invalid"),
        ("x" * 900, "source_not_found"),
        ("adapters/sql", "reference_invalid"),
    ],
)
def test_a_reference_that_leads_nowhere_has_a_stable_code(root: Path, reference: str, code: str) -> None:
    assert code_of(Resolver(roots=[root]), reference) == code


def test_a_published_merge_is_a_source(root: Path) -> None:
    merged = FoundFiles(files=listing(root / "org" / "base"))
    assert Resolver(merges={"m1": merged}.__getitem__).model("merge:m1").reference == "merge:m1"


def test_local_commands_take_plain_paths(root: Path) -> None:
    assert Resolver(local=root).model("org/base").tensors
    assert Resolver(local=Path("elsewhere")).model(str(root / "org" / "base")).tensors


def test_two_spellings_of_a_local_path_are_one_reference(root: Path) -> None:
    resolver = Resolver(local=root)
    assert {
        resolver.canonical(text) for text in ("org/base", "./org/base", "org/../org/base/", str(root / "org/base"))
    } == {"org/base"}


def test_the_catalogue_lists_models_and_adapters_but_nothing_outside(root: Path, tmp_path: Path) -> None:
    (root / "out").symlink_to(tmp_path / "secret")
    found = [(entry.reference, entry.kind) for entry in catalogue([root])]
    assert found == [("models:adapters/sql", "adapter"), ("models:org/base", "model")]


def test_an_upload_is_named_by_its_contents_and_resolves(root: Path, tmp_path: Path) -> None:
    references = []
    for _ in range(2):
        draft = UploadStore(tmp_path / "uploads").begin()
        for name, path in listing(root / "adapters" / "sql").items():
            draft.add(name, [path.read_bytes()])
        upload = draft.check()
        draft.commit(upload)
        references.append((upload.reference, upload.kind))
    assert references[0] == references[1]
    assert references[0][1] == "adapter"
    assert Resolver(uploads=tmp_path / "uploads").adapter(references[0][0]).modules
    assert len(list((tmp_path / "uploads").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("pytorch_model.bin", "pickle_refused"),
        ("weights.pt", "pickle_refused"),
        ("../config.json", "request_invalid"),
        ("/etc/passwd", "request_invalid"),
        ("modeling_x.py", "request_invalid"),
        ("a/b.safetensors", "request_invalid"),
        (".hidden.safetensors", "request_invalid"),
        ("", "request_invalid"),
    ],
)
def test_an_upload_takes_only_plain_names_of_data_files(tmp_path: Path, name: str, code: str) -> None:
    draft = UploadStore(tmp_path).begin()
    with pytest.raises(MergeyardError) as caught:
        draft.add(name, [b"x"])
    draft.discard()
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_an_upload_has_at_most_so_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.sources.uploads.MAX_FILES", 2)
    draft = UploadStore(tmp_path).begin()
    for number in range(2):
        draft.add(f"{number}.safetensors", [b"x"])
    with pytest.raises(MergeyardError, match="more than 2 files") as caught:
        draft.add("2.safetensors", [b"x"])
    assert caught.value.code == "request_invalid"
    assert len(list(tmp_path.glob("*/*"))) == 2


def test_only_uploads_that_nobody_writes_to_are_swept(tmp_path: Path) -> None:
    store, day = UploadStore(tmp_path), 86_400
    now = time.time()
    ages = {"dead": (2 * day, 2 * day), "young": (day / 2, day / 2), "slow": (2 * day, 60)}
    for name, (folder_age, file_age) in ages.items():
        staging = tmp_path / f".staging-{name}"
        staging.mkdir()
        (staging / "model.safetensors").write_bytes(b"x")
        os.utime(staging / "model.safetensors", (now - file_age, now - file_age))
        os.utime(staging, (now - folder_age, now - folder_age))
    finished = tmp_path / ("a" * 64)
    finished.mkdir()
    os.utime(finished, (0, 0))
    store.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {".staging-young", ".staging-slow", finished.name}


def test_a_damaged_upload_is_refused_on_arrival(root: Path, tmp_path: Path) -> None:
    draft = UploadStore(tmp_path / "uploads").begin()
    for name, path in listing(root / "org" / "base").items():
        content = path.read_bytes()
        draft.add(name, [content[:-10] if name.endswith(".safetensors") else content])
    with pytest.raises(MergeyardError, match="truncated"):
        draft.check()
    draft.discard()
    assert list((tmp_path / "uploads").iterdir()) == []


def test_a_revision_is_a_folders_name_or_said_to_mean_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "org" / "model")
    write_model(tmp_path / "org" / "other@v2")
    resolver = Resolver(roots=[tmp_path])
    assert resolver.model("org/other@v2").reference == "models:org/other@v2"
    with pytest.raises(MergeyardError, match=r"Folders have no revisions: leave out what follows the @") as caught:
        resolver.model("org/model@main")
    assert caught.value.code == "source_not_found"
