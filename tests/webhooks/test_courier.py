"""Webhooks from an API to a real receiver, on both databases: signed, tried again, sent once by many, never lost."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from app.api.examples import RECIPE
from app.records import deliveries
from app.records.job import Job
from app.records.key import Caller, Scope
from app.records.keys import Keys
from app.settings import Settings
from tests.api.serving import GuardedApi, ServedApi, problem, serving, write_sources
from tests.api.test_metrics import scrape, series
from tests.cli.commands import MERGEYARD, environment
from tests.records.submitting import ARTIFACT
from tests.records.test_deliveries import later
from tests.webhooks.receiver import Receiver, answering, hanging, receiving
from tests.worker.yard import REPOSITORY

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def settings(database_url: str, broker_url: str, tmp_path: Path) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        broker_url=broker_url,
        model_roots=str(write_sources(tmp_path / "models")),
        janitor_seconds=3600,
        webhook_secret=SECRET,
        webhook_hosts="hooks.example.com",
        webhook_private_hosts="127.0.0.1:1",
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "PAUSES", (0.1,) * 10)


def allowing(settings: Settings, receiver: Receiver) -> Settings:
    return settings.model_copy(update={"webhook_private_hosts": f"127.0.0.1:{receiver.port}"})


def finished(api: ServedApi, receiver: Receiver, owner: str = "local") -> Job:
    running = api.running(owner=owner, webhook={"url": receiver.url, "events": ["succeeded"]})
    return api.jobs.publish(running.id, running.lease_token or "", ARTIFACT)


def log_of(api: ServedApi, job: Job, done: Callable[[Any], bool]) -> Any:
    """The merge's one delivery, once it is as it should be."""
    deadline = time.monotonic() + 20
    while True:
        (found,) = api.http.get(f"/merges/{job.id}/webhooks").json()["items"]
        if done(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def delivered(found: Any) -> bool:
    return bool(found["state"] == "delivered")


def attempts(api: ServedApi) -> dict[str, float]:
    return series(scrape(api), "mergeyard_webhook_attempts_total")


def eventually(look: Callable[[], object], wanted: object) -> bool:
    deadline = time.monotonic() + 20
    while look() != wanted:
        assert time.monotonic() < deadline, look()
        time.sleep(0.05)
    return True


class TestAnApi:
    def test_tells_of_the_end_with_a_signature_that_the_owner_can_check(self, settings: Settings) -> None:
        with receiving() as receiver, serving(allowing(settings, receiver)) as api:
            job = finished(api, receiver)
            (received,) = receiver.until(1)
            (secret,) = api.http.get("/webhooks").json()["secrets"]
            told = Webhook(secret).verify(received.body, dict(received.headers))
            assert (told["type"], told["data"]["id"]) == ("merge.succeeded", job.id)
            assert received.headers["content-type"] == "application/json"
            log = log_of(api, job, delivered)
            assert (log["id"], log["type"]) == (received.headers["webhook-id"], "merge.succeeded")
            assert [attempt["status"] for attempt in log["attempts"]] == [204] and log["next_attempt_at"] is None

    def test_tries_again_with_the_same_id_and_body_until_it_is_taken(self, settings: Settings) -> None:
        moved = answering(302, {"Location": "http://127.0.0.1:1/"})
        with receiving(answering(500), moved, answering(200)) as receiver, serving(allowing(settings, receiver)) as api:
            job = finished(api, receiver)
            log = log_of(api, job, delivered)
            assert [(made["status"], made["error"]) for made in log["attempts"]] == [
                (500, "answered 500"),
                (302, "redirects are not followed"),
                (200, None),
            ]
            assert len({(sent.headers["webhook-id"], sent.body) for sent in receiver.received}) == 1

    def test_counts_attempts_by_what_became_of_them(self, settings: Settings) -> None:
        answers = (answering(500), answering(503), answering(200), answering(410))
        with receiving(*answers) as receiver, serving(allowing(settings, receiver)) as api:
            assert attempts(api) == {"delivered": 0, "failed": 0, "given_up": 0}, "told from the start"
            log_of(api, finished(api, receiver), delivered)
            log_of(api, finished(api, receiver), lambda found: found["state"] == "failed")
            assert eventually(lambda: attempts(api), {"delivered": 1, "failed": 2, "given_up": 1})

    def test_says_why_nothing_could_be_sent(self, settings: Settings) -> None:
        with receiving() as receiver:
            pass
        with serving(allowing(settings, receiver)) as api:
            log = log_of(api, finished(api, receiver), lambda found: len(found["attempts"]) >= 1)
            assert (log["attempts"][0]["status"], log["attempts"][0]["error"]) == (None, "no connection")

    def test_a_host_that_is_no_longer_allowed_is_not_asked(self, settings: Settings) -> None:
        with receiving() as receiver, serving(settings) as api:
            log = log_of(api, finished(api, receiver), lambda found: len(found["attempts"]) >= 1)
            assert log["attempts"][0]["error"].startswith("not sent: ")
            assert receiver.received == []

    def test_one_that_hangs_holds_up_no_other(self, settings: Settings) -> None:
        release = threading.Event()
        with receiving(hanging(release)) as stuck, receiving() as well, ExitStack() as stack:
            hosts = f"127.0.0.1:{stuck.port},127.0.0.1:{well.port}"
            api = stack.enter_context(serving(settings.model_copy(update={"webhook_private_hosts": hosts})))
            stack.callback(release.set)
            finished(api, stuck)
            stuck.until(1)
            well_told = finished(api, well)
            log_of(api, well_told, delivered)
            assert not release.is_set()

    def test_a_submission_says_whom_to_tell(self, settings: Settings) -> None:
        with serving(settings) as api:
            url = "https://hooks.example.com/x"
            assert api.submit(webhook=url)["webhook"] == {"url": url, "events": ["succeeded", "failed", "cancelled"]}
            told = api.submit(webhook={"url": url, "events": ["failed"]})
            assert told["webhook"] == {"url": url, "events": ["failed"]} and api.submit()["webhook"] is None
            assert api.http.get(f"/merges/{told['id']}/webhooks").json() == {"items": []}
            for path in ("/merges", "/merges/plan"):
                refused = api.http.post(path, json={"recipe": RECIPE, "webhook": "https://evil.example/"})
                assert problem(refused, 422, "webhook_refused")["where"] == "webhook.url"

    def test_an_owner_has_secrets_of_its_own(self, settings: Settings) -> None:
        with serving(settings) as api:
            keys, by = Keys(api.jobs.database), Caller(owner="cli:tests")
            made = {owner: keys.create(owner=owner, scopes=[Scope.MERGE], by=by).text for owner in ("alice", "bob")}
            guarded = GuardedApi(api, made)
            found = {owner: guarded.send(owner, "get", "/webhooks").json() for owner in made}
            assert found["alice"]["secrets"] != found["bob"]["secrets"]
            assert found["alice"]["hosts"] == ["hooks.example.com", "127.0.0.1:1"] and found["alice"]["enabled"]


class TestManyApis:
    def test_two_send_each_webhook_once(self, settings: Settings) -> None:
        with receiving() as receiver, ExitStack() as stack:
            first, _second = (stack.enter_context(serving(allowing(settings, receiver))) for _ in range(2))
            jobs = [finished(first, receiver) for _ in range(12)]
            for job in jobs:
                assert len(log_of(first, job, delivered)["attempts"]) == 1
            assert len({sent.headers["webhook-id"] for sent in receiver.received}) == len(receiver.received) == 12

    def test_what_ended_while_none_lived_is_told_by_the_next(self, settings: Settings) -> None:
        with receiving() as receiver:
            with serving(settings.model_copy(update={"webhook_hosts": "", "webhook_private_hosts": ""})) as silent:
                job = finished(silent, receiver)
            assert receiver.received == []
            with serving(allowing(settings, receiver)) as api:
                log_of(api, job, delivered)
            assert len(receiver.received) == 1

    @pytest.fixture
    def doomed(self, settings: Settings) -> Iterator[Callable[[Receiver], subprocess.Popen[bytes]]]:
        """An API process that will be killed."""
        with ExitStack() as stack:

            def start(receiver: Receiver) -> subprocess.Popen[bytes]:
                values = allowing(settings, receiver).model_dump(mode="json", exclude={"port", "host"})
                given = {f"MERGEYARD_{name.upper()}": str(value) for name, value in values.items() if value}
                process = subprocess.Popen(
                    [*MERGEYARD, "api"],
                    cwd=REPOSITORY,
                    env={**environment(**given), "MERGEYARD_PORT": "0"},
                    stderr=subprocess.DEVNULL,
                )
                stack.callback(process.wait)
                stack.callback(process.kill)
                return process

            yield start

    def test_one_killed_in_the_middle_of_a_request_is_made_good_under_the_same_id(
        self, settings: Settings, doomed: Callable[[Receiver], subprocess.Popen[bytes]]
    ) -> None:
        release = threading.Event()
        with receiving(hanging(release), answering(204)) as receiver, ExitStack() as stack:
            stack.callback(release.set)
            with serving(settings.model_copy(update={"webhook_hosts": "", "webhook_private_hosts": ""})) as silent:
                job = finished(silent, receiver)
            process = doomed(receiver)
            receiver.until(1, seconds=60)
            process.kill()
            process.wait()
            api = stack.enter_context(serving(allowing(settings, receiver)))
            later(api.jobs.database, deliveries.TAKEN_SECONDS)
            log_of(api, job, delivered)
            first, second = receiver.received
            assert first.headers["webhook-id"] == second.headers["webhook-id"] and first.body == second.body
            assert json.loads(first.body)["data"]["id"] == job.id


def test_webhooks_without_a_secret_do_not_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MERGEYARD_WEBHOOK_SECRET is missing"):
        Settings(data_dir=tmp_path, webhook_hosts="hooks.example.com")


@pytest.mark.parametrize(
    "wrong", [{"webhook_hosts": "https://x/"}, {"webhook_private_hosts": "a b"}, {"webhook_secret": "secret"}]
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is not a host|whsec_"):
        Settings(**({"data_dir": tmp_path, "webhook_secret": SECRET} | wrong))  # type: ignore[arg-type]
