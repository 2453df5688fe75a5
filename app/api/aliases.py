"""/aliases: names that deployments follow, each pointing to a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from app.api.callers import Merging, Reading
from app.api.jobs import Problem
from app.api.schemas import Document
from app.api.service import Serving
from app.errors import MergeyardError
from app.records.aliases import Alias, Move

# What hub clients take as a repository's name, and no name that a file system could mistake.
NAME = r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$"
Name = Annotated[str, Path(pattern=NAME, max_length=96, description="Letters and digits, single . _ - between them")]

router = APIRouter(prefix="/aliases", tags=["aliases"])


class Target(BaseModel):
    """What an alias is to point to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    merge: str = Field(description="The id of a succeeded merge", pattern=r"^[A-Za-z0-9_.-]{1,96}$")


class MoveDocument(Document):
    """A merge that an alias was pointed to. ``commit`` is its revision for hub clients."""

    merge: str
    commit: str
    at: datetime
    key_id: str | None = Field(description="Of the key that did it; null before the first key")


class AliasSummary(Document):
    """An alias as it is now. ``repo`` is what hub clients call it."""

    name: str
    owner: str
    repo: str = Field(examples=["aliases/production"])
    merge: str
    commit: str
    created_at: datetime
    moved_at: datetime

    @classmethod
    def of(cls, alias: Alias) -> AliasSummary:
        return cls(**_summary(alias))


class AliasDocument(AliasSummary):
    """An alias with what it has pointed to, the newest first; of a long history the newest part."""

    history: list[MoveDocument]

    @classmethod
    def with_history(cls, alias: Alias, history: Sequence[Move]) -> AliasDocument:
        return cls(**_summary(alias), history=[MoveDocument(**asdict(move)) for move in history])


class AliasList(Document):
    """By name."""

    items: list[AliasSummary]


@router.get("", response_model=AliasList, summary="List aliases")
def list_aliases(caller: Reading, serving: Serving) -> AliasList:
    """Your owner's. An admin's key sees its own owner's, too: the same name may be several owners'."""
    return AliasList(items=[AliasSummary.of(alias) for alias in serving.aliases.list(by=caller)])


@router.get(
    "/{alias}",
    response_model=AliasDocument,
    summary="Look at an alias",
    responses={404: Problem, 422: Problem},
)
def get_alias(
    caller: Reading,
    alias: Name,
    serving: Serving,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of the history")] = 100,
) -> AliasDocument:
    """What it points to, and what it has pointed to before."""
    found = serving.aliases.get(alias, by=caller)
    return AliasDocument.with_history(found, serving.aliases.history(alias, by=caller, limit=limit))


@router.put(
    "/{alias}",
    response_model=AliasSummary,
    summary="Point an alias at a merge",
    responses={
        201: {"description": "It is new", "model": AliasSummary},
        404: Problem,
        409: Problem,
        413: Problem,
        422: Problem,
    },
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {"examples": {"a merge": {"summary": "A merge", "value": {"merge": "mrg-…"}}}}
            }
        }
    },
)
def point_alias(caller: Merging, alias: Name, target: Target, serving: Serving, response: Response) -> AliasSummary:
    """Makes it, or moves it in one step; again: nothing. While it points to a merge that cannot be deleted."""
    if alias.endswith(".git"):
        raise MergeyardError("request_invalid", "Hub clients take no name that ends in .git.", where="path.alias")
    found, created = serving.aliases.point(alias, target.merge, by=caller)
    response.status_code = 201 if created else 200
    return AliasSummary.of(found)


@router.delete(
    "/{alias}",
    status_code=204,
    response_class=Response,
    summary="Delete an alias",
    responses={404: Problem, 422: Problem},
)
def delete_alias(caller: Merging, alias: Name, serving: Serving) -> None:
    """Its name and history go; the merges stay."""
    serving.aliases.delete(alias, by=caller)


def _summary(alias: Alias) -> dict[str, Any]:
    return {**asdict(alias), "repo": f"aliases/{alias.name}"}
