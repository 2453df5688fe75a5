"""The OpenAPI document: FastAPI's, with errors as they really are (problem documents) and short operation names.

What needs a key says so, with its scope, and has the answers of the gate, and of a database that is away.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from app.api.answers import CHALLENGE, WAIT
from app.api.callers import cookie_name
from app.api.errors import MEDIA_TYPE

PROBLEM = {"$ref": "#/components/schemas/ProblemDocument"}
REFUSALS = {
    "401": {
        "description": "No key, or one that is wrong, expired or revoked",
        "headers": {"WWW-Authenticate": {**CHALLENGE, "required": True}},
    },
    "403": {
        "description": "The key lacks the scope, or another site's page sent the request",
        "headers": {"WWW-Authenticate": CHALLENGE},
    },
    "429": {
        "description": "Too many requests in a minute; Retry-After says when to send the next",
        "headers": {"Retry-After": WAIT},
    },
    "503": {"description": "A part that this needs is away; try again", "headers": {"Retry-After": WAIT}},
}
SESSION = {
    "type": "apiKey",
    "in": "cookie",
    "name": cookie_name("http"),
    "description": f"Made by POST /session; over https it is {cookie_name('https')}. Writes send X-CSRF-Token, too.",
}
NEVER_SENT = ("HTTPValidationError", "ValidationError")  # FastAPI documents these; our handlers replace them


def operation_id(route: APIRoute) -> str:
    """The function's name; a second method of the same function goes in front of it."""
    return f"head_{route.name}" if route.methods == {"HEAD"} else route.name


def install(api: FastAPI) -> None:
    """Make ``api.openapi()`` tell the truth about errors and keys."""
    build = api.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        for operations in document["paths"].values():
            for operation in operations.values():
                for parameter in operation.get("parameters", ()):
                    parameter["schema"] = _not_null(parameter["schema"])
                if "security" in operation:
                    scopes = operation["security"][0]["key"]
                    operation["security"] = [{"key": scopes}, {"session": scopes}]
                    responses = operation["responses"]  # what an operation says itself goes before
                    responses |= {
                        status: {**answer, **responses.get(status, {})} for status, answer in REFUSALS.items()
                    }
                for status, answer in operation["responses"].items():
                    if status.startswith(("4", "5")):
                        answer["content"] = {MEDIA_TYPE: {"schema": PROBLEM}}
        document["components"]["securitySchemes"]["session"] = SESSION
        for name in NEVER_SENT:
            document["components"]["schemas"].pop(name, None)
        return document

    api.openapi = openapi  # type: ignore[method-assign]


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter that is optional may be left out; neither a URL nor a header can say null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if not kinds:
        return schema
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    return {**rest, **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})}
