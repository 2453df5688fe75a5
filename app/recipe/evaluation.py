"""What a recipe asks of its result: tasks to score it on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from app.tasks.task import Metric

MAX_TASKS = 50
LONGEST_NAME = 64
NAME = rf"^[\w.-]{{1,{LONGEST_NAME}}}$"


class TaskEntry(BaseModel):
    """One task: its ``file`` and how its answers are judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(None, pattern=NAME, description="Default: the file's name")
    file: str = Field(min_length=1, max_length=1000, description="models:PATH.jsonl, upload:DIGEST or shipped:NAME")
    metric: Metric = Field("exact_match", description="How an answer is judged; docs/evaluation.md has them all")
    limit: int | None = Field(None, ge=1, le=20_000, strict=True, description="The first examples alone")
    max_new_tokens: int = Field(128, ge=1, le=8192, strict=True, description="The longest answer that is written")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Of the file; another one is refused")


class Evaluation(BaseModel):
    """Scores of the result, made before it is published."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[TaskEntry, ...] = Field(min_length=1, max_length=MAX_TASKS, description="What to score it on")

    @field_validator("tasks", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("must be a list of tasks, each with its `file`")
        return value
