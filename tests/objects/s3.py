"""A real S3 server for the tests: OpenStack Swift with its S3 API, whole and on this machine alone.

Swift is what several clouds answer S3 requests with, and it comes as a wheel. Its four servers (proxy, accounts,
containers, objects) run with one replica in a folder of their own.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import os
import pwd
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from tests.environments import environment

REQUIREMENTS = ("swift[keystone]==2.38.3", "setuptools<81")
REGION = "us-east-1"
ACCESS_KEY, SECRET_KEY = "yard:keeper", "not-so-secret"
PATIENCE = 60.0
SERVERS = ("account", "container", "object")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """An empty bucket of the server at ``endpoint``."""

    endpoint: str
    name: str

    def settings(self, prefix: str = "artifacts") -> dict[str, Any]:
        """The service's settings for it."""
        return {
            "artifact_store": f"s3://{self.name}/{prefix}",
            "s3_endpoint": self.endpoint,
            "s3_region": REGION,
            "s3_access_key_id": ACCESS_KEY,
            "s3_secret_access_key": SECRET_KEY,
        }

    def sizes(self) -> dict[str, int]:
        """The sizes of all objects by key."""
        return {key: int(size) for key, size in _found(self.get({"list-type": "2"}), r"<Key>(.*?)</Key>.*?<Size>(\d+)")}

    def unfinished(self) -> list[str]:
        """The keys of uploads that were begun and neither finished nor aborted."""
        return [key for (key,) in _found(self.get({"uploads": ""}), r"<Key>(.*?)</Key>")]

    def read(self, key: str) -> bytes:
        return signed("GET", self.endpoint, f"/{self.name}/{key}").content

    def write(self, key: str, content: bytes) -> None:
        signed("PUT", self.endpoint, f"/{self.name}/{key}", content=content)

    def get(self, query: Mapping[str, str]) -> str:
        return signed("GET", self.endpoint, f"/{self.name}", query).text


def signed(
    method: str, endpoint: str, path: str, query: Mapping[str, str] | None = None, content: bytes = b""
) -> httpx2.Response:
    """A request with Signature Version 4, for what no client of ours asks: buckets, and unfinished uploads."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    host, digest = urlsplit(endpoint).netloc, hashlib.sha256(content).hexdigest()
    headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": now}
    line = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in sorted((query or {}).items()))
    names = ";".join(sorted(headers))
    listed = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    request = f"{method}\n{quote(path)}\n{line}\n{listed}\n{names}\n{digest}"
    scope = f"{now[:8]}/{REGION}/s3/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{SECRET_KEY}".encode()
    for part in (now[:8], REGION, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    answer = httpx2.request(
        method, f"{endpoint}{quote(path)}{'?' if line else ''}{line}", headers=headers, content=content
    )
    answer.raise_for_status()
    return answer


@contextmanager
def s3_server(folder: Path, *, host: str = "127.0.0.1") -> Iterator[str]:
    """A server of our own in ``folder``, that listens on ``host``; its endpoint. Make buckets with ``new_bucket``."""
    programs = environment("swift", REQUIREMENTS)
    ports = dict(zip(("proxy", *SERVERS), _free_ports(4), strict=True))
    _configure(folder, programs, ports, host)
    with contextlib.ExitStack() as stack:
        for kind in (*SERVERS, "proxy"):
            stack.enter_context(_running([programs / f"swift-{kind}-server", folder / f"{kind}.conf"], folder, kind))
        endpoint = f"http://{host}:{ports['proxy']}"
        _wait_for(endpoint, folder)
        yield endpoint


def new_bucket(endpoint: str) -> Bucket:
    """A bucket with a name of its own."""
    name = f"yard-{secrets.token_hex(6)}"
    signed("PUT", endpoint, f"/{name}")
    return Bucket(endpoint=endpoint, name=name)


def _configure(folder: Path, programs: Path, ports: Mapping[str, int], host: str) -> None:
    (folder / "devices" / "disk").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_prefix = mergeyard\n")
    default = (
        f"[DEFAULT]\nworkers = 0\nswift_dir = {folder}\ndevices = {folder}/devices\nmount_check = false\n"
        f"log_address = {folder}/no-syslog\nuser = {_user()}\n"
    )
    builder = programs / "swift-ring-builder"
    for kind in SERVERS:
        ring = folder / f"{kind}.builder"
        for step in (
            ("create", "2", "1", "0"),  # four partitions, one replica
            ("add", f"r1z1-127.0.0.1:{ports[kind]}/disk", "1"),
            ("rebalance",),
        ):
            subprocess.run([builder, ring, *step], check=True, stdout=subprocess.DEVNULL)
        (folder / f"{kind}.conf").write_text(
            f"{default}bind_ip = 127.0.0.1\nbind_port = {ports[kind]}\n"
            f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
        )
    filters = {
        "catch_errors": "",
        "cache": f"memcache_servers = {folder}/none:0\n",
        "listing_formats": "",
        "bulk": "",
        "s3api": f"location = {REGION}\ns3_acl = false\n",
        "tempauth": f"user_{ACCESS_KEY.replace(':', '_')} = {SECRET_KEY} .admin\n",
        "slo": "",
        "dlo": "",
    }
    named = {"cache": "memcache"}
    (folder / "proxy.conf").write_text(
        f"{default}bind_ip = {host}\nbind_port = {ports['proxy']}\n"
        f"[pipeline:main]\npipeline = {' '.join(filters)} proxy-server\n"
        "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
        + "".join(f"[filter:{name}]\nuse = egg:swift#{named.get(name, name)}\n{more}" for name, more in filters.items())
    )


@contextmanager
def _running(command: list[Path], folder: Path, kind: str) -> Iterator[None]:
    with (folder / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            yield
        finally:
            process.kill()
            process.wait()


def _wait_for(endpoint: str, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            signed("GET", endpoint, "/")  # the account, its containers
            return
        except httpx2.HTTPError as error:
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
                raise AssertionError(f"the S3 server did not come up: {error}\n{logs}") from None
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _found(text: str, pattern: str) -> list[tuple[str, ...]]:
    found = [match.groups() for match in re.finditer(pattern, text, re.DOTALL)]
    return [tuple(map(str, groups)) for groups in found]
