"""Webhooks: what an owner's receiver needs, and what was sent of a merge."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter, Response
from pydantic import Field

from app.api.callers import Merging, Reading
from app.api.jobs import Id, Problem
from app.api.schemas import Document
from app.api.service import Service, Serving
from app.records.deliveries import Delivery
from app.records.job import Kind
from app.records.key import Caller
from app.records.outbox import DeliveryState
from app.webhooks.signing import owners_secret, read_secrets

router = APIRouter(tags=["webhooks"])


class WebhookSettings(Document):
    """What webhooks of this owner are signed with, and where they may go."""

    enabled: bool
    hosts: list[str] = Field(description="Allowed hosts; `*.domain` is any host of a domain, but not the domain itself")
    secrets: list[str] = Field(description="Each signs every webhook; the first is the current one")


class AttemptDocument(Document):
    """One request. ``status`` is the answer's, ``error`` says why it was no 2xx."""

    at: datetime
    status: int | None
    error: str | None


class DeliveryDocument(Document):
    """One webhook. ``id`` is its `webhook-id`, the same at every attempt."""

    id: str
    type: str = Field(examples=["merge.succeeded"])
    url: str
    state: DeliveryState
    attempts: list[AttemptDocument]
    next_attempt_at: datetime | None
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, delivery: Delivery) -> DeliveryDocument:
        return cls(
            id=delivery.id,
            type=delivery.type,
            url=delivery.url,
            state=delivery.state,
            attempts=[AttemptDocument(at=made.at, status=made.status, error=made.error) for made in delivery.attempts],
            next_attempt_at=delivery.next_at,
            created_at=delivery.created_at,
            finished_at=delivery.finished_at,
        )


class DeliveryList(Document):
    """A job's webhooks, oldest first."""

    items: list[DeliveryDocument]


@router.get("/webhooks", response_model=WebhookSettings, summary="How are webhooks signed, and where may they go?")
def webhook_settings(caller: Merging, serving: Serving, response: Response) -> WebhookSettings:
    """The secrets are your own, and check your webhooks alone. Keep them as you keep keys."""
    response.headers["Cache-Control"] = "no-store"
    allowed = serving.webhook_hosts
    secrets = read_secrets(serving.settings.webhook_secret) if allowed.anybody else ()
    return WebhookSettings(
        enabled=allowed.anybody,
        hosts=[*allowed.public, *allowed.private],
        secrets=[owners_secret(secret, caller.owner) for secret in secrets],
    )


@router.get(
    "/merges/{id}/webhooks", response_model=DeliveryList, summary="What was a webhook told?", responses={404: Problem}
)
def merge_webhooks(caller: Reading, id: Id, serving: Serving) -> DeliveryList:
    """The webhooks of a merge that has ended, with every attempt. Empty before, and where it has no webhook."""
    return deliveries_of(serving, caller, id, Kind.MERGE)


def deliveries_of(serving: Service, caller: Caller, job_id: str, kind: Kind) -> DeliveryList:
    """What the webhook of a job was told. `not_found` as in ``Jobs.get``."""
    found = serving.deliveries.of(job_id, by=caller, kind=kind)
    return DeliveryList(items=[DeliveryDocument.of(delivery) for delivery in found])
