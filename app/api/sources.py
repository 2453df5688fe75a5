"""/sources: what recipes may name."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.callers import Reading
from app.api.schemas import SourceEntry, SourceList
from app.api.service import Serving
from app.records.owned import stored_uploads
from app.sources.catalogue import catalogue

router = APIRouter(prefix="/sources", tags=["sources"])


@router.get("", response_model=SourceList, summary="List models and adapters")
def list_sources(caller: Reading, serving: Serving) -> SourceList:
    """Every model and adapter below the roots and among your uploads, by the reference that names it in a recipe."""
    uploads = [serving.settings.uploads / digest for digest in serving.uploaded.of(caller.owner)]
    found = catalogue(serving.settings.roots, uploads)
    if (stored := stored_uploads(serving.store, serving.settings)) is not None:
        elsewhere = [stored.entry(upload.name) for upload in uploads if not upload.is_dir()]
        found = sorted((*found, *filter(None, elsewhere)), key=lambda entry: entry.reference)
    return SourceList(items=[SourceEntry.of(entry) for entry in found])
