"""/sweeps: one recipe over a grid of parameters, every point scored on tasks; and the merge of the point one likes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from app.api.answers import FROM_A_MERGE, FROM_A_SWEEP
from app.api.callers import Merging
from app.api.envelope import JsonBody, Running, read_json
from app.api.examples import SWEEP, json_body, schema_of
from app.api.jobs import Asked, Id, IdempotencyKey, accepted, queue, submitted_at
from app.api.merges import accept
from app.api.schemas import Merge
from app.api.scoring import as_sent, ask, endpoints
from app.api.scoring_schemas import Sweep, best_point, in_grid, sweep_rows
from app.api.service import Service, Serving
from app.errors import MergeyardError
from app.recipe import parse_recipe
from app.recipe.evaluation import MAX_TASKS
from app.records.job import Job, Kind
from app.records.key import Caller
from app.sources.resolver import Resolver
from app.sweeps.planning import PlannedSweep, SweptTask, plan_sweep

router = endpoints(Kind.SWEEP, Sweep)


class SweepRequest(Running):
    """A recipe, the grid it is swept over, and the tasks that every point is scored on."""

    recipe: dict[str, Any] | str = Field(description="The recipe as an object, or as YAML text; its `models` are swept")
    grid: dict[str, list[Any]] = Field(
        min_length=1,
        max_length=20,
        description="By parameter its values: `density`, `models[0].weight`, `merge_method`, …; at most 1,000 points",
    )
    tasks: list[SweptTask] = Field(min_length=1, max_length=MAX_TASKS)


class Chosen(Running):
    """Which point of a sweep is to be merged, and how."""

    point: int | None = Field(None, ge=0, lt=100_000, description="Its number; without one the best that is scored")
    force: bool = Field(False, description="Merge again even where you have an equal result")


@router.post(
    "",
    status_code=202,
    response_model=Sweep,
    summary="Submit a sweep",
    responses=accepted(FROM_A_SWEEP),
    openapi_extra=json_body(schema_of(SweepRequest), "Four points, one task", SWEEP),
)
async def submit_sweep(
    caller: Merging, body: JsonBody, serving: Serving, response: Response, idempotency_key: IdempotencyKey = None
) -> Sweep:
    """Plan every point of the grid and queue the sweep. Everything wrong with it is answered at once (422).

    No checkpoint is written: a worker merges each point into one model in memory and scores it. First it scores the
    base, and by itself each model that a task names (`source`), to tell what share of its gain a point keeps.
    """
    job = await queue(serving, caller, lambda: _asked(serving, caller, body, idempotency_key))
    submitted_at(response, job)
    return Sweep.of(job, serving.points.of(job.id))


@router.post(
    "/{id}/merges",
    status_code=202,
    response_model=Merge,
    summary="Merge a point of a sweep",
    responses=accepted(FROM_A_MERGE, 404, 409),
    openapi_extra=json_body(schema_of(Chosen), "The first point; without `point` the best", {"point": 0}),
)
async def merge_of_sweep(
    caller: Merging,
    id: Id,
    body: JsonBody,
    serving: Serving,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Merge:
    """Submit the merge of one of its points, as POST /merges would: what was scored in memory becomes an artifact."""
    chosen = read_json(Chosen, body, serving.webhook_hosts)
    envelope = chosen.model_dump(mode="json", exclude={"point"}, exclude_none=True)
    job = await merge_point(serving, caller, id, chosen.point, envelope, idempotency_key)
    submitted_at(response, job)
    return Merge.of(job)


async def merge_point(
    serving: Service,
    caller: Caller,
    job_id: str,
    number: int | None,
    envelope: Mapping[str, Any],
    idempotency_key: str | None = None,
) -> Job:
    """Submit the merge of a point, as POST /merges would; ``number`` None: of the best."""
    recipe = await run_in_threadpool(_recipe_of, serving, caller, job_id, number)
    body = json.dumps({**envelope, "recipe": recipe}).encode()
    return await accept(serving, caller, ("application/json", body), idempotency_key)


def _recipe_of(serving: Service, caller: Caller, job_id: str, number: int | None) -> Mapping[str, Any]:
    """That of a point. Raises `not_found`, `conflict` where none is scored yet, `request_invalid` for no such point."""
    job = serving.jobs.get(job_id, by=caller, kind=Kind.SWEEP)
    points = serving.points.of(job_id)
    if number is None:
        number = best_point(sweep_rows(job, points), points)
    if number is None:
        raise MergeyardError("conflict", "No point is scored yet, so none is the best; say which `point` you want.")
    known = in_grid(points)
    if number >= len(known):
        message = f"The sweep has {len(known)} points, counted from 0."
        raise MergeyardError("request_invalid", message, where="point")
    return serving.points.recipe(job_id, known[number].number)


def _asked(serving: Service, caller: Caller, body: bytes, key: str | None) -> Asked:
    request = read_json(SweepRequest, body, serving.webhook_hosts, with_recipe=True)
    recipe = parse_recipe(request.recipe).as_sent()
    asked = {"recipe": recipe, "grid": request.grid, "tasks": as_sent(request.tasks)}

    def plan(resolver: Resolver) -> PlannedSweep:
        return plan_sweep(recipe, request.grid, request.tasks, resolver)

    return ask(serving, caller, Kind.SWEEP, request, asked, key, plan)
