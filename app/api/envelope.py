"""What is submitted: a recipe in its envelope (JSON), or bare (YAML); and of every kind of job how to run it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

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


class Running(BaseModel):
    """How to run a job, and who is told."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    queue: str = Field("default", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="Which workers may take it")
    priority: int = Field(0, ge=-100, le=100, description="Higher goes first among those that wait in one queue")
    labels: dict[Annotated[str, Field(min_length=1, max_length=100)], Label] = Field(
        default_factory=dict, max_length=MAX_LABELS, description="Names and values for people and filters"
    )
    expires_in: int | None = Field(
        None,
        ge=1,
        le=LONGEST_LIFE,
        description="Seconds after its success until it is deleted; without it MERGEYARD_RETENTION_SECONDS",
    )
    pinned: bool = Field(False, description="Keep it until somebody deletes it, whatever `expires_in` says")
    webhook: Webhook | None = Field(
        None, description="Who is told when it has ended: a URL, or with it the ends that it is told of"
    )

    def wanted(self, retention_seconds: int | None) -> dict[str, Any]:
        """Of a ``NewJob``, the fields that say so; ``retention_seconds`` is the life of what asks for none."""
        return {
            "queue": self.queue,
            "priority": self.priority,
            "labels": self.labels,
            "pinned": self.pinned,
            "webhook": None if self.webhook is None else self.webhook.model_dump(mode="json"),
            "expires_in": self.expires_in or retention_seconds,
        }

    def canonical(self) -> dict[str, Any]:
        """The same value for requests that mean the same."""
        rest = self.model_dump(mode="json", exclude={"webhook"}, exclude_none=True)
        if self.webhook is not None:  # else as before there were webhooks: keys outlive an upgrade
            rest["webhook"] = self.webhook.model_dump(mode="json")
        return rest


class Envelope(Running):
    """A recipe and how to run it."""

    recipe: dict[str, Any] | str = Field(description="The recipe as an object, or as YAML text")
    force: bool = Field(False, description="Merge again even where you have an equal result")


AnyRunning = TypeVar("AnyRunning", bound=Running)


class Submission(BaseModel):
    """An envelope whose recipe has been parsed, in one form for JSON and YAML alike."""

    model_config = ConfigDict(frozen=True)

    envelope: Envelope
    recipe: Recipe

    def canonical(self) -> bytes:
        """The same bytes for requests that mean the same: what an Idempotency-Key is compared by."""
        rest = {name: value for name, value in self.envelope.canonical().items() if name != "recipe"}
        return canonical({"recipe": submitted(self.recipe), **rest})


async def body_of(request: Request) -> tuple[str, bytes]:
    """The media type and the body, bounded by the middleware. Raises `unsupported_media_type`."""
    media_type = _media_type(request)
    if media_type not in JSON_TYPES | YAML_TYPES:
        sent = f"{media_type[:80]!r} is not accepted" if media_type else "The Content-Type is missing"
        message = f"{sent}: send application/json (an envelope with `recipe`) or application/yaml (a bare recipe)."
        raise MergeyardError("unsupported_media_type", message)
    return media_type, await request.body()


Body = Annotated[tuple[str, bytes], Depends(body_of)]


async def json_of(request: Request) -> bytes:
    """The body of what takes JSON alone. Raises `unsupported_media_type`."""
    if _media_type(request) not in JSON_TYPES:
        raise MergeyardError("unsupported_media_type", "Send a JSON object, as application/json.")
    return await request.body()


JsonBody = Annotated[bytes, Depends(json_of)]


def read_submission(media_type: str, body: bytes, hosts: Allowed) -> Submission:
    """Parse an envelope and the recipe in it. ``hosts``: those that a webhook may name.

    Raises:
        MergeyardError: `request_invalid`, `unknown_key`, `not_supported`, `webhook_refused`, and what `parse_recipe`
            raises, with all problems at once.
    """
    if media_type in YAML_TYPES:
        return Submission(envelope=Envelope(recipe=""), recipe=_recipe(body))
    raw = load(body)
    problems = _recipe_is_there(raw)
    recipe: Recipe | None = None
    if isinstance(raw.get("recipe"), dict | str):
        try:
            recipe = _recipe(raw["recipe"])
        except MergeyardError as error:
            problems.extend(error.problems)
    envelope, wrong = read_running(Envelope, raw, hosts, with_recipe=True)
    problems.extend(wrong)
    if problems:
        raise MergeyardError.of(problems)
    assert recipe is not None and envelope is not None
    return Submission(envelope=envelope, recipe=recipe)


