"""The cookie of pages: what it opens, what it takes beside it, and everything that ends it."""

from __future__ import annotations

from datetime import timedelta

import httpx
import pytest
from sqlalchemy import select, update

from app.records.key import Caller, digest
from app.records.keys import Keys
from app.records.tables import sessions
from tests.api.serving import GuardedApi, ServedApi, problem

OPERATOR = Caller(owner="cli:tests")


class Page:
    """A browser's tab: a cookie jar, and the token that our own page would have."""

    def __init__(self, guarded: GuardedApi, caller: str) -> None:
        self.http = httpx.Client(base_url=guarded.served.url)
        self.answer = self.http.post("/session", headers=guarded.header(caller))
        assert self.answer.status_code == 201, self.answer.text
        self.token = {"X-CSRF-Token": self.answer.json()["csrf_token"]}


@pytest.fixture
def page(guarded: GuardedApi) -> Page:
    return Page(guarded, "alice")


def test_a_key_makes_a_cookie_that_scripts_and_other_sites_cannot_have(page: Page) -> None:
    cookie = page.answer.headers["set-cookie"]
    assert cookie.startswith("mergeyard=")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie and "expires=" in cookie.lower()
    assert page.answer.headers["cache-control"] == "no-store"


def test_over_https_it_is_secure_and_this_hosts_alone(guarded: GuardedApi) -> None:
    behind = {"X-Forwarded-Proto": "https"}  # as a TLS proxy on this machine says
    answer = guarded.send("alice", "post", "/session", headers=behind)
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-mergeyard=") and "Secure" in cookie.split("; ")
    carried = {**behind, "Cookie": cookie.partition(";")[0]}
    assert guarded.served.http.get("/merges", headers=carried).status_code == 200


def test_it_has_the_rights_of_its_key(guarded: GuardedApi, page: Page) -> None:
    hers = guarded.served.queued(owner="alice").id
    his = guarded.served.queued(owner="bob").id
    assert page.http.get(f"/merges/{hers}").status_code == 200
    assert page.http.get(f"/merges/{his}").status_code == 404
    reader = Page(guarded, "reader")
    assert reader.http.get(f"/merges/{hers}").status_code == 200
    problem(reader.http.post(f"/merges/{hers}/cancel", headers=reader.token), 403, "scope_merge_required")
    who = page.http.get("/session").json()
    assert (who["owner"], who["scopes"]) == ("alice", ["merge", "read"])
    assert who["csrf_token"] == page.token["X-CSRF-Token"]


def test_writing_takes_the_token_of_ones_own_session(guarded: GuardedApi, page: Page) -> None:
    path = f"/merges/{guarded.served.queued(owner='alice').id}/cancel"
    other = Page(guarded, "alice")
    for token in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "ä".encode()}, other.token):
        problem(page.http.post(path, headers=token), 403, "csrf_token_wrong")
    assert page.http.post(path, headers=page.token).status_code == 202


@pytest.mark.parametrize(
    "sent", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_another_sites_page_writes_nothing_even_with_the_token(
    guarded: GuardedApi, page: Page, sent: dict[str, str]
) -> None:
    path = f"/merges/{guarded.served.queued(owner='alice').id}/cancel"
    problem(page.http.post(path, headers={**page.token, **sent}), 403, "origin_refused")


def test_a_key_needs_no_token_and_goes_before_the_cookie(guarded: GuardedApi, page: Page) -> None:
    path = f"/merges/{guarded.served.queued(owner='bob').id}/cancel"
    assert page.http.post(path, headers=guarded.header("bob")).status_code == 202


class TestItsEnd:
    def test_signing_out(self, page: Page) -> None:
        cookie = {"Cookie": f"mergeyard={page.http.cookies['mergeyard']}"}
        problem(page.http.delete("/session"), 403, "csrf_token_wrong")
        out = page.http.delete("/session", headers=page.token)
        assert out.status_code == 204 and 'mergeyard=""' in out.headers["set-cookie"]
        assert "mergeyard" not in page.http.cookies
        problem(page.http.get("/merges", headers=cookie), 401, "session_ended")

    def test_with_its_key(self, guarded: GuardedApi, page: Page) -> None:
        other = Page(guarded, "bob")
        Keys(guarded.served.jobs.database).revoke(guarded.keys["alice"][4:16], by=OPERATOR)
        problem(page.http.get("/merges"), 401, "key_revoked")
        assert other.http.get("/merges").status_code == 200

    def test_by_time(self, guarded: GuardedApi, page: Page) -> None:
        with guarded.served.jobs.database.write() as connection:
            past = guarded.served.jobs.database.now() - timedelta(seconds=1)
            connection.execute(update(sessions).values(expires_at=past))
        problem(page.http.get("/merges"), 401, "session_ended")
        Page(guarded, "bob")
        with guarded.served.jobs.database.read() as connection:
            assert len(connection.execute(select(sessions)).all()) == 1, "what has ended is gone"

    def test_no_later_than_its_keys(self, guarded: GuardedApi) -> None:
        keys = Keys(guarded.served.jobs.database)
        keys.replace(guarded.keys["alice"][4:16], grace=timedelta(minutes=5), by=OPERATOR)
        ends = Page(guarded, "alice").answer.json()["expires_at"]
        key = next(key for key in keys.list() if key.id == guarded.keys["alice"][4:16])
        assert key.expires_at is not None and ends == key.expires_at.isoformat().replace("+00:00", "Z")


def test_it_cannot_prolong_itself(page: Page) -> None:
    problem(page.http.post("/session", headers=page.token), 401, "key_required")


def test_there_is_none_before_there_are_keys(api: ServedApi) -> None:
    problem(api.http.post("/session"), 401, "key_required")
    assert api.http.get("/session").json()["owner"] == "local"


def test_a_cookie_that_nobody_gave_opens_nothing(guarded: GuardedApi) -> None:
    for cookie in ("mergeyard=x", "mergeyard="):
        assert guarded.served.http.get("/merges", headers={"Cookie": cookie}).status_code == 401


def test_the_cookie_is_nowhere_in_the_database(guarded: GuardedApi, page: Page) -> None:
    with guarded.served.jobs.database.read() as connection:
        row = connection.execute(select(sessions)).one()
    cookie = page.http.cookies["mergeyard"]
    assert cookie not in repr(row) and row.sha256 == digest(cookie)
