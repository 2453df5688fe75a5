"""Fetching an artifact: resumed where it stopped, several files at once, and every byte verified before a file gets its
name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Event, Lock
from typing import Any, Protocol

import httpx

from mergeyard.answers import File, FileList
from mergeyard.calls import RETRIED_STATUSES, pause_before, retry_after
from mergeyard.errors import DownloadError, UnavailableError, read_error

MANIFEST = "mergeyard.json"
PART = ".part"
PIECE_BYTES = 1 << 20
REDIRECT = 307


class OnProgress(Protocol):
    """Told the bytes that are here, those in all, and the file that moved. Called by one thread at a time."""

    def __call__(self, done: int, total: int, name: str, /) -> object: ...


class Download:
    """The files of ``listing`` on their way into ``directory``."""

    def __init__(
        self, http: httpx.Client, listing: FileList, directory: Path, retries: int, on_progress: OnProgress | None
    ) -> None:
        self._http, self._listing, self._directory, self._retries = http, listing, directory, retries
        self._on_progress = on_progress
        self._here: dict[str, int] = {}
        self._lock = Lock()
        self._stopped = Event()

    def run(self, at_once: int = 4) -> None:
        """Fetch them, the manifest first.

        Raises:
            DownloadError: ``unsafe_name`` for a name that leads outside the directory, ``output_exists`` for a file
                that is there with other contents, ``digest_mismatch`` where bytes, listing and manifest do not agree.
            ApiError: what the service says, ``unreachable`` where it does not answer. What came is kept.
        """
        for file in self._listing["items"]:
            _check_name(file["name"])
        self._directory.mkdir(parents=True, exist_ok=True)
        # The manifest is named by the digest that the merge itself was published under; it then vouches for the rest.
        for file in self._listing["items"]:
            if file["name"] == MANIFEST:
                self._fetch(file)
                _check_listing(self._listing, json.loads((self._directory / MANIFEST).read_bytes()))
        rest = [file for file in self._listing["items"] if file["name"] != MANIFEST]
        with ThreadPoolExecutor(max(1, at_once), thread_name_prefix="download") as pool:
            fetched = [pool.submit(self._fetch, file) for file in rest]
            try:
                for future in as_completed(fetched):
                    future.result()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """End at the next piece, and keep what came. For another thread than that of ``run``."""
        self._stopped.set()

    def _report(self, file: File, size: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        with self._lock:
            self._here[file["name"]] = size
            if self._on_progress is not None:
                self._on_progress(sum(self._here.values()), self._listing["size"], file["name"])

    def _fetch(self, file: File) -> None:
        self._report(file, 0)
        target = self._directory / file["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self._directory.resolve()):
            raise _unsafe(file["name"])
        if not _is_there(target, file):
            part = target.with_name(target.name + PART)
            resumed = part.is_file()
            if self._complete(file, part) != file["sha256"]:
                part.unlink()
                # What an interrupted download left may belong to something else; a fresh one has no such excuse.
                if not resumed or self._complete(file, part) != file["sha256"]:
                    part.unlink(missing_ok=True)
                    message = (
                        f"{file['name']} arrived with another digest than {file['sha256']}; nothing of it was kept."
                    )
                    raise DownloadError("digest_mismatch", 0, message)
            part.rename(target)
        self._report(file, file["size"])

    def _complete(self, file: File, part: Path) -> str:
        """Bring ``part`` to its full size and return its sha256. A broken connection is taken up where it broke."""
        digest = hashlib.sha256()
        failures = 0
        with part.open("a+b") as stream:
            stream.seek(0)
            while piece := stream.read(PIECE_BYTES):
                digest.update(piece)
                self._report(file, 0)  # it may be of something else, and is counted when it is not
            while stream.tell() < file["size"]:
                start = stream.tell()
                try:
                    for piece in _pieces(self._http, file, start):
                        if stream.tell() + len(piece) > file["size"]:
                            return ""  # more than was announced: certainly not the file
                        stream.write(piece)
                        digest.update(piece)
                        self._report(file, stream.tell())
                except (httpx.TransportError, _TransientError) as error:
                    failures = failures + 1 if stream.tell() == start else 1
                    if failures > self._retries:
                        message = f"{file['name']} could not be fetched: {error or type(error).__name__}"
                        message += "; run it again to go on from there."
                        raise UnavailableError("unreachable", 0, message) from None
                    self._stopped.wait(max(pause_before(failures), getattr(error, "after", 0.0)))
                except _RestartError:
                    stream.truncate(0)
                    stream.seek(0)
                    digest = hashlib.sha256()
            if stream.tell() > file["size"]:
                return ""
        return digest.hexdigest()


class _StoppedError(Exception):
    """Another file failed, or whoever waits does not any more."""


class _RestartError(Exception):
    """The service sends the whole file: what is here is of another one."""


class _TransientError(Exception):
    """The service answered that it cannot just now, and perhaps ``after`` how many seconds it can."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


def _is_there(target: Path, file: File) -> bool:
    """Raises ``output_exists`` for anything else under its name."""
    if not (target.exists() or target.is_symlink()):
        return False
    if target.is_file() and target.stat().st_size == file["size"] and _sha256(target) == file["sha256"]:
        return True
    message = f"{target} is there already and differs; remove it or download into another folder."
    raise DownloadError("output_exists", 0, message, fault="user")


def _pieces(http: httpx.Client, file: File, start: int) -> Iterator[bytes]:
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": f'"{file["sha256"]}"'}
    with _asked(http, file["url"], headers) as response:
        if response.status_code in RETRIED_STATUSES:
            raise _TransientError(f"the service answered {response.status_code}", retry_after(response) or 0.0)
        if not response.is_success:
            response.read()
            raise read_error(response)
        if start and response.status_code != 206:
            raise _RestartError
        yield from response.iter_bytes()  # as they come: what is gathered into pieces is lost when it breaks
        if response.num_bytes_downloaded == 0:
            raise _TransientError("the service sent nothing")


@contextmanager
def _asked(http: httpx.Client, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    """The answer, of the bucket where the service leads there: our key is not for it, and its ETags are not ours."""
    with http.stream("GET", url, headers=headers) as response:
        if response.status_code != REDIRECT:
            yield response
            return
        place = response.headers["location"]
    kept = {name: value for name, value in headers.items() if name != "If-Range"}
    request = http.build_request("GET", place, headers=kept)
    request.headers.pop("Authorization", None)
    found = http.send(request, stream=True)
    try:
        yield found
    finally:
        found.close()


def _check_listing(listing: FileList, manifest: dict[str, Any]) -> None:
    vouched = {file["name"]: (file["size"], file["sha256"]) for file in manifest["files"]}
    listed = {file["name"]: (file["size"], file["sha256"]) for file in listing["items"] if file["name"] != MANIFEST}
    if listed != vouched:
        message = f"The service's list of files is not what {MANIFEST} says; nothing more was fetched."
        raise DownloadError("digest_mismatch", 0, message)


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


def _unsafe(name: str) -> DownloadError:
    return DownloadError(
        "unsafe_name", 0, f"The service names a file {name!r}, which leads outside the folder; refused."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
