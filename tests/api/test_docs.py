"""docs/api.md says what is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from app.api.examples import RECIPE_YAML
from app.errors import CODES
from tests import files
from tests.api.curl import run_curl
from tests.api.serving import ServedApi

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docs" / "api.md").read_text()
COMMANDS = re.findall(r"^\$ (curl .*)$", TEXT, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the commands send."""
    files.write_adapter(tmp_path, files.lora_tensors(seed=21))
    (tmp_path / "recipe.yaml").write_text(RECIPE_YAML)
    envelope = next(block for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL) if '"recipe"' in block)
    (tmp_path / "merge.json").write_text(envelope)
    return tmp_path


def test_its_commands_run_in_order(fresh_api: ServedApi, folder: Path) -> None:
    merge = fresh_api.published({"model.safetensors": bytes(1000)})
    assert len(COMMANDS) == 31
    for command in COMMANDS:
        here = command.replace("http://127.0.0.1:8000", fresh_api.url).replace("$ID", merge.id)
        if command.endswith("/cancel"):
            here = here.replace(merge.id, fresh_api.queued().id)
        response = run_curl(here, folder)
        assert response.is_success or response.status_code == 304, (command, response.text)


def test_it_names_every_code_under_its_status() -> None:
    for line in re.findall(r"^\| (\d{3}.*)\|$", TEXT, re.MULTILINE):
        statuses, codes = line.split("|")
        for code in re.findall(r"`(\w+)`", codes):
            assert str(CODES[code].status) in statuses, code
    assert set(re.findall(r"`(\w+)`", TEXT[TEXT.index("| status |") :])) >= set(CODES)


def test_every_code_is_raised_somewhere() -> None:
    sources = [path for part in ("app", "worker", "mergeyard") for path in (REPOSITORY / part).rglob("*.py")]
    text = "".join(path.read_text() for path in sources if path != REPOSITORY / "app" / "errors.py")
    assert [code for code in CODES if f'"{code}"' not in text] == []


def test_its_error_is_one(api: ServedApi) -> None:
    block = next(block for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL) if '"fault"' in block)
    real = api.http.get("/nowhere").json()
    assert set(json.loads(block)) == set(real)
    assert json.loads(block)["title"] == CODES["parameter_invalid"].title
