"""`pip install mergeyard`, without extras: the client and its commands, and nothing of the service but its files."""

from __future__ import annotations

import json
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from tests.api.serving import ServedApi

REPOSITORY = Path(__file__).parents[2]
OF_THE_SERVICE = ("torch", "fastapi", "sqlalchemy", "celery", "numpy", "yaml", "huggingface_hub")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare environment with the wheel and what it depends on, as pip installs it."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "app", "worker", "mergeyard", "migrations"):
        whole = REPOSITORY / name
        shutil.copytree(whole, source / name) if whole.is_dir() else shutil.copy(whole, source / name)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, source], check=True)
    [wheel] = folder.glob("mergeyard-*.whl")
    constraints = REPOSITORY / "constraints.txt"
    subprocess.run([*pip, "install", wheel, "--constraint", constraints], check=True)
    return folder / "venv" / "bin"


def test_the_client_is_there_and_nothing_of_the_service(installed: Path, tmp_path: Path) -> None:
    code = f"""
import sys, importlib.util, importlib.resources, mergeyard
for name in mergeyard.__all__:
    getattr(mergeyard, name)
assert importlib.resources.files("mergeyard").joinpath("py.typed").is_file()
assert not any(importlib.util.find_spec(name) for name in {OF_THE_SERVICE!r})
assert not {{name.partition(".")[0] for name in sys.modules}} & {{"app", "worker"}}
"""
    subprocess.run([installed / "python", "-I", "-c", code], check=True, cwd=tmp_path)


def test_its_commands_work(installed: Path, service: ServedApi, tmp_path: Path) -> None:
    job = service.published({"config.json": b"{}"})

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(installed / "mergeyard"), *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
            env={"MERGEYARD_URL": service.url, "PATH": ""},
        )

    assert "download" in run("--help").stdout
    assert json.loads(run("status", job.id, "--json").stdout)["id"] == job.id
    for arguments in (["list"], ["events", job.id], ["download", job.id, "out"]):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"
    (tmp_path / "recipe.yaml").write_text("merge_method: ties")
    refused = run("submit", "recipe.yaml")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    lacking = run("plan", "recipe.yaml")
    assert lacking.returncode == 2 and "mergeyard[worker]" in lacking.stderr
