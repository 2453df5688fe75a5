"""What local files need of the disk: room taken before they are written, and folders that a power cut cannot undo."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_CANNOT = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})  # network and FUSE file systems answer these


def reserve(descriptor: int, size: int) -> None:
    """Take ``size`` bytes of disk at once, so that a full one raises OSError (ENOSPC) before the work.

    On a file system that cannot do so the space is taken as the file is written.
    """
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def sync_folder(folder: Path) -> None:
    """The names in ``folder`` are durable when this returns."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
