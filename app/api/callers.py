"""Who calls, and what their key may do: a request's way from its headers to a Caller, and what endpoints ask of one."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Scope as ASGIScope

from app.api.origins import SAFE_METHODS, check_local, check_same_site
from app.errors import MergeyardError
from app.records.key import LOCAL_OWNER, Caller, Key, Scope, Session
from app.records.keys import Keys
from app.records.sessions import Sessions

REQUIRED = {
    Scope.MERGE: "scope_merge_required",
    Scope.READ: "scope_read_required",
    Scope.METRICS: "scope_metrics_required",
    Scope.ADMIN: "scope_admin_required",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Presented:
    """What of a request tells who sends it. ``bearer`` and ``cookie`` are None where there is none."""

    method: str
    headers: Headers
    address: str | None
    request_id: str
    bearer: str | None
    cookie: str | None
    form: bool = False  # of a page, which carries its session's token itself and is checked by ``frame.own_form``

    @property
    def writes(self) -> bool:
        return self.method not in SAFE_METHODS


class Callers:
    """Recognises callers. Safe to share between threads."""

    def __init__(self, keys: Keys, sessions: Sessions) -> None:
        self._keys = keys
        self._sessions = sessions
        self._keys_exist = False  # once they do they always do: rows stay

    def recognise(self, request: Presented) -> Caller:
        """Who sends a request. While no key was ever made: whoever does from this machine, with every right.

        Raises:
            MergeyardError: `key_required`, `key_invalid`, `key_expired`, `key_revoked`, `session_ended` (401),
                `origin_refused`, `csrf_token_wrong` (403).
        """
        if not self._keys_exist and not self._keys.exist():
            check_local(request.headers, request.address)
            check_same_site(request.method, request.headers)
            return Caller(owner=LOCAL_OWNER, request_id=request.request_id)
        self._keys_exist = True
        if request.bearer is not None:
            return _caller(self._keys.authenticate(request.bearer), request)
        if request.cookie is not None:
            session = self._sessions.authenticate(request.cookie)
            _check_own_page(request, session)
            return _caller(session.key, request, session)
        message = "Send a key: `Authorization: Bearer mrg_…`."
        raise MergeyardError("key_required", message, where="header.Authorization")


def presented(scope: ASGIScope) -> Presented:
    """What an ASGI request carries."""
    connection = HTTPConnection(scope)
    scheme, _, text = connection.headers.get("authorization", "").partition(" ")
    return Presented(
        method=scope["method"],
        headers=connection.headers,
        address=connection.client.host if connection.client else None,
        request_id=connection.state.request_id,
        bearer=text.strip() if scheme.lower() == "bearer" else None,
        cookie=connection.cookies.get(cookie_name(scope["scheme"])),
        form=scope["path"].startswith("/ui/")
        and connection.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"),
    )


def cookie_name(scheme: str) -> str:
    """Over TLS with the prefix that makes browsers refuse it from any other host or without Secure (RFC 6265bis)."""
    return "__Host-mergeyard" if scheme == "https" else "mergeyard"


def _check_own_page(request: Presented, session: Session) -> None:
    """A browser adds its cookies to what any page asks for: what may change something must come from ours."""
    check_same_site(request.method, request.headers)
    token = request.headers.get("x-csrf-token", "")
    if request.writes and not request.form and not hmac.compare_digest(token.encode(), session.csrf_token.encode()):
        message = "With a session, send the `csrf_token` of GET /session as X-CSRF-Token."
        raise MergeyardError("csrf_token_wrong", message, where="header.X-CSRF-Token")


def _caller(key: Key, request: Presented, session: Session | None = None) -> Caller:
    return Caller(
        owner=key.owner,
        key_id=key.id,
        scopes=key.scopes,
        request_id=request.request_id,
        quota_bytes=key.quota_bytes,
        session=session,
    )


class KeyScheme(SecurityBase):
    """Depends on a caller whose key has the scopes named in ``Security(…, scopes=…)``; OpenAPI shows them."""

    def __init__(self) -> None:
        description = "Made by the operator with `mergeyard keys create`. None is needed before the first is made."
        self.model = HTTPBearer(bearerFormat="mrg_<id>_<secret>", description=description)
        self.scheme_name = "key"

    async def __call__(self, request: Request, needed: SecurityScopes) -> Caller:
        caller = request.state.caller
        assert isinstance(caller, Caller)
        for scope in map(Scope, needed.scopes):
            if not caller.may(scope):
                held = ", ".join(sorted(caller.scopes))
                message = f"This needs a key with the scope {scope}; this one has {held}."
                raise MergeyardError(REQUIRED[scope], message, where="header.Authorization")
        return caller


KEY = KeyScheme()
Known = Annotated[Caller, Security(KEY)]
Merging = Annotated[Caller, Security(KEY, scopes=[Scope.MERGE])]
Reading = Annotated[Caller, Security(KEY, scopes=[Scope.READ])]
Scraping = Annotated[Caller, Security(KEY, scopes=[Scope.METRICS])]
Administering = Annotated[Caller, Security(KEY, scopes=[Scope.ADMIN])]
