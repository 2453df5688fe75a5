"""Requests to the hub: guarded, bounded, and with failures that have a code.

The protocol is ``huggingface_hub``'s: its addresses, its headers, its reading of what an answer means. Its downloads
are not used: version 2.4 begins again where a process was stopped, checks no digest, writes what is sent without an
end, and shares one HTTP client with all of the process.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from app import strict_json
from app.addresses import address_of, is_public
from app.errors import MergeyardError
from app.sources.source import RemoteFile

log = logging.getLogger("mergeyard.hub")

TIMEOUT = httpx2.Timeout(20.0, connect=5.0)
TRIES = 3  # of a small request
PAUSE_SECONDS = 0.5
MAX_INFO_BYTES = 50_000_000
MOST_ADDRESSES = 3  # that are tried
PORTS = {"http": 80, "https": 443}
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class Wire:
    """The hub at ``endpoint``, with the operator's ``token`` if it is not empty. Safe to share between threads."""

    def __init__(self, endpoint: str, token: str) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._has_token = bool(token)
        self._http = httpx2.Client(
            transport=GuardedTransport(self.endpoint),
            headers={
                **build_hf_headers(token=token or False, library_name="mergeyard"),
                "Accept-Encoding": "identity",  # what is counted, and what ranges are of
            },
            timeout=TIMEOUT,
            follow_redirects=True,
            trust_env=False,  # no proxies: the address that is looked at is the one that is reached
        )

    def close(self) -> None:
        self._http.close()

    def info(self, repository: str, revision: str) -> ModelInfo:
        """The repository at a revision: its commit, and its files with sizes and digests.

        Raises MergeyardError `source_not_found`, `hub_forbidden`, `hub_unavailable`, `hub_not_allowed`.
        """
        url = f"{self.endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}"
        content = self._bytes(url, MAX_INFO_BYTES, about=f"{repository}@{revision}", params={"blobs": "true"})
        try:
            return ModelInfo(**strict_json.loads(content))  # type: ignore[no-untyped-call]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise unavailable(self.endpoint, f"it says nothing of {repository} that can be read") from None

    def start_of(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes ``start`` up to ``stop``, or up to the file's end. Raises as ``info``."""
        headers = {"Range": f"bytes={start}-{min(stop, file.size) - 1}"}
        wanted = min(stop, file.size) - start
        content = self._bytes(self._url(file), wanted, about=_named(file), headers=headers, skipped=start)
        if len(content) < wanted:
            raise unavailable(self.endpoint, f"{_named(file)} ends after {start + len(content)} bytes")
        return content

    @contextmanager
    def opened(self, file: RemoteFile, start: int) -> Iterator[Iterator[bytes]]:
        """The file's bytes from ``start`` on, as they come, and no more of them than the file has.

        Raises as ``info``, also on the way.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            with self._http.stream("GET", self._url(file), headers=headers) as response:
                self._check(response, _named(file))
                skipped = start if response.status_code != 206 else 0
                yield _bounded(response, skipped, file.size - start)
        except httpx2.RequestError as error:
            raise self._broken(error) from None

    def _bytes(
        self,
        url: str,
        most: int,
        *,
        about: str,
        params: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        skipped: int = 0,
    ) -> bytes:
        """At most ``most`` bytes of an answer, asked for again where it breaks. ``skipped``: the range's first."""
        for attempt in range(1, TRIES + 1):
            try:
                with self._http.stream("GET", url, params=params, headers=headers) as response:
                    self._check(response, about)
                    first = skipped if response.status_code != 206 else 0
                    return b"".join(_bounded(response, first, most))
            except httpx2.RequestError as error:
                if attempt == TRIES:
                    raise self._broken(error) from None
            except MergeyardError as error:
                if attempt == TRIES or error.code != "hub_unavailable":
                    raise
            time.sleep(PAUSE_SECONDS * attempt)
        raise AssertionError("the last try returns or raises")

    def _broken(self, error: Exception) -> MergeyardError:
        """A connection that could not be made, or broke."""
        log.warning("the hub cannot be reached: %s: %s", type(error).__name__, error)
        return unavailable(self.endpoint, str(error) or type(error).__name__)

    def ended(self, file: RemoteFile, size: int) -> MergeyardError:
        """A file that was sent in part, without an error."""
        return unavailable(self.endpoint, f"{_named(file)} ended after {size} of {file.size} bytes")

    def _url(self, file: RemoteFile) -> str:
        return hf_hub_url(file.repository, file.name, revision=file.commit, endpoint=self.endpoint)

    def _check(self, response: httpx2.Response, about: str) -> None:
        """Raise what an answer other than the file means."""
        if response.is_success:
            return
        status = response.status_code
        if status in BUSY:
            raise unavailable(self.endpoint, f"it answers {status}")
        if status == 401 and not self._has_token and response.headers.get("X-Error-Code") != "GatedRepo":
            raise _missing(about, "does not exist on the hub, or is not for everybody")
        try:
            hf_raise_for_status(response)
        except (GatedRepoError, DisabledRepoError):
            pass
        except RevisionNotFoundError:
            raise MergeyardError("source_not_found", f"{about}: the hub has no such revision of it") from None
        except RepositoryNotFoundError:
            if status != 401:
                raise _missing(about, "does not exist on the hub, or is not for everybody") from None
        except EntryNotFoundError:
            raise MergeyardError("source_not_found", f"{about} is not on the hub any more") from None
        except HfHubHTTPError:
            if status not in (401, 403):
                raise unavailable(self.endpoint, f"it answers {status} where {about} should be") from None
        message = (
            f"{about}: the hub does not give it out ({status}). Its licence may have to be accepted there, or the "
            "service's token (MERGEYARD_HUB_TOKEN) does not open it."
        )
        raise MergeyardError("hub_forbidden", message)


@dataclass(frozen=True, slots=True)
class _Place:
    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: httpx2.URL) -> _Place:
        return cls(url.scheme, url.host, url.port or PORTS.get(url.scheme, 0))


