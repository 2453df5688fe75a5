"""Files that are elsewhere, brought here whole: several at once, resumed, bounded and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from threading import Event
from typing import Protocol

from app.errors import NO_SPACE, MergeyardError
from app.sources.fetching.cache import FetchCache, Part
from app.sources.source import RemoteFile

FILES_AT_ONCE = 4
TRIES = 5  # in a row that bring nothing
PAUSE_SECONDS = 0.5  # before the second, and twice as long before each one after it
LONGEST_PAUSE = 8.0
LOOK_SECONDS = 0.2  # between two checks whether to go on


class Wire(Protocol):
    """How to ask for files where they are. Safe to share between threads.

    What may be different a moment later is a MergeyardError whose fault is the system's; others are final.
    """

    def start_of(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes ``start`` up to ``stop``, or up to the file's end."""
        ...

    def opened(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        """The file's bytes from ``start`` on, as they come, and no more of them than the file has."""
        ...

    def ended(self, file: RemoteFile, size: int) -> MergeyardError:
        """What to say of a file that ended after ``size`` bytes, without an error."""
        ...


def start_by_opening(wire: Wire, file: RemoteFile, start: int, stop: int) -> bytes:
    """``Wire.start_of`` where ``opened`` costs no more than the bytes that are taken."""
    content = bytearray()
    wanted = min(stop, file.size) - start
    with wire.opened(file, start) as pieces:
        for piece in pieces:
            content += piece
            if len(content) >= wanted:
                return bytes(content[:wanted])
    raise wire.ended(file, start + len(content))


class _Stopped(Exception):  # noqa: N818 — news, not an error
    """Another file failed, or whoever waits was told to stop."""


class Transfer:
    """Of ``files`` those that are not here whole: ``total`` bytes, of which what is here in part counts as done."""

    def __init__(self, files: Iterable[RemoteFile], cache: FetchCache, wire: Callable[[], Wire]) -> None:
        by_digest = {file.digest: file for file in files}
        self.files = [file for file in by_digest.values() if cache.whole(file) is None]
        self.total = sum(file.size for file in self.files)
        self._cache, self._wire = cache, wire
        self._here: dict[str, int] = dict.fromkeys((file.digest for file in self.files), 0)
        self._stop = Event()

    def run(
        self,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Bring them here. ``on_progress`` is told the bytes that are here and those in all; ``check`` may raise.

        Raises:
            MergeyardError: what the wire raises, `digest_mismatch`, `disk_full`; or what ``check`` raised. What has
                arrived is kept for the next time.
        """
        if not self.files:
            return
        wire = self._wire()
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="fetch") as pool:
            fetched: list[Future[None]] = [pool.submit(self._fetch, wire, file) for file in self.files]
            try:
                while (states := wait(fetched, LOOK_SECONDS, FIRST_EXCEPTION)).not_done:
                    check()
                    on_progress(sum(self._here.values()), self.total)
                    for future in states.done:
                        future.result()
                for future in fetched:
                    future.result()
            except BaseException:
                self._stop.set()
                raise
        on_progress(self.total, self.total)

    def _fetch(self, wire: Wire, file: RemoteFile) -> None:
        try:
            # A leftover may belong to something else; a fresh file has no such excuse.
            for _ in range(2):
                with self._cache.part(file, lambda size: self._pause(file, size, LOOK_SECONDS)) as part:
                    if part is None:
                        self._here[file.digest] = file.size
                        return
                    resumed = part.size > 0
                    self._complete(wire, file, part)
                    if part.finish():
                        return
                if not resumed:
                    break
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            message = f"{file.name} of {file.repository} ({file.size} bytes) has no room on the disk of what is fetched"
            raise MergeyardError("disk_full", message) from error
        message = f"{file.name} of {file.repository}@{file.commit[:12]} arrived with another digest than it should have"
        raise MergeyardError("digest_mismatch", message)

    def _complete(self, wire: Wire, file: RemoteFile, part: Part) -> None:
        """Go on until all bytes are there; a connection that breaks is taken up again where it broke."""
        failures = 0
        while part.size < file.size:
            before = part.size
            problem: MergeyardError
            try:
                with wire.opened(file, part.size) as pieces:
                    for piece in pieces:
                        part.write(piece)
                        self._pause(file, part.size)
                problem = wire.ended(file, part.size)
            except MergeyardError as error:
                if error.fault != "system":
                    raise
                problem = error
            if part.size == file.size:
                return
            failures = 1 if part.size > before else failures + 1
            if failures >= TRIES:
                raise problem
            self._pause(file, part.size, min(LONGEST_PAUSE, PAUSE_SECONDS * 2 ** (failures - 1)))

    def _pause(self, file: RemoteFile, size: int, seconds: float = 0.0) -> None:
        """Note what is here, and wait, unless it is over."""
        self._here[file.digest] = min(size, file.size)
        if self._stop.wait(seconds) if seconds else self._stop.is_set():
            raise _Stopped