def read_running(
    model: type[AnyRunning], raw: Mapping[str, Any], hosts: Allowed, *, with_recipe: bool
) -> tuple[AnyRunning | None, list[Problem]]:
    """How to run a job, or everything that is wrong with that.

    ``with_recipe``: there must be one, which somebody else judges; without it the other keys may be a bare one's.
    """
    unknown = [] if with_recipe and "recipe" not in raw else [key for key in raw if key not in model.model_fields]
    problems = [unknown_key(key[:100], model.model_fields, key[:100]) for key in unknown]
    found: AnyRunning | None = None
    try:
        found = model.model_validate({key: value for key, value in raw.items() if key in model.model_fields})
        problems.extend(unstorable(found.labels, "labels"))
        if found.webhook is not None and (refusal := hosts.refusal(found.webhook.url)):
            problems.append(Problem(code="webhook_refused", message=f"{refusal}.", where="webhook.url"))
    except ValidationError as error:
        problems.extend(
            Problem(code="request_invalid", message=f"{wrong['msg']}.", where=place(wrong["loc"]))
            for wrong in error.errors()
            if not (with_recipe and wrong["loc"][:1] == ("recipe",))
        )
    return found, problems


def read_json(model: type[AnyRunning], body: bytes, hosts: Allowed, *, with_recipe: bool = False) -> AnyRunning:
    """A request that is JSON alone; a recipe in it (``with_recipe``) is not parsed.

    Raises MergeyardError as ``read_submission`` does.
    """
    raw = load(body)
    problems = _recipe_is_there(raw) if with_recipe else []
    found, wrong = read_running(model, raw, hosts, with_recipe=with_recipe)
    problems.extend(wrong)
    problems.extend(problem for name, value in raw.items() if name != "labels" for problem in unstorable(value, name))
    if problems or found is None:
        raise MergeyardError.of(problems)
    return found


def canonical(value: Mapping[str, Any]) -> bytes:
    """The same bytes for equal values: what an Idempotency-Key is compared by."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def submitted(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it was sent: what the user wrote and no defaults."""
    return recipe.as_sent()


def load(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises `request_invalid`."""
    try:
        raw = strict_json.loads(body)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise MergeyardError("request_invalid", f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(raw, dict):
        raise MergeyardError("request_invalid", "The body must be a JSON object.")
    return raw


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _recipe_is_there(raw: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if not isinstance(raw.get("recipe"), dict | str):
        message = "`recipe` is missing: the recipe goes under `recipe`, as an object or as YAML text."
        if "merge_method" in raw or "models" in raw:
            message = "This is a bare recipe: put it under `recipe`, or send it as application/yaml."
        problems.append(Problem(code="request_invalid", message=message, where="recipe"))
    return problems


def _recipe(source: bytes | str | Mapping[str, Any]) -> Recipe:
    recipe = parse_recipe(source)
    if problems := list(unstorable(submitted(recipe), "")):
        raise MergeyardError.of(problems)
    return recipe


def unstorable(value: Any, where: str) -> Iterator[Problem]:
    """Text that JSON and YAML can spell and PostgreSQL cannot keep: NUL characters and halves of surrogate pairs."""
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
            message = "This text holds a NUL character or half a surrogate pair; remove it."
            yield Problem(code="request_invalid", message=message, where=where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{where}.{key}" if where else str(key)
            if any(True for _ in unstorable(str(key), where)):
                yield from unstorable(str(key), where)
            else:
                yield from unstorable(item, inner)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from unstorable(item, f"{where}[{index}]")
