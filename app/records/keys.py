"""The repository of keys: made, listed, revoked and recognised. Rows stay for ever, so that who had a key can be told.

Every request looks its key up again: one that was just made works at once, one that was just revoked no longer does.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, exists, insert, or_, select, update

from app.errors import MergeyardError
from app.records.audit import record
from app.records.database import Database, clock
from app.records.key import (
    ID_LENGTH,
    KEY_TEXT,
    OWNER,
    SECRET_LENGTH,
    Caller,
    Key,
    NewKey,
    Scope,
    digest,
    random_text,
)
from app.records.tables import keys

USED_EVERY = timedelta(minutes=1)  # `last_used_at` is written no oftener: reading must not become writing
MAX_NOTE = 200

log = logging.getLogger("mergeyard.keys")


class Keys:
    """Keys in ``database``. An id that does not exist raises MergeyardError ``not_found``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self,
        *,
        owner: str,
        scopes: Collection[Scope],
        by: Caller,
        note: str = "",
        expires_in: timedelta | None = None,
        quota_bytes: int | None = None,
    ) -> NewKey:
        """A new key, whose text is in the answer and nowhere else. ``request_invalid`` for what cannot be an owner.

        ``quota_bytes`` is what the owner may take where this key submits, None what every owner may.
        """
        if not OWNER.fullmatch(owner):
            message = f"{owner[:96]!r} cannot be an owner: 1 to 96 letters, digits and . _ - @ +"
            raise MergeyardError("request_invalid", message, where="owner")
        with self.database.write() as connection:
            now = clock(connection)
            expires_at = None if expires_in is None else now + expires_in
            made = _insert(
                connection,
                now,
                owner=owner,
                scopes=scopes,
                note=note,
                expires_at=expires_at,
                quota_bytes=quota_bytes,
            )
            record(connection, by, "key_created", made.key.id, _described(made.key))
            return made

    def replace(self, key_id: str, *, grace: timedelta, by: Caller, expires_in: timedelta | None = None) -> NewKey:
        """A new key with the owner, scopes, note and quota of an active one, which goes on working for ``grace``.

        Without ``expires_in`` it has as long to live as the old one had when it was made.
        ``conflict`` where the key is revoked or has expired: what no longer works cannot be handed over.
        """
        with self.database.write() as connection:
            now = clock(connection)
            old = _get(connection, key_id)
            if (state := old.state(now)) != "active":
                raise MergeyardError("conflict", f"The key {key_id} is {state}; create a new one without replacing it.")
            lifetime = expires_in
            if lifetime is None and old.expires_at is not None:
                lifetime = old.expires_at - old.created_at
            made = _insert(
                connection,
                now,
                owner=old.owner,
                scopes=old.scopes,
                note=old.note,
                replaces=key_id,
                quota_bytes=old.quota_bytes,
                expires_at=None if lifetime is None else now + lifetime,
            )
            ends = now + grace
            if old.expires_at is None or old.expires_at > ends:
                connection.execute(update(keys).where(keys.c.id == key_id).values(expires_at=ends))
            handed_over = _described(made.key) | {"replaces": key_id, "grace_seconds": grace.total_seconds()}
            record(connection, by, "key_created", made.key.id, handed_over)
            return made

    def revoke(self, key_id: str, *, by: Caller) -> Key:
        """End a key and its sessions at once and for ever. Idempotent."""
        with self.database.write() as connection:
            key = _get(connection, key_id)
            if key.revoked_at is not None:
                return key
            connection.execute(update(keys).where(keys.c.id == key_id).values(revoked_at=clock(connection)))
            record(connection, by, "key_revoked", key_id, _described(key))
            return _get(connection, key_id)

    def list(self, *, owner: str | None = None) -> Sequence[Key]:
        """Every key there ever was, the newest first."""
        statement = select(keys).order_by(keys.c.created_at.desc(), keys.c.id)
        if owner is not None:
            statement = statement.where(keys.c.owner == owner)
        with self.database.read() as connection:
            return [read_key(row) for row in connection.execute(statement)]

    def exist(self) -> bool:
        """Whether a key was ever made. Revoked and expired ones count: losing the last must not open the service."""
        with self.database.read() as connection:
            return bool(connection.execute(select(exists().select_from(keys))).scalar_one())

    def authenticate(self, text: str) -> Key:
        """The active key that ``text`` is.

        Raises MergeyardError ``key_invalid``; ``key_expired``, ``key_revoked`` to whoever knows the secret alone.
        """
        wanted = KEY_TEXT.fullmatch(text)
        if wanted is None:
            raise MergeyardError("key_invalid", "This is no key of Mergeyard; they look like mrg_<id>_<secret>.")
        with self.database.read() as connection:
            row = connection.execute(select(keys).where(keys.c.id == wanted[1])).one_or_none()
            now = clock(connection)
        if row is None or not hmac.compare_digest(row.sha256, digest(text)):
            raise MergeyardError("key_invalid", "The service does not know this key.")
        key = read_key(row)
        check_active(key, now)
        self._used(key, now)
        return key

    def _used(self, key: Key, now: datetime) -> None:
        if key.last_used_at is not None and now - key.last_used_at < USED_EVERY:
            return
        try:
            with self.database.write() as connection:
                stale = or_(keys.c.last_used_at.is_(None), keys.c.last_used_at <= now - USED_EVERY)
                connection.execute(update(keys).where(keys.c.id == key.id, stale).values(last_used_at=now))
        except MergeyardError as error:  # a full disk must not keep anybody from reading
            log.warning("the last use of key %s was not written: %s", key.id, error.message)


