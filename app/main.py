"""The service as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from starlette.routing import Route

import app
from app.api import (
    aliases,
    audit,
    docs,
    errors,
    evaluations,
    files,
    health,
    hub,
    merges,
    metrics,
    openapi,
    queues,
    session,
    sources,
    sweeps,
    uploads,
    webhooks,
    workers,
)
from app.api.callers import Callers
from app.api.failures import Failures
from app.api.figures import Figures
from app.api.gate import Gate
from app.api.limits import RateLimits
from app.api.middleware import BodyLimit, Measured, RequestIds
from app.api.readiness import Readiness
from app.api.service import Service
from app.api.streams import Streams
from app.api.turns import Turns
from app.artifacts.opening import open_store
from app.dashboard.frame import Pages
from app.dashboard.pages import ROUTERS as PAGES
from app.records.aliases import Aliases
from app.records.audit import Audit
from app.records.bell import Bell
from app.records.database import Database
from app.records.deliveries import Deliveries
from app.records.following import Following
from app.records.janitor import Janitor
from app.records.jobs import Jobs
from app.records.keys import Keys
from app.records.owned import OwnedUploads, stored_uploads
from app.records.points import Points
from app.records.queues import Queues
from app.records.quotas import Quotas
from app.records.sessions import Sessions
from app.records.workers import Workers
from app.settings import Settings
from app.sources.hub.hub import Hub, HubSettings
from app.sources.uploads import UploadStore
from app.webhooks.courier import Courier
from app.webhooks.outbound import Allowed
from app.webhooks.signing import read_secrets

UPLOADS_AT_ONCE = 8  # more wait their turn
CATCHING_UP_AT_ONCE = 4  # event streams that read what happened before

DESCRIPTION = """\
Turns a library of specialist LoRA adapters and fine-tuned checkpoints into one deployable model.
`POST` a recipe to `/merges`, poll `/merges/{id}`, download the files. Every error is a problem document (RFC 9457)
with a stable `code`.
"""


def create_app(settings: Settings) -> FastAPI:
    """The application. Nothing is opened before its lifespan starts, and nothing stays open after it.

    The database must be migrated (``mergeyard migrate``); until it is, /readyz and every request that needs it say so.
    """

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        service = open_service(settings)
        janitor = Janitor(
            service.jobs,
            service.bell,
            settings.janitor_interval,
            service.store,
            service.uploads,
            stalled_after=settings.stalled_seconds,
        )
        api.state.service = service
        api.state.upload_limiter = CapacityLimiter(UPLOADS_AT_ONCE)
        api.state.catch_up_limiter = CapacityLimiter(CATCHING_UP_AT_ONCE)
        janitor.start()
        tasks = [asyncio.create_task(service.streams.run())]
        if service.webhook_hosts.anybody:
            secrets = read_secrets(settings.webhook_secret)
            count = service.figures.note_webhook
            courier = Courier(service.deliveries, service.webhook_hosts, secrets, count=count)
            tasks.append(asyncio.create_task(courier.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)  # none is in the middle of the database when that closes
            await run_in_threadpool(janitor.stop)
            await run_in_threadpool(service.failures.flush)
            service.limits.close()
            service.bell.close()
            service.hub.close()
            service.database.close()

    api = FastAPI(
        title="Mergeyard",
        version=app.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
    )
    # Added last is outermost.
    api.add_middleware(BodyLimit, default=settings.max_body_bytes, limits={"/uploads": settings.max_upload_bytes})
    api.add_middleware(Gate)
    api.add_middleware(RequestIds)
    api.add_middleware(Pages)
    api.add_middleware(Measured)
    resources = (
        merges,
        files,
        sweeps,
        evaluations,
        aliases,
        hub,
        uploads,
        sources,
        queues,
        workers,
        webhooks,
        session,
        audit,
        health,
        metrics,
        docs,
    )
    routers = [*(resource.router for resource in resources), *PAGES]
    for router in routers:
        api.include_router(router)
    openapi.install(api)
    errors.install(api, [route for router in routers for route in router.routes if isinstance(route, Route)])
    return api


def open_service(settings: Settings) -> Service:
    """Everything the endpoints work with, made from settings. Connects to nothing yet."""
    database = Database(settings.database, answer_seconds=settings.database_seconds)
    jobs = Jobs(database, retry_seconds=settings.retry_seconds)
    store = open_store(settings)
    keys, sessions, entries = Keys(database), Sessions(database), Audit(database)
    bell = Bell(settings.broker)
    quotas = Quotas(database)
    readiness = Readiness(database, bell, store=store, data=settings.root)
    # a bucket has no disk to tell of
    folders = {"data": settings.root} if settings.bucket else {"store": settings.artifacts, "data": settings.root}
    figures = Figures(database, readiness, quotas, folders, settings.quota_bytes)
    return Service(
        settings=settings,
        database=database,
        jobs=jobs,
        points=Points(database),
        queues=Queues(database),
        workers=Workers(database),
        aliases=Aliases(database),
        bell=bell,
        hub=Hub(HubSettings.of(settings)),
        store=store,
        uploads=UploadStore(
            settings.uploads, keep_free=settings.min_free_bytes, stored=stored_uploads(store, settings)
        ),
        uploaded=OwnedUploads(database),
        quotas=quotas,
        planning=Turns(settings.plans_at_once, settings.plan_wait_seconds),
        keys=keys,
        sessions=sessions,
        audit=entries,
        callers=Callers(keys, sessions),
        limits=RateLimits(settings),
        failures=Failures(entries),
        readiness=readiness,
        figures=figures,
        streams=Streams(
            Following(database),
            figures.open_streams,
            most=settings.max_streams,
            most_of_one=settings.max_streams_per_key,
        ),
        webhook_hosts=Allowed.read(settings.webhook_hosts, settings.webhook_private_hosts),
        deliveries=Deliveries(database),
    )
