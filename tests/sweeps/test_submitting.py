"""``mergeyard sweep`` and ``mergeyard evaluate`` with ``--submit`` tell what they tell without it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from app.records.job import Kind
from tests.api.serving import ServedApi
from tests.cli.commands import mergeyard
from tests.sweeps.asking import RECIPE
from worker.job import Ending

Do = Callable[[str], Ending]
TASKS = ("--tasks", "first.jsonl@0", "--tasks", "second.jsonl@1", "--grid", "density=0.3,0.9")


@contextmanager
def working(api: ServedApi, do: Do, kind: Kind) -> Iterator[None]:
    """Somebody who works on whatever is submitted."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.1):
            for job in api.jobs.list(status="queued", kind=kind).jobs:
                do(job.id)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path, chat_root: Path) -> Path:
    """Task files, and a recipe for this machine and one for the service."""
    for name in ("first.jsonl", "second.jsonl"):
        (tmp_path / name).write_bytes((chat_root / name).read_bytes())
    (tmp_path / "there.yaml").write_text(yaml.safe_dump(RECIPE))
    here = json.loads(json.dumps(RECIPE).replace("models:", f"{chat_root}/"))
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(here))
    return tmp_path


def test_a_sweep_there_is_a_sweep_here(yard_api: ServedApi, do: Do, folder: Path) -> None:
    here = mergeyard("sweep", "here.yaml", *TASKS, "--json", cwd=folder)
    with working(yard_api, do, Kind.SWEEP):
        submit = ("--submit", "--url", yard_api.url, "--best", "best.yaml", "--plots", "plots")
        there = mergeyard("sweep", "there.yaml", *TASKS, *submit, "--json", cwd=folder)
    assert (here.code, there.code) == (0, 0), there.err
    first, second = json.loads(here.out), json.loads(there.out)
    assert second["points"] == first["points"] and second["against"] == first["against"]
    assert second["best"]["point"] == first["best"]["point"]
    assert yaml.safe_load((folder / "best.yaml").read_text()) == second["best"]["recipe"]
    assert (folder / "plots" / "by-density.svg").is_file()


def test_an_evaluation_there_is_an_evaluation_here(yard_api: ServedApi, do: Do, folder: Path, chat_root: Path) -> None:
    asked = ("--tasks", "first.jsonl=nll", "--tasks", "second.jsonl")
    here = mergeyard("evaluate", chat_root / "chat", *asked, "--json", cwd=folder)
    with working(yard_api, do, Kind.EVALUATION):
        there = mergeyard("evaluate", "models:chat", *asked, "--submit", "--url", yard_api.url, "--json", cwd=folder)
    assert (here.code, there.code) == (0, 0), there.err
    assert json.loads(there.out)["scores"] == json.loads(here.out)["scores"]


def test_what_fails_there_is_exit_code_1(yard_api: ServedApi, do: Do, folder: Path, chat_root: Path) -> None:
    longer = {"prompt": "a" * 100, "answer": "b"}
    (folder / "long.jsonl").write_text(json.dumps(longer) + "\n")
    asked = ("models:chat", "--tasks", "long.jsonl=nll", "--submit", "--url", yard_api.url)
    with working(yard_api, do, Kind.EVALUATION):
        done = mergeyard("evaluate", *asked, cwd=folder)
    assert done.code == 1 and "task_too_long" in done.err


def test_what_is_wrong_is_exit_code_2(yard_api: ServedApi, folder: Path) -> None:
    asked = ("there.yaml", *TASKS, "--submit", "--url", yard_api.url)
    kept = mergeyard("sweep", *asked, "--out", "scores.jsonl", cwd=folder)
    assert kept.code == 2 and "--out" in kept.err
    beyond = mergeyard("sweep", *asked[:-2], "--grid", "lambda=1,x", "--url", yard_api.url, cwd=folder)
    assert beyond.code == 2 and "At density=0.3, lambda=x" in beyond.err