class GuardedTransport(httpx2.BaseTransport):
    """Sends requests to the endpoint, wherever the operator has it, and to nothing else but public addresses by TLS.

    Every redirect passes here. A name is resolved once and the connection goes to an address that was looked at, so
    that a name which resolves to something else a moment later changes nothing.
    """

    def __init__(self, endpoint: str) -> None:
        self._own = _Place.of(httpx2.URL(endpoint))
        self._inner = httpx2.HTTPTransport(trust_env=False)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        place = _Place.of(request.url)
        if place == self._own:
            return self._inner.handle_request(request)
        if place.scheme != "https":
            raise _refused(place, "which is no https:// address")
        try:
            found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpx2.ConnectError(f"{place.host} has no address", request=request) from error
        addresses = list(dict.fromkeys(map(address_of, found)))
        if not all(map(is_public, addresses)):
            raise _refused(place, "which has an address of a private network")
        failure = httpx2.ConnectError(f"{place.host} has no address", request=request)
        for address in addresses[:MOST_ADDRESSES]:
            looked_at = httpx2.Request(
                request.method,
                request.url.copy_with(host=str(address)),
                headers=request.headers,  # Host among them
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": place.host},
            )
            try:
                return self._inner.handle_request(looked_at)
            except httpx2.ConnectError as error:
                failure = error
        raise failure

    def close(self) -> None:
        self._inner.close()


def unavailable(endpoint: str, why: str) -> MergeyardError:
    return MergeyardError("hub_unavailable", f"The hub at {endpoint} cannot be used just now: {why[:200]}.")


def _bounded(response: httpx2.Response, skipped: int, most: int) -> Iterator[bytes]:
    """What follows the first ``skipped`` bytes, cut where it exceeds ``most``."""
    for piece in response.iter_raw():
        wanted = memoryview(piece)[skipped:]
        skipped -= min(skipped, len(piece))
        if wanted.nbytes > most:
            yield bytes(wanted[:most])
            return
        if wanted.nbytes:
            yield bytes(wanted)
        most -= wanted.nbytes
        if most == 0:
            return


def _missing(about: str, what: str) -> MergeyardError:
    return MergeyardError("source_not_found", f"{about} {what} (then its operator can set MERGEYARD_HUB_TOKEN)")


def _refused(place: _Place, why: str) -> MergeyardError:
    return MergeyardError("hub_not_allowed", f"The hub leads to {place.host}:{place.port}, {why}; it is not followed.")


def _named(file: RemoteFile) -> str:
    return f"{file.name} of {file.repository}@{file.commit[:12]}"


def listed(info: ModelInfo) -> dict[str, Any]:
    """What is kept of an answer: the commit, and of each file its size and digest."""
    return {
        "commit": info.sha,
        "files": {
            sibling.rfilename: [sibling.size, (sibling.lfs.sha256 if sibling.lfs else None) or sibling.blob_id]
            for sibling in info.siblings or []
        },
    }
