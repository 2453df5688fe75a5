"""Published artifacts, looked up by their merge's id: what is served, and what ``merge:ID`` names as a source."""

from __future__ import annotations

from app.artifacts.manifest import MANIFEST_NAME, StoredFile, commit_of
from app.artifacts.store import ArtifactStore
from app.errors import MergeyardError
from app.records.job import Job
from app.records.jobs import Jobs
from app.records.key import Caller
from app.sources.accepted import is_accepted
from app.sources.fetching.fetching import Fetching
from app.sources.source import FoundFiles, RemoteFile


def artifact_files(job: Job) -> dict[str, StoredFile]:
    """Every file of a published artifact by the name users see, the manifest first."""
    assert job.artifact is not None
    listed = [StoredFile(**file) for file in job.artifact["files"]]
    return {file.name: file for file in sorted(listed, key=lambda file: file.name != MANIFEST_NAME)}


def merged_files(jobs: Jobs, store: ArtifactStore, stored: Fetching, owner: str, job_id: str) -> FoundFiles:
    """A published merge of ``owner`` as a source (``merge:ID``); ``stored`` brings here what the store has elsewhere.

    Raises ``source_not_found``, and what ``stored`` raises.
    """
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
    here = {name: path for name, file in files.items() if (path := store.local_path(file.key)) is not None}
    if here:
        return FoundFiles(files=here)
    commit = commit_of(job.artifact["manifest_sha256"])
    there = [_remote(file, f"merge:{job_id}", commit) for name, file in files.items() if is_accepted(name)]
    return stored.begun(there)


def _remote(file: StoredFile, reference: str, commit: str) -> RemoteFile:
    return RemoteFile(
        origin="store",
        repository=reference,
        commit=commit,
        name=file.name,
        size=file.size,
        digest=file.sha256,
        key=file.key,
    )
