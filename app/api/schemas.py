"""What the API answers with, as it is documented: one model a document, made from the records' frozen values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from app.artifacts.manifest import MANIFEST_NAME, StoredFile
from app.planning.plan import Plan, PlannedSource, ShardPlan
from app.records.following import Standing
from app.records.job import Event, Job, Listed, Stage, Status
from app.sources.catalogue import CatalogueEntry
from app.sources.safetensors import DTYPE_BYTES
from app.sources.uploads import Upload


class Document(BaseModel):
    model_config = ConfigDict(frozen=True)


class ProblemItem(Document):
    """One thing that is wrong, and where."""

    code: str = Field(examples=["parameter_invalid"])
    message: str
    where: str = Field(examples=["models[1].parameters.density"])


class ProblemDocument(Document):
    """RFC 9457. ``detail`` and ``where`` are the first problem's; ``problems`` has all of them."""

    type: str = Field(examples=["urn:mergeyard:problem:parameter_invalid"])
    title: str
    status: int
    detail: str
    instance: str
    code: str
    where: str
    fault: str = Field(description="user: change the request. system: try again, or tell the operator.")
    problems: list[ProblemItem]
    request_id: str


class Progress(Document):
    """Bytes of the result written so far. ``fraction`` is between 0 and 1."""

    bytes_done: int
    bytes_total: int
    fraction: float


class Failure(Document):
    """Why a merge failed."""

    code: str
    title: str
    detail: str
    where: str
    fault: str
    problems: list[ProblemItem]


class FailedAttempt(Document):
    """Why one attempt came to nothing. ``code`` as in errors; `worker_lost` is a crash, a kill or a lost connection."""

    attempt: int
    at: datetime
    code: str
    message: str


class ArtifactSummary(Document):
    """What a succeeded merge published. ``size`` is the bytes of all files, the manifest's included."""

    size: int
    files: int
    manifest_sha256: str


class Score(Document):
    """What the result reached on a task of the recipe."""

    name: str
    metric: str
    score: float = Field(description="0 to 1, more is better; of `nll` nats a token, less is better")
    standard_error: float
    examples: int


class MergeUrls(Document):
    self: str
    events: str
    cancel: str
    files: str
    archive: str


class JobSummary(Document):
    """What lists show of any kind of job."""

    id: str
    kind: str
    owner: str = Field(description="Whose key submitted it; `local` while there were no keys")
    status: Status
    stage: Stage | None
    method: str
    queue: str
    priority: int
    labels: dict[str, str]
    attempt: int
    max_attempts: int
    error: Failure | None
    pinned: bool = Field(description="It does not expire")
    expires_at: datetime | None = Field(description="When it will be deleted, unless it is pinned or in use then")
    fingerprint: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime


class MergeSummary(JobSummary):
    """A merge as lists show it."""

    progress: Progress
    artifact: ArtifactSummary | None
    reused: bool = Field(description="The artifact is one that an equal merge of yours had made before")
    fingerprint: str = Field(description="sha256 over the resolved recipe, its files' pins and the engine's version")
    urls: MergeUrls

    @classmethod
    def listed(cls, job: Listed) -> MergeSummary:
        return cls(**_summary(job))


class WebhookDocument(Document):
    """Who is told of which ends of a merge."""

    url: str
    events: list[str]


class Merge(MergeSummary):
    """A merge: one job, from its recipe to its artifact."""

    recipe: dict[str, Any] = Field(description="As submitted")
    webhook: WebhookDocument | None = Field(description="Who is told when it ends")
    failures: list[FailedAttempt] = Field(description="The attempts that failed, in order; hand-backs are none")
    retry_at: datetime | None = Field(
        description="While queued after a failure, or without room: the next attempt begins no sooner"
    )
    waits_for: str | None = Field(description="`disk` while queued because the store has too little room for it now")
    resolved: dict[str, Any] = Field(description="Every reference canonical, every default written out")
    estimates: dict[str, int]
    warnings: list[ProblemItem]
    evaluation: list[Score] = Field(description="The result's scores on the recipe's tasks; empty without any")

    @classmethod
    def of(cls, job: Job) -> Merge:
        return cls(
            **_summary(job),
            **job_details(job),
            recipe=dict(job.recipe),
            waits_for=job.waits_for,
            resolved=dict(job.resolved),
            evaluation=[Score(**score) for score in (job.artifact or {}).get("evaluation", [])],
        )


