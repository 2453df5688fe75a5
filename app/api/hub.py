"""Merges as repositories of the Hugging Face hub: what its clients ask of a server that ``HF_ENDPOINT`` names.

``merges/<id>`` is a merge's artifact, ``aliases/<name>`` what an alias points to. Revisions are ``main`` and commits:
40 hex of the manifest's digest, so the same commit always has the same files. As observed in huggingface_hub 0.36 to
2.4, a miss without ``X-Error-Code`` reads as a network failure, and a redirect to another port takes the key along.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from app.api.answers import ASKED_OF_DOWNLOADS
from app.api.callers import Reading
from app.api.files import FILE, send_file
from app.api.jobs import Problem
from app.api.schemas import Document
from app.api.service import Service, Serving
from app.artifacts.manifest import StoredFile, commit_of
from app.errors import MergeyardError
from app.records.job import Job
from app.records.key import Caller
from app.records.published import artifact_files

NAME = re.compile(r"[A-Za-z0-9_.-]{1,96}")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"
PAGE = 1000

# Any text is taken: what is no name of ours is a repository that does not exist, and never a 422.
Namespace = Annotated[str, Path(description="merges or aliases", examples=["merges"])]
Name = Annotated[str, Path(description="A merge's id, or an alias", examples=["mrg-…"])]
Revision = Annotated[str, Path(description="main, or a commit", examples=["main"])]
FilePath = Annotated[str, Path(description="A file's name", examples=["config.json"])]

router = APIRouter(tags=["hub"])


class Lfs(Document):
    """A file's digest as sha256 hex. ``pointer_size`` is that of the pointer which git would hold for it."""

    sha256: str
    size: int
    pointer_size: int = Field(serialization_alias="pointerSize")


class Sibling(Document):
    rfilename: str
    size: int
    blob_id: str = Field(serialization_alias="blobId")
    lfs: Lfs


class Model(Document):
    """A repository at one commit."""

    id: str = Field(examples=["merges/mrg-…"])
    model_id: str = Field(serialization_alias="modelId")
    author: str
    sha: str = Field(description="The commit")
    created_at: datetime = Field(serialization_alias="createdAt")
    last_modified: datetime = Field(serialization_alias="lastModified")
    private: bool
    gated: bool
    disabled: bool
    tags: list[str]
    siblings: list[Sibling]


class TreeLfs(Document):
    oid: str = Field(description="sha256 hex")
    size: int
    pointer_size: int = Field(serialization_alias="pointerSize")


