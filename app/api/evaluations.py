"""/evaluations: the scores of a model as it is, without a merge."""

from __future__ import annotations

from fastapi import Response
from pydantic import Field

from app.api.answers import FROM_AN_EVALUATION
from app.api.callers import Merging
from app.api.envelope import JsonBody, Running, read_json
from app.api.examples import EVALUATION, json_body, schema_of
from app.api.jobs import Asked, IdempotencyKey, accepted, queue, submitted_at
from app.api.scoring import as_sent, ask, endpoints
from app.api.scoring_schemas import Evaluation
from app.api.service import Service, Serving
from app.recipe.evaluation import MAX_TASKS, TaskEntry
from app.records.job import Kind
from app.records.key import Caller
from app.sources.resolver import Resolver
from app.sweeps.planning import PlannedSweep, plan_evaluation

router = endpoints(Kind.EVALUATION, Evaluation)


class EvaluationRequest(Running):
    """A model and the tasks that it is scored on."""

    model: str = Field(
        min_length=1,
        max_length=2000,
        description="models:PATH, upload:DIGEST, merge:ID, hf:ORG/NAME, s3://…; of MODEL+ADAPTER their merge",
    )
    tasks: list[TaskEntry] = Field(min_length=1, max_length=MAX_TASKS)


@router.post(
    "",
    status_code=202,
    response_model=Evaluation,
    summary="Submit an evaluation",
    responses=accepted(FROM_AN_EVALUATION),
    openapi_extra=json_body(schema_of(EvaluationRequest), "A base with an adapter on it", EVALUATION),
)
async def submit_evaluation(
    caller: Merging, body: JsonBody, serving: Serving, response: Response, idempotency_key: IdempotencyKey = None
) -> Evaluation:
    """Check the model and the tasks, and queue the evaluation. Everything wrong with it is answered at once (422)."""
    job = await queue(serving, caller, lambda: _asked(serving, caller, body, idempotency_key))
    submitted_at(response, job)
    return Evaluation.of(job, serving.points.of(job.id))


def _asked(serving: Service, caller: Caller, body: bytes, key: str | None) -> Asked:
    request = read_json(EvaluationRequest, body, serving.webhook_hosts)
    asked = {"model": request.model, "tasks": as_sent(request.tasks)}

    def plan(resolver: Resolver) -> PlannedSweep:
        return plan_evaluation(request.model, request.tasks, resolver)

    return ask(serving, caller, Kind.EVALUATION, request, asked, key, plan)
