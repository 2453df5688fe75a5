"""``mergeyard sweep --submit`` and ``mergeyard evaluate --submit``: the same on the service's workers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import typer

from mergeyard import display
from mergeyard.answers import Evaluation, Sweep
from mergeyard.client import Client
from mergeyard.command import FAILED, print_json

Scoring = TypeVar("Scoring", Sweep, Evaluation)


def evaluate_there(client: Client, model: str, tasks: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Submit, wait and show the scores."""
    with client:
        made = client.submit_evaluation(model, uploaded(client, tasks))
        done = _wait(made, client.wait_evaluation)
    if as_json:
        print_json({"model": model, "scores": done["scores"], "id": done["id"]})
    else:
        display.show_scores(done["scores"])


def sweep_there(
    client: Client, recipe: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], tasks: Sequence[Mapping[str, Any]]
) -> Sweep:
    """Submit and wait."""
    with client:
        made = client.submit_sweep(recipe, grid, uploaded(client, tasks))
        return _wait(made, client.wait_sweep)


def uploaded(client: Client, tasks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tasks; those whose file is one on this machine as uploads, which are then called after it."""
    found: list[Mapping[str, Any]] = []
    for task in tasks:
        path = Path(task["file"])
        if path.is_file():
            reference = client.upload([path])["reference"]
            name = re.sub(r"[^\w.-]", "-", path.stem)[:64]
            found.append({"name": name, **task, "file": reference})
        else:
            found.append(task)
    return found


def _wait(made: Scoring, wait: Callable[[str, Callable[[Scoring], None]], Scoring]) -> Scoring:
    display.show_warnings(made["warnings"])
    display.note(f"submitted {made['id']}")
    watching: AbstractContextManager[Callable[[Any], None]] = display.watching_points(made["progress"]["points_total"])
    try:
        with watching as on_update:
            done = wait(made["id"], on_update)
    except KeyboardInterrupt:
        display.note(f"It goes on; `mergeyard events {made['id']}` shows it.")
        raise typer.Exit(130) from None
    if done["status"] != "succeeded":
        display.show_failure(done)
        raise typer.Exit(FAILED)
    return done
