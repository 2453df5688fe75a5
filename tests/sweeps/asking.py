"""What is asked for in the tests of sweeps."""

from __future__ import annotations

from typing import Any

RECIPE: dict[str, Any] = {
    "base_model": "models:chat",
    "merge_method": "ties",
    "models": [
        {"adapter": "models:one", "parameters": {"weight": 1.0, "density": 0.9}},
        {"adapter": "models:two", "parameters": {"weight": 0.5, "density": 0.9}},
    ],
}
GRID: dict[str, Any] = {"density": [0.3, 0.9], "lambda": [0.5, 1.0]}
TASKS: list[dict[str, Any]] = [
    {"file": "models:first.jsonl", "metric": "nll", "source": 0},
    {"file": "models:second.jsonl", "metric": "nll", "source": 1},
]


def asked(**changes: Any) -> dict[str, Any]:
    return {"recipe": RECIPE, "grid": GRID, "tasks": TASKS, **changes}
