"""Keys: made, recognised, replaced, revoked; and what of them is in the database. On both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select, text, update

from app.errors import MergeyardError
from app.records.audit import Audit
from app.records.database import Database
from app.records.key import KEY_TEXT, Caller, NewKey, Scope, digest
from app.records.keys import Keys
from app.records.tables import keys as table
from tests.records.submitting import wait_a_moment

OPERATOR = Caller(owner="cli:root@here")


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


def make(keys: Keys, *, owner: str = "alice", scopes: tuple[Scope, ...] = (Scope.READ,), **rest) -> NewKey:
    return keys.create(owner=owner, scopes=scopes, by=OPERATOR, **rest)


def code_of(keys: Keys, text: str) -> str:
    with pytest.raises(MergeyardError) as caught:
        keys.authenticate(text)
    return caught.value.code


def test_a_new_key_is_recognised(keys: Keys) -> None:
    assert not keys.exist()
    made = make(keys, scopes=(Scope.MERGE, Scope.READ), note="nightly")
    assert keys.exist()
    found = keys.authenticate(made.text)
    assert (found.id, found.owner, found.note) == (made.key.id, "alice", "nightly")
    assert found.scopes == {Scope.MERGE, Scope.READ}
    assert KEY_TEXT.fullmatch(made.text)


def test_keys_are_not_alike(keys: Keys) -> None:
    made = [make(keys).text for _ in range(20)]
    assert len({text[4:16] for text in made}) == len({text[17:] for text in made}) == 20


def test_the_key_itself_is_nowhere_in_the_database(keys: Keys) -> None:
    made = make(keys)
    with keys.database.read() as connection:
        row = connection.execute(select(table)).one()
    assert made.text[17:] not in repr(row)
    assert row.sha256 == digest(made.text)
    assert made.text[17:] not in repr(Audit(keys.database).list())


def test_what_is_no_key_is_invalid(keys: Keys) -> None:
    made = make(keys)
    other = make(keys)
    changed = made.text[:-1] + ("0" if made.text[-1] != "0" else "1")
    mixed = made.text[:17] + other.text[17:]
    nobody = "mrg_000000000000_" + "0" * 32
    for wrong in ("", "x", made.text + "0", made.text.upper(), "hf_abc", changed, mixed, nobody):
        assert code_of(keys, wrong) == "key_invalid"


def test_a_revoked_key_says_so_to_its_holder_alone(keys: Keys) -> None:
    made = make(keys)
    revoked = keys.revoke(made.key.id, by=OPERATOR)
    assert revoked.revoked_at is not None
    assert code_of(keys, made.text) == "key_revoked"
    assert code_of(keys, make(keys).text[:0] + made.text[:17] + "0" * 32) == "key_invalid"
    assert keys.revoke(made.key.id, by=OPERATOR) == revoked
    assert keys.exist()


def test_a_key_expires(keys: Keys) -> None:
    assert code_of(keys, make(keys, expires_in=timedelta(0)).text) == "key_expired"
    assert keys.authenticate(make(keys, expires_in=timedelta(hours=1)).text)


def test_an_unknown_id_cannot_be_revoked(keys: Keys) -> None:
    with pytest.raises(MergeyardError) as caught:
        keys.revoke("000000000000", by=OPERATOR)
    assert caught.value.code == "not_found"


class TestReplacing:
    def test_a_new_key_takes_over_and_the_old_one_ends_after_its_grace(self, keys: Keys) -> None:
        old = make(keys, scopes=(Scope.MERGE,), note="ci")
        new = keys.replace(old.key.id, grace=timedelta(hours=1), by=OPERATOR)
        assert (new.key.owner, new.key.scopes, new.key.note) == ("alice", old.key.scopes, "ci")
        assert new.key.replaces == old.key.id
        assert keys.authenticate(new.text)
        ends = keys.authenticate(old.text).expires_at
        assert ends is not None
        assert timedelta(minutes=59) < ends - keys.database.now() < timedelta(minutes=61)

    def test_no_grace_ends_the_old_one_at_once(self, keys: Keys) -> None:
        old = make(keys)
        keys.replace(old.key.id, grace=timedelta(0), by=OPERATOR)
        assert code_of(keys, old.text) == "key_expired"

    def test_grace_never_prolongs(self, keys: Keys) -> None:
        old = make(keys, expires_in=timedelta(minutes=5))
        keys.replace(old.key.id, grace=timedelta(days=1), by=OPERATOR)
        assert keys.authenticate(old.text).expires_at == old.key.expires_at

    @pytest.mark.parametrize("lifetime", [None, timedelta(days=90)])
    def test_the_new_key_lives_as_long_as_the_old_one_would(self, lifetime: timedelta | None, keys: Keys) -> None:
        old = make(keys, expires_in=lifetime).key
        new = keys.replace(old.id, grace=timedelta(0), by=OPERATOR).key
        asked = keys.replace(new.id, grace=timedelta(0), by=OPERATOR, expires_in=timedelta(days=1)).key
        assert lifetime == (None if new.expires_at is None else new.expires_at - new.created_at)
        assert asked.expires_at == asked.created_at + timedelta(days=1)

    def test_a_dead_key_cannot_be_replaced(self, keys: Keys) -> None:
        revoked, expired = make(keys).key.id, make(keys, expires_in=timedelta(0)).key.id
        keys.revoke(revoked, by=OPERATOR)
        for dead in (revoked, expired):
            with pytest.raises(MergeyardError) as caught:
                keys.replace(dead, grace=timedelta(0), by=OPERATOR)
            assert caught.value.code == "conflict"
        assert len(keys.list()) == 2


class TestTheLastUse:
    def test_is_written_once_a_minute(self, keys: Keys) -> None:
        made = make(keys)
        assert keys.list()[0].last_used_at is None
        keys.authenticate(made.text)
        first = keys.list()[0].last_used_at
        assert first is not None
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(keys.database, "write", None)  # not even begun: a writer would wait for other writers
            keys.authenticate(made.text)
        assert keys.list()[0].last_used_at == first
        with keys.database.write() as connection:
            connection.execute(update(table).values(last_used_at=first - timedelta(seconds=61)))
        keys.authenticate(made.text)
        again = keys.list()[0].last_used_at
        assert again is not None and again >= first

    def test_that_cannot_be_written_keeps_nobody_out(self, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
        made = make(keys)

        def fail(*_: object) -> None:
            raise MergeyardError("database_unavailable", "read only")

        monkeypatch.setattr(keys.database, "write", fail)
        assert keys.authenticate(made.text).id == made.key.id


@pytest.mark.parametrize("owner", ["", "a b", "a/b", "ä", "cli:root", "x" * 97, "a\n"])
def test_what_cannot_be_an_owner_is_refused(keys: Keys, owner: str) -> None:
    with pytest.raises(MergeyardError) as caught:
        make(keys, owner=owner)
    assert (caught.value.code, caught.value.where) == ("request_invalid", "owner")
    assert not keys.exist()


def test_a_list_is_newest_first_and_can_be_one_owners(keys: Keys) -> None:
    first = make(keys).key
    wait_a_moment(keys.database)
    second = make(keys, owner="bob").key
    assert [key.id for key in keys.list()] == [second.id, first.id]
    assert [key.id for key in keys.list(owner="alice")] == [first.id]


def test_the_audit_keeps_who_made_and_revoked_which(keys: Keys) -> None:
    made = make(keys)
    new = keys.replace(made.key.id, grace=timedelta(hours=1), by=OPERATOR)
    keys.revoke(made.key.id, by=OPERATOR)
    keys.revoke(made.key.id, by=OPERATOR)
    found = Audit(keys.database).list()
    assert [(entry.action, entry.subject) for entry in found] == [
        ("key_created", made.key.id),
        ("key_created", new.key.id),
        ("key_revoked", made.key.id),
    ]
    assert {entry.owner for entry in found} == {"cli:root@here"}
    assert found[1].data["replaces"] == made.key.id
    assert Audit(keys.database).list(after=found[0].id, action="key_revoked") == found[2:]


def test_a_change_that_is_rolled_back_leaves_no_audit(keys: Keys) -> None:
    with pytest.raises(MergeyardError):
        make(keys, scopes=())
    assert Audit(keys.database).list() == []
    with keys.database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM keys")).scalar_one() == 0
