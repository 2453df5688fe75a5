"""Published artifacts, looked up by their merge's id: what is served, and what ``merge:ID`` names as a source."""

from __future__ import annotations

from app.artifacts.manifest import MANIFEST_NAME, StoredFile
from app.artifacts.store import LocalStore
from app.errors import MergeyardError
from app.records.job import Job
from app.records.jobs import Jobs
from app.records.key import Caller
from app.sources.resolver import MergedFiles


def artifact_files(job: Job) -> dict[str, StoredFile]:
    """Every file of a published artifact by the name users see, the manifest first."""
    assert job.artifact is not None
    listed = [StoredFile(**file) for file in job.artifact["files"]]
    return {file.name: file for file in sorted(listed, key=lambda file: file.name != MANIFEST_NAME)}


def merged_files(jobs: Jobs, store: LocalStore, owner: str, job_id: str) -> MergedFiles:
    """A published merge of ``owner`` as a source (``merge:ID``). Raises ``source_not_found``."""
    try:
        job = jobs.get(job_id, by=Caller(owner=owner, scopes=frozenset()))
    except MergeyardError as error:
        if error.code != "not_found":
            raise
        raise MergeyardError("source_not_found", f"merge:{job_id} does not exist; GET /merges lists them.") from None
    if job.artifact is None:
        message = f"merge:{job_id} is {job.status}: only a succeeded merge can be a source."
        raise MergeyardError("source_not_found", message)
    files = artifact_files(job)
    return MergedFiles(files={name: store.path(file.key) for name, file in files.items()})