def check_active(key: Key, now: datetime) -> None:
    """Raise ``key_revoked`` or ``key_expired`` unless the key is active."""
    if (state := key.state(now)) == "active":
        return
    if state == "revoked":
        raise MergeyardError("key_revoked", "This key was revoked; ask the service's operator for another.")
    raise MergeyardError("key_expired", "This key has expired; ask the service's operator for another.")


def read_key(row: Row[Any]) -> Key:
    """The frozen value of a row of ``keys``."""
    return Key(
        id=row.id,
        owner=row.owner,
        note=row.note,
        scopes=frozenset(map(Scope, row.scopes)),
        replaces=row.replaces,
        quota_bytes=row.quota_bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )


def _get(connection: Connection, key_id: str) -> Key:
    row = connection.execute(select(keys).where(keys.c.id == key_id).with_for_update()).one_or_none()
    if row is None:
        raise MergeyardError("not_found", f"There is no key {key_id[:40]!r}; `mergeyard keys list` shows them.")
    return read_key(row)


def _insert(
    connection: Connection,
    now: datetime,
    *,
    owner: str,
    scopes: Collection[Scope],
    note: str,
    expires_at: datetime | None,
    quota_bytes: int | None,
    replaces: str | None = None,
) -> NewKey:
    if not scopes:
        raise MergeyardError("request_invalid", "A key needs a scope: merge, read or admin.", where="scopes")
    if len(note) > MAX_NOTE or not note.isprintable():
        raise MergeyardError("request_invalid", f"A note is at most {MAX_NOTE} printable characters.", where="note")
    key_id = random_text(ID_LENGTH)
    text = f"mrg_{key_id}_{random_text(SECRET_LENGTH)}"
    row = connection.execute(
        insert(keys)
        .values(
            id=key_id,
            sha256=digest(text),
            owner=owner,
            note=note,
            scopes=sorted(scopes),
            replaces=replaces,
            quota_bytes=quota_bytes,
            created_at=now,
            expires_at=expires_at,
        )
        .returning(keys)
    ).one()
    return NewKey(key=read_key(row), text=text)


def _described(key: Key) -> dict[str, Any]:
    return {
        "owner": key.owner,
        "scopes": sorted(key.scopes),
        "expires_at": None if key.expires_at is None else key.expires_at.isoformat(),
        "quota_bytes": key.quota_bytes,
    }