class MergePage(Document):
    """One page, newest first. ``next_cursor`` is null on the last page."""

    items: list[MergeSummary]
    next_cursor: str | None


class MergeEvent(Document):
    """Something that happened to a merge. ``id`` grows; ``type`` is stable."""

    id: int
    type: str
    at: datetime
    data: dict[str, Any]

    @classmethod
    def of(cls, event: Event) -> MergeEvent:
        return cls(id=event.id, type=event.type, at=event.at, data=dict(event.data))


class StreamProgress(Progress):
    """Where a merge stands, in an event stream: the data of `progress`, which has no number and is not kept."""

    status: Status
    stage: Stage | None
    attempt: int

    @classmethod
    def of(cls, standing: Standing) -> StreamProgress:
        done = min(standing.bytes_done, standing.bytes_total)
        return cls(
            bytes_done=done,
            bytes_total=standing.bytes_total,
            fraction=done / standing.bytes_total if standing.bytes_total else 0.0,
            status=standing.status,
            stage=standing.stage,
            attempt=standing.attempt,
        )


class EventPage(Document):
    """Events in order. ``after`` is what to ask for next time: the last id seen."""

    items: list[MergeEvent]
    after: int


class FileEntry(Document):
    name: str
    size: int
    sha256: str
    url: str


class FileList(Document):
    """The artifact's files, the manifest (mergeyard.json) first. ``manifest_sha256`` names the whole artifact."""

    items: list[FileEntry]
    size: int
    manifest_sha256: str

    @classmethod
    def of(cls, job_id: str, files: Mapping[str, StoredFile], manifest_sha256: str) -> FileList:
        items = [
            FileEntry(name=file.name, size=file.size, sha256=file.sha256, url=file_url(job_id, file.name))
            for file in files.values()
        ]
        return cls(items=items, size=sum(file.size for file in items), manifest_sha256=manifest_sha256)


class PlannedSourceDocument(Document):
    reference: str
    role: str
    size: int
    files: list[str]

    @classmethod
    def of(cls, source: PlannedSource) -> PlannedSourceDocument:
        return cls(
            reference=source.reference,
            role=source.role,
            size=sum(file.size for file in source.files),
            files=[file.name for file in source.files],
        )


class PlannedTensor(Document):
    """A tensor that the merge changes. ``sources`` are indices into the plan's ``sources``."""

    name: str
    shape: list[int]
    dtype: str
    sources: list[int]


class PlannedShard(Document):
    """An output file. ``size`` is the bytes of its tensors."""

    filename: str
    tensors: int
    size: int


class PlannedMerge(Document):
    """One document of a recipe: what is merged, and what it would change and write."""

    method: str
    base: PlannedSourceDocument
    sources: list[PlannedSourceDocument]
    touched: list[PlannedTensor]
    shards: list[PlannedShard]
    estimates: dict[str, int]


class EarlierMerge(PlannedMerge):
    """A document whose result others read, by this ``name``, and which is no part of the artifact."""

    name: str

    @classmethod
    def of(cls, plan: Plan) -> EarlierMerge:
        return cls(name=str(plan.reference), **_planned(plan))


class MergePlan(PlannedMerge):
    """What a merge would do, found from headers alone."""

    fingerprint: str
    reserved_bytes: int = Field(description="What POST /merges would reserve of the store until the merge has ended")
    warnings: list[ProblemItem]
    recipe: dict[str, Any] = Field(description="The resolved recipe: it can be submitted as it is")
    earlier: list[EarlierMerge] = Field(description="The recipe's documents before the last, in the order of merging")

    @classmethod
    def of(cls, plan: Plan) -> MergePlan:
        return cls(
            **_planned(plan),
            fingerprint=plan.digest,
            reserved_bytes=plan.estimates.disk_bytes,
            warnings=[ProblemItem(**warning.as_json()) for warning in plan.warnings],
            recipe=dict(plan.recipe),
            earlier=[EarlierMerge.of(document) for document in plan.earlier],
        )


class UploadedFile(Document):
    name: str
    size: int
    sha256: str


class UploadDocument(Document):
    """A model, an adapter or a task file that was uploaded. ``reference`` goes into recipes."""

    reference: str = Field(examples=["upload:sha256-9f2c…"])
    kind: str = Field(description="model, adapter or task")
    files: list[UploadedFile]

    @classmethod
    def of(cls, upload: Upload) -> UploadDocument:
        files = [UploadedFile(name=file.name, size=file.size, sha256=file.sha256) for file in upload.files]
        return cls(reference=upload.reference, kind=upload.kind, files=files)


