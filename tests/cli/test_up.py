"""``mergeyard up``: a real service from nothing to nothing, and everything that may happen between."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from app.settings import Settings
from mergeyard import ApiError, Client, gpus
from mergeyard.gpus import usable_gpus
from mergeyard.processes import StartError
from mergeyard.up import (
    API_STOP_SECONDS,
    BROKER_STOP_SECONDS,
    SOCKET_PATH_BYTES,
    WORKER_STOP_SECONDS,
    broker_socket,
    worker_environments,
)
from tests import servers, tiny
from tests.cli.commands import MERGEYARD, environment, mergeyard
from tests.faults.proxy import Proxy, proxied

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Up:
    """A running ``mergeyard up``."""

    process: subprocess.Popen[str]
    url: str
    data: Path

    def family(self) -> list[psutil.Process]:
        """It and everything it started."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def part(self, wanted: str) -> psutil.Process:
        for process in psutil.Process(self.process.pid).children():
            if wanted in " ".join(process.cmdline()):
                return process
        raise AssertionError(f"{wanted} does not run")


def start(data: Path, models: Path, **variables: str) -> Up:
    # Everybody is quick to notice and to be missed: no test waits for a minute's lease.
    quick = {"MERGEYARD_JANITOR_SECONDS": "1", "MERGEYARD_LEASE_SECONDS": "10", "MERGEYARD_RETRY_SECONDS": "0"}
    process = subprocess.Popen(
        [*MERGEYARD, "up", "--port", "0", "--data-dir", str(data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(MERGEYARD_MODEL_ROOTS=str(models), **quick, **variables),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Mergeyard is ready at http://127.0.0.1:"), line
    return Up(process, line.split()[-1], data)


def end(up: Up, number: int = signal.SIGTERM) -> None:
    """Send the signal and wait until nothing of it is left."""
    family = up.family()
    up.process.send_signal(number)
    _, alive = psutil.wait_procs(family, timeout=API_STOP_SECONDS + WORKER_STOP_SECONDS + BROKER_STOP_SECONDS + 10)
    for process in alive:
        process.kill()
    assert alive == []
    assert up.process.stdout is not None
    up.process.stdout.close()
    up.process.wait()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Up]:
    """One service for the tests that leave it running."""
    running = start(tmp_path_factory.mktemp("up") / "data", tiny_models)
    yield running
    if running.process.poll() is None:
        end(running)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tiny.recipe()))
    return path


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class TestAService:
    def test_merges_two_adapters_from_submission_to_verified_files(self, up: Up, recipe: Path, tmp_path: Path) -> None:
        ran = mergeyard("submit", recipe, "--wait", "--download", tmp_path / "out", "--json", MERGEYARD_URL=up.url)
        assert ran.code == 0, ran.err
        assert ran.json["status"] == "succeeded"
        manifest = json.loads((tmp_path / "out" / "mergeyard.json").read_text())
        assert {file["name"] for file in manifest["files"]} >= {"model.safetensors", "config.json"}
        for file in manifest["files"]:
            data = (tmp_path / "out" / file["name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == file["sha256"]
        assert "succeeded" in ran.err

    @pytest.mark.parametrize("documents", [False, True])
    def test_merges_as_the_local_command_does(
        self, up: Up, recipe: Path, tmp_path: Path, tiny_models: Path, documents: bool
    ) -> None:
        if documents:
            recipe.write_text("\n---\n".join(json.dumps(part) for part in tiny.documents()["documents"]))
        mergeyard("submit", recipe, "--download", tmp_path / "served", MERGEYARD_URL=up.url)
        mergeyard("merge", recipe, tmp_path / "local", MERGEYARD_MODEL_ROOTS=str(tiny_models))
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "served" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()

    def test_answers_every_command(self, up: Up, recipe: Path, tmp_path: Path) -> None:
        submitted = mergeyard("submit", recipe, "--label", "team=search", "--force", "--wait", MERGEYARD_URL=up.url)
        assert submitted.code == 0 and "succeeded" in submitted.out
        listed = mergeyard("list", "--status", "succeeded", "--json", MERGEYARD_URL=up.url).json["items"]
        merge_id = listed[0]["id"]
        assert listed[0]["labels"] == {"team": "search"}
        assert merge_id in mergeyard("list", MERGEYARD_URL=up.url).out
        assert "team=search" in mergeyard("status", merge_id, MERGEYARD_URL=up.url).out
        events = mergeyard("events", merge_id, "--json", MERGEYARD_URL=up.url).json["items"]
        assert [event["type"] for event in events][:2] == ["submitted", "claimed"]
        assert "succeeded" in mergeyard("events", merge_id, MERGEYARD_URL=up.url).out
        cancelled = mergeyard("cancel", merge_id, "--json", MERGEYARD_URL=up.url)
        assert (cancelled.code, cancelled.json["error"]["code"]) == (2, "conflict")
        downloaded = mergeyard("download", merge_id, tmp_path / "again", MERGEYARD_URL=up.url)
        assert downloaded.code == 0 and "all verified" in downloaded.out
        again = mergeyard("submit", recipe, "--expires-in", "3600", MERGEYARD_URL=up.url)
        assert again.code == 0 and "result is reused" in again.err and again.out.strip().startswith("mrg-")
        shown = mergeyard("status", again.out.strip(), MERGEYARD_URL=up.url).out
        assert ", reused" in shown and "expires" in shown

    def test_uploads_serve_as_sources(self, up: Up, tiny_models: Path) -> None:
        with Client(up.url) as client:
            uploaded = client.upload(
                [tiny_models / "sql" / "adapter_config.json", *tiny_models.glob("sql/*.safetensors")]
            )
            recipe = tiny.recipe(models=[{"adapter": uploaded["reference"]}])
            merge = client.wait(client.submit(recipe)["id"], timeout=60)
            assert merge["status"] == "succeeded"
            again = client.submit({**tiny.recipe(), "base_model": f"merge:{merge['id']}"})
            assert client.wait(again["id"], timeout=60)["status"] == "succeeded"
            assert uploaded["reference"] in [source["reference"] for source in client.sources()["items"]]

    def test_a_bad_recipe_is_exit_code_2_with_every_problem(self, up: Up, tmp_path: Path) -> None:
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(tiny.recipe(models=[{"adapter": "models:nowhere"}, {"adapter": "models:neither"}])))
        ran = mergeyard("submit", path, "--wait", MERGEYARD_URL=up.url)
        assert ran.code == 2
        assert "2 problems:" in ran.err and "models[1].adapter" in ran.err

    def test_a_merge_that_fails_is_exit_code_1(self, up: Up, tmp_path: Path, tiny_models: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(tiny_models / "sql" / ADAPTER[1])
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, tmp_path / ADAPTER[1], {"format": "pt"})
        with Client(up.url) as client:
            uploaded = client.upload(
                [tiny_models / "sql" / "adapter_config.json", tmp_path / "adapter_model.safetensors"]
            )
        path = tmp_path / "nan.json"
        path.write_text(json.dumps(tiny.recipe(models=[{"adapter": uploaded["reference"]}])))
        ran = mergeyard("submit", path, "--wait", MERGEYARD_URL=up.url)
        assert ran.code == 1
        assert "source_not_finite" in ran.err

    def test_does_not_share_its_folder(self, up: Up) -> None:
        ran = mergeyard("up", "--port", "0", "--data-dir", up.data)
        assert ran.code == 2
        assert str(up.process.pid) in ran.err and "--data-dir" in ran.err

    def test_does_not_share_its_port(self, up: Up, tmp_path: Path) -> None:
        ran = mergeyard("up", "--port", up.url.rsplit(":", 1)[1], "--data-dir", tmp_path / "other")
        assert ran.code == 2 and "--port" in ran.err

    @pytest.mark.parametrize("part", ["worker", "valkey-server", "api --fd"])
    def test_starts_a_part_that_died_again_and_goes_on(self, up: Up, part: str) -> None:
        victim = up.part(part)
        victim.kill()
        with Client(up.url, retries=8) as client:
            merge = client.submit(tiny.recipe(), force=True)
            assert client.wait(merge["id"], timeout=60)["status"] == "succeeded"
        assert up.part(part).pid != victim.pid

    def test_leaves_nothing_running_when_told_to_stop(self, up: Up) -> None:
        end(up)
        assert up.process.returncode == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(up.url)
        assert not (up.data / "valkey.sock").exists()


def test_whoever_has_a_key_merges_from_upload_to_download_and_nobody_else(tmp_path: Path, tiny_models: Path) -> None:
    data = tmp_path / "data"
    mergeyard("migrate", MERGEYARD_DATA_DIR=str(data))
    made = [
        mergeyard("keys", "create", "--owner", owner, MERGEYARD_DATA_DIR=str(data)).out.strip()
        for owner in ("search", "ads")
    ]
    up = start(data, tiny_models)
    try:
        with Client(up.url, made[0]) as mine, Client(up.url, made[1]) as theirs, Client(up.url, "") as nobodys:
            reference = mine.upload([tiny_models / "sql" / name for name in ADAPTER])["reference"]
            recipe = tiny.recipe(models=[{"adapter": reference}])
            first = mine.wait(mine.submit(recipe)["id"], timeout=60)
            again = mine.wait(mine.submit({**recipe, "base_model": f"merge:{first['id']}"})["id"], timeout=60)
            assert (first["status"], again["status"], again["owner"]) == ("succeeded", "succeeded", "search")
            assert (mine.download(again["id"], tmp_path / "out") / "model.safetensors").stat().st_size > 0
            for refused, code in ((theirs, "not_found"), (nobodys, "key_required")):
                with pytest.raises(ApiError) as caught:
                    refused.get(again["id"])
                assert caught.value.code == code
            assert list(theirs.list()) == []
    finally:
        end(up)


def ends_without_a_trace(data: Path, models: Path, number: int, **variables: str) -> None:
    up = start(data, models, **variables)
    merge_id = httpx.post(f"{up.url}/merges", json={"recipe": tiny.recipe(), "queue": "default"}).json()["id"]
    end(up, number)
    # The folder is free again, and what was accepted is not forgotten.
    again = start(data, models, **variables)
    with Client(again.url) as client:
        assert client.wait(merge_id, timeout=90)["status"] == "succeeded"
    end(again)


def test_nothing_is_left_running_when_it_is_killed(tmp_path: Path, tiny_models: Path) -> None:
    data = tmp_path / "with a space"  # so its broker's socket lies in a private temporary folder
    ends_without_a_trace(data, tiny_models, signal.SIGKILL)
    folder = broker_socket(data).parent
    assert folder.parent == Path(tempfile.gettempdir()) and list(folder.iterdir()) == []
    folder.rmdir()


def test_nothing_is_left_running_after_ctrl_c_on_postgresql_and_a_broker_of_ones_own(
    tmp_path: Path, tiny_models: Path, postgres_url: str
) -> None:
    with (
        servers.temporary_database(postgres_url) as database,
        servers.short_folder() as folder,
        servers.valkey(folder / "own.sock") as broker,
    ):
        own = {"MERGEYARD_DATABASE_URL": database, "MERGEYARD_BROKER_URL": broker}
        ends_without_a_trace(tmp_path / "data", tiny_models, signal.SIGINT, **own)
        assert {path.name for path in (tmp_path / "data").glob("*.s*")} == set()  # no SQLite, no socket


def test_a_worker_that_went_deaf_ends_and_is_started_again(tmp_path: Path, tiny_models: Path) -> None:
    """Its connection to the broker is open and nothing comes through; other connections are well."""
    with servers.short_folder() as folder, servers.valkey(folder / "real.sock"):
        between = Proxy(folder / "proxy.sock", folder / "real.sock", random.Random(0), {"none": 1})
        with proxied(between):
            own = {"MERGEYARD_BROKER_URL": f"redis+socket://{between.listen}", "MERGEYARD_DEAF_SECONDS": "3"}
            up = start(tmp_path / "data", tiny_models, **own)
            with Client(up.url) as client:
                assert client.wait(client.submit(tiny.recipe())["id"], timeout=90)["status"] == "succeeded"
                deaf = up.part("worker")
                between.break_all("swallow")
                merge = client.wait(client.submit(tiny.recipe(), force=True)["id"], timeout=90)
            assert (merge["status"], merge["attempt"]) == ("succeeded", 1)
            assert up.part("worker").pid != deaf.pid
            assert "heard nothing" in (up.data / "logs" / "worker.log").read_text()
            end(up)


class TestTheBrokersSocket:
    def test_is_in_the_data_folder(self, tmp_path: Path) -> None:
        assert broker_socket(Path("/srv/mergeyard")) == Path("/srv/mergeyard/valkey.sock")

    @pytest.mark.parametrize("root", ["/srv/" + "long/" * 30, "/srv/with space", "/srv/100%"])
    def test_is_in_a_private_folder_where_that_path_does_not_do(self, root: str) -> None:
        path = broker_socket(Path(root))
        assert len(os.fsencode(path)) <= SOCKET_PATH_BYTES
        assert path.parent.stat().st_mode & 0o077 == 0
        assert broker_socket(Path(root)) == path
        path.parent.rmdir()


class TestWorkersAndGpus:
    """What a machine with GPUs answers is made up here: the driver's tool by an empty file, torch by what it prints."""

    @pytest.fixture
    def driver(self, tmp_path: Path) -> dict[str, str]:
        tool = tmp_path / "nvidia-smi"
        tool.touch(mode=0o755)
        return {"PATH": str(tmp_path)}

    @pytest.fixture
    def torch_says(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        return lambda program: monkeypatch.setattr(gpus, "COUNT", program)

    def test_there_is_one_for_each_gpu_and_it_sees_no_other(self) -> None:
        found = worker_environments(Settings(threads=5), ["0", "GPU-9f2c"])
        assert found == {
            "worker-0": {"CUDA_VISIBLE_DEVICES": "0", "MERGEYARD_THREADS": "5"},
            "worker-1": {"CUDA_VISIBLE_DEVICES": "GPU-9f2c", "MERGEYARD_THREADS": "5"},
        }

    def test_they_share_the_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
        found = worker_environments(Settings(threads=0), ["0", "1", "2"])
        assert [own["MERGEYARD_THREADS"] for own in found.values()] == ["5", "5", "5"]

    def test_there_is_one_where_there_is_one_gpu_or_none(self) -> None:
        assert worker_environments(Settings(), []) == {"worker": {}}
        assert worker_environments(Settings(), ["3"]) == {"worker": {"CUDA_VISIBLE_DEVICES": "3"}}

    def test_gpus_are_counted_in_another_process(
        self, driver: dict[str, str], torch_says: Callable[[str], None]
    ) -> None:
        torch_says("print(3)")
        assert usable_gpus(driver) == ("0", "1", "2")

    def test_gpus_that_the_user_chose_keep_their_names(
        self, driver: dict[str, str], torch_says: Callable[[str], None]
    ) -> None:
        torch_says("import os; print(len(os.environ['CUDA_VISIBLE_DEVICES'].split(',')))")
        assert usable_gpus(driver | {"CUDA_VISIBLE_DEVICES": "2, GPU-9f2c"}) == ("2", "GPU-9f2c")

    def test_what_the_engine_cannot_use_does_not_count(self, driver: dict[str, str]) -> None:
        """This one asks the real torch, of a machine that has the tool and no GPU."""
        if Path("/dev/nvidiactl").exists():
            pytest.skip("this machine has a GPU")
        assert usable_gpus({**os.environ, **driver}) == ()

    def test_without_a_driver_nothing_is_started(self, torch_says: Callable[[str], None], tmp_path: Path) -> None:
        torch_says("raise SystemExit(1)")
        assert usable_gpus({"PATH": str(tmp_path)}) == ()

    def test_an_answer_that_does_not_come_says_so(
        self, driver: dict[str, str], torch_says: Callable[[str], None]
    ) -> None:
        torch_says("raise SystemExit('libcuda is broken')")
        with pytest.raises(StartError, match="libcuda is broken"):
            usable_gpus(driver)
