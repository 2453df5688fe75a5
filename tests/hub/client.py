"""What a user's script does, with whichever huggingface_hub its environment has. Nothing of ours is imported.

Reads steps as JSON, ``[[function, {arguments}], …]``, and writes what each gave. To call anything but the endpoint is
an error, also on another port of the same host.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ENDPOINT = urlsplit(os.environ["HF_ENDPOINT"])
_connect, _look_up = socket.socket.connect, socket.getaddrinfo


def connect(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[:2] != (ENDPOINT.hostname, ENDPOINT.port):
        sys.stderr.write(f"CALLED {address}\n")
        raise ConnectionRefusedError(f"{address} is not {ENDPOINT.netloc}")
    _connect(self, address)


def look_up(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
    if host not in (ENDPOINT.hostname, (ENDPOINT.hostname or "").encode()):
        sys.stderr.write(f"CALLED {host}\n")
        raise socket.gaierror(f"{host} is not {ENDPOINT.netloc}")
    return _look_up(host, port, *rest, **more)


socket.socket.connect = connect  # type: ignore[method-assign,assignment]
socket.getaddrinfo = look_up  # type: ignore[assignment]

import huggingface_hub  # noqa: E402
from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: E402

API = HfApi()


def version() -> str:
    return str(huggingface_hub.__version__)


def snapshot(**arguments: Any) -> dict[str, str]:
    """sha256 by name of what was downloaded."""
    return digests(Path(snapshot_download(**arguments)))


def snapshot_folder(**arguments: Any) -> str:
    """The name of the folder in the cache: the commit."""
    return Path(snapshot_download(**arguments)).name


def file(**arguments: Any) -> str:
    """sha256 of one downloaded file."""
    return digest(Path(hf_hub_download(**arguments)))


def until_whole(tries: int, **arguments: Any) -> tuple[int, str]:
    """How often a file had to be asked for, and its sha256."""
    for number in range(1, tries):
        try:
            return number, file(**arguments)
        except Exception as error:
            sys.stderr.write(f"try {number}: {type(error).__name__}: {error}\n")
    return tries, file(**arguments)


def model_info(**arguments: Any) -> dict[str, Any]:
    info = API.model_info(**arguments)
    siblings = {item.rfilename: item.lfs.sha256 if item.lfs else None for item in info.siblings or []}
    return {"id": info.id, "sha": info.sha, "private": info.private, "siblings": siblings}


def list_repo_files(**arguments: Any) -> list[str]:
    return API.list_repo_files(**arguments)


def list_repo_tree(**arguments: Any) -> list[tuple[str, str | None]]:
    """(path, sha256) of every file and folder."""
    entries = API.list_repo_tree(**arguments)
    return [(entry.path, entry.lfs.sha256 if getattr(entry, "lfs", None) else None) for entry in entries]


def file_exists(**arguments: Any) -> bool:
    return API.file_exists(**arguments)


def repo_exists(**arguments: Any) -> bool:
    return API.repo_exists(**arguments)


def revision_exists(**arguments: Any) -> bool:
    return API.revision_exists(**arguments)


def metadata(repo_id: str, filename: str) -> list[Any]:
    url = huggingface_hub.hf_hub_url(repo_id, filename)
    found = huggingface_hub.get_hf_file_metadata(url)
    return [found.commit_hash, found.etag, found.size]


def error_of(step: str, **arguments: Any) -> tuple[str, str]:
    """The kind of error that a step ends in, and what it tells the user."""
    try:
        globals()[step](**arguments)
    except Exception as error:
        cause = error.__cause__ or error
        kind = type(cause if type(error).__name__ == "LocalEntryNotFoundError" else error).__name__
        return kind, str(error)
    return "", ""


def digests(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): digest(path) for path in found}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    steps = json.load(sys.stdin)
    json.dump([globals()[name](**arguments) for name, arguments in steps], sys.stdout)
