"""What every page has: who may see it, what a browser may load for it, whose forms it takes, and how it fails."""

from __future__ import annotations

import re

import httpx
import pytest
from starlette.routing import Route

from app.dashboard.frame import CSP, STATIC, static
from app.dashboard.pages import ROUTERS
from tests.api.serving import GuardedApi, ServedApi
from tests.dashboard.browsing import Browser, signed_in


def test_the_service_s_address_leads_to_the_overview(fresh_api: ServedApi) -> None:
    browser = Browser(fresh_api.url)
    answer = browser.open("/")
    assert answer.url.path == "/ui" and answer.status_code == 200
    assert "<h1>Overview</h1>" in answer.text
    assert answer.headers["content-security-policy"] == CSP
    assert "Sign out" not in answer.text, "nobody has signed in while there are no keys"


def test_nothing_is_inline_or_foreign_and_static_files_are_kept_for_good(fresh_api: ServedApi) -> None:
    text = fresh_api.http.get("/ui").text
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=|https?://", text)
    named = set(re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', text))
    assert any(name.endswith(".css") for name in named) and any(name.endswith(".js") for name in named)
    for address in named:
        answer = fresh_api.http.get(address)
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
    other = fresh_api.http.get(f"{STATIC}/{'0' * 16}/mergeyard.css")
    assert other.headers["cache-control"] == "no-cache", "an address of other bytes is not kept"
    for missing in ("/ui/static/0/secret.txt", "/ui/static/0/..%2fframe.py"):
        assert fresh_api.http.get(missing).status_code == 404
    assert static("mergeyard.css") in named


def test_who_has_no_session_is_led_to_sign_in_and_back(guarded: GuardedApi) -> None:
    browser = Browser(guarded.served.url)
    answer = browser.open("/ui?a=b")
    assert answer.url.path == "/ui/sign-in" and "Sign in" in answer.text
    answer = browser.send("/ui/sign-in", key=guarded.keys["alice"])
    assert (answer.status_code, answer.url.path, answer.url.query) == (200, "/ui", b"a=b")
    assert "alice" in answer.text
    answer = browser.send("/ui/sign-out")
    assert answer.url.path == "/ui/sign-in"
    assert browser.open("/ui").url.path == "/ui/sign-in", "the session has ended"


@pytest.mark.parametrize("caller", ["wrong", "expired", "revoked"])
def test_a_key_that_opens_nothing_is_told_so(guarded: GuardedApi, caller: str) -> None:
    browser = Browser(guarded.served.url)
    browser.open("/ui")
    answer = browser.send("/ui/sign-in", key=guarded.keys[caller])
    assert answer.status_code == 401 and 'role="alert"' in answer.text
    assert not browser.http.cookies


@pytest.mark.parametrize("next", ["https://evil.example", "//evil.example", "/merges", "/ui/sign-in", "/ui\r\nX: y"])
def test_sign_in_leads_to_no_other_place_than_a_page(guarded: GuardedApi, next: str) -> None:
    fields = {"key": guarded.keys["alice"], "next": next}
    answer = guarded.served.http.post("/ui/sign-in", data=fields)
    assert answer.status_code == 303 and answer.headers["location"] == "/ui"


def test_a_link_from_another_site_finds_the_session(guarded: GuardedApi) -> None:
    """A browser sends no strict cookie with it: the page is asked for once more, by itself."""
    answer = httpx.get(f"{guarded.served.url}/ui?a=%22%3E", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200 and 'content="0; url=/ui?a=%22%3E"' in answer.text
    assert "alice" not in answer.text


def test_no_page_takes_a_form_without_its_session_s_token(guarded: GuardedApi) -> None:
    browser = signed_in(guarded, "alice")
    job = guarded.served.queued(owner="alice")
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]
    writing = [route.path.replace("{id}", job.id) for route in routes if "POST" in (route.methods or ())]
    paths = set(writing) - {"/ui/sign-in"}
    assert "/ui/sign-out" in paths
    for path in sorted(paths):
        for token in ({}, {"csrf_token": "0" * 32}):
            answer = browser.http.post(path, data={"x": "y", **token})
            assert answer.status_code == 403 and "csrf_token_wrong" in answer.text, path
            answer = browser.http.post(path, json={"x": "y"})
            assert answer.status_code == 403 and "csrf_token_wrong" in answer.text, path
    other = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert browser.http.post("/ui/sign-out", data={"x": "y"}, headers=other).status_code == 403
    foreign = browser.http.post("/ui/sign-in", data={"key": guarded.keys["bob"]}, headers=other)
    assert foreign.status_code == 403, "nobody is signed in as somebody else by another site"
    assert browser.open("/ui").url.path == "/ui", "the session goes on"


def test_a_failure_is_a_page(guarded: GuardedApi) -> None:
    browser = signed_in(guarded, "alice")
    answer = browser.open("/ui/nothing")
    assert answer.status_code == 404 and answer.headers["content-type"].startswith("text/html")
    assert "not_found" in answer.text and answer.headers["x-request-id"] in answer.text
    assert answer.headers["content-security-policy"] == CSP
    assert guarded.send("alice", "get", "/nothing").headers["content-type"] == "application/problem+json"


def test_a_key_that_may_not_read_sees_why(guarded: GuardedApi) -> None:
    browser = Browser(guarded.served.url)
    browser.open("/ui")
    answer = browser.send("/ui/sign-in", key=guarded.keys["merger"])
    assert answer.status_code == 403 and "scope_read_required" in answer.text
