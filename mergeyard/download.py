"""Fetching an artifact: resumed where it stopped, and every byte verified before a file gets its name."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import httpx

from mergeyard.answers import ApiError, File, FileList, read_error

MANIFEST = "mergeyard.json"
PART = ".part"
PIECE_BYTES = 1 << 20
LONGEST_PAUSE = 60.0  # a rate limit counts minutes
TRANSIENT = frozenset({429, 502, 503, 504})

OnProgress = Callable[[int, int, str], None]  # bytes here and verified or on their way, bytes in all, the file's name


def fetch_all(
    http: httpx.Client, listing: FileList, directory: Path, retries: int, on_progress: OnProgress | None
) -> None:
    """Fetch the files of ``listing`` into ``directory``, the manifest first.

    Raises:
        ApiError: ``unsafe_name`` for a name that leads outside the directory, ``output_exists`` for a file that is
            there with other contents, ``digest_mismatch`` where bytes, listing and manifest do not agree.
    """
    for file in listing["items"]:
        _check_name(file["name"])
    directory.mkdir(parents=True, exist_ok=True)
    done = 0

    def report(name: str, size: int) -> None:
        if on_progress is not None:
            on_progress(done + size, listing["size"], name)

    # The manifest is named by the digest that the merge itself was published under; it then vouches for the rest.
    ordered = sorted(listing["items"], key=lambda file: file["name"] != MANIFEST)
    for file in ordered:
        report(file["name"], 0)
        _fetch(http, file, directory, retries, partial(report, file["name"]))
        if file["name"] == MANIFEST:
            _check_listing(listing, json.loads((directory / MANIFEST).read_bytes()))
        done += file["size"]
    report(ordered[-1]["name"] if ordered else "", 0)


def _fetch(http: httpx.Client, file: File, directory: Path, retries: int, on_size: Callable[[int], None]) -> None:
    target = directory / file["name"]
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(directory.resolve()):
        raise _unsafe(file["name"])
    if target.exists() or target.is_symlink():
        if target.is_file() and target.stat().st_size == file["size"] and _sha256(target) == file["sha256"]:
            return
        message = f"{target} is there already and differs; remove it or download into another folder."
        raise ApiError("output_exists", 0, message, fault="user")
    part = target.with_name(target.name + PART)
    resumed = part.is_file()
    if _complete(http, file, part, retries, on_size) != file["sha256"]:
        part.unlink()
        # What an interrupted download left behind may belong to something else; a fresh one has no such excuse.
        if not resumed or _complete(http, file, part, retries, on_size) != file["sha256"]:
            part.unlink(missing_ok=True)
            message = f"{file['name']} arrived with another digest than {file['sha256']}; nothing of it was kept."
            raise ApiError("digest_mismatch", 0, message)
    part.rename(target)


def _complete(http: httpx.Client, file: File, part: Path, retries: int, on_size: Callable[[int], None]) -> str:
    """Bring ``part`` to its full size and return its sha256. A broken connection is taken up again where it broke."""
    digest = hashlib.sha256()
    failures = 0
    with part.open("a+b") as stream:
        stream.seek(0)
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
        while stream.tell() < file["size"]:
            start = stream.tell()
            try:
                for piece in _pieces(http, file, start):
                    if stream.tell() + len(piece) > file["size"]:
                        return ""  # more than was announced: certainly not the file
                    stream.write(piece)
                    digest.update(piece)
                    on_size(stream.tell())
            except (httpx.TransportError, _TransientError) as error:
                failures = failures + 1 if stream.tell() == start else 1
                if failures > retries:
                    message = f"{file['name']} could not be fetched: {error or type(error).__name__}"
                    raise ApiError("unreachable", 0, f"{message}; run it again to go on from there.") from None
                time.sleep(max(0.25 * 2**failures, getattr(error, "after", 0.0)))
            except _RestartError:
                stream.truncate(0)
                stream.seek(0)
                digest = hashlib.sha256()
        if stream.tell() > file["size"]:
            return ""
    return digest.hexdigest()


class _RestartError(Exception):
    """The service sends the whole file: what is here is of another one."""


class _TransientError(Exception):
    """The service answered that it cannot just now, and perhaps ``after`` how many seconds it can."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


def _pieces(http: httpx.Client, file: File, start: int) -> Iterator[bytes]:
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": f'"{file["sha256"]}"'}
    with http.stream("GET", file["url"], headers=headers) as response:
        if response.status_code in TRANSIENT:
            wait = response.headers.get("retry-after", "")
            after = min(float(wait), LONGEST_PAUSE) if wait.isdigit() else 0.0
            raise _TransientError(f"the service answered {response.status_code}", after)
        if not response.is_success:
            response.read()
            raise read_error(response)
        if start and response.status_code != 206:
            raise _RestartError
        yield from response.iter_bytes()  # as they come: what is gathered into pieces is lost when it breaks
        if response.num_bytes_downloaded == 0:
            raise _TransientError("the service sent nothing")


def _check_listing(listing: FileList, manifest: dict[str, Any]) -> None:
    vouched = {file["name"]: (file["size"], file["sha256"]) for file in manifest["files"]}
    listed = {file["name"]: (file["size"], file["sha256"]) for file in listing["items"] if file["name"] != MANIFEST}
    if listed != vouched:
        message = f"The service's list of files is not what {MANIFEST} says; nothing more was fetched."
        raise ApiError("digest_mismatch", 0, message)


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    unsafe = (
        not parts
        or name != PurePosixPath(name).as_posix()
        or ".." in parts
        or name.startswith("/")
        or "\\" in name
        or "\x00" in name
        or PureWindowsPath(name).drive
    )
    if unsafe:
        raise _unsafe(name)


def _unsafe(name: str) -> ApiError:
    return ApiError("unsafe_name", 0, f"The service names a file {name!r}, which leads outside the folder; refused.")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
