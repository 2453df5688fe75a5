"""Requests to servers that users name: to allowed hosts alone, at addresses that were looked at, and bounded.

A name is resolved once, every address it has is checked, and the connection goes to a checked address: a name that
resolves to something else a moment later changes nothing (DNS rebinding). Redirects are not followed, no proxy of the
environment is used, and of the answer nothing but the status is read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import httpx

from app.addresses import Address, address_of, is_public

MAX_URL = 2000
PORTS = {"http": 80, "https": 443}
TOTAL_SECONDS = 15.0  # for a whole attempt, however slowly the other side drips
CONNECT_SECONDS = 5.0
MOST_ADDRESSES = 3  # that are tried

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?", re.ASCII)


class Refused(Exception):  # noqa: N818 — an outcome of an attempt
    """The request was not sent; the text says why, to the merge's owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """Hosts that may be named: ``host`` (ports 80 and 443), ``host:port``, ``*.domain``. ``private`` ones may have
    addresses of private networks and of this machine, too.
    """

    public: tuple[str, ...]
    private: tuple[str, ...]

    @classmethod
    def read(cls, public: str, private: str) -> Allowed:
        """From settings: names with commas between them."""
        return cls(public=_names(public), private=_names(private))

    @property
    def anybody(self) -> bool:
        return bool(self.public or self.private)

    def refusal(self, url: str) -> str:
        """Why no request may be sent to ``url``; empty where it may."""
        try:
            self.target(url)
        except Refused as error:
            return str(error)
        return ""

    def target(self, url: str) -> Target:
        """Where a URL leads. Refused unless it may."""
        if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
            raise Refused(f"A webhook's URL has at most {MAX_URL} printable ASCII characters and no spaces")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port or PORTS.get(parts.scheme, 0)
        except ValueError:
            raise Refused("The webhook's URL cannot be read") from None
        if parts.scheme not in PORTS or not host or parts.username is not None or parts.fragment or "\\" in url:
            raise Refused(
                "A webhook's URL is http:// or https://, with a host, and without user, password and fragment"
            )
        if not _HOST.fullmatch(host) and not _is_address(host):
            raise Refused("The webhook's URL has no proper host")
        if not self.anybody:
            raise Refused("This service sends no webhooks: its operator has allowed no hosts")
        private = any(_matches(name, host, port) for name in self.private)
        if not private and not any(_matches(name, host, port) for name in self.public):
            raise Refused(f"Webhooks to {host}:{port} are not allowed here; GET /webhooks lists the hosts that are")
        return Target(parts=parts, host=host, port=port, private=private)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An allowed URL in parts."""

    parts: SplitResult
    host: str
    port: int
    private: bool

    async def addresses(self) -> Sequence[Address]:
        """Where it is. Refused where it is nowhere, or at one address that nobody outside should reach."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            raise Refused("its host has no address") from None
        addresses = list(map(address_of, found))
        if not self.private and not all(map(is_public, addresses)):
            raise Refused("its host has an address of a private network")
        return list(dict.fromkeys(addresses))[:MOST_ADDRESSES]


async def post(target: Target, body: bytes, headers: Mapping[str, str]) -> int:
    """POST, and the status of the answer. Raises Refused, TimeoutError, httpx.TransportError."""
    async with asyncio.timeout(TOTAL_SECONDS):
        failure: Exception = Refused("its host has no address")
        for address in await target.addresses():
            try:
                return await _post_to(address, target, body, headers)
            except httpx.ConnectError as error:
                failure = error
        raise failure


async def _post_to(address: Address, target: Target, body: bytes, headers: Mapping[str, str]) -> int:
    where = f"[{address}]" if address.version == 6 else str(address)
    url = target.parts._replace(netloc=f"{where}:{target.port}").geturl()
    host = f"[{target.host}]" if ":" in target.host else target.host
    named = host if target.port == PORTS[target.parts.scheme] else f"{host}:{target.port}"
    client = httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(verify=httpx.create_ssl_context()),  # no proxies
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(TOTAL_SECONDS, connect=CONNECT_SECONDS),
    )
    async with (
        client,
        client.stream(
            "POST", url, content=body, headers={**headers, "Host": named}, extensions={"sni_hostname": target.host}
        ) as answer,
    ):
        return answer.status_code  # its body is never read


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    for name in names:
        host, port = _split(name)
        if not (_HOST.fullmatch(host.removeprefix("*.")) or _is_address(host)) or not 0 <= port < 65536:
            raise ValueError(f"{name!r} is not a host, host:port or *.domain")
    return names


def _matches(name: str, host: str, port: int) -> bool:
    wanted, its_port = _split(name)
    if port != its_port if its_port else port not in PORTS.values():
        return False
    return host.endswith(wanted[1:]) and host != wanted[2:] if wanted.startswith("*.") else host == wanted


def _split(name: str) -> tuple[str, int]:
    """Host and port of an allowed name; 0 where it names no port."""
    host, colon, port = name.rpartition(":")
    return (host, int(port)) if colon and port.isdigit() and not _is_address(name) else (name, 0)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
