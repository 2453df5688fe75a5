"""SIGKILL for every part of the service at every named stage of a merge, then at random, under load."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.audit import Audit, audit
from tests.faults.load import Load
from tests.faults.service import LEASE_SECONDS, Service, running
from tests.faults.stages import STAGES, Stop

VICTIMS = ("child", "worker", "api", "broker")
ANY_TIME = "any time"  # no stage: whenever it happens to be
CAUGHT_SECONDS = 20.0
DRAIN_SECONDS = 90.0
FROZEN = 0.04  # the share of stops at which the child is frozen for longer than its lease, and goes on


@dataclass
class Campaign:
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    frozen: int = 0
    missed: int = 0  # armed stages that nobody came to


def break_by_kills(
    folder: Path,
    socket_path: Path,
    models: Path,
    database_url: str,
    expected: Mapping[str, Mapping[str, str]],
    kills: int,
    seed: int,
) -> tuple[Campaign, Load, Audit]:
    """At least ``kills`` kills of a service on ``database_url``; what was killed, the load, and the audit after it."""
    rng, campaign = random.Random(seed), Campaign()
    with running(folder, models, database_url, socket_path=socket_path) as service:
        load = Load(service.url, expected, random.Random(seed + 1))
        load.start()
        for victim, stage in itertools.islice(_targets(rng), kills):
            if load.wrong:
                break
            _kill(service, campaign, victim, stage, rng)
        service.stops.disarm()
        load.drain(DRAIN_SECONDS)
        found = audit(service.settings, load.accepted, load.deleted)
    found.lost += sorted(load.open)
    return campaign, load, found


def _targets(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Every victim at every stage in a random order, then anybody anywhere."""
    matrix = [(victim, stage) for victim in VICTIMS for stage in STAGES]
    rng.shuffle(matrix)
    yield from matrix
    while True:
        # A worker's start takes seconds of a core and a broker's none, so that brokers die more often.
        yield rng.choices(VICTIMS, (2, 2, 2, 3))[0], rng.choice((*STAGES, ANY_TIME, ANY_TIME))


def _kill(service: Service, campaign: Campaign, victim: str, stage: str, rng: random.Random) -> None:
    stop = None if stage == ANY_TIME else _caught(service, stage)
    if stop is None:
        campaign.missed += stage != ANY_TIME
        stage = ANY_TIME
        time.sleep(rng.random() * 0.5)
    if stop is not None and rng.random() < FROZEN:
        _freeze(stop.pid)
        campaign.frozen += 1
    if _strike(service, victim, stop, rng):
        campaign.kills[victim, stage] += 1
    if stop is not None:
        # Who was not killed goes on at once or a little later: an orphan works on beside its job's next worker.
        threading.Timer(rng.choice((0.0, 0.3, LEASE_SECONDS + 1)), stop.release).start()


def _caught(service: Service, stage: str) -> Stop | None:
    service.stops.arm(stage)
    deadline = time.monotonic() + CAUGHT_SECONDS
    while time.monotonic() < deadline:
        for stop in service.stops.waiting():
            if stop.stage == stage:
                return stop
        time.sleep(0.01)
    return None


def _strike(service: Service, victim: str, stop: Stop | None, rng: random.Random) -> bool:
    if victim in ("api", "broker"):
        service.kill(victim)
        return True
    pool = service.pool()
    child = rng.choice(pool).pid if stop is None and pool else stop.pid if stop is not None else None
    if child is None:
        return False
    if victim == "child":
        return _sigkill(child)
    for part in service.workers():
        with suppress(psutil.Error):
            if child in [process.pid for process in psutil.Process(part.pid).children()]:
                service.kill(part.name)
                return True
    return _sigkill(child)  # an orphan already: its worker was killed before


def _sigkill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _freeze(pid: int) -> None:
    """Longer than its lease, as a machine that was suspended: it wakes up in the belief that the job is its own."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(LEASE_SECONDS + 1)
        os.kill(pid, signal.SIGCONT)
