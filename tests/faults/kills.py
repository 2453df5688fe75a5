"""SIGKILL for every part of the service at every named stage of a merge, then at random, under load."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.audit import Audit, audit
from tests.faults.load import Load
from tests.faults.service import LEASE_SECONDS, Service, running, sigkill
from tests.faults.stages import STAGES, Stop

VICTIMS = ("child", "worker", "api", "broker")
MATRIX = [(victim, stage) for victim in VICTIMS for stage in STAGES]
ANY_TIME = "any time"  # no stage: whenever it happens to be
CAUGHT_SECONDS = 20.0
DRAIN_SECONDS = 90.0
FROZEN = 0.04  # the share of stops at which the child is frozen for longer than its lease, and goes on


@dataclass
class Campaign:
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    frozen: int = 0
    missed: int = 0  # armed stages that nobody came to
    retried: int = 0

    def tries(self) -> bool:
        """Whether a stage that was missed is worth another try."""
        self.retried += 1
        return self.retried <= len(MATRIX)


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
        todo = deque(rng.sample(MATRIX, len(MATRIX)))
        while (sum(campaign.kills.values()) < kills or (todo and kills >= len(MATRIX))) and not load.wrong:
            victims, stage = _next(todo, rng)
            struck = _kill(service, campaign, victims, stage, rng)
            if not struck and (cell := (victims[0], stage)) in MATRIX and not campaign.kills[cell] and campaign.tries():
                todo.append(cell)  # nobody came there in time, or its worker was just being started; perhaps later
        service.stops.disarm()
        load.drain(DRAIN_SECONDS)
        found = audit(service.settings, load.accepted, load.deleted)
    found.lost += sorted(load.open)
    return campaign, load, found


def _next(todo: deque[tuple[str, str]], rng: random.Random) -> tuple[list[str], str]:
    """Every victim at every stage, alone; then any of them together, at any stage or time."""
    if todo:
        victim, stage = todo.popleft()
        return [victim], stage
    return rng.sample(VICTIMS, rng.choice((1, 2, 2, 3))), rng.choice((*STAGES, ANY_TIME, ANY_TIME))


def _kill(service: Service, campaign: Campaign, victims: list[str], stage: str, rng: random.Random) -> bool:
    """Whether somebody came to the stage, and all victims were alive and died there."""
    wanted, stop = stage, None if stage == ANY_TIME else _caught(service, stage)
    if stop is None:
        campaign.missed += stage != ANY_TIME
        stage = ANY_TIME
        time.sleep(rng.random() * 0.5)
    if stop is not None and rng.random() < FROZEN:
        _freeze(stop.pid)
        campaign.frozen += 1
    struck = []
    for victim in sorted(victims, reverse=True):  # a worker before its child, which is found through it
        struck.append(_strike(service, victim, stop, rng))
        campaign.kills[victim, stage] += struck[-1]
    if stop is not None:
        # Who was not killed goes on at once or a little later: an orphan works on beside its job's next worker.
        threading.Timer(rng.choice((0.0, 0.3, LEASE_SECONDS + 1)), stop.release).start()
    return stage == wanted and all(struck)


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
        return service.kill(victim)
    pool = service.pool()
    child = rng.choice(pool).pid if stop is None and pool else stop.pid if stop is not None else None
    if child is None:
        return False
    if victim == "child":
        return sigkill(child)
    for part in service.workers():
        with suppress(psutil.Error):
            if child in [process.pid for process in psutil.Process(part.pid).children()]:
                return service.kill(part.name)
    return sigkill(child)  # an orphan already: its worker was killed before


def _freeze(pid: int) -> None:
    """Longer than its lease, as a machine that was suspended: it wakes up in the belief that the job is its own."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(LEASE_SECONDS + 1)
        os.kill(pid, signal.SIGCONT)