class TreeEntry(Document):
    """A file, or a folder (``size`` 0, no ``lfs``). ``oid`` is a file's id as git would have it."""

    type: str
    path: str
    size: int
    oid: str
    lfs: TreeLfs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository at one commit."""

    id: str
    commit: str
    job: Job
    files: Mapping[str, StoredFile]


@router.get("/api/models/{namespace}/{name}", response_model=Model, summary="Look at a model", responses={404: Problem})
def get_model(caller: Reading, namespace: Namespace, name: Name, serving: Serving) -> Model:
    """A merge or an alias as a model on the hub, at `main`."""
    return _model(_repository(serving, caller, namespace, name, MAIN), caller)


@router.get(
    "/api/models/{namespace}/{name}/revision/{revision:path}",
    response_model=Model,
    summary="Look at a model at a revision",
    responses={404: Problem},
)
def get_model_at(caller: Reading, namespace: Namespace, name: Name, revision: Revision, serving: Serving) -> Model:
    """As it was at a commit."""
    return _model(_repository(serving, caller, namespace, name, revision), caller)


Recursive = Annotated[bool, Query(description="Also what is in its folders")]
Cursor = Annotated[str, Query(max_length=1000, description="From `Link` of the page before")]
Limit = Annotated[int, Query(ge=1, le=PAGE)]
TREE: dict[str, Any] = {
    "response_model": list[TreeEntry],
    "response_model_exclude_none": True,
    "responses": {404: Problem, 422: Problem},
}


@router.get("/api/models/{namespace}/{name}/tree/{revision}", summary="List a model's files", **TREE)
def get_tree(
    caller: Reading,
    namespace: Namespace,
    name: Name,
    revision: Revision,
    serving: Serving,
    request: Request,
    response: Response,
    recursive: Recursive = False,
    cursor: Cursor = "",
    limit: Limit = PAGE,
) -> list[TreeEntry]:
    """Files and folders by name. `Link: rel="next"` leads to the next page, at the commit of this one."""
    found = _repository(serving, caller, namespace, name, revision)
    return _page(request, response, found, "", _entries(found.files, "", recursive), cursor, limit)


@router.get("/api/models/{namespace}/{name}/tree/{revision}/{path:path}", summary="List a model's folder", **TREE)
def get_folder(
    caller: Reading,
    namespace: Namespace,
    name: Name,
    revision: Revision,
    path: FilePath,
    serving: Serving,
    request: Request,
    response: Response,
    recursive: Recursive = False,
    cursor: Cursor = "",
    limit: Limit = PAGE,
) -> list[TreeEntry]:
    """As the whole tree."""
    found = _repository(serving, caller, namespace, name, revision)
    folder = path.strip("/")
    entries = _entries(found.files, f"{folder}/" if folder else "", recursive)
    if not entries:
        raise _miss("EntryNotFound", "The model has no folder of this name at this revision.", found.commit)
    return _page(request, response, found, folder, entries, cursor, limit)


# No 409: a merge without files is no repository.
RESOLVE: dict[str, Any] = {
    "response_class": Response,
    "responses": {status: answer for status, answer in FILE.items() if status != 409},
    "openapi_extra": ASKED_OF_DOWNLOADS,
}


@router.get("/{namespace}/{name}/resolve/{revision}/{path:path}", summary="Download a model's file", **RESOLVE)
@router.head("/{namespace}/{name}/resolve/{revision}/{path:path}", summary="Look at a model's file", **RESOLVE)
async def resolve(
    caller: Reading,
    namespace: Namespace,
    name: Name,
    revision: Revision,
    path: FilePath,
    request: Request,
    serving: Serving,
) -> Response:
    """As `/merges/{id}/files/{path}`, with `X-Repo-Commit`. A miss says which in `X-Error-Code`: `EntryNotFound`,
    `RevisionNotFound` or `RepoNotFound`.
    """
    found = await run_in_threadpool(_repository, serving, caller, namespace, name, revision)
    file = found.files.get(path)
    if file is None:
        raise _miss("EntryNotFound", "The model has no file of this name at this revision.", found.commit)
    return await send_file(request, serving, caller, found.job.id, file, {"X-Repo-Commit": found.commit})


@router.api_route("/api/models/{name}", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/api/models/{name}/revision/{rest:path}", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/api/models/{name}/tree/{rest:path}", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/{name}/resolve/{rest:path}", methods=["GET", "HEAD"], include_in_schema=False)
def without_namespace(caller: Reading, name: str) -> None:  # noqa: ARG001 — the scope is what is asked of the caller
    """Models such as gpt2: none of ours."""
    raise _no_repository()


def _repository(serving: Service, caller: Caller, namespace: str, name: str, revision: str) -> Repository:
    """Raises MergeyardError ``not_found`` with the X-Error-Code that clients read."""
    find = FINDERS.get(namespace)
    if find is None or not NAME.fullmatch(name):
        raise _no_repository()
    try:
        job = find(serving, caller, name, revision)
    except MergeyardError as error:
        if error.code != "not_found":
            raise
        raise _no_repository() from None
    if job is None:
        raise _miss("RevisionNotFound", "The model has no such revision, or no longer: its merge was deleted.")
    if job.artifact is None:
        raise _no_repository(f"The merge is {job.status}: only a succeeded one has files.")
    return Repository(
        id=f"{namespace}/{name}",
        commit=commit_of(job.artifact["manifest_sha256"]),
        job=job,
        files=artifact_files(job),
    )


def _merge(serving: Service, caller: Caller, name: str, revision: str) -> Job | None:
    """The merge; None where ``revision`` is not its own. Raises ``not_found``."""
    job = serving.jobs.get(name, by=caller)
    known = job.artifact is None or revision in (MAIN, commit_of(job.artifact["manifest_sha256"]))
    return job if known else None


def _aliased(serving: Service, caller: Caller, name: str, revision: str) -> Job | None:
    """The merge that the alias points to, or the one of an earlier ``revision``. Raises ``not_found``."""
    current = serving.aliases.target(name, by=caller)
    if revision == MAIN:
        return current
    return serving.aliases.earlier(name, revision, by=caller) if COMMIT.fullmatch(revision) else None


FINDERS = {"merges": _merge, "aliases": _aliased}


def _model(found: Repository, caller: Caller) -> Model:
    finished = found.job.finished_at or found.job.updated_at
    return Model(
        id=found.id,
        model_id=found.id,
        author=found.id.partition("/")[0],
        sha=found.commit,
        created_at=finished,
        last_modified=finished,
        private=caller.key_id is not None,
        gated=False,
        disabled=False,
        tags=[],
        siblings=[_sibling(file) for file in found.files.values()],
    )


def _sibling(file: StoredFile) -> Sibling:
    pointer = _pointer(file)
    lfs = Lfs(sha256=file.sha256, size=file.size, pointer_size=len(pointer))
    return Sibling(rfilename=file.name, size=file.size, blob_id=_git_id("blob", pointer), lfs=lfs)


def _entries(files: Mapping[str, StoredFile], prefix: str, recursive: bool) -> list[TreeEntry]:
    """What is below ``prefix`` ("" or "folder/"), by path."""
    inside = [name for name in files if name.startswith(prefix)]
    folders = {folder for name in inside for folder in _folders(name) if len(folder) > len(prefix)}
    found = [_file_entry(files[name]) for name in inside] + [_folder_entry(folder) for folder in folders]
    below = [entry for entry in found if recursive or "/" not in entry.path[len(prefix) :]]
    return sorted(below, key=lambda entry: entry.path)


def _folders(name: str) -> Iterable[str]:
    parts = name.split("/")[:-1]
    return ("/".join(parts[: count + 1]) for count in range(len(parts)))


def _file_entry(file: StoredFile) -> TreeEntry:
    pointer = _pointer(file)
    lfs = TreeLfs(oid=file.sha256, size=file.size, pointer_size=len(pointer))
    return TreeEntry(type="file", path=file.name, size=file.size, oid=_git_id("blob", pointer), lfs=lfs)


def _folder_entry(path: str) -> TreeEntry:
    return TreeEntry(type="directory", path=path, size=0, oid=_git_id("tree", path.encode()))


def _page(
    request: Request,
    response: Response,
    found: Repository,
    folder: str,
    entries: list[TreeEntry],
    cursor: str,
    limit: int,
) -> list[TreeEntry]:
    """The entries after ``cursor`` (a path). An alias may move between two pages: the link names the commit."""
    rest = [entry for entry in entries if entry.path > cursor]
    if len(rest) > limit:
        place = f"/api/models/{found.id}/tree/{found.commit}" + (f"/{quote(folder)}" if folder else "")
        query = request.url.include_query_params(cursor=rest[limit - 1].path).query
        response.headers["Link"] = f'<{str(request.base_url).rstrip("/")}{place}?{query}>; rel="next"'
    response.headers["X-Repo-Commit"] = found.commit
    return rest[:limit]


def _pointer(file: StoredFile) -> bytes:
    """What git would hold of a file on the hub (git-lfs's specification, v1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.size}\n".encode()


def _git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0%s" % (kind.encode(), len(content), content), usedforsecurity=False).hexdigest()


def _no_repository(message: str = "There is no such model here: merges/ID and aliases/NAME are.") -> MergeyardError:
    return _miss("RepoNotFound", message)


def _miss(code: str, message: str, commit: str = "") -> MergeyardError:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return MergeyardError("not_found", message, headers={**headers, **({"X-Repo-Commit": commit} if commit else {})})
