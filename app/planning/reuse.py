"""When an earlier result may stand for a merge: its plan is the same, and so is every file that both of them read.

The plan's digest pins weights by header, size and mtime. Two fine-tunes of one model often share all three (archives
and image layers set every mtime to one instant), so a file that may be replaced is also known by its inode and its
ctime, which nobody can set. They are compared as the worker saw them before and after it read the files, and as they
are when the next merge is submitted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from app.planning.earlier import file_of
from app.planning.plan import Plan
from app.sources.references import is_immutable
from app.sources.source import SourceFile


def reuse_key(plan: Plan) -> str | None:
    """sha256 hex, equal for merges with the same artifact to the byte; None where nobody can know that.

    Of a file system that keeps ctimes in whole seconds, or none of its own (images), nobody can: a file replaced within
    the second looks the same. The recipe's name is in the artifact though not in the plan's digest.
    """
    moments = []
    for file in sorted(changeable_files(plan), key=lambda file: (file.header_sha256, str(file.path))):
        try:
            status = file.path.stat()
        except OSError:
            return None
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns) or status.st_ctime_ns % 10**9 == 0:
            return None
        moments.append([file.header_sha256, status.st_ino, status.st_ctime_ns])
    text = json.dumps([plan.digest, plan.recipe.get("name"), moments], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def changeable_files(plan: Plan) -> frozenset[SourceFile]:
    """The weight files that the plan reads and that may be replaced, which uploads, merges and commits are not."""
    made = {file_of(document, shard) for document in plan.earlier for shard in document.shards}
    return frozenset(_weights(plan)) - made


def _weights(plan: Plan) -> Iterator[SourceFile]:
    """Anything else is pinned by all of its bytes."""
    for document in (*plan.earlier, plan):
        for source in (document.base, *document.sources, *document.tokenizers):
            if not is_immutable(source.reference):
                yield from (file for file in source.files if file.name.endswith(".safetensors"))
