"""Where a request comes from, as far as its headers tell: what keeps other sites' pages out of a service in reach.

A browser sends whatever a page asks for to 127.0.0.1, too. While there are no keys, and wherever a cookie is what lets
a request in, these two checks stand between such a page and the service.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from app.errors import MergeyardError

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine alone: ``localhost``, ``127.0.0.1``, ``::1``, …"""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_local(headers: Mapping[str, str], client: str | None) -> None:
    """Raise ``key_required`` unless the request is for this machine, by its name, and from it.

    DNS rebinding makes a page's own name lead to 127.0.0.1: the browser then sends that name as Host. ``client`` is the
    peer's address, None on a Unix socket.
    """
    if not is_loopback(_host_of(headers.get("host", ""))) or not (client is None or is_loopback(client)):
        message = (
            "The service has no keys, so it answers this machine alone, as localhost or 127.0.0.1. "
            "Its operator makes keys with `mergeyard keys create`."
        )
        raise MergeyardError("key_required", message, where="header.Host")


def check_same_site(method: str, headers: Mapping[str, str]) -> None:
    """Raise ``origin_refused`` where a page of another origin sends a request that may change something.

    Every browser sends Origin with those (Fetch standard, 3.2); what sends none is not a browser.
    """
    if method in SAFE_METHODS:
        return
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    same = origin is None or (origin.partition("://")[2] or None) == headers.get("host")
    if not same or site not in ("none", "same-origin"):
        message = "A page of another site sent this request; it is refused. Programs send no Origin header."
        raise MergeyardError("origin_refused", message, where="header.Origin")


def _host_of(header: str) -> str:
    """The name in a Host header, without its port; empty where it is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
