"""Where webhooks may go: allowed names, public addresses, and no way around either."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from typing import Any

import pytest

from app.addresses import is_public
from app.webhooks import outbound
from app.webhooks.outbound import Allowed, Refused, post
from tests.webhooks.receiver import answering, dripping, endless, hanging, receiving

ALLOWED = Allowed.read("hooks.example.com, *.example.org, hooks.example.net:8443", "127.0.0.1:9000, intern")


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/merges?team=1",
        "http://HOOKS.example.com./",
        "http://hooks.example.com:443/",
        "https://a.b.example.org/x",
        "https://hooks.example.net:8443/",
        "http://127.0.0.1:9000/",
        "http://intern/hook",
    ],
)
def test_an_allowed_host_may_be_named(url: str) -> None:
    assert ALLOWED.refusal(url) == ""


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",
        "https://evilhooks.example.com/",
        "https://hooks.example.com.evil.net/",
        "https://example.org/",
        "https://evilexample.org/",
        "https://hooks.example.com:22/",
        "https://hooks.example.net/",
        "http://127.0.0.1:9001/",
        "http://127.0.0.1/",
        "http://2130706433:9000/",
        "http://[::ffff:127.0.0.1]:9000/",
        "https://hooks.example.com@evil.net/",
        "https://evil.net#@hooks.example.com/",
        "https://evil.net\\@hooks.example.com/",
        "https://user:pw@hooks.example.com/",
        "https://hooks.example.com:99999/",
        "https://hooks.example.com/#x",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "//hooks.example.com/",
        "hooks.example.com",
        "https://",
        "https:///x",
        "https://hooks.example.com/\r\nHost: evil",
        "https://hooks.example.com/a b",
        "https://hööks.example.com/",
        "https://hooks.example.com/" + "x" * 2000,
        "https://[::1/",
        "",
    ],
)
def test_nothing_else_may(url: str) -> None:
    assert ALLOWED.refusal(url)


def test_where_no_host_is_allowed_the_refusal_says_so() -> None:
    assert "allowed no hosts" in Allowed.read("", " , ").refusal("https://hooks.example.com/")


@pytest.mark.parametrize("text", ["http://x", "a b", "*", "*.", "x:99999", "-", "a/b", "x:y"])
def test_what_is_no_host_is_no_setting(text: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        Allowed.read(text, "")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
        ("::7f00:1", False),
    ],
)
def test_only_addresses_of_the_internet_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Names resolve to these addresses, one answer after another; what was asked for."""
    asked: list[str] = []

    async def getaddrinfo(_loop: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


def send(allowed: Allowed, url: str) -> int:
    return asyncio.run(post(allowed.target(url), b"{}", {"webhook-id": "msg_1"}))


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"]])
def test_an_allowed_name_with_a_private_address_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    resolving(monkeypatch, addresses)
    with receiving() as receiver:
        with pytest.raises(Refused, match="private network"):
            send(Allowed.read(f"hooks.example.com:{receiver.port}", ""), f"http://hooks.example.com:{receiver.port}/")
        assert receiver.received == []


def test_the_connection_goes_to_the_address_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is resolved once: the second answer of a rebinding name server is never asked for."""
    with receiving() as receiver:
        asked = resolving(monkeypatch, ["127.0.0.1"], ["10.255.255.1"])
        url = f"http://hooks.example.com:{receiver.port}/x?y=1"
        assert send(Allowed.read("", f"hooks.example.com:{receiver.port}"), url) == 204
        assert asked == ["hooks.example.com"]
        (received,) = receiver.received
        assert received.headers["host"] == f"hooks.example.com:{receiver.port}" and received.path == "/x?y=1"


def test_a_second_address_is_tried_where_the_first_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        resolving(monkeypatch, ["127.0.0.9", "127.0.0.1"])
        url = f"http://hooks.example.com:{receiver.port}/"
        assert send(Allowed.read("", f"hooks.example.com:{receiver.port}"), url) == 204


def test_redirects_and_proxies_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as other, receiving(answering(307, {"Location": other.url})) as receiver:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{other.port}")
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{other.port}")
        assert send(Allowed.read("", f"127.0.0.1:{receiver.port}"), receiver.url) == 307
        assert (len(receiver.received), other.received) == (1, [])


@pytest.mark.parametrize("behaviour", [hanging, dripping])
def test_an_attempt_ends_in_time_whatever_the_other_side_does(monkeypatch: pytest.MonkeyPatch, behaviour: Any) -> None:
    monkeypatch.setattr(outbound, "TOTAL_SECONDS", 0.5)
    release = threading.Event()
    with receiving(behaviour(release)) as receiver:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            send(Allowed.read("", f"127.0.0.1:{receiver.port}"), receiver.url)
        assert time.monotonic() - began < 10
        release.set()


def test_of_an_endless_answer_only_the_beginning_is_taken() -> None:
    sent: list[int] = []
    with receiving(endless(sent)) as receiver:
        assert send(Allowed.read("", f"127.0.0.1:{receiver.port}"), receiver.url) == 200
    assert sum(sent) < 20_000_000, "what buffers on the way take, of 131 MB"
