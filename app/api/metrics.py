"""/metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import PlainTextResponse, Response

from app.api.callers import Scraping
from app.api.service import Serving

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=PlainTextResponse, summary="Figures for Prometheus")
def metrics(
    caller: Scraping,  # noqa: ARG001 — the scope is what is asked of it
    serving: Serving,
    request: Request,
) -> Response:
    """Of every owner's merges, so it has a scope of its own: `metrics`. docs/operations.md says what each means."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(serving.figures.registry), headers={"Content-Type": media_type})
