"""What POST /merges takes: a recipe in its envelope (JSON), or a bare recipe (YAML)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from app import strict_json
from app.errors import MergeyardError, Problem
from app.recipe.grammar import Recipe
from app.recipe.parse import parse_recipe, place, unknown_key
from app.webhooks.outbound import MAX_URL, Allowed

JSON_TYPES = frozenset({"application/json"})
YAML_TYPES = frozenset({"application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"})
MAX_LABELS = 32

LONGEST_LIFE = 10 * 365 * 86_400  # seconds

Label = Annotated[str, Field(max_length=200)]


End = Literal["succeeded", "failed", "cancelled"]


class WebhookRequest(BaseModel):
    """Whom to tell when the merge has ended, and of which ends."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str = Field(min_length=1, max_length=MAX_URL, examples=["https://hooks.example.com/merges"])
    events: list[End] = Field(["succeeded", "failed", "cancelled"], min_length=1, max_length=3)


def _spelled_out(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


Webhook = Annotated[WebhookRequest, BeforeValidator(_spelled_out, json_schema_input_type=WebhookRequest | str)]


class Envelope(BaseModel):
    """A recipe and how to run it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    recipe: dict[str, Any] | str = Field(description="The recipe as an object, or as YAML text")
    queue: str = Field("default", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="Which workers may take it")
    priority: int = Field(0, ge=-100, le=100, description="Higher goes first among those that wait in one queue")
    labels: dict[Annotated[str, Field(min_length=1, max_length=100)], Label] = Field(
        default_factory=dict, max_length=MAX_LABELS, description="Names and values for people and filters"
    )
    expires_in: int | None = Field(
        None,
        ge=1,
        le=LONGEST_LIFE,
        description="Seconds after its success until the merge is deleted; without it MERGEYARD_RETENTION_SECONDS",
    )
    pinned: bool = Field(False, description="Keep the merge until somebody deletes it, whatever `expires_in` says")
    webhook: Webhook | None = Field(
        None, description="Who is told when the merge has ended: a URL, or with it the ends that it is told of"
    )
    force: bool = Field(False, description="Merge again even where you have an equal result")


class Submission(BaseModel):
    """An envelope whose recipe has been parsed, in one form for JSON and YAML alike."""

    model_config = ConfigDict(frozen=True)

    envelope: Envelope
    recipe: Recipe

    def canonical(self) -> bytes:
        """The same bytes for requests that mean the same: what an Idempotency-Key is compared by."""
        rest = self.envelope.model_dump(mode="json", exclude={"recipe", "webhook"}, exclude_none=True)
        if self.envelope.webhook is not None:  # else as before there were webhooks: keys outlive an upgrade
            rest["webhook"] = self.envelope.webhook.model_dump(mode="json")
        value = {"recipe": submitted(self.recipe), **rest}
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


async def body_of(request: Request) -> tuple[str, bytes]:
    """The media type and the body, bounded by the middleware. Raises `unsupported_media_type`."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in JSON_TYPES | YAML_TYPES:
        sent = f"{media_type[:80]!r} is not accepted" if media_type else "The Content-Type is missing"
        message = f"{sent}: send application/json (an envelope with `recipe`) or application/yaml (a bare recipe)."
        raise MergeyardError("unsupported_media_type", message)
    return media_type, await request.body()


Body = Annotated[tuple[str, bytes], Depends(body_of)]


def read_submission(media_type: str, body: bytes, hosts: Allowed) -> Submission:
    """Parse an envelope and the recipe in it. ``hosts``: those that a webhook may name.

    Raises:
        MergeyardError: `request_invalid`, `unknown_key`, `not_supported`, `webhook_refused`, and what `parse_recipe`
            raises, with all problems at once.
    """
    if media_type in YAML_TYPES:
        return Submission(envelope=Envelope(recipe=""), recipe=_recipe(body))
    raw = _load(body)
    problems = _envelope_problems(raw)
    recipe: Recipe | None = None
    if isinstance(raw.get("recipe"), dict | str):
        try:
            recipe = _recipe(raw["recipe"])
        except MergeyardError as error:
            problems.extend(error.problems)
    envelope: Envelope | None = None
    try:
        envelope = Envelope.model_validate({key: value for key, value in raw.items() if key in Envelope.model_fields})
        problems.extend(_unstorable(envelope.labels, "labels"))
        if envelope.webhook is not None and (refusal := hosts.refusal(envelope.webhook.url)):
            problems.append(Problem(code="webhook_refused", message=f"{refusal}.", where="webhook.url"))
    except ValidationError as error:
        problems.extend(
            Problem(code="request_invalid", message=f"{found['msg']}.", where=place(found["loc"]))
            for found in error.errors()
            if found["loc"][:1] != ("recipe",)
        )
    if problems:
        raise MergeyardError.of(problems)
    assert recipe is not None and envelope is not None
    return Submission(envelope=envelope, recipe=recipe)


def submitted(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it was sent: what the user wrote and no defaults."""
    return recipe.as_sent()


def _load(body: bytes) -> dict[str, Any]:
    try:
        raw = strict_json.loads(body)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise MergeyardError("request_invalid", f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(raw, dict):
        raise MergeyardError("request_invalid", "The body must be a JSON object with a `recipe`.")
    return raw


def _envelope_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """Keys that do not exist, and a missing recipe."""
    problems = []
    for key in raw:
        if key not in Envelope.model_fields and "recipe" in raw:
            problems.append(unknown_key(key[:100], Envelope.model_fields, key[:100]))
    if not isinstance(raw.get("recipe"), dict | str):
        message = "`recipe` is missing: the recipe goes under `recipe`, as an object or as YAML text."
        if "merge_method" in raw or "models" in raw:
            message = "This is a bare recipe: put it under `recipe`, or send it as application/yaml."
        problems.append(Problem(code="request_invalid", message=message, where="recipe"))
    return problems


def _recipe(source: bytes | str | Mapping[str, Any]) -> Recipe:
    recipe = parse_recipe(source)
    if problems := list(_unstorable(submitted(recipe), "")):
        raise MergeyardError.of(problems)
    return recipe


def _unstorable(value: Any, where: str) -> Iterator[Problem]:
    """Text that JSON and YAML can spell and PostgreSQL cannot keep: NUL characters and halves of surrogate pairs."""
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
            message = "This text holds a NUL character or half a surrogate pair; remove it."
            yield Problem(code="request_invalid", message=message, where=where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{where}.{key}" if where else str(key)
            if any(True for _ in _unstorable(str(key), where)):
                yield from _unstorable(str(key), where)
            else:
                yield from _unstorable(item, inner)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _unstorable(item, f"{where}[{index}]")
