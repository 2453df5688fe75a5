"""Opening a source's files: what was checked may be another thing by then, where strangers may write."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_SMALL_BYTES = 50_000_000  # of what is read whole: the largest tokenizer.json seen is about 35 MB
NOT_FOLLOWED = frozenset({errno.ELOOP, errno.ENOTDIR})  # what opening a link answers here

# O_PATH needs no right to list the folder, only to pass it; where there is none (macOS), listing is asked for.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_source(path: Path) -> int:
    """A descriptor of the regular file at ``path``, which is a real path: no part of it is a link.

    Each folder is opened from the one above it and no link is followed, so that what was swapped for a link after the
    resolver looked leads nowhere. A FIFO or a device is not waited for. Raises OSError.
    """
    path = path.absolute()
    folder = os.open(path.anchor, _FOLDER)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        descriptor = os.open(path.name, _FILE, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file")
    return descriptor


def read_small(path: Path) -> tuple[bytes, os.stat_result]:
    """A whole file, and its status. Raises OSError, ValueError for more than MAX_SMALL_BYTES."""
    with os.fdopen(open_source(path), "rb") as stream:
        content = stream.read(MAX_SMALL_BYTES + 1)
        if len(content) > MAX_SMALL_BYTES:
            raise ValueError(f"larger than {MAX_SMALL_BYTES} bytes")
        return content, os.fstat(stream.fileno())
