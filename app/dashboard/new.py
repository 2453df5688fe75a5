"""/ui/new: a recipe, what is wrong with it beside its lines, what it would take, and its way into a queue."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Form, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel

from app.api.callers import Merging
from app.api.examples import RECIPE
from app.api.merges import accept, look_ahead
from app.api.service import Serving
from app.dashboard import shown
from app.dashboard.frame import page, page_router
from app.errors import MergeyardError, Problem
from app.recipe.difference import as_yaml
from app.recipe.lines import line_of

OF_THE_FORM = re.compile(r"(queue|priority|labels|pinned|force)\b.*")

router = page_router("/new")


class Filled(BaseModel):
    """The form as it was sent. ``once``: made with the form, so that a second click makes no second merge."""

    recipe: str = ""
    queue: str = "default"
    priority: str = "0"
    labels: str = ""
    pinned: bool = False
    force: bool = False
    once: str = ""
    action: Literal["plan", "submit"] = "plan"


@dataclass(frozen=True, slots=True)
class Line:
    """Of the recipe's text, with what is wrong there."""

    text: str
    problems: Sequence[Problem]


@router.get("")
def new_page(
    caller: Merging, request: Request, serving: Serving, like: Annotated[str, Query(max_length=96)] = ""
) -> Response:
    """An empty form, or one filled as the merge ``like`` was submitted."""
    filled = Filled(recipe=as_yaml(RECIPE), once=secrets.token_hex(16))
    if like:
        job = serving.jobs.get(like, by=caller)
        labels = "\n".join(f"{name}={value}" for name, value in job.labels.items())
        told = {"recipe": as_yaml(job.recipe), "queue": job.queue, "priority": str(job.priority), "labels": labels}
        filled = filled.model_copy(update={**told, "pinned": job.pinned})
    return _page(request, caller, filled)


@router.post("")
async def send(caller: Merging, request: Request, serving: Serving, filled: Annotated[Filled, Form()]) -> Response:
    """Checks the plan, as POST /merges/plan does, or submits, as POST /merges does."""
    try:
        body = ("application/json", json.dumps(envelope(filled)).encode())
        if filled.action == "submit":
            job = await accept(serving, caller, body, f"form-{filled.once}" if filled.once else None)
            return RedirectResponse(f"/ui/merges/{job.id}", status_code=303)
        plan = await look_ahead(serving, caller, body)
    except MergeyardError as error:
        return await run_in_threadpool(_page, request, caller, filled, error=error)
    return await run_in_threadpool(_page, request, caller, filled, plan=plan)


def envelope(filled: Filled) -> Mapping[str, Any]:
    """What the form means to POST /merges. Raises `request_invalid` where that cannot be told."""
    try:
        priority = int(filled.priority)
    except ValueError:
        message = "The priority is a whole number from -100 to 100."
        raise MergeyardError("request_invalid", message, where="priority") from None
    return {
        "recipe": filled.recipe.replace("\r\n", "\n"),
        "queue": filled.queue,
        "priority": priority,
        "labels": read_labels(filled.labels),
        "pinned": filled.pinned,
        "force": filled.force,
    }


def read_labels(text: str) -> Mapping[str, str]:
    """``team=search``, one on each line."""
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            message = f"{line[:80]!r} is no label: write a name, =, and a value on each line, such as team=search."
            raise MergeyardError("request_invalid", message, where="labels")
        found[name.strip()] = value.strip()
    return found


def beside_lines(text: str, problems: Sequence[Problem]) -> tuple[Sequence[Line], Sequence[Problem]]:
    """The text's lines with their problems, and the problems that have none."""
    texts = text.splitlines()
    by_line: dict[int, list[Problem]] = {}
    apart = []
    for problem in problems:
        line = None if OF_THE_FORM.fullmatch(problem.where or "") else line_of(text, problem.where or "")
        if line is None or not texts:
            apart.append(problem)
        else:
            by_line.setdefault(min(line, len(texts)), []).append(problem)  # what ends too soon is told after its end
    lines = [Line(line, by_line.get(number, ())) for number, line in enumerate(texts, 1)]
    return lines, apart


def _page(
    request: Request, caller: Any, filled: Filled, *, error: MergeyardError | None = None, plan: Any = None
) -> Response:
    problems = (
        []
        if error is None
        else error.problems or [Problem(code=error.code, message=error.message, where=error.where or "")]
    )
    lines, apart = beside_lines(filled.recipe.replace("\r\n", "\n"), problems)
    return page(
        request,
        caller,
        "new.html",
        status=200 if error is None else error.status,
        filled=filled,
        lines=lines if any(line.problems for line in lines) else (),
        apart=apart,
        problems=problems,
        plan=plan,
        size=shown.size,
    )
