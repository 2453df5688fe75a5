"""Who calls, and what their key may do: a request's way from its headers to a Caller, and what endpoints ask of one."""

from __future__ import annotations

from typing import Annotated

from fastapi import Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.datastructures import Headers

from app.api.origins import check_local, check_same_site
from app.errors import MergeyardError
from app.records.key import LOCAL_OWNER, Caller, Scope
from app.records.keys import Keys

REQUIRED = {
    Scope.MERGE: "scope_merge_required",
    Scope.READ: "scope_read_required",
    Scope.ADMIN: "scope_admin_required",
}


class Callers:
    """Recognises callers. Safe to share between threads."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._keys_exist = False  # once they do they always do: rows stay

    def recognise(self, method: str, headers: Headers, client: str | None, request_id: str) -> Caller:
        """Who sends a request. While no key was ever made: whoever does from this machine, with every right.

        Raises:
            MergeyardError: `key_required`, `key_invalid`, `key_expired`, `key_revoked` (401), `origin_refused` (403).
        """
        if not self._keys_exist and not self._keys.exist():
            check_local(headers, client)
            check_same_site(method, headers)
            return Caller(owner=LOCAL_OWNER, request_id=request_id)
        self._keys_exist = True
        text = bearer(headers)
        if text is None:
            message = "Send a key: `Authorization: Bearer mrg_…`."
            raise MergeyardError("key_required", message, where="header.Authorization")
        key = self._keys.authenticate(text)
        return Caller(owner=key.owner, key_id=key.id, scopes=key.scopes, request_id=request_id)


def bearer(headers: Headers) -> str | None:
    """The key that a request carries."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else None


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
Merging = Annotated[Caller, Security(KEY, scopes=[Scope.MERGE])]
Reading = Annotated[Caller, Security(KEY, scopes=[Scope.READ])]
Administering = Annotated[Caller, Security(KEY, scopes=[Scope.ADMIN])]
