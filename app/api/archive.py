"""An artifact as one tar: headers between stored files, so its length is known and any part of it can be read."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable

from app.api.transfer import Segment, Stored
from app.artifacts.manifest import StoredFile


def tar_segments(files: Iterable[StoredFile]) -> list[Segment]:
    """The archive's segments: per file a header, its bytes and the padding, and the end blocks at the end.

    The same artifact gives the same bytes: names in the order given, mode 0644, no owner, no time. pax, because its
    sizes go beyond 8 GB.
    """
    segments: list[Segment] = []
    total = 0
    for file in files:
        header = _header(file)
        padding = bytes(-file.size % tarfile.BLOCKSIZE)
        segments += [header, Stored(file.key, file.size), padding]
        total += len(header) + file.size + len(padding)
    end = 2 * tarfile.BLOCKSIZE
    segments.append(bytes(end + -(total + end) % tarfile.RECORDSIZE))
    return segments


def _header(file: StoredFile) -> bytes:
    entry = tarfile.TarInfo(file.name)
    entry.size = file.size
    entry.mode = 0o644
    return entry.tobuf(tarfile.PAX_FORMAT)
