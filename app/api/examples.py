"""The requests that the API's pages show. ``tests/api/test_openapi.py`` sends every one of them as it stands."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

RECIPE: dict[str, Any] = {
    "base_model": "models:smollm2-135m-instruct",
    "merge_method": "ties",
    "models": [
        {"adapter": "models:adapters/sql", "parameters": {"weight": 1.0, "density": 0.5}},
        {"adapter": "models:adapters/json", "parameters": {"weight": 1.0, "density": 0.5}},
    ],
    "parameters": {"normalize": False},
    "out_dtype": "bfloat16",
}

RECIPE_YAML = """\
base_model: models:smollm2-135m-instruct
merge_method: ties
models:
  - adapter: models:adapters/sql
    parameters: {weight: 1.0, density: 0.5}
  - adapter: models:adapters/json
    parameters: {weight: 1.0, density: 0.5}
parameters: {normalize: false}
out_dtype: bfloat16
"""

SUBMISSION: dict[str, Any] = {"recipe": RECIPE, "labels": {"team": "search"}}

TEXT_SUBMISSION: dict[str, Any] = {"recipe": RECIPE_YAML, "queue": "default", "priority": 10}


TASK: dict[str, Any] = {"file": "models:tasks/sql.jsonl", "metric": "nll"}

SWEEP: dict[str, Any] = {
    "recipe": RECIPE,
    "grid": {"density": [0.3, 0.6], "lambda": [0.5, 1.0]},
    "tasks": [{**TASK, "source": 0}],
}

EVALUATION: dict[str, Any] = {"model": "models:smollm2-135m-instruct+models:adapters/sql", "tasks": [TASK]}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body that an endpoint reads for itself, in one piece.

    What pydantic puts beside it (``#/$defs/…``) would be looked for at the top of the OpenAPI document.
    """
    schema = model.model_json_schema()
    named = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(item) for item in value]
        if not isinstance(value, dict):
            return value
        rest = {key: whole(item) for key, item in value.items() if key != "$ref"}
        return {**whole(named[value["$ref"].rsplit("/", 1)[1]]), **rest} if "$ref" in value else rest

    found: dict[str, Any] = whole(schema)
    return found


def json_body(schema: dict[str, Any], summary: str, example: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI request body of an endpoint that takes JSON alone."""
    examples = {"example": {"summary": summary, "value": example}}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": examples}}}
    }


def submission_body(schema: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI request body of the endpoints that take a recipe; ``schema`` is the envelope's."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": schema,
                    "examples": {
                        "recipe": {"summary": "A recipe as JSON, in its envelope", "value": SUBMISSION},
                        "text": {"summary": "A recipe as YAML text, in its envelope", "value": TEXT_SUBMISSION},
                    },
                },
                "application/yaml": {
                    "schema": {"type": "string"},
                    "examples": {"bare": {"summary": "A bare recipe, as mergekit takes it", "value": RECIPE_YAML}},
                },
            },
        }
    }
