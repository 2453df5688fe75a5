"""Sessions of pages: made from a key, with its rights, and ended by time, by signing out, or with the key."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, insert, select

from app.errors import MergeyardError
from app.records.audit import record
from app.records.database import Database, clock
from app.records.key import SECRET_LENGTH, Caller, Session, digest, random_text
from app.records.keys import check_active, read_key
from app.records.tables import keys, sessions


class Sessions:
    """Sessions in ``database``."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def open(self, lifetime: timedelta, *, by: Caller) -> Session:
        """A session of the caller's key, which must be active. Those that have ended go."""
        text = random_text(SECRET_LENGTH)
        with self.database.write() as connection:
            now = clock(connection)
            key = read_key(connection.execute(select(keys).where(keys.c.id == by.key_id)).one())
            check_active(key, now)
            expires_at = min(now + lifetime, key.expires_at or datetime.max.replace(tzinfo=UTC))
            connection.execute(delete(sessions).where(sessions.c.expires_at <= now))
            connection.execute(
                insert(sessions).values(sha256=digest(text), key_id=key.id, created_at=now, expires_at=expires_at)
            )
            record(connection, by, "session_opened", key.id)
        return Session(text=text, key=key, expires_at=expires_at)

    def authenticate(self, text: str) -> Session:
        """The session that ``text`` is. Raises ``session_ended``, ``key_revoked``, ``key_expired``."""
        wanted = (
            select(keys, sessions.c.expires_at.label("ends_at"))
            .join(sessions, sessions.c.key_id == keys.c.id)
            .where(sessions.c.sha256 == digest(text))
        )
        with self.database.read() as connection:
            row = connection.execute(wanted).one_or_none()
            now = clock(connection)
        if row is None or row.ends_at <= now:
            raise MergeyardError("session_ended", "The session has ended; sign in again with a key.")
        key = read_key(row)
        check_active(key, now)
        return Session(text=text, key=key, expires_at=row.ends_at)

    def close(self, session: Session, *, by: Caller) -> None:
        """Sign out."""
        with self.database.write() as connection:
            connection.execute(delete(sessions).where(sessions.c.sha256 == digest(session.text)))
            record(connection, by, "session_closed", session.key.id)
