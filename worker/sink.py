"""The engine's Sink into the artifact store, which keeps each finished weight file for a retry."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from app import logs
from app.artifacts.manifest import StoredFile, TensorStatistics
from app.artifacts.store import ArtifactStore, StoreWriter
from app.records.job import Job
from app.records.jobs import Jobs
from worker.engine.sinks import SCRATCH, statistics_as_json, statistics_from_json

READ_BACK = ".read"  # beside an attempt's files: the result as a model is loaded
_PIECE = 4 << 20

log = logging.getLogger("mergeyard.sink")


class StoreSink:
    """Files under ``<job>/<attempt token>/``. What earlier attempts recorded is adopted where its digest holds."""

    def __init__(
        self, store: ArtifactStore, jobs: Jobs, job: Job, persist: Callable[[Callable[[], None]], None]
    ) -> None:
        """``persist`` (``Lease.persist``) makes a write and waits out a database that is away for a while."""
        assert job.lease_token is not None
        self._store, self._jobs, self._persist = store, jobs, persist
        self.keep_free = store.keep_free
        self._job_id, self._token = job.id, job.lease_token
        self._recorded = {shard.file.name: shard for shard in jobs.shards(job.id)}
        self._statistics: dict[str, Mapping[str, TensorStatistics]] = {}
        self._log = logs.of_job(log, job)

    def adopt(self, filename: str, check: Callable[[], None]) -> StoredFile | None:
        """The recorded file, if its bytes are still those that were recorded: they are all read again."""
        shard = self._recorded.get(filename)
        if shard is None:
            return None
        try:
            holds = self._store.sha256(shard.file.key, check) == shard.file.sha256
        except OSError:
            holds = False
        if not holds:
            self._log.warning("%s does not hold its digest any more; it is made again", shard.file.key)
            return None
        self._log.info("kept %s of an earlier attempt", filename)
        return shard.file

    def recall(self, filename: str) -> Mapping[str, TensorStatistics] | None:
        """The statistics recorded with the file."""
        shard = self._recorded.get(filename)
        return None if shard is None else statistics_from_json(shard.statistics)

    def remember(self, filename: str, statistics: Mapping[str, TensorStatistics]) -> None:
        """Makes the file worth recording; see ``finish``."""
        self._statistics[filename] = statistics

    def create(self, filename: str, size: int) -> StoreFile:
        """Begin a file of this attempt."""
        key = f"{self._job_id}/{self._token}/{filename}"
        return StoreFile(self, filename, key, self._store.create(key, size))

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Beside this attempt's files, so that it goes with them where this process cannot see to it.

        What an attempt that died has left goes first: it may be as large as what is to come.
        """
        own = f"{self._job_id}/{self._token}/{SCRATCH}"
        for folder in {key.partition(f"/{SCRATCH}/")[0] for key in self._store.keys(self._job_id) if SCRATCH in key}:
            self._store.delete_prefix(f"{folder}/{SCRATCH}")
        try:
            yield self._store.scratch(own)
        finally:
            with contextlib.suppress(OSError):  # whoever ends the attempt deletes all that it left
                self._store.delete_prefix(own)

    @contextlib.contextmanager
    def readable(self, files: Sequence[StoredFile]) -> Iterator[Path]:
        """Links to what lies in the store on this machine, and copies of what does not."""
        prefix = f"{self._job_id}/{self._token}/{READ_BACK}"
        folder = self._store.scratch(prefix)
        try:
            for file in files:
                place = folder / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                if (local := self._store.local_path(file.key)) is not None:
                    place.symlink_to(local)
                else:
                    _copy(self._store, file, place)
            yield folder
        finally:
            with contextlib.suppress(OSError):
                self._store.delete_prefix(prefix)

    def record(self, file: StoredFile) -> None:
        """Keep a durable weight file for a retry. Small files are made anew in no time, and are not recorded."""
        statistics = self._statistics.pop(file.name, None)
        if statistics is not None:
            value = statistics_as_json(statistics)
            self._persist(lambda: self._jobs.record_shard(self._job_id, self._token, file, value))


def _copy(store: ArtifactStore, file: StoredFile, place: Path) -> None:
    with contextlib.closing(store.open(file.key)) as stored, place.open("xb") as copy:
        while piece := stored.read(_PIECE):
            copy.write(piece)


class StoreFile:
    """A FileWriter into the store, hashing what passes."""

    def __init__(self, sink: StoreSink, name: str, key: str, writer: StoreWriter) -> None:
        self._sink, self._name, self._key, self._writer = sink, name, key, writer
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: memoryview) -> None:
        """Append."""
        self._digest.update(data)
        self._size += data.nbytes
        self._writer.write(data)

    def finish(self) -> StoredFile:
        """Durable first, recorded second: a row never names bytes that a power cut could take."""
        self._writer.close()
        file = StoredFile(name=self._name, key=self._key, size=self._size, sha256=self._digest.hexdigest())
        self._sink.record(file)
        return file

    def abort(self) -> None:
        """Leave nothing."""
        self._writer.abort()
