"""`hf:` sources, with another Mergeyard as the hub: planned from headers, fetched by the worker, merged to the byte."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save_file

from app.errors import MergeyardError
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.records.job import Job, Status
from app.sources.hub.hub import Hub, HubSettings
from app.sources.resolver import Resolver
from tests import tiny
from tests.api.serving import problem, serving
from tests.cli.commands import mergeyard
from tests.faults.proxy import Proxy, proxied
from tests.hub.conftest import Hub as Served
from tests.worker.attempts import attempt, digests, place_in
from tests.worker.yard import Yard, open_yard
from worker.job import Ending

WEIGHTS = 30_000_000  # bytes of the file whose download is cut
CUT_AFTER = 7_000_000


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass(frozen=True)
class Published:
    """The tiny model and its adapters as alice's merges on the hub."""

    hub: Served
    base: Job
    sql: Job
    json: Job

    def recipe(self, revision: str = "main", **changes: Any) -> dict[str, Any]:
        adapters = [
            {"adapter": f"hf:merges/{job.id}@{revision}", "parameters": {"weight": 1.0, "density": 0.5}}
            for job in (self.sql, self.json)
        ]
        return tiny.recipe(base_model=f"hf:merges/{self.base.id}@{revision}", models=adapters, **changes)


@pytest.fixture(scope="module")
def there(hub: Served, tiny_models: Path) -> Published:
    return Published(hub, *(hub.published(contents(tiny_models / name)) for name in (tiny.BASE, *tiny.ADAPTERS)))


def commit_of(job: Job) -> str:
    assert job.artifact is not None
    return str(job.artifact["manifest_sha256"])[:40]


def sent(hub: Served, job: Job) -> list[str]:
    """The files of the job of which anything was asked for."""
    return [name for name, _ in hub.downloads(job)]


@pytest.fixture
def settings(there: Published, tmp_path: Path) -> HubSettings:
    return HubSettings(
        endpoint=there.hub.served.url,
        token=there.hub.keys["alice"],
        repositories=("*",),
        cache=tmp_path / "hub-files",
        most_bytes=10**9,
        keep_free=0,
    )


@pytest.fixture
def asked(settings: HubSettings) -> Iterator[Hub]:
    made = Hub(settings)
    yield made
    made.close()


@pytest.fixture
def yard(there: Published, tiny_models: Path, tmp_path: Path, database_url: str) -> Iterator[Yard]:
    """Another Mergeyard, on each database, whose hub is the first."""
    nobody = f"redis+socket://{tmp_path}/nobody.sock"
    with open_yard(
        tmp_path,
        tiny_models,
        nobody,
        "default",
        tidy=False,
        database_url=database_url,
        hub_endpoint=there.hub.served.url,
        hub_token=there.hub.keys["alice"],
        hub_repositories="merges/*, aliases/*",
    ) as opened:
        yield opened


def plan_of(recipe: dict[str, Any], hub: Hub) -> Plan:
    return make_plan(parse_recipe(recipe), Resolver(hub=hub))


def refused(call: Callable[[], object]) -> MergeyardError:
    with pytest.raises(MergeyardError) as raised:
        call()
    return raised.value


@pytest.fixture(scope="module")
def large(there: Published) -> Job:
    return there.hub.published({"model.safetensors": weights_of(WEIGHTS), "config.json": b"{}"})


