"""huggingface_hub 0.36, 1.x and 2.x pull merges and aliases as if from the hub."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from app.artifacts.manifest import MANIFEST_NAME
from app.records.job import Job
from app.settings import Settings
from tests.api.serving import serving
from tests.faults.proxy import Proxy, proxied
from tests.hub.clients import REQUIREMENTS
from tests.hub.conftest import Client, Hub

FILES = {
    "model-00001-of-00002.safetensors": random.Random(1).randbytes(3_000_000),
    "model-00002-of-00002.safetensors": random.Random(2).randbytes(100_000),
    "config.json": b'{"model_type": "llama"}',
    "chat_template.jinja": b"",
    "1_Pooling/config.json": b"{}",
}
WEIGHTS = 40_000_000  # bytes of the file whose download is cut
CUT_AFTER = 12_000_000


@pytest.fixture(scope="module")
def job(hub: Hub) -> Job:
    return hub.published(FILES)


def repo(job: Job) -> str:
    return f"merges/{job.id}"


def commit(job: Job) -> str:
    assert job.artifact is not None
    return str(job.artifact["manifest_sha256"])[:40]


def test_the_client_is_the_one_that_is_meant(alice: Client) -> None:
    [found] = alice.run(("version", {}))
    assert found in REQUIREMENTS[alice.version][0]


def test_a_snapshot_is_the_artifact_byte_for_byte(hub: Hub, alice: Client, job: Job, tmp_path: Path) -> None:
    everything = hub.manifest(job)
    assert sorted(everything) == sorted([*FILES, MANIFEST_NAME])
    in_cache, in_folder, chosen, folder = alice.run(
        ("snapshot", {"repo_id": repo(job)}),
        ("snapshot", {"repo_id": repo(job), "local_dir": str(tmp_path / "model")}),
        ("snapshot", {"repo_id": repo(job), "local_dir": str(tmp_path / "json"), "allow_patterns": "*.json"}),
        ("snapshot_folder", {"repo_id": repo(job)}),
    )
    assert in_cache == in_folder == everything
    assert sorted(chosen) == ["1_Pooling/config.json", "config.json", MANIFEST_NAME]
    assert folder == commit(job)


def test_what_is_in_the_cache_is_not_sent_again(hub: Hub, alice: Client) -> None:
    job = hub.published(FILES)
    alice.run(("snapshot", {"repo_id": repo(job)}))
    before = hub.downloads(job)
    sent = [name for name, content in FILES.items() if content]  # clients know what is in an empty file
    assert sorted(name for name, _ in before) == sorted([*sent, MANIFEST_NAME])
    [again, one] = alice.run(
        ("snapshot", {"repo_id": repo(job)}), ("file", {"repo_id": repo(job), "filename": "config.json"})
    )
    assert again == hub.manifest(job) and one == again["config.json"]
    assert hub.downloads(job) == before


def test_it_is_told_what_there_is(hub: Hub, alice: Client, job: Job) -> None:
    digests = hub.manifest(job)
    info, files, top, tree, weights = alice.run(
        ("model_info", {"repo_id": repo(job), "files_metadata": True}),
        ("list_repo_files", {"repo_id": repo(job), "revision": commit(job)}),
        ("list_repo_tree", {"repo_id": repo(job)}),
        ("list_repo_tree", {"repo_id": repo(job), "recursive": True}),
        ("metadata", {"repo_id": repo(job), "filename": "model-00001-of-00002.safetensors"}),
    )
    assert info == {"id": repo(job), "sha": commit(job), "private": True, "siblings": digests}
    assert sorted(files) == sorted(digests)
    assert dict(top) == {"1_Pooling": None, **{name: sha for name, sha in digests.items() if "/" not in name}}
    assert dict(tree) == {"1_Pooling": None, **digests}
    assert weights == [commit(job), digests["model-00001-of-00002.safetensors"], 3_000_000]


def test_what_is_missing_is_an_answer_and_not_a_broken_network(alice: Client, job: Job) -> None:
    nowhere = {"repo_id": "merges/mrg-nowhere"}
    exists, absent, no_repo, others, here, revision, entry, no_revision, gone = alice.run(
        ("file_exists", {"repo_id": repo(job), "filename": "config.json"}),
        ("file_exists", {"repo_id": repo(job), "filename": "adapter_config.json"}),
        ("repo_exists", nowhere),
        ("repo_exists", {"repo_id": "gpt2"}),
        ("repo_exists", {"repo_id": repo(job)}),
        ("revision_exists", {"repo_id": repo(job), "revision": "refs/pr/1"}),
        ("error_of", {"step": "file", "repo_id": repo(job), "filename": "adapter_config.json"}),
        ("error_of", {"step": "snapshot", "repo_id": repo(job), "revision": "v1"}),
        ("error_of", {"step": "snapshot", **nowhere}),
    )
    assert (exists, absent, no_repo, others, here, revision) == (True, False, False, False, True, False)
    assert entry[0] in ("EntryNotFoundError", "RemoteEntryNotFoundError")
    assert (no_revision[0], gone[0]) == ("RevisionNotFoundError", "RepositoryNotFoundError")


@pytest.fixture
def broken(hub: Hub) -> Iterator[Proxy]:
    """The way to the hub, on which whatever carries more than CUT_AFTER bytes is cut."""
    place = urlsplit(hub.served.url)
    assert place.hostname and place.port
    target = (place.hostname, place.port)
    proxy = Proxy(("127.0.0.1", 0), target, random.Random(0), {"none": 1}, cut_after=CUT_AFTER)
    with proxied(proxy):
        yield proxy


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub: Hub, alice: Client, broken: Proxy) -> None:
    job = hub.published({"model.safetensors": random.Random(3).randbytes(WEIGHTS)})
    cut = replace(alice, endpoint=f"http://127.0.0.1:{broken.port}")
    asked = {"repo_id": repo(job), "filename": "model.safetensors", "tries": 20}
    [[_, found]] = cut.run(("until_whole", asked))
    assert found == hub.manifest(job)["model.safetensors"]
    ranges = [int(wanted.removeprefix("bytes=").rstrip("-") or 0) for _, wanted in hub.downloads(job)]
    assert broken.faults["cut"] >= WEIGHTS // CUT_AFTER
    assert ranges[0] == 0 and ranges[-1] > WEIGHTS - CUT_AFTER
    assert ranges == sorted(ranges) and ranges.count(0) == 1, "nothing is sent from the start again"


def test_a_key_opens_what_is_its_owners_and_nothing_else(hub: Hub, alice: Client, job: Job) -> None:
    steps = [("error_of", {"step": step, "repo_id": repo(job)}) for step in ("snapshot", "model_info")]
    assert {kind for kind, _ in replace(alice, token=hub.keys["bob"]).run(*steps)} == {"RepositoryNotFoundError"}
    for token in (None, "hf_" + "x" * 34):
        for _, message in replace(alice, token=token).run(*steps):
            assert "401" in message, "a key is needed: that is another thing than a model that is not there"


def test_an_alias_is_followed_and_its_commits_can_be_pinned(hub: Hub, alice: Client) -> None:
    weights = {"model.safetensors": random.Random(4).randbytes(100_000)}
    old, new = (hub.published({**weights, "config.json": config}) for config in (b"{}", b'{"a": 1}'))
    alias = f"followed-by-{alice.version}"
    followed = {"repo_id": f"aliases/{alias}"}
    hub.point(alias, old)
    [first] = alice.run(("snapshot", followed))
    hub.point(alias, new)
    second, pinned, info = alice.run(
        ("snapshot", followed),
        ("snapshot", {**followed, "revision": commit(old)}),
        ("model_info", followed),
    )
    assert (first, second, pinned) == (hub.manifest(old), hub.manifest(new), hub.manifest(old))
    assert info["sha"] == commit(new)
    assert sorted(name for name, _ in hub.downloads(new)) == ["config.json", MANIFEST_NAME], "the weights are there"
    hub.send("DELETE", f"/merges/{old.id}")
    shutil.rmtree(alice.home)
    [[kind, _], still] = alice.run(
        ("error_of", {"step": "snapshot", **followed, "revision": commit(old)}), ("snapshot", followed)
    )
    assert kind == "RevisionNotFoundError" and still == hub.manifest(new)


def test_no_key_is_needed_before_the_first_is_made(alice: Client, tmp_path: Path, sqlite_url: str) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=sqlite_url, janitor_seconds=3600)
    with serving(settings) as served:
        job = served.published({"config.json": b"{}"})
        [found] = replace(alice, endpoint=served.url, token=None).run(("snapshot", {"repo_id": repo(job)}))
        assert sorted(found) == ["config.json", MANIFEST_NAME]
