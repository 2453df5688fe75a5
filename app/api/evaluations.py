"""/evaluations: the scores of a model as it is, without a merge."""

from __future__ import annotations

from fastapi import Response
from pydantic import Field

from app.api.answers import FROM_AN_EVALUATION, JOB_HEADERS, LOCATION
from app.api.callers import Merging
from app.api.envelope import JsonBody, Running, canonical, read_json
from app.api.examples import EVALUATION, json_body, schema_of
from app.api.jobs import Asked, IdempotencyKey, Problem, describe, idempotency, queue
from app.api.scored import Evaluation, scoring_url
from app.api.scoring import endpoints, new_job
from app.api.service import Service, Serving
from app.recipe.evaluation import MAX_TASKS, TaskEntry
from app.records.job import Kind
from app.records.key import Caller
from app.sweeps.planning import plan_evaluation

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
    responses={
        202: {"headers": {**JOB_HEADERS, "Location": LOCATION}, "links": FROM_AN_EVALUATION},
        413: Problem,
        415: Problem,
        422: Problem,
        429: Problem,
        503: Problem,
        507: Problem,
    },
    openapi_extra=json_body(schema_of(EvaluationRequest), "A base with an adapter on it", EVALUATION),
)
async def submit_evaluation(
    caller: Merging, body: JsonBody, serving: Serving, response: Response, idempotency_key: IdempotencyKey = None
) -> Evaluation:
    """Check the model and the tasks, and queue the evaluation. Everything wrong with it is answered at once (422)."""
    job = await queue(serving, caller, lambda: _asked(serving, caller, body, idempotency_key))
    response.headers["Location"] = scoring_url(job)
    describe(response, job)
    return Evaluation.of(job, serving.points.of(job.id))


def _asked(serving: Service, caller: Caller, body: bytes, key: str | None) -> Asked:
    """The job to submit and its key, or the job that the key has made."""
    request = read_json(EvaluationRequest, body, serving.webhook_hosts)
    tasks = [task.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for task in request.tasks]
    asked = {"model": request.model, "tasks": tasks}
    made_by = idempotency(caller.owner, key, canonical({**request.canonical(), **asked, "kind": Kind.EVALUATION}))
    earlier = serving.jobs.earlier(made_by) if made_by else None
    if earlier is not None:
        return earlier
    merges: set[str] = set()
    planned = plan_evaluation(request.model, request.tasks, serving.resolver(caller.owner, merges))
    new = new_job(
        Kind.EVALUATION, asked, request, planned, owner=caller.owner, settings=serving.settings, merges=merges
    )
    return new, made_by, None
