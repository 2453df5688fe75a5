"""Rate limits: what a key may send in a minute, whichever API process it asks."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.connection import ConnectionPool

from app.api.limits import _redis_url, network
from app.records.key import Caller, Scope
from app.records.keys import Keys
from app.settings import Settings
from tests import servers
from tests.api.serving import ServedApi, problem, serving

Start = Callable[..., ServedApi]


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with servers.broker() as url:
        yield url


@pytest.fixture
def start(database_url: str, tmp_path: Path, broker: str) -> Iterator[Start]:
    """Starts an API with these rates; every one has the same database and broker."""
    with ExitStack() as stack:

        def started(**changes: Any) -> ServedApi:
            values = {"data_dir": tmp_path / "data", "database_url": database_url, "broker_url": broker}
            return stack.enter_context(serving(Settings(**(values | {"janitor_seconds": 3600} | changes))))

        yield started


def key_of(api: ServedApi) -> dict[str, str]:
    made = Keys(api.jobs.database).create(owner="alice", scopes=list(Scope), by=Caller(owner="cli:tests"))
    return {"Authorization": f"Bearer {made.text}"}


def test_what_is_left_is_told_and_more_is_refused_until_it_passes(start: Start) -> None:
    api = start(rate_requests=3)
    key = key_of(api)
    left = []
    for _ in range(3):
        answer = api.http.get("/merges", headers=key)
        assert answer.status_code == 200
        assert answer.headers["ratelimit-policy"] == '"requests";q=3;w=60'
        left.append(answer.headers["ratelimit"].partition(";t=")[0])
    assert left == ['"requests";r=2', '"requests";r=1', '"requests";r=0']
    refused = api.http.get("/merges/mrg-1/files/x", headers=key)
    assert "s." in problem(refused, 429, "rate_limited")["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.headers["ratelimit"].startswith('"requests";r=0;t=')
    assert api.http.get("/merges", headers=key_of(api)).status_code == 200, "another key is another count"
    assert api.http.get("/healthz").status_code == 200


def test_every_api_process_counts_together(start: Start) -> None:
    one, other = start(rate_requests=2), start(rate_requests=2)
    key = key_of(one)
    assert one.http.get("/merges", headers=key).status_code == 200
    assert other.http.get("/merges", headers=key).status_code == 200
    assert {api.http.get("/merges", headers=key).status_code for api in (one, other)} == {429}


def test_writes_have_a_limit_of_their_own(start: Start) -> None:
    api = start(rate_writes=1)
    key = key_of(api)
    first = api.http.post("/merges/x/cancel", headers=key)
    assert first.status_code == 404
    assert first.headers["ratelimit-policy"] == '"requests";q=1200;w=60, "writes";q=1;w=60'
    problem(api.http.delete("/merges/x", headers=key), 429, "rate_limited")
    assert api.http.get("/merges", headers=key).status_code == 200


def test_nothing_is_counted_where_the_limits_are_zero_or_there_are_no_keys(start: Start) -> None:
    api = start(rate_requests=0, rate_writes=0)
    assert "ratelimit" not in api.http.get("/merges", headers=key_of(api)).headers
    api = start(rate_requests=1)
    assert "ratelimit" in api.http.get("/merges", headers=key_of(api)).headers


def test_without_keys_nobody_is_counted(start: Start) -> None:
    api = start(rate_requests=1, rate_writes=1)
    assert {api.http.get("/merges").status_code for _ in range(4)} == {200}


def test_a_broker_that_is_away_keeps_nobody_out(start: Start, tmp_path: Path) -> None:
    api = start(rate_requests=1, broker_url=f"redis+socket://{tmp_path}/nobody.sock")
    key = key_of(api)
    answers = [api.http.get("/merges", headers=key) for _ in range(4)]
    assert {answer.status_code for answer in answers} == {200}
    assert "ratelimit" not in answers[0].headers


def test_a_broker_that_hangs_is_asked_once_and_left_alone_for_a_while(start: Start) -> None:
    asked: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    asked.append(silent.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        api = start(rate_requests=1, broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}")
        key = key_of(api)
        assert {api.http.get("/merges", headers=key).status_code for _ in range(4)} == {200}
        assert len(asked) == 1
        for connection in asked:
            connection.close()


def test_wrong_keys_are_counted_by_address_and_good_ones_from_there_pass(start: Start, tmp_path: Path) -> None:
    with servers.short_folder() as folder, servers.valkey(folder / "own.sock") as url:  # nobody else's failures
        api = start(rate_failures=2, broker_url=url)
        key = key_of(api)
        wrong = {"Authorization": key["Authorization"][:-1] + "!"}
        statuses = [api.http.get("/merges", headers=wrong).status_code for _ in range(4)]
        assert statuses == [401, 401, 429, 429]
        assert api.http.get("/merges", headers=key).status_code == 200
        problem(api.http.get("/merges"), 401, "key_required")


@pytest.mark.parametrize(
    ("address", "subscriber"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        (None, "unknown"),
        ("testclient", "testclient"),
    ],
)
def test_an_address_stands_for_its_subscriber(address: str | None, subscriber: str) -> None:
    assert network(address) == subscriber


def test_a_unix_sockets_url_is_spelt_for_redis() -> None:
    assert _redis_url("redis+socket:///run/v.sock?virtual_host=3") == "unix:///run/v.sock?db=3"
    assert _redis_url("rediss://host:6380/1") == "rediss://host:6380/1"


@pytest.mark.parametrize(
    ("spelling", "meaning"),
    [
        ("CERT_REQUIRED", ssl.CERT_REQUIRED),
        ("CERT_OPTIONAL", ssl.CERT_OPTIONAL),
        ("CERT_NONE", ssl.CERT_NONE),
        ("required", ssl.CERT_REQUIRED),
    ],
)
def test_what_celery_calls_a_brokers_certificate_means_the_same_here(spelling: str, meaning: ssl.VerifyMode) -> None:
    """Or the broker of every queued merge would be one that nothing can be counted at."""
    url = f"rediss://host:6380/1?ssl_ca_certs=/etc/ca.pem&ssl_cert_reqs={spelling}&socket_timeout=3"
    connection = ConnectionPool.from_url(_redis_url(url)).make_connection()
    assert (connection.cert_reqs, connection.ca_certs) == (meaning, "/etc/ca.pem")
