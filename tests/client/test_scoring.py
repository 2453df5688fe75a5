"""Sweeps and evaluations by both clients, at a real API whose work is done here."""

from __future__ import annotations

import pytest

from app.api.examples import EVALUATION, SWEEP
from app.records.job import Kind
from app.records.points import Points
from app.tasks.task import TaskScore
from mergeyard import InvalidRequestError, NotFoundError
from tests.api.serving import ServedApi
from tests.client.conftest import Connect


def work(service: ServedApi, job_id: str) -> None:
    """Scores that nothing was computed for: these models have no tokenizer."""
    job = service.jobs.claim(job_id, lease_seconds=60)
    assert job is not None and job.lease_token is not None
    points = Points(service.jobs.database)
    for point in points.of(job_id):
        score = TaskScore(name="sql", metric="nll", score=2.0 - point.number / 4, standard_error=0.1, examples=1)
        points.record(job_id, job.lease_token, point.number, [score])
    service.jobs.conclude(job_id, job.lease_token)


def test_a_sweep_from_submission_to_the_merge_of_its_best_point(connect: Connect, service: ServedApi) -> None:
    client = connect(service.url)
    key = "one"
    made = client.submit_sweep(SWEEP["recipe"], SWEEP["grid"], SWEEP["tasks"], idempotency_key=key, labels={"a": "b"})
    again = client.submit_sweep(SWEEP["recipe"], SWEEP["grid"], SWEEP["tasks"], idempotency_key=key, labels={"a": "b"})
    assert again["id"] == made["id"] and made["labels"] == {"a": "b"} and len(made["points"]) == 4
    work(service, made["id"])
    told: list[str] = []
    done = client.wait_sweep(made["id"], lambda now: told.append(now["status"]), timeout=30)
    assert told == ["succeeded"] and client.get_sweep(made["id"]) == done
    assert done["best"] == 3 and done["points"][3]["kept"] == {"sql": 5.0}
    numbers = [event["data"]["number"] for event in client.events(made["id"]) if event["type"] == "point"]
    assert numbers == [0, 1, 2, 3, 4, 5]
    merge = client.merge_point(made["id"])
    assert merge["recipe"]["parameters"]["lambda"] == 1.0 and merge["kind"] == "merge"
    assert client.merge_point(made["id"], 0)["recipe"]["parameters"]["lambda"] == 0.5
    client.delete(made["id"])
    with pytest.raises(NotFoundError):
        client.get_sweep(made["id"])


def test_sweep_submits_and_waits(connect: Connect, service: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(service.url)
    slept: list[float] = []

    def meanwhile(seconds: float) -> None:
        if not slept:
            (waiting,) = service.jobs.list(kind=Kind.SWEEP).jobs
            work(service, waiting.id)
        slept.append(seconds)

    async def meanwhile_there(seconds: float) -> None:
        meanwhile(seconds)

    monkeypatch.setattr("time.sleep", meanwhile)
    monkeypatch.setattr("anyio.sleep", meanwhile_there)
    done = client.sweep(SWEEP["recipe"], {"density": [0.5]}, SWEEP["tasks"], timeout=60)
    assert done["status"] == "succeeded" and done["best"] == 0 and slept


def test_an_evaluation(connect: Connect, service: ServedApi) -> None:
    client = connect(service.url)
    made = client.submit_evaluation(EVALUATION["model"], EVALUATION["tasks"])
    assert client.get_evaluation(made["id"])["scores"] == []
    work(service, made["id"])
    done = client.wait_evaluation(made["id"], timeout=30)
    assert [score["score"] for score in done["scores"]] == [2.0] and done["model"] == EVALUATION["model"]


def test_what_waits_can_be_cancelled(connect: Connect, service: ServedApi) -> None:
    client = connect(service.url)
    sweep = client.submit_sweep(SWEEP["recipe"], SWEEP["grid"], SWEEP["tasks"])
    evaluation = client.submit_evaluation(EVALUATION["model"], EVALUATION["tasks"])
    assert client.cancel_sweep(sweep["id"])["status"] == "cancelled"
    assert client.cancel_evaluation(evaluation["id"])["status"] == "cancelled"


def test_every_problem_is_told(connect: Connect, service: ServedApi) -> None:
    client = connect(service.url)
    with pytest.raises(InvalidRequestError) as refused:
        client.submit_sweep(SWEEP["recipe"], {"density": []}, SWEEP["tasks"])
    assert refused.value.code == "grid_invalid"
