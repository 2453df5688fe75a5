"""Uploads kept in the bucket, and ``s3:`` sources, on the real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.api.service import Service
from app.api.sources import list_sources
from app.errors import MergeyardError
from app.main import open_service
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.records.key import Caller
from app.records.owned import OwnedUploads, stored_uploads
from app.settings import Settings
from app.sources.buckets import Buckets
from app.sources.uploads import UploadStore
from mergeyard.local import fetch_remote, here, plan_recipe
from tests.objects.s3 import Bucket, new_bucket
from tests.worker.attempts import attempt, digests, lonely_yard, place_in
from tests.worker.yard import Yard
from worker.job import Ending


@pytest.fixture
def library(s3_endpoint: str, tiny_models: Path) -> Bucket:
    """A bucket with a model, its adapters, and what nobody should take."""
    made = new_bucket(s3_endpoint)
    for path in sorted(tiny_models.rglob("*")):
        if path.is_file():
            made.write(f"team/{path.relative_to(tiny_models).as_posix()}", path.read_bytes())
    made.write("team/tiny-llama/notes.bin.txt", b"not taken")
    made.write("team/tiny-llama/onnx/model.safetensors", b"deeper is another folder")
    made.write("others/tiny-llama/config.json", b"{}")
    return made


@pytest.fixture
def yard(tmp_path: Path, tiny_models: Path, library: Bucket) -> Iterator[Yard]:
    """Its artifacts are in a folder: where sources are is another matter."""
    settings = library.settings() | {"artifact_store": "", "s3_sources": f"s3://{library.name}/team"}
    with lonely_yard(tmp_path, tiny_models, **settings) as opened:
        yield opened


def recipe(bucket: Bucket, **changes: Any) -> dict[str, Any]:
    place = f"s3://{bucket.name}/team"
    return {
        "base_model": f"{place}/tiny-llama",
        "merge_method": "ties",
        "models": [{"adapter": f"{place}/{name}", "parameters": {"density": 0.5}} for name in ("sql", "json")],
    } | changes


def refused(ask: Callable[[], Any]) -> MergeyardError:
    with pytest.raises(MergeyardError) as found:
        ask()
    return found.value


class TestSources:
    def test_a_merge_of_a_bucket_is_that_of_the_folder(self, yard: Yard, library: Bucket) -> None:
        job = yard.submit(recipe(library), ring=False)
        adapters = [{"adapter": f"models:{name}", "parameters": {"density": 0.5}} for name in ("sql", "json")]
        same = yard.submit(recipe(library, base_model="models:tiny-llama", models=adapters), ring=False)
        base = job.resolved["base_model"]
        assert base.startswith(f"s3://{library.name}/team/tiny-llama@") and len(base.rpartition("@")[2]) == 40
        assert not list((yard.settings.hub_files / "files").glob("*.part"))
        place = place_in(yard)
        assert attempt(place, job) is attempt(place, same) is Ending.PUBLISHED
        assert digests(yard, job)["model.safetensors"] == digests(yard, same)["model.safetensors"]

    def test_only_headers_are_read_for_a_plan(self, yard: Yard, library: Bucket) -> None:
        plan = make_plan(parse_recipe(recipe(library)), yard.resolver("local"))
        assert {file.name for file in plan.remote} == {"model.safetensors", "adapter_model.safetensors"}
        assert {file.origin for file in plan.remote} == {"bucket"}

    def test_what_changed_since_the_plan_is_another_source(self, yard: Yard, library: Bucket) -> None:
        job = yard.submit(recipe(library), ring=False, max_attempts=1)
        key = "team/sql/adapter_model.safetensors"
        content = bytearray(library.read(key))
        content[-1] ^= 1
        library.write(key, bytes(content))
        assert attempt(place_in(yard), job) is Ending.FAILED
        assert (yard.jobs.get(job.id).error or {})["code"] == "source_changed"
        again = yard.submit(recipe(library), ring=False)
        assert again.plan_digest != job.plan_digest and attempt(place_in(yard), again) is Ending.PUBLISHED

    def test_bytes_of_another_version_are_never_taken(self, yard: Yard, library: Bucket) -> None:
        buckets = Buckets.of(yard.settings)
        plan = make_plan(parse_recipe(recipe(library)), yard.resolver("local"))
        [file] = [file for file in plan.remote if file.key == "team/sql/adapter_model.safetensors"]
        library.write(file.key, b"\0" * file.size)
        assert refused(buckets.transfer([file]).run).code == "source_changed"

    @pytest.mark.parametrize(
        ("reference", "code"),
        [
            ("s3://{bucket}/others/tiny-llama", "bucket_not_allowed"),
            ("s3://{bucket}/teams", "bucket_not_allowed"),
            ("s3://another/team/x", "bucket_not_allowed"),
            ("s3://{bucket}/team/nothing", "source_not_found"),
            ("s3://{bucket}/team", "source_not_found"),
            ("s3://{bucket}/team/../others/tiny-llama", "reference_invalid"),
            ("s3:bucket/team", "reference_invalid"),
            ("s3://{bucket}", "reference_invalid"),
            ("s3://{bucket}/team/tiny-llama@main", "reference_invalid"),
        ],
    )
    def test_what_cannot_be_named(self, yard: Yard, library: Bucket, reference: str, code: str) -> None:
        named = recipe(library, base_model=reference.format(bucket=library.name))
        error = refused(lambda: make_plan(parse_recipe(named), yard.resolver("local")))
        assert (error.code, error.where) == (code, "base_model")

    def test_pickles_are_refused_by_name_and_never_fetched(self, yard: Yard, library: Bucket) -> None:
        library.write("team/pickled/config.json", b"{}")
        library.write("team/pickled/pytorch_model.bin", b"cos\nsystem\n")
        named = recipe(library, base_model=f"s3://{library.name}/team/pickled")
        error = refused(lambda: make_plan(parse_recipe(named), yard.resolver("local")))
        assert error.code == "pickle_refused"

    def test_a_service_reads_no_bucket_until_it_is_told_to(self, yard: Yard, library: Bucket) -> None:
        settings = yard.settings.model_copy(update={"s3_sources": ""})
        error = refused(lambda: Buckets.of(settings).files(f"//{library.name}/team/tiny-llama"))
        assert error.code == "bucket_not_allowed" and "MERGEYARD_S3_SOURCES" in error.message

    def test_a_local_command_may_read_any(self, yard: Yard, library: Bucket, tmp_path: Path) -> None:
        settings = yard.settings.model_copy(update={"s3_sources": "", "data_dir": tmp_path / "own"})
        place = here(tmp_path, settings.model_copy(update={"hub_cache": tmp_path / "cache"}))
        plan = plan_recipe(str(recipe(library)).replace("'", '"'), place)
        assert plan.remote and fetch_remote(plan, place, lambda *_: None).remote == ()

    @pytest.mark.parametrize("secret", ["wrong"])
    def test_a_bucket_that_refuses_us_says_so(self, yard: Yard, library: Bucket, secret: str) -> None:
        settings = yard.settings.model_copy(update={"s3_secret_access_key": secret})
        error = refused(lambda: Buckets.of(settings).files(f"//{library.name}/team/tiny-llama"))
        assert error.code == "bucket_unavailable" and "credentials" in error.message and secret not in error.message


class TestUploads:
    @pytest.fixture
    def host(self, tmp_path: Path, sqlite_url: str, bucket: Bucket) -> Callable[[str], Service]:
        """A host with a data folder of its own; the records and the bucket are everybody's."""
        return lambda name: open_service(
            Settings(data_dir=tmp_path / name, database_url=sqlite_url, broker_url="redis://-", **bucket.settings())
        )

    def test_an_upload_to_one_host_is_a_source_on_another(
        self, host: Callable[[str], Service], tiny_models: Path, bucket: Bucket
    ) -> None:
        first, second = host("a"), host("b")
        draft = first.uploads.begin()
        for path in sorted((tiny_models / "sql").iterdir()):
            draft.add(path.name, [path.read_bytes()])
        made = draft.check()
        anna = Caller(owner="anna", scopes=frozenset())
        OwnedUploads(first.database).add(made, by=anna)
        assert refused(lambda: second.resolver("anna").adapter(made.reference)).code == "source_not_found"
        draft.commit(made)
        assert not (second.settings.uploads / made.digest).exists()
        here_, there = first.resolver("anna").adapter(made.reference), second.resolver("anna").adapter(made.reference)
        assert {file.name for file in there.files if file.remote} == {"adapter_model.safetensors"}
        assert [(f.name, f.size, f.header_sha256) for f in there.files] == [
            (f.name, f.size, f.header_sha256) for f in here_.files
        ]
        listed = list_sources(anna, second).items
        assert [(entry.reference, entry.kind) for entry in listed] == [(made.reference, "adapter")]
        assert listed[0].size == (tiny_models / "sql" / "adapter_model.safetensors").stat().st_size
        assert refused(lambda: second.resolver("bob").adapter(made.reference)).code == "source_not_found"
        assert all(key.startswith(f"artifacts/.uploads/{made.digest}/") for key in bucket.sizes())
        assert list(second.store.folders()) == [], "no job is called so"

    def test_an_upload_that_cannot_be_kept_is_no_upload(
        self, tmp_path: Path, tiny_models: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.artifacts.bucket.RETRY", {"max_retries": 0})
        settings = Settings(data_dir=tmp_path, **(bucket.settings() | {"s3_endpoint": "http://127.0.0.1:9"}))
        store = open_service(settings).store
        uploads = UploadStore(settings.uploads, stored=stored_uploads(store, settings))
        draft = uploads.begin()
        for path in sorted((tiny_models / "sql").iterdir()):
            draft.add(path.name, [path.read_bytes()])
        made = draft.check()
        assert refused(lambda: draft.commit(made)).code == "store_unavailable"
        draft.discard()
        assert list(settings.uploads.iterdir()) == []
