"""What a plan reads of files that are elsewhere, and what brings the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.errors import MergeyardError
from app.sources.fetching.cache import FetchCache
from app.sources.fetching.transfer import Transfer, Wire
from app.sources.safetensors import MAX_HEADER_BYTES
from app.sources.source import FoundFiles, RemoteFile

FIRST_BYTES = 1 << 17  # of a safetensors file: most headers are shorter
WEIGHTS = ".safetensors"
AT_ONCE = 8  # small requests


class Fetching:
    """Files behind one ``wire``, which is made when it is first needed. Safe to share between threads."""

    def __init__(self, cache: FetchCache, wire: Callable[[], Wire]) -> None:
        self.cache = cache
        self._wire = wire

    def transfer(self, files: Iterable[RemoteFile]) -> Transfer:
        """What brings these files here, whole."""
        return Transfer(files, self.cache, self._wire)

    def begun(self, files: Sequence[RemoteFile]) -> FoundFiles:
        """What a plan reads of them: what is small whole, of weights the headers. Raises as ``weights``."""
        paths = self.small([file for file in files if not file.name.endswith(WEIGHTS)])
        weights, remote = self.weights([file for file in files if file.name.endswith(WEIGHTS)])
        return FoundFiles(files={**paths, **weights}, remote=remote)

    def small(self, files: Sequence[RemoteFile]) -> dict[str, Path]:
        """These files whole, by name. Raises what the wire raises, `digest_mismatch`, `disk_full`, OSError."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip((file.name for file in files), pool.map(self._whole, files), strict=True))

    def weights(self, files: Sequence[RemoteFile]) -> tuple[dict[str, Path], dict[str, RemoteFile]]:
        """Of safetensors files those that are here whole and the headers of the others, and which the others are.

        Raises as ``small``, and `source_format`.
        """
        here = {file.name: whole for file in files if (whole := self.cache.whole(file))}
        remote = {file.name: file for file in files if file.name not in here}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            headers = dict(zip(remote, pool.map(self._header, remote.values()), strict=True))
        return here | headers, remote

    def _whole(self, file: RemoteFile) -> Path:
        if (path := self.cache.whole(file)) is None:
            self.transfer([file]).run()
            path = self.cache.whole(file)
        assert path is not None
        return path.resolve()

    def _header(self, file: RemoteFile) -> Path:
        """The header alone, in one request or two. What it says is for ``read_header`` to judge."""
        if (path := self.cache.header(file)) is None:
            content = self._wire().start_of(file, 0, FIRST_BYTES)
            end = 8 + int.from_bytes(content[:8], "little")
            if end > 8 + MAX_HEADER_BYTES:
                message = f"{file.name} of {file.repository} is not an acceptable safetensors file: its header is vast"
                raise MergeyardError("source_format", message)
            if end > len(content) < file.size:
                content += self._wire().start_of(file, len(content), end)
            path = self.cache.keep_header(file, content[:end])
        return path.resolve()
