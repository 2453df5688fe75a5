"""The OpenAPI document: FastAPI's, with errors as they really are (problem documents) and short operation names.

What needs a key says so, with its scope, and has the answers of the gate.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from app.api.errors import MEDIA_TYPE

PROBLEM = {"$ref": "#/components/schemas/ProblemDocument"}
REFUSALS = {
    "401": {"description": "No key, or one that is wrong, expired or revoked"},
    "403": {"description": "The key lacks the scope, or another site's page sent the request"},
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
                if "security" in operation:
                    operation["responses"] |= {status: dict(answer) for status, answer in REFUSALS.items()}
                for status, answer in operation["responses"].items():
                    if status.startswith(("4", "5")):
                        answer["content"] = {MEDIA_TYPE: {"schema": PROBLEM}}
        for name in NEVER_SENT:
            document["components"]["schemas"].pop(name, None)
        return document

    api.openapi = openapi  # type: ignore[method-assign]
