"""The images and the compose file, as far as they can be checked without a container engine.

The Dockerfile is linted, the compose file is held against the Compose specification, and the images' install steps run
as they stand in the Dockerfile, on what its COPY lines copy, into bare virtual environments; what is installed starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.settings import Settings
from tests import servers

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("migrate", "api", "worker")
TOOLS = Path(sys.executable).parent
PULLED = re.compile(r"[\w./-]+:\d[\w.-]*")  # an image with a tag that begins with a version
START_SECONDS = 120.0


def stage(name: str) -> list[str]:
    """The instructions of a stage, each on one line, without comments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    (found,) = [part for part in stages if re.match(rf"\S+(?: AS {name})\s*\n", part)]
    return [" ".join(line.split()) for line in found.splitlines()[1:] if line.strip()]


def arguments(stage_name: str, instruction: str) -> list[str]:
    return [line.partition(" ")[2] for line in stage(stage_name) if line.startswith(f"{instruction} ")]


class TestTheDockerfile:
    def test_passes_hadolint(self) -> None:
        found = subprocess.run(
            [TOOLS / "hadolint", ROOT / "Dockerfile"], check=False, capture_output=True, text=True, timeout=60
        )
        assert (found.returncode, found.stdout) == (0, "")

    def test_has_pinned_bases(self) -> None:
        bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
        assert set(bases) == {"${PYTHON}", "source", "runtime"}
        (python,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
        assert PULLED.fullmatch(python)

    @pytest.mark.parametrize("target", ["api", "worker"])
    def test_runs_as_nobody_special_and_tells_its_health(self, target: str) -> None:
        user, health = arguments(target, "USER"), arguments(target, "HEALTHCHECK")
        assert user == ["10001"] and len(health) == 1
        instructions = [line.split()[0] for line in stage(target)]
        assert "RUN" not in instructions[instructions.index("USER") :]

    def test_copies_what_the_ignore_file_lets_through_and_nothing_secret(self) -> None:
        copied = {source for line in arguments("source", "COPY") for source in line.split()[:-1]}
        let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
        assert copied == let_through
        assert not re.search(r"SECRET|PASSWORD|TOKEN|API_KEY", DOCKERFILE)


class TestTheComposeFile:
    def test_follows_the_compose_specification(self) -> None:
        command = [TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"]
        found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout

    def test_is_what_compose_itself_reads(self, tmp_path: Path) -> None:
        docker = shutil.which("docker")
        known = docker and subprocess.run([docker, "compose", "version"], check=False, capture_output=True, timeout=30)
        if not known or known.returncode:
            pytest.skip("docker's compose plugin is not installed; the file is held against the specification's schema")
        filled = ["POSTGRES_PASSWORD=x", f"MERGEYARD_MODELS={tmp_path}"]
        (tmp_path / "env").write_text("\n".join(filled))
        command = [docker, "compose", "--env-file", tmp_path / "env", "--profile", "*", "config", "--quiet"]
        found = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stderr

    def test_builds_both_targets_of_the_dockerfile(self) -> None:
        targets = {name: SERVICES[name]["build"]["target"] for name in OURS}
        assert targets == {"migrate": "api", "api": "api", "worker": "worker"}
        assert SERVICES["migrate"]["image"] == SERVICES["api"]["image"] != SERVICES["worker"]["image"]

    @pytest.mark.parametrize("name", SERVICES)
    def test_pins_images_and_keeps_an_eye_on_every_service(self, name: str) -> None:
        service = SERVICES[name]
        if name not in OURS:
            assert PULLED.fullmatch(service["image"]) and "healthcheck" in service
        assert service["restart"] == ("no" if name in ("migrate", "bucket") else "unless-stopped")

    @pytest.mark.parametrize("name", OURS)
    def test_gives_ours_only_settings_that_there_are_and_no_rights(self, name: str) -> None:
        service = SERVICES[name]
        known = {f"MERGEYARD_{field.upper()}" for field in Settings.model_fields}
        known |= {"FORWARDED_ALLOW_IPS", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"}
        assert set(service["environment"]) <= known
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service

    @pytest.mark.parametrize("name", ["api", "worker"])
    def test_starts_what_needs_the_schema_after_it_was_migrated(self, name: str) -> None:
        needed = {of: needs["condition"] for of, needs in SERVICES[name]["depends_on"].items()}
        healthy = "service_healthy"
        assert needed == {"migrate": "service_completed_successfully", "postgres": healthy, "redis": healthy}
        assert SERVICES["migrate"]["command"] == ["migrate"]

    def test_reserves_a_gpu_keeps_doorbells_and_serves_the_store_by_nginx(self) -> None:
        (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        command = " ".join(SERVICES["redis"]["command"])
        assert "--appendonly yes" in command and "--maxmemory-policy noeviction" in command
        assert SERVICES["nginx"]["profiles"] == ["nginx"]
        assert SERVICES["objects"]["profiles"] == SERVICES["bucket"]["profiles"] == ["objects"]
        store = Settings(data_dir=Path("/srv/mergeyard")).artifacts
        assert SERVICES["nginx"]["environment"]["MERGEYARD_STORE"] == str(store)
        assert SERVICES["api"]["environment"]["MERGEYARD_ACCEL_REDIRECT"] == "${MERGEYARD_ACCEL_REDIRECT-/_artifacts/}"

    def test_has_no_secret_and_an_example_of_every_value_it_wants(self) -> None:
        text = (ROOT / "docker-compose.yml").read_text()
        example = re.findall(r"^#?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
        assert set(re.findall(r"\$\{(\w+)", text)) == set(example)
        assert re.findall(r"^POSTGRES_PASSWORD=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE) == [""]
        assert all("POSTGRES_PASSWORD" not in line or "${POSTGRES_PASSWORD:?" in line for line in text.splitlines())
        ignored = subprocess.run(["git", "check-ignore", "-q", ".env"], check=False, cwd=ROOT, timeout=30)
        assert ignored.returncode == 0


@dataclass(frozen=True)
class Installed:
    """An image's virtual environment, and the settings of a service that has what the images' environment says."""

    venv: Path
    environment: Mapping[str, str]
    folder: Path

    def run(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.venv / "bin" / words[0]), *words[1:]],
            check=False,
            cwd=self.folder,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=120,
        )

    @contextmanager
    def running(self, *words: str, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [str(self.venv / "bin" / "mergeyard"), *words],
                cwd=self.folder,
                env={**self.environment, **changes},
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def healthy(self, target: str, process: subprocess.Popen[bytes], **changes: str) -> None:
        """Wait until the image's health check is content."""
        deadline = time.monotonic() + START_SECONDS
        while (found := self.run(*health_check(target), **changes)).returncode:
            log = (self.folder / "log").read_text()
            assert process.poll() is None and time.monotonic() < deadline, f"{found.stderr}\n{log}"
            time.sleep(0.2)


def health_check(target: str) -> Sequence[str]:
    (line,) = arguments(target, "HEALTHCHECK")
    words: list[str] = json.loads(line.partition("CMD ")[2])
    return words


def installed(target: str, folder: Path) -> Installed:
    """Carry out the COPY and RUN lines of the target's build stages, as they are."""
    source = folder / "src"
    source.mkdir()
    for line in arguments("source", "COPY"):
        *names, to = line.split()
        for name in names:
            place = source / (to if to != "./" else name)
            place.parent.mkdir(exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, place)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MERGEYARD_")}
    kept.pop("PYTHONPATH", None)
    (command,) = arguments(f"build-{target}", "RUN")
    build = {**kept, "VENV": str(folder / "venv"), "PYTHON": sys.executable}
    done = subprocess.run(
        ["sh", "-c", command], check=False, cwd=source, env=build, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shutil.rmtree(source)  # an image has the environment alone
    data = folder / "data"
    data.mkdir()
    runtime = {**kept, "PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}", "MERGEYARD_DATA_DIR": str(data)}
    return Installed(folder / "venv", runtime, folder)


@pytest.mark.timeout(900)
def test_the_api_image_has_no_torch_and_answers(tmp_path: Path) -> None:
    image = installed("api", tmp_path)
    for name in ("torch", "triton", "numba", "numpy"):
        assert image.run("python", "-c", f"import {name}").returncode == 1, name
    with servers.short_folder() as short, servers.valkey(short / "valkey.sock") as broker, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        given = {"MERGEYARD_BROKER_URL": broker, "MERGEYARD_PORT": port}
        assert image.run(*health_check("api"), **given).returncode == 1

        refused = image.run("mergeyard", "api", **given)
        assert refused.returncode == 1 and "mergeyard migrate" in refused.stderr
        migrated = image.run("mergeyard", "migrate", **given)
        assert migrated.returncode == 0, migrated.stderr

        keyless = image.run("mergeyard", "api", **given, MERGEYARD_HOST="0.0.0.0")
        assert keyless.returncode == 2 and "mergeyard keys create" in keyless.stderr
        key = image.run("mergeyard", "keys", "create", "--owner", "me", **given).stdout.split()[-1]
        with image.running("api", **given, MERGEYARD_HOST="0.0.0.0") as api:
            image.healthy("api", api, **given)
            header = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"http://127.0.0.1:{port}/readyz", headers=header).status_code == 200
            assert httpx.get(f"http://127.0.0.1:{port}/merges", headers=header).json()["items"] == []


@pytest.mark.timeout(900)
def test_the_worker_image_has_the_pinned_torch_and_serves_its_queue(tmp_path: Path) -> None:
    """With whichever build of the pinned torch pip finds; the image's is CUDA's."""
    image = installed("worker", tmp_path)
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    version = image.run("python", "-c", "import torch; print(torch.__version__)").stdout.strip()
    assert pinned and version.partition("+")[0] == pinned[1]
    with servers.short_folder() as short, servers.valkey(short / "valkey.sock") as broker:
        given = {"MERGEYARD_BROKER_URL": broker, "MERGEYARD_DEVICE": "cpu"}
        assert image.run("mergeyard", "migrate", **given).returncode == 0
        assert image.run(*health_check("worker"), **given).returncode == 1
        with image.running("worker", **given) as worker:
            image.healthy("worker", worker, **given)
        assert image.run(*health_check("worker"), **given).returncode == 1
