"""The nginx that is shipped, in front of an API: Debian's nginx as an unprivileged process of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "deploy" / "nginx.conf.template"
LOCATION = "/_artifacts/"
START_SECONDS = 10.0

# What Debian's and the official image's nginx.conf have around the files of conf.d, with every path in one folder.
MAIN = """\
{user}
worker_processes auto;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
    default_type application/octet-stream;
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/conf.d/*.conf;
}}
"""


def binary() -> str:
    """nginx's path; skips the test where there is none."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip("nginx is not installed (Debian: nginx-light); .ci/run installs it")
    return found


def filled_in(values: Mapping[str, str]) -> str:
    """The template as the official image's envsubst fills it in: variables of other names are nginx's own."""
    text = TEMPLATE.read_text()
    for name, value in values.items():
        assert f"${{{name}}}" in text, name
        text = text.replace(f"${{{name}}}", value)
    return text


def write(folder: Path, *, listen: str, upstream: str, store: Path, further: str = "") -> Path:
    """The configuration's main file. ``further``: more server blocks."""
    (folder / "conf.d").mkdir(parents=True)
    values = {"MERGEYARD_LISTEN": listen, "MERGEYARD_UPSTREAM": upstream, "MERGEYARD_STORE": str(store)}
    (folder / "conf.d" / "mergeyard.conf").write_text(filled_in(values))
    (folder / "conf.d" / "further.conf").write_text(further)
    main = folder / "nginx.conf"
    # Started by root, its workers would be nobody and could not read a test's own folders.
    main.write_text(MAIN.format(folder=folder, user="user root;" if os.geteuid() == 0 else ""))
    return main


def check(program: str, main: Path) -> str:
    """What ``nginx -t`` says. Raises CalledProcessError where it does not like the configuration."""
    command = [program, "-t", "-c", str(main), "-e", str(main.parent / "error.log")]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stderr


@contextmanager
def running(program: str, main: Path, port: int) -> Iterator[str]:
    """nginx's URL, until the block ends."""
    process = subprocess.Popen([program, "-c", str(main), "-e", str(main.parent / "error.log")])
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listening(port):
            assert process.poll() is None and time.monotonic() < deadline, (main.parent / "error.log").read_text()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
