"""The records' words for access: scopes, keys, sessions, and whoever calls."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

LOCAL_OWNER = "local"  # everybody, while there are no keys
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
ID_LENGTH = 12
SECRET_LENGTH = 32  # 160 random bits
KEY_TEXT = re.compile(rf"mrg_([{ALPHABET}]{{{ID_LENGTH}}})_([{ALPHABET}]{{{SECRET_LENGTH}}})", re.ASCII)
OWNER = re.compile(r"[\w.@+-]{1,96}", re.ASCII)


class Scope(StrEnum):
    """What a key may do. ``admin`` holds the others, for every owner's merges."""

    MERGE = "merge"  # submit, plan, upload, cancel, delete
    READ = "read"  # look at merges, events and sources, download
    METRICS = "metrics"  # the figures of the whole service, and nothing else
    ADMIN = "admin"  # everything, every owner's, and the audit


EVERY_SCOPE = frozenset(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of ``keys``, without what it is compared by. Times are the database's clock, UTC."""

    id: str
    owner: str
    note: str
    scopes: frozenset[Scope]
    replaces: str | None  # the key that this one was made to take over from
    quota_bytes: int | None  # what its owner may take where it is used to submit; None: what every owner may
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None  # within a minute

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key as it is made: ``text`` is all of it, and kept nowhere."""

    key: Key
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """``text`` is the cookie's value; its sha256 is all that is kept of it."""

    text: str = field(repr=False)
    key: Key
    expires_at: datetime

    @property
    def csrf_token(self) -> str:
        """What only pages of ours can send beside the cookie: derived from it, and it is kept from scripts."""
        return hmac.new(self.text.encode(), b"csrf", hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whoever asks for something, as rights and the audit know them. ``key_id`` None: nobody needs a key yet."""

    owner: str
    key_id: str | None = None
    scopes: frozenset[Scope] = EVERY_SCOPE
    request_id: str = ""
    quota_bytes: int | None = None  # its key's
    session: Session | None = None  # where a page's cookie stands for the key

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    @property
    def sees(self) -> str | None:
        """The owner whose merges this caller sees; None: every owner's."""
        return None if Scope.ADMIN in self.scopes else self.owner


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One append-only row: who did what. ``subject`` is the id of a key or a merge, or a reference."""

    id: int
    at: datetime
    action: str
    owner: str
    key_id: str | None
    request_id: str
    subject: str
    data: Mapping[str, Any]


def random_text(length: int) -> str:
    """``length`` random characters of five bits each."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def digest(text: str) -> str:
    """What is stored of a key or a session. A fast hash does: the text is random, not somebody's password."""
    return hashlib.sha256(text.encode()).hexdigest()