class SourceEntry(Document):
    """Something recipes may name. ``detail`` is a model's architecture, or the base an adapter was trained on."""

    reference: str
    kind: str = Field(description="model or adapter")
    size: int
    detail: str

    @classmethod
    def of(cls, entry: CatalogueEntry) -> SourceEntry:
        return cls(reference=entry.reference, kind=entry.kind, size=entry.size, detail=entry.detail)


class SourceList(Document):
    """Models and adapters below the roots, and uploads."""

    items: list[SourceEntry]


class Health(Document):
    status: str = Field(examples=["ok"])
    version: str


class Readiness(Document):
    """Each part's state: ``ok``, or what is wrong."""

    status: str
    database: str
    queue: str
    store: str
    data: str


def job_url(job: Listed) -> str:
    return f"/{job.kind}s/{job.id}"


def merge_url(job_id: str) -> str:
    return f"/merges/{job_id}"


def file_url(job_id: str, name: str) -> str:
    return f"{merge_url(job_id)}/files/{quote(name)}"


def estimates(plan: Plan) -> dict[str, int]:
    """The plan's estimates as they are stored and shown."""
    return asdict(plan.estimates)


def _planned(plan: Plan) -> dict[str, Any]:
    touched = [
        PlannedTensor(
            name=tensor.name,
            shape=list(tensor.shape),
            dtype=tensor.dtype,
            sources=[part.source for part in tensor.contributions if part.changes],
        )
        for tensor in plan.tensors
        if any(part.changes for part in tensor.contributions)
    ]
    return {
        "method": plan.method,
        "base": PlannedSourceDocument.of(plan.base),
        "sources": [PlannedSourceDocument.of(source) for source in plan.sources],
        "touched": touched,
        "shards": [_shard(shard) for shard in plan.shards],
        "estimates": estimates(plan),
    }


def job_summary(job: Listed) -> dict[str, Any]:
    """The fields of ``JobSummary``."""
    return {
        "id": job.id,
        "kind": job.kind,
        "owner": job.owner,
        "status": job.status,
        "stage": job.stage,
        "method": job.method,
        "queue": job.queue,
        "priority": job.priority,
        "labels": dict(job.labels),
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "error": _failure(job.error),
        "pinned": job.pinned,
        "expires_at": None if job.pinned else job.expires_at,
        "fingerprint": job.plan_digest,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "updated_at": job.updated_at,
    }


def job_details(job: Job) -> dict[str, Any]:
    """What the documents of all kinds have beside their summary."""
    return {
        "webhook": None if job.webhook is None else WebhookDocument(**job.webhook),
        "failures": [FailedAttempt(**failure) for failure in job.failures],
        "retry_at": job.retry_at,
        "estimates": dict(job.estimates),
        "warnings": [ProblemItem(**warning) for warning in job.warnings],
    }


def _summary(job: Listed) -> dict[str, Any]:
    url = job_url(job)
    done = job.total_bytes if job.status is Status.SUCCEEDED else min(job.progress_bytes, job.total_bytes)
    return {
        **job_summary(job),
        "progress": Progress(
            bytes_done=done,
            bytes_total=job.total_bytes,
            fraction=done / job.total_bytes if job.total_bytes else 0.0,
        ),
        "artifact": _artifact(job.artifact),
        "reused": job.reused,
        "urls": MergeUrls(
            self=url,
            events=f"{url}/events",
            cancel=f"{url}/cancel",
            files=f"{url}/files",
            archive=f"{url}/archive.tar",
        ),
    }


def _failure(error: Mapping[str, Any] | None) -> Failure | None:
    if error is None:
        return None
    return Failure(
        code=error["code"],
        title=error["title"],
        detail=error["message"],
        where=error["where"],
        fault=error["fault"],
        problems=[ProblemItem(**problem) for problem in error["problems"]],
    )


def _artifact(artifact: Mapping[str, Any] | None) -> ArtifactSummary | None:
    if artifact is None:
        return None
    names = {file["name"] for file in artifact["files"]} | {MANIFEST_NAME}
    return ArtifactSummary(size=artifact["size"], files=len(names), manifest_sha256=artifact["manifest_sha256"])


def _shard(shard: ShardPlan) -> PlannedShard:
    size = sum(math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype] for tensor in shard.tensors)
    return PlannedShard(filename=shard.filename, tensors=len(shard.tensors), size=size)
