"""The API's reference, from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from app.main import create_app
from app.settings import Settings

HEAD = """\
# API reference

Made from the service's OpenAPI document (`/openapi.json`); [the API by example](api.md) is where to begin.
"""


def reference() -> str:
    """A page of Markdown with every operation."""
    document = create_app(Settings()).openapi()
    sections = (
        "\n".join(_operation(method, path, operation))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return f"{HEAD}\n{chr(10).join(sections)}"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {operation['summary']}\n"
    yield f"`{method.upper()} {path}`\n"
    if text := operation.get("description"):
        yield f"{text}\n"
    if parameters := operation.get("parameters"):
        yield "| parameter | in | type | |\n| --- | --- | --- | --- |"
        for parameter in parameters:
            required = "required. " if parameter.get("required") and parameter["in"] != "path" else ""
            told = f"{required}{parameter.get('description', '')}"
            yield f"| `{parameter['name']}` | {parameter['in']} | {_cell(_type(parameter['schema']))} | {_cell(told)} |"
        yield ""
    if body := operation.get("requestBody"):
        yield f"Body: {', '.join(f'`{media}`' for media in body['content'])}.\n"
    yield "| status | |\n| --- | --- |"
    for status, answer in operation["responses"].items():
        yield f"| {status} | {_cell(answer['description'])} |"
    yield ""


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type", "any"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
