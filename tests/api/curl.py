"""The curl commands of our pages, run with httpx: curl itself is not on every machine."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import httpx


def run_curl(command: str, folder: Path = Path()) -> httpx.Response:
    """Run a command of the options our pages use; ``@file`` is relative to ``folder``. Others raise SystemExit."""
    parser = argparse.ArgumentParser(prog="curl", exit_on_error=False)
    parser.add_argument("url")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-F", dest="files", action="append", default=[])
    parser.add_argument("--data-binary", dest="data")
    parser.add_argument("-r", dest="range")
    parser.add_argument("-o", dest="output")
    for flag in ("-s", "-i", "-I", "-N", "-O"):
        parser.add_argument(flag, action="store_true")
    program, *arguments = shlex.split(command)
    assert program == "curl"
    given = parser.parse_args(arguments)
    headers = dict(header.split(": ", 1) for header in given.headers)
    if given.range:
        headers["range"] = f"bytes={given.range}"
    data = (folder / given.data[1:]).read_bytes() if (given.data or "").startswith("@") else given.data
    parts = []
    for part in given.files:
        name, _, path = part.partition("=@")
        parts.append((name, (Path(path).name, (folder / path).read_bytes())))
    method = given.method or ("HEAD" if given.I else "POST" if data or parts else "GET")
    return httpx.request(method, given.url, headers=headers, content=data, files=parts or None, timeout=30)
