"""Event streams: what is told, from where, until when, to how many; and what they must not hold up."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.api import eventstream, streams
from app.api.eventstream import wants_stream
from app.api.streams import MOST_WAITING, Listener
from app.artifacts.manifest import StoredFile
from app.records import rows
from app.records.database import clock
from app.records.following import Following
from app.records.job import Job
from app.settings import Settings
from tests.api.listening import ACCEPT, Stream, listening
from tests.api.serving import GuardedApi, ServedApi, problem, serving
from tests.records.submitting import ARTIFACT


def shard(api: ServedApi, job: Job, name: str) -> None:
    api.jobs.record_shard(job.id, job.lease_token or "", StoredFile(name=name, key=name, size=1, sha256="0" * 64), {})


def beat(api: ServedApi, job: Job, done: int) -> None:
    api.jobs.heartbeat(job.id, job.lease_token or "", lease_seconds=3600, progress_bytes=done, total_bytes=100)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def open_streams(api: ServedApi) -> int:
    line = next(line for line in api.http.get("/metrics").text.splitlines() if line.startswith("mergeyard_event_str"))
    return int(float(line.split()[1]))


class TestWhatIsTold:
    def test_what_happened_then_what_happens_until_the_merge_has_ended(self, api: ServedApi) -> None:
        job = api.running()
        with listening(api.http, job.id) as stream:
            before = stream.until("claimed")
            assert [message.type for message in before] == ["progress", "submitted", "claimed"]
            beat(api, job, 40)
            api.jobs.set_stage(job.id, job.lease_token or "", "merging")
            shard(api, job, "a")
            assert stream.until("progress")[-1].data["fraction"] == 0.4
            stream.until("shard")
            api.jobs.publish(job.id, job.lease_token or "", ARTIFACT)
            rest = list(stream)
        assert rest[-1].type == "succeeded", "and it ends with that"
        assert stream.response.headers["content-type"].startswith("text/event-stream")

    def test_a_message_is_the_event_of_the_page(self, api: ServedApi) -> None:
        job = api.published({"config.json": b"{}"})
        page = api.http.get(f"/merges/{job.id}/events").json()["items"]
        with listening(api.http, job.id) as stream:
            told = [message for message in stream if message.id is not None]
        assert [message.data for message in told] == page
        assert [(message.id, message.type) for message in told] == [(event["id"], event["type"]) for event in page]

    def test_it_goes_on_after_the_last_event_that_was_seen(self, api: ServedApi) -> None:
        job = api.published({"config.json": b"{}"})
        first, *rest = api.http.get(f"/merges/{job.id}/events").json()["items"]
        with listening(api.http, job.id, {"Last-Event-ID": str(first["id"])}, after=0) as stream:
            assert [message.id for message in stream if message.id] == [event["id"] for event in rest]

    def test_an_eventsource_that_knows_the_end_is_told_to_stop(self, api: ServedApi) -> None:
        job = api.published({"config.json": b"{}"})
        last = api.http.get(f"/merges/{job.id}/events").json()["after"]
        answer = api.http.get(f"/merges/{job.id}/events", headers={**ACCEPT, "Last-Event-ID": str(last)})
        assert (answer.status_code, answer.content) == (204, b"")

    def test_every_event_of_a_long_history_comes_once(self, api: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eventstream, "PAGE", 3)
        job = api.running()
        for number in range(7):
            shard(api, job, f"{number}")
        with listening(api.http, job.id) as early, listening(api.http, job.id) as late:
            early.until("claimed")
            shard(api, job, "7")
            seen = [message.data["data"]["name"] for message in early.until("shard")[-1:]]
            while seen[-1] != "7":
                seen.append(early.until("shard")[-1].data["data"]["name"])
            assert seen == [str(number) for number in range(8)]
            api.jobs.publish(job.id, job.lease_token or "", ARTIFACT)
            assert [message.data["data"]["name"] for message in late if message.type == "shard"] == seen

    def test_who_comes_back_to_a_running_merge_hears_nothing_twice(self, api: ServedApi) -> None:
        job = api.running()
        last = api.http.get(f"/merges/{job.id}/events").json()["after"]
        with listening(api.http, job.id, {"Last-Event-ID": str(last)}) as stream:
            stream.until("progress")
            shard(api, job, "a")
            assert [message.type for message in stream.until("shard")] == ["shard"]

    def test_progress_comes_when_it_changes_and_has_no_number(self, api: ServedApi) -> None:
        job = api.running()
        with listening(api.http, job.id) as stream:
            stream.until("claimed")
            beat(api, job, 10)
            told = stream.until("progress")[-1]
            assert (told.id, told.data["bytes_done"], told.data["bytes_total"]) == (None, 10, 100)
            beat(api, job, 10)
            shard(api, job, "a")
            assert [message.type for message in stream.until("shard")] == ["shard"]
            api.jobs.hand_back(job.id, job.lease_token or "")
            again = api.jobs.claim(job.id, lease_seconds=60)
            assert again is not None
            assert [message.type for message in stream.until("claimed")] == ["progress", "handed_back", "claimed"]

    def test_a_number_that_nobody_gave_holds_up_nobody_else(self, api: ServedApi) -> None:
        job = api.running()
        with listening(api.http, job.id, {"Last-Event-ID": str((1 << 62) - 1)}) as strange:
            next(iter(strange))
            with listening(api.http, job.id) as other:
                other.until("claimed")
                shard(api, job, "a")
                other.until("shard")
                api.jobs.publish(job.id, job.lease_token or "", ARTIFACT)
                assert [message.type for message in other][-1] == "succeeded"
                list(strange)

    def test_silence_is_broken_by_comments(self, api: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eventstream, "KEEP_ALIVE_SECONDS", 0.05)
        with listening(api.http, api.queued().id) as stream:
            assert [message.type for message in stream.until(":")] == ["progress", "submitted", ":"]

    def test_a_stream_ends_after_a_while_so_that_its_key_is_looked_at_again(
        self, api: ServedApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(eventstream, "LONGEST_SECONDS", 0.0)
        with listening(api.http, api.queued().id) as stream:
            assert [message.type for message in stream] == ["progress", "submitted"]

    @pytest.mark.parametrize(
        ("accept", "stream"),
        [
            ("text/event-stream", True),
            ("text/event-stream, application/json;q=0.9", True),
            ("Text/Event-Stream; q=0.5", True),
            ("application/json, text/event-stream;q=0.5", False),
            ("text/event-stream;q=0", False),
            ("text/event-stream;q=x", False),
            ("application/json", False),
            ("*/*", False),
            ("", False),
        ],
    )
    def test_it_is_a_stream_where_the_accept_header_prefers_one(self, accept: str, stream: bool) -> None:
        assert wants_stream(accept) is stream

    def test_a_wrong_number_is_refused(self, api: ServedApi) -> None:
        headers = {**ACCEPT, "Last-Event-ID": "x"}
        answer = api.http.get(f"/merges/{api.queued().id}/events", headers=headers)
        assert problem(answer, 422, "request_invalid")["where"] == "header.last-event-id"


class TestWhoMayListen:
    def test_owners_by_key_and_by_cookie_and_nobody_else(self, guarded: GuardedApi) -> None:
        job = guarded.served.published({"config.json": b"{}"}, owner="alice")
        http, path = guarded.served.http, f"/merges/{job.id}/events"
        with listening(http, job.id, guarded.header("alice")) as stream:
            assert [message.type for message in stream][-1] == "succeeded"
        signed_in = guarded.send("alice", "post", "/session").headers["set-cookie"].partition(";")[0]
        http.cookies.clear()
        with listening(http, job.id, {"Cookie": signed_in}) as stream:
            assert [message.type for message in stream][-1] == "succeeded"
        problem(guarded.send("bob", "get", path, headers=ACCEPT), 404, "not_found")
        problem(guarded.send("nobody", "get", path, headers=ACCEPT), 401, "key_required")
        problem(guarded.send("merger", "get", path, headers=ACCEPT), 403, "scope_read_required")


@pytest.fixture
def narrow(sqlite_url: str, tmp_path: Path, api_broker: str) -> Iterator[ServedApi]:
    """An API with two streams for each and three in all."""
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=sqlite_url,
        broker_url=api_broker,
        janitor_seconds=3600,
        max_streams=3,
        max_streams_per_key=2,
    )
    with serving(settings) as served:
        yield served


class TestHowMany:
    def test_one_key_has_so_many_and_all_have_so_many(self, narrow: ServedApi) -> None:
        from app.records.key import Caller, Scope
        from app.records.keys import Keys

        made = Keys(narrow.jobs.database)
        keys = [made.create(owner="me", scopes=[Scope.READ], by=Caller(owner="cli:tests")).text for _ in range(2)]
        mine, other = ({"Authorization": f"Bearer {key}"} for key in keys)
        job = narrow.queued(owner="me")
        path = f"/merges/{job.id}/events"
        held: list[Stream] = []  # one that nobody holds is closed
        with ExitStack() as stack:
            for headers in (mine, mine, other):
                held.append(stack.enter_context(listening(narrow.http, job.id, headers)))
                held[-1].until("submitted")
            refused = narrow.http.get(path, headers={**ACCEPT, **mine})
            problem(refused, 429, "too_many_streams")
            full = narrow.http.get(path, headers={**ACCEPT, **other})
            problem(full, 503, "streams_exhausted")
            assert "retry-after" in full.headers
            assert narrow.http.get(path, headers=mine).status_code == 200, "a page can be had"

        def free() -> bool:
            with narrow.http.stream("GET", path, headers={**ACCEPT, **mine}) as answer:
                return answer.status_code == 200

        until(free)  # whoever goes leaves a place

    def test_one_look_is_for_all_and_none_for_nobody(self, api: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
        until(lambda: open_streams(api) == 0)
        looks: list[int] = []
        look = Following.look
        monkeypatch.setattr(Following, "look", lambda self, seen: looks.append(len(seen)) or look(self, seen))
        held: list[Stream] = []  # one that nobody holds is closed
        with ExitStack() as stack:
            for job in [api.queued()] * 10 + [api.queued()]:
                held.append(stack.enter_context(listening(api.http, job.id)))
                held[-1].until("submitted")
            looks.clear()
            began = time.monotonic()
            until(lambda: len(looks) >= 3)
            assert set(looks) == {2}, "merges, not listeners"
            assert len(looks) <= (time.monotonic() - began) / streams.LOOK_SECONDS + 1
            assert open_streams(api) == 11
        until(lambda: open_streams(api) == 0)
        looks.clear()
        time.sleep(3 * streams.LOOK_SECONDS)  # long enough to see that nothing happens
        assert looks == []


class TestSlowClients:
    def test_what_waits_for_one_is_bounded_and_it_is_cut_off_beyond(self) -> None:
        async def drown() -> None:
            listener = Listener(after=0)
            for number in range(1, MOST_WAITING + 1):
                listener.put(number, b"x")
            listener.put_progress(b"p")
            listener.put_progress(b"q")
            assert await listener.take(1) == (b"q" + b"x" * MOST_WAITING, False)
            for number in range(MOST_WAITING + 1, 3 * MOST_WAITING):
                listener.put(number, b"x")
            assert await listener.take(1) == (b"", True)

        asyncio.run(drown())

    def test_one_that_takes_nothing_is_given_up_and_holds_up_nobody(
        self, api: ServedApi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(eventstream, "SEND_SECONDS", 0.5)
        monkeypatch.setattr(eventstream, "KEEP_ALIVE_SECONDS", 0.1)
        job = api.running()
        with api.jobs.database.write() as connection:  # more than every buffer on the way takes
            for number in range(40):
                rows.append(connection, job.id, clock(connection), ("shard", {"name": "x" * 400_000, "size": number}))
        until(lambda: open_streams(api) == 0)
        place = urlsplit(api.url)
        with socket.create_connection((place.hostname, place.port), timeout=10) as stuck:
            request = f"GET /merges/{job.id}/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
            stuck.sendall(request.encode())
            until(lambda: open_streams(api) == 1)
            other = api.queued()
            with listening(api.http, other.id) as stream:
                stream.until("submitted")
                api.jobs.request_cancel(other.id)
                assert [message.type for message in stream][-1] == "cancelled"
            until(lambda: open_streams(api) == 0)

    def test_one_that_goes_away_leaves_nothing(self, api: ServedApi) -> None:
        until(lambda: open_streams(api) == 0)
        with listening(api.http, api.queued().id) as stream:
            stream.until("submitted")
            assert open_streams(api) == 1
        until(lambda: open_streams(api) == 0)


class TestTrouble:
    def test_a_stopping_service_ends_its_streams_at_once(
        self, sqlite_url: str, tmp_path: Path, api_broker: str
    ) -> None:
        settings = Settings(data_dir=tmp_path / "data", database_url=sqlite_url, broker_url=api_broker)
        ended: list[float] = []
        with httpx.Client(timeout=30) as http:
            with serving(settings) as served:
                http.base_url = served.http.base_url
                job = served.queued()
                ready = threading.Event()

                def listen() -> None:
                    with listening(http, job.id) as stream:
                        stream.until("submitted")
                        ready.set()
                        list(stream)
                        ended.append(time.monotonic())

                thread = threading.Thread(target=listen)
                thread.start()
                assert ready.wait(20)
                began = time.monotonic()
            stopped = time.monotonic() - began
            thread.join(20)
        assert ended and stopped < 8, "uvicorn waits 10 s for what does not end by itself"

    def test_a_database_that_is_away_is_waited_for(self, api: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
        from app.errors import MergeyardError

        job = api.running()
        away = threading.Event()
        look, failed = Following.look, []

        def sometimes(self: Following, seen: Any) -> Any:
            if away.is_set():
                failed.append(1)
                raise MergeyardError("database_unavailable", "away")
            return look(self, seen)

        monkeypatch.setattr(Following, "look", sometimes)
        with listening(api.http, job.id) as stream:
            stream.until("claimed")
            away.set()
            shard(api, job, "a")
            until(lambda: len(failed) >= 2)
            away.clear()
            stream.until("shard")
