"""The requests that the API's pages show. ``tests/api/test_openapi.py`` sends every one of them as it stands."""

from __future__ import annotations

from typing import Any

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