class TestThroughTheService:
    def test_it_is_merged_as_if_it_were_below_a_root(self, yard: Yard, there: Published) -> None:
        place = place_in(yard)
        with serving(yard.settings) as served:
            answer = served.http.post("/merges", json={"recipe": there.recipe()})
            assert answer.status_code == 202, answer.text
            job = yard.jobs.get(answer.json()["id"])
        assert attempt(place, job) is Ending.PUBLISHED
        here = yard.submit(ring=False)
        assert attempt(place, here) is Ending.PUBLISHED
        assert digests(yard, job)["model.safetensors"] == digests(yard, here)["model.safetensors"]
        # pinned, and the manifest names what was read by the digests that the hub has
        assert job.resolved["base_model"] == f"hf:merges/{there.base.id}@{commit_of(there.base)}"
        artifact = yard.jobs.get(job.id).artifact
        assert artifact is not None
        manifest = json.loads((yard.settings.artifacts / artifact["manifest_key"]).read_bytes())
        base = there.hub.manifest(there.base)
        assert manifest["sources"][0]["files"] == {"model.safetensors": base["model.safetensors"]}
        stages = [event.data["stage"] for event in yard.jobs.events(job.id) if event.type == "stage"]
        assert stages == ["downloading", "merging", "publishing"]

    def test_an_equal_one_is_reused_and_one_whose_files_are_here_fetches_nothing(
        self, yard: Yard, there: Published
    ) -> None:
        with serving(yard.settings) as served:
            first = served.http.post("/merges", json={"recipe": there.recipe()}).json()
            assert attempt(place_in(yard), yard.jobs.get(first["id"])) is Ending.PUBLISHED
            before = sent(there.hub, there.base)
            assert served.http.post("/merges", json={"recipe": there.recipe()}).json()["reused"]
            again = served.http.post("/merges", json={"recipe": there.recipe(), "force": True}).json()
            assert attempt(place_in(yard), yard.jobs.get(again["id"])) is Ending.PUBLISHED
        assert sent(there.hub, there.base) == before
        assert "downloading" not in [event.data.get("stage") for event in yard.jobs.events(again["id"])]

    def test_an_api_that_has_none_of_the_files_knows_the_result_too(self, yard: Yard, there: Published) -> None:
        with serving(yard.settings) as served:
            first = served.http.post("/merges", json={"recipe": there.recipe()}).json()
            assert attempt(place_in(yard), yard.jobs.get(first["id"])) is Ending.PUBLISHED
            shutil.rmtree(yard.settings.hub_files)
            assert served.http.post("/merges", json={"recipe": there.recipe()}).json()["reused"]

    def test_a_revision_that_moves_is_merged_as_it_was(self, yard: Yard, there: Published, tiny_models: Path) -> None:
        other = there.hub.published({**contents(tiny_models / tiny.BASE), "generation_config.json": b"{}"})
        there.hub.point("moving", there.base)
        recipe = there.recipe() | {"base_model": "hf:aliases/moving"}
        job = yard.submit(recipe, ring=False)
        there.hub.point("moving", other)
        assert attempt(place_in(yard), job) is Ending.PUBLISHED
        assert job.resolved["base_model"] == f"hf:aliases/moving@{commit_of(there.base)}"
        assert yard.submit(recipe, ring=False).resolved["base_model"].endswith(commit_of(other))

    def test_an_adapter_that_a_merge_made_and_one_on_a_model(self, yard: Yard, there: Published) -> None:
        made = yard.submit(tiny.recipe(output={"kind": "adapter", "rank": 8}), ring=False)
        assert attempt(place_in(yard), made) is Ending.PUBLISHED
        artifact = yard.jobs.get(made.id).artifact
        assert artifact is not None
        files = {file["name"]: (yard.settings.artifacts / file["key"]).read_bytes() for file in artifact["files"]}
        files.pop("mergeyard.json")
        adapter = f"hf:merges/{there.hub.published(files).id}"
        base = f"hf:merges/{there.base.id}"
        for source in (
            {"adapter": adapter},
            {"model": f"models:{tiny.BASE}+{adapter}"},
            {"model": f"{base}+{adapter}"},
        ):
            recipe = {"base_model": base, "merge_method": "task_arithmetic", "models": [source]}
            job = yard.submit(recipe, ring=False)
            assert attempt(place_in(yard), job) is Ending.PUBLISHED, yard.jobs.get(job.id).error
            assert "@" in str(job.resolved["models"])

    def test_a_hub_that_is_away_is_a_503_at_planning_and_another_attempt_in_the_worker(
        self, yard: Yard, there: Published, tmp_path: Path
    ) -> None:
        job = yard.submit(there.recipe(), ring=False)
        closed = socket.create_server(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        closed.close()
        away = yard.settings.model_copy(update={"hub_endpoint": endpoint})
        with serving(away) as served:
            answer = served.http.post("/merges/plan", json={"recipe": there.recipe(revision="nowhere")})
            found = problem(answer, 503, "hub_unavailable")
            assert answer.headers["retry-after"] and found["problems"][0]["where"] == "base_model"
        assert attempt(replace(place_in(yard), hub=Hub(HubSettings.of(away))), job) is Ending.FAILED
        waiting = yard.jobs.get(job.id)
        assert (waiting.status, waiting.failures[0]["code"]) == (Status.QUEUED, "hub_unavailable")
        assert attempt(place_in(yard), job) is Ending.PUBLISHED

    def test_nothing_is_fetched_that_the_operator_has_not_allowed(
        self, there: Published, sqlite_url: str, tmp_path: Path
    ) -> None:
        from app.settings import Settings

        for allowed in ("", "other/*"):
            made = Settings(
                data_dir=tmp_path / "data",
                database_url=sqlite_url,
                hub_endpoint=there.hub.served.url,
                hub_repositories=allowed,
                janitor_seconds=3600,
            )
            with serving(made) as served:
                recipe = tiny.recipe(base_model="hf:merges/x")
                problem(served.http.post("/merges/plan", json={"recipe": recipe}), 422, "hub_not_allowed")

    def test_the_token_is_in_no_record(self, yard: Yard, there: Published) -> None:
        job = yard.submit(there.recipe(), ring=False)
        assert attempt(place_in(yard), job) is Ending.PUBLISHED
        told = str((yard.jobs.get(job.id), yard.jobs.events(job.id)))
        assert there.hub.keys["alice"] not in told + repr(yard.settings) + repr(HubSettings.of(yard.settings))


class TestPlanning:
    def test_it_reads_headers_alone(self, asked: Hub, there: Published, tiny_models: Path) -> None:
        """At most the first 128 kB of weights are asked for, by a range."""
        before = len(there.hub.downloads(there.base))
        plan = plan_of(there.recipe(), asked)
        asks = dict(there.hub.downloads(there.base)[before:])
        size = (tiny_models / tiny.BASE / "model.safetensors").stat().st_size
        assert asks["model.safetensors"] == f"bytes=0-{min(size, 1 << 17) - 1}"
        assert {file.name for file in plan.remote} == {"model.safetensors", "adapter_model.safetensors"}
        assert [file.size for file in plan.base.files] == [size]

    def test_it_is_the_same_plan_whether_the_files_are_here_or_not(self, asked: Hub, there: Published) -> None:
        first = plan_of(there.recipe(), asked)
        asked.transfer(first.remote).run()
        second = plan_of(there.recipe(), asked)
        assert (first.digest, second.remote) == (second.digest, ())

    def test_a_long_header_is_read_to_its_end(self, asked: Hub, there: Published, tmp_path: Path) -> None:
        tensors = {f"model.layers.{number}.{'x' * 200}.weight": torch.zeros(1) for number in range(1500)}
        save_file(tensors, tmp_path / "model.safetensors")
        job = there.hub.published(
            {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), "config.json": b"{}"}
        )
        assert len(Resolver(hub=asked).model(f"hf:merges/{job.id}").tensors) == 1500

    def test_only_what_is_read_is_fetched(self, asked: Hub, there: Published, tiny_models: Path) -> None:
        more = {
            "consolidated.safetensors": b"x" * 1000,
            "pytorch_model.bin": b"pickle",
            "run.py": b"print()",
            "sub/config.json": b"{}",
        }
        job = there.hub.published({**contents(tiny_models / tiny.BASE), **more})
        files = asked.files(f"merges/{job.id}")
        asked.transfer(files.remote.values()).run()
        assert not {name for name, _ in there.hub.downloads(job)} & set(more)
        assert list(files.remote) == ["model.safetensors"]

    def test_a_bare_name_is_looked_for_below_the_roots_and_then_on_the_hub(
        self, asked: Hub, there: Published, tiny_models: Path
    ) -> None:
        resolver = Resolver(roots=[tiny_models], hub=asked)
        assert resolver.canonical(tiny.BASE) == f"models:{tiny.BASE}"
        pinned = f"hf:merges/{there.base.id}@{commit_of(there.base)}"
        assert resolver.canonical(f"merges/{there.base.id}") == pinned
        assert resolver.canonical(f"merges/{there.base.id}@main") == pinned
        error = refused(lambda: resolver.canonical("merges/mrg-nowhere"))
        assert error.code == "source_not_found" and "model root" in error.message and "hub" in error.message

    @pytest.mark.parametrize(
        ("name", "code"),
        [
            ("hf:merges/mrg-nowhere", "source_not_found"),
            ("hf:gpt2", "source_not_found"),
            ("hf:merges/{base}@v1", "source_not_found"),
            ("hf:merges/{base}@" + "0" * 40, "source_not_found"),
            ("hf:merges/{base}@", "reference_invalid"),
            ("hf:", "reference_invalid"),
            ("hf:../x", "reference_invalid"),
            ("hf:a/b/c", "reference_invalid"),
            ("hf:merges/{sql}", "reference_invalid"),  # an adapter is no model
        ],
    )
    def test_what_is_not_there_has_a_code(self, asked: Hub, there: Published, name: str, code: str) -> None:
        text = name.format(base=there.base.id, sql=there.sql.id)
        assert refused(lambda: Resolver(hub=asked).model(text)).code == code

    def test_a_key_that_opens_nothing_is_told(self, settings: HubSettings, there: Published) -> None:
        name = f"merges/{there.base.id}"
        wrong = Hub(replace(settings, token="hf_" + "x" * 30))
        assert refused(lambda: wrong.files(name)).code == "hub_forbidden"
        error = refused(lambda: Hub(replace(settings, token="")).files(name))
        assert error.code == "source_not_found" and "MERGEYARD_HUB_TOKEN" in error.message

    def test_weights_without_safetensors_and_pickles_are_refused(self, asked: Hub, there: Published) -> None:
        pickled = there.hub.published({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
        bare = there.hub.published({"config.json": b"{}"})
        resolver = Resolver(hub=asked)
        assert refused(lambda: resolver.model(f"hf:merges/{pickled.id}")).code == "pickle_refused"
        assert refused(lambda: resolver.model(f"hf:merges/{bare.id}")).code == "source_not_found"
        assert sent(there.hub, pickled) == ["config.json"]

    def test_what_is_too_large_is_not_begun(
        self, settings: HubSettings, there: Published, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = Hub(replace(settings, most_bytes=1000))
        assert refused(lambda: hub.files(f"merges/{there.base.id}")).code == "source_too_large"
        monkeypatch.setattr("app.sources.hub.hub.MAX_SMALL_BYTES", 10)
        assert refused(lambda: Hub(settings).files(f"merges/{there.sql.id}")).code == "source_too_large"

    def test_a_header_that_claims_to_be_vast_is_not_fetched(self, asked: Hub, there: Published) -> None:
        weights = (1 << 40).to_bytes(8, "little") + b"{}" * 100_000
        job = there.hub.published({"config.json": b"{}", "model.safetensors": weights})
        assert refused(lambda: asked.files(f"merges/{job.id}")).code == "source_format"


class TestFetching:
    @pytest.fixture
    def broken(self, hub: Served) -> Iterator[Proxy]:
        """The way to the hub, on which whatever carries more than CUT_AFTER bytes is cut."""
        place = urlsplit(hub.served.url)
        assert place.hostname and place.port
        proxy = Proxy(
            ("127.0.0.1", 0), (place.hostname, place.port), random.Random(0), {"none": 1}, cut_after=CUT_AFTER
        )
        with proxied(proxy):
            yield proxy

    @pytest.fixture(autouse=True)
    def _at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("app.sources.fetching.transfer.PAUSE_SECONDS", 0.01)

    def test_a_connection_that_is_cut_is_taken_up_where_it_broke(
        self, settings: HubSettings, there: Published, large: Job, broken: Proxy
    ) -> None:
        hub = Hub(replace(settings, endpoint=f"http://127.0.0.1:{broken.port}"))
        before = len(there.hub.downloads(large))
        told: list[tuple[int, int]] = []
        files = hub.files(f"merges/{large.id}")
        hub.transfer(files.remote.values()).run(lambda *progress: told.append(progress))
        path = hub.files(f"merges/{large.id}").paths["model.safetensors"]
        assert sha256(path) == there.hub.manifest(large)["model.safetensors"]
        ranges = [wanted for name, wanted in there.hub.downloads(large)[before + 2 :] if name == "model.safetensors"]
        begins = [int(wanted.removeprefix("bytes=").partition("-")[0] or 0) for wanted in ranges]
        assert broken.faults["cut"] >= WEIGHTS // CUT_AFTER
        assert begins == sorted(begins) and begins.count(0) <= 1 and begins[-1] > WEIGHTS - CUT_AFTER
        assert told[-1] == (WEIGHTS, WEIGHTS)

    def test_another_process_goes_on_with_what_the_last_one_left(
        self, asked: Hub, settings: HubSettings, there: Published, large: Job
    ) -> None:
        files = asked.files(f"merges/{large.id}")
        [remote] = files.remote.values()
        part = settings.cache / "files" / f"{remote.digest}.part"
        part.write_bytes(weights_of(WEIGHTS)[: WEIGHTS // 2])
        asked.transfer([remote]).run()
        assert ("model.safetensors", f"bytes={WEIGHTS // 2}-") in there.hub.downloads(large)
        assert not part.exists() and sha256(settings.cache / "files" / remote.digest) == remote.digest

    @pytest.mark.parametrize("left", [b"something else", b"x" * (WEIGHTS + 5)])
    def test_a_leftover_of_something_else_is_not_kept(
        self, asked: Hub, settings: HubSettings, large: Job, left: bytes
    ) -> None:
        [remote] = asked.files(f"merges/{large.id}").remote.values()
        (settings.cache / "files" / f"{remote.digest}.part").write_bytes(left)
        asked.transfer([remote]).run()
        assert sha256(settings.cache / "files" / remote.digest) == remote.digest

    def test_other_bytes_than_the_hub_tells_are_not_kept(self, asked: Hub, settings: HubSettings, large: Job) -> None:
        [remote] = asked.files(f"merges/{large.id}").remote.values()
        other = replace(remote, digest="0" * 64)
        assert refused(asked.transfer([other]).run).code == "digest_mismatch"
        assert not list((settings.cache / "files").glob("0000*"))

    def test_a_damaged_file_is_fetched_again(self, asked: Hub, settings: HubSettings, large: Job) -> None:
        [remote] = asked.files(f"merges/{large.id}").remote.values()
        asked.transfer([remote]).run()
        path = settings.cache / "files" / remote.digest
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert asked.files(f"merges/{large.id}").remote, "its time tells that somebody wrote to it"
        asked.transfer([remote]).run()
        assert sha256(path) == remote.digest

    def test_two_at_once_fetch_it_once(self, settings: HubSettings, there: Published) -> None:
        job = there.hub.published({"model.safetensors": weights_of(WEIGHTS, seed=5), "config.json": b"{}"})
        hubs = [Hub(settings), Hub(settings)]
        remotes = [list(hub.files(f"merges/{job.id}").remote.values()) for hub in hubs]
        threads = [threading.Thread(target=hub.transfer(remote).run) for hub, remote in zip(hubs, remotes, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sha256(settings.cache / "files" / remotes[0][0].digest) == remotes[0][0].digest
        assert there.hub.downloads(job).count(("model.safetensors", "")) == 1

    def test_it_stops_when_it_is_told_to_and_keeps_what_came(
        self, settings: HubSettings, large: Job, broken: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.sources.fetching.transfer.PAUSE_SECONDS", 60)  # the first cut is where it waits
        hub = Hub(replace(settings, endpoint=f"http://127.0.0.1:{broken.port}"))
        transfer = hub.transfer(hub.files(f"merges/{large.id}").remote.values())
        here: list[int] = []

        def check() -> None:
            if here and here[-1]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            transfer.run(lambda done, _: here.append(done), check)
        [part] = (settings.cache / "files").glob("*.part")
        assert 0 < part.stat().st_size < WEIGHTS

    def test_a_disk_without_room_is_told_before_anything_is_fetched(
        self, settings: HubSettings, there: Published, large: Job
    ) -> None:
        [remote] = Hub(settings).files(f"merges/{large.id}").remote.values()
        before = there.hub.downloads(large)
        full = Hub(replace(settings, keep_free=1 << 60))
        assert refused(full.transfer([remote]).run).code == "disk_full"
        assert there.hub.downloads(large) == before


def test_local_commands_fetch_what_they_are_told(there: Published, tmp_path: Path, tiny_models: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(there.recipe()))
    (tmp_path / "here.json").write_text(json.dumps(tiny.recipe()))
    own = {
        "MERGEYARD_HUB_ENDPOINT": there.hub.served.url,
        "MERGEYARD_HUB_TOKEN": there.hub.keys["alice"],
        "XDG_CACHE_HOME": str(tmp_path / "caches"),
        "MERGEYARD_MODEL_ROOTS": str(tiny_models),
    }
    planned = mergeyard("plan", "recipe.json", "--json", cwd=tmp_path, **own)
    assert planned.json["base"]["reference"].endswith(f"@{commit_of(there.base)}")
    merged = mergeyard("merge", "recipe.json", "out", "--json", cwd=tmp_path, **own)
    assert merged.code == 0, merged.out + merged.err
    assert mergeyard("merge", "here.json", "other", cwd=tmp_path, **own).code == 0
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(tmp_path / "other" / "model.safetensors")
    assert (tmp_path / "caches" / "mergeyard" / "hub" / "files").is_dir()
    assert there.hub.keys["alice"] not in merged.out + merged.err


def weights_of(size: int, seed: int = 1) -> bytes:
    """A safetensors file of one tensor, ``size`` bytes in all."""
    length = 120
    header = json.dumps(
        {"weight": {"dtype": "U8", "shape": [size - 8 - length], "data_offsets": [0, size - 8 - length]}}
    )
    return (
        length.to_bytes(8, "little") + header.encode().ljust(length) + random.Random(seed).randbytes(size - 8 - length)
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
