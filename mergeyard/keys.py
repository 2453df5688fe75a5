"""``mergeyard keys``: who may use the service. On the database, as ``migrate`` is: the first key needs none."""

# Each command imports what it alone needs, and Typer passes options by name:
# ruff: noqa: PLC0415

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeyard.command import AsJson, guarded, print_json, read_settings

if TYPE_CHECKING:
    from app.records.key import Caller, Key
    from app.records.keys import Keys

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

keys = typer.Typer(name="keys", help="Make, list and revoke the service's API keys.", no_args_is_help=True)


class ScopeName(StrEnum):
    merge = "merge"
    read = "read"
    metrics = "metrics"
    admin = "admin"


KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id: what stands between mrg_ and the next _.")]


@keys.command()
@guarded
def create(
    owner: Annotated[str, typer.Option(help="Whose merges and uploads its own are.", show_default=False)] = "",
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(
            help="merge submits, cancels, deletes; read looks and downloads; metrics: /metrics alone; admin: all. "
            "[default: merge, read]"
        ),
    ] = None,
    expires_in: Annotated[str | None, typer.Option(metavar="TIME", help="90d, 12h, 30m. [default: never]")] = None,
    note: Annotated[str, typer.Option(help="For people: what it is for.")] = "",
    quota: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="2TB, 500GB: what its owner may take. [default: what every owner may]"),
    ] = None,
    replaces: Annotated[
        str | None, typer.Option(metavar="ID", help="Take over this key's owner, scopes, note and quota, and end it.")
    ] = None,
    grace: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long the replaced key goes on working. [default: 24h]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is shown this once: only its digest is kept."""
    from app.records.key import Scope
    from mergeyard import display

    if replaces is None and (not owner or grace):
        raise typer.BadParameter("give --owner; --grace goes with --replaces")
    if replaces is not None and (owner or scope or note or quota):
        raise typer.BadParameter("a key that --replaces another has its owner, scopes, note and quota")
    quota_bytes = None if quota is None else _size(quota)
    lifetime = None if expires_in is None else _duration(expires_in)
    with _opened() as found:
        if replaces is None:
            scopes = [Scope(name.value) for name in scope or (ScopeName.merge, ScopeName.read)]
            made = found.create(
                owner=owner,
                scopes=scopes,
                note=note,
                expires_in=lifetime,
                quota_bytes=quota_bytes,
                by=_operator(),
            )
        else:
            made = found.replace(replaces, grace=_duration(grace or "24h"), expires_in=lifetime, by=_operator())
        now = found.database.now()
    if as_json:
        print_json({"key": made.text, **_document(made.key, now)})
    else:
        display.say(made.text)
        display.note(f"Key {made.key.id} of {made.key.owner}. It is shown this once; MERGEYARD_API_KEY takes it.")


@keys.command("list")
@guarded
def list_keys(
    owner: Annotated[str | None, typer.Option(help="Only this owner's.")] = None, as_json: AsJson = False
) -> None:
    """List every key there ever was, the newest first. Never the keys themselves."""
    from mergeyard import display

    with _opened() as found:
        now = found.database.now()
        documents = [_document(key, now) for key in found.list(owner=owner)]
    if as_json:
        print_json({"items": documents})
    else:
        display.show_keys(documents)
        if not documents and owner is None:
            display.note("No key was ever made: the service is open to this machine alone.")


@keys.command()
@guarded
def revoke(id: KeyId, as_json: AsJson = False) -> None:
    """End a key and its sessions at once and for ever."""
    from mergeyard import display

    with _opened() as found:
        key = found.revoke(id, by=_operator())
        now = found.database.now()
    if as_json:
        print_json(_document(key, now))
    else:
        display.say(f"{key.id} of {key.owner} is revoked")


@contextmanager
def _opened() -> Iterator[Keys]:
    """The keys of the database that the settings name. `not_ready` where it must be migrated first."""
    from app.records.database import Database
    from app.records.keys import Keys

    database = Database(read_settings().database)
    try:
        database.check()
        yield Keys(database)
    finally:
        database.close()


def _operator() -> Caller:
    """Whoever may open the database needs no key. The audit names the account; no owner's name has a colon."""
    from app.records.key import Caller

    try:
        account = getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as in some containers
        account = "unknown"
    return Caller(owner=f"cli:{account}@{socket.gethostname()}"[:96])


def _document(key: Key, now: datetime) -> dict[str, Any]:
    moments = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at", "last_used_at")}
    return {
        "id": key.id,
        "owner": key.owner,
        "note": key.note,
        "scopes": sorted(key.scopes),
        "state": key.state(now),
        "replaces": key.replaces,
        "quota_bytes": key.quota_bytes,
        **{name: None if moment is None else moment.isoformat() for name, moment in moments.items()},
    }


def _duration(text: str) -> timedelta:
    """``90d``, ``12h``, ``30m``, ``0s`` as a time of at most a hundred years."""
    wanted = re.fullmatch(r"(\d{1,9})([smhd])", text)
    span = timedelta(**{UNITS[wanted[2]]: int(wanted[1])}) if wanted else None
    if span is None or span > timedelta(days=36_500):
        raise typer.BadParameter(f"{text!r} is not a time: a whole number and s, m, h or d, as in 90d")
    return span


def _size(text: str) -> int:
    """``2TB``, ``500GB``, ``1GiB`` as bytes."""
    from app.recipe.grammar import shard_bytes

    try:
        return shard_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
