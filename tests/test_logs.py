"""The log's lines: of each process, as text and as JSON, with what they are about and without secrets."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.logs import JsonLines, TextLines
from tests.cli.commands import MERGEYARD, environment, mergeyard
from tests.worker.yard import open_yard, worker

KEY = "mrg_0123456789ab_" + "s" * 32
URL = "redis://user:pass-word@broker:6379/0"


def record(message: str = "hello %s", *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "mergeyard.job", "levelno": 20, "levelname": "INFO", "msg": message})
    made.args = arguments
    vars(made).update(fields)
    return made


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Every line, each of which has to be JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_json_line_has_the_fields_that_are_known() -> None:
    line = json.loads(JsonLines().format(record("hello %s", "wörld\n", merge="mrg-1", attempt=2, owner="alice")))
    assert line.pop("time").endswith("+00:00") and line.pop("process") is not None
    assert line == {
        "level": "info",
        "logger": "mergeyard.job",
        "message": "hello wörld\n",
        "merge": "mrg-1",
        "attempt": 2,
        "owner": "alice",
    }


def test_a_text_line_has_them_before_its_words() -> None:
    line = TextLines().format(record("hello %s", "x", attempt=2, merge="mrg-1"))
    assert line.endswith(" mergeyard.job merge=mrg-1 attempt=2 hello x")


@pytest.mark.parametrize("lines", [JsonLines(), TextLines()])
def test_keys_and_passwords_are_left_out(lines: logging.Formatter) -> None:
    try:
        raise ValueError(f"{KEY} at {URL}")
    except ValueError:
        text = lines.format(record("%s %s", KEY, URL, exc_info=sys.exc_info()))
    assert "ValueError" in text and "Traceback" in text
    assert text.count("mrg_0123456789ab_***") == 2 and text.count("redis://user:***@broker") == 2
    assert "sss" not in text and "pass-word" not in text


def test_every_line_of_an_api_is_json_and_names_its_request(tmp_path: Path, sqlite_url: str, broker_url: str) -> None:
    variables = {
        "MERGEYARD_DATA_DIR": str(tmp_path / "data"),
        "MERGEYARD_DATABASE_URL": sqlite_url,
        "MERGEYARD_BROKER_URL": broker_url,
        "MERGEYARD_PORT": "0",
    }
    key = mergeyard("keys", "create", "--owner", "search", **variables).out.strip()
    path = tmp_path / "log"
    with path.open("w") as log:  # no terminal: JSON without being told
        api = subprocess.Popen([*MERGEYARD, "api"], stderr=log, stdout=log, env=environment(**variables))
    try:
        while "running on" not in path.read_text():  # the test's own time limit ends it
            assert api.poll() is None, path.read_text()
        url = next(line["message"] for line in lines_of(path) if "running on" in line["message"]).split()[3]
        headers = {"X-Request-Id": "mine-1", "Authorization": f"Bearer {key}"}
        assert httpx.get(f"{url}/merges", headers=headers).status_code == 200
        wrong = {"X-Request-Id": "mine-2", "Authorization": f"Bearer {key[:17]}{'0' * 32}"}
        assert httpx.get(f"{url}/merges", headers=wrong).status_code == 401
    finally:
        api.terminate()
        api.wait(20)
    lines = lines_of(path)
    about = {line["request"]: line for line in lines if "request" in line and line["logger"] == "uvicorn.access"}
    assert about["mine-1"]["owner"] == "search" and '"GET /merges HTTP/1.1" 200' in about["mine-1"]["message"]
    assert "owner" not in about["mine-2"] and "401" in about["mine-2"]["message"]
    assert key[17:] not in path.read_text()


def test_every_line_of_a_worker_is_json_and_names_its_attempt(
    tmp_path: Path, tiny_models: Path, broker_url: str, queue: str
) -> None:
    path = tmp_path / "log"
    with (
        open_yard(tmp_path / "yard", tiny_models, broker_url, queue, log_format="json") as yard,
        path.open("w") as log,
        worker(yard, stderr=log),
    ):
        job = yard.finish(yard.submit(owner="alice"))
        yard.until(lambda: '"published"' in path.read_text())
    about = {line["message"]: line for line in lines_of(path) if line.get("merge") == job.id}
    for message in ("claimed, attempt 1 of 3", "published"):
        assert (about[message]["attempt"], about[message]["owner"]) == (1, "alice")
