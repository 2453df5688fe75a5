"""``make test-faults``: the promise under kills and cut connections. Prints its counts; exits 1 where it is broken."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.records.database import Database
from tests import servers, tiny
from tests.faults.audit import Audit
from tests.faults.cuts import break_by_cuts, enough
from tests.faults.kills import MATRIX, VICTIMS, Campaign, break_by_kills
from tests.faults.load import Load, unbroken

SHOWN = 20  # of each kind of thing that went wrong


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by the way that ends every process that was started
    print(f"seed {options.seed}; repeat with --seed {options.seed}", *servers.described(), sep="\n", flush=True)
    with servers.short_folder() as folder:
        models = tiny.write_root(folder / "models")
        expected = unbroken(models, folder / "unbroken")
        good = _kills_on_postgresql(folder, models, expected, options)
        good &= _kills_on_sqlite(folder, models, expected, options)
        good &= _cuts_on_postgresql(folder, models, expected, options)
    print("every count that must be zero is zero, and all was broken" if good else "NOT PROVEN: see above", flush=True)
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="repeats a run's choices")
    parser.add_argument("--kills", type=int, default=150, help="on PostgreSQL")
    parser.add_argument("--sqlite-kills", type=int, default=60)
    parser.add_argument("--cut-seconds", type=int, default=60, help="of load over connections that break")
    parser.add_argument("--keep", type=Path, help="copy the logs of every process to this folder")
    return parser.parse_args()


def _kills_on_postgresql(folder: Path, models: Path, expected: Any, options: argparse.Namespace) -> bool:
    with servers.postgresql() as server, servers.temporary_database(server) as url:
        return _kills("PostgreSQL", url, options.kills, folder, models, expected, options)


def _kills_on_sqlite(folder: Path, models: Path, expected: Any, options: argparse.Namespace) -> bool:
    return _kills(
        "SQLite", f"sqlite:///{folder}/faults.sqlite3", options.sqlite_kills, folder, models, expected, options
    )


def _kills(
    name: str, url: str, kills: int, folder: Path, models: Path, expected: Any, options: argparse.Namespace
) -> bool:
    if kills == 0:
        return True
    began = time.monotonic()
    _migrate(url)
    campaign, load, found = break_by_kills(
        folder / name, folder / f"{name}.sock", models, url, expected, kills, options.seed
    )
    _tell(f"kills on {name}", time.monotonic() - began, load, found)
    _tell_kills(campaign)
    if options.keep:
        _keep(folder / name / "logs", options.keep / name)
    broken = sum(campaign.kills.values()) >= kills and (kills < len(MATRIX) or all(map(campaign.kills.get, MATRIX)))
    return broken and not load.wrong and not any(found.zeros.values())


def _cuts_on_postgresql(folder: Path, models: Path, expected: Any, options: argparse.Namespace) -> bool:
    if options.cut_seconds == 0:
        return True
    began = time.monotonic()
    with servers.postgresql() as server, servers.temporary_database(server) as url:
        _migrate(url)
        broker, database, load, found = break_by_cuts(
            folder / "cuts", models, url, expected, options.cut_seconds, options.seed
        )
    _tell("cut connections", time.monotonic() - began, load, found)
    for name, proxy in (("broker", broker), ("database", database)):
        print(f"  {name}: {proxy.connections} connections; {_counts(proxy.faults)}", flush=True)
    if options.keep:
        _keep(folder / "cuts" / "service" / "logs", options.keep / "cuts")
    broken = enough((broker, database), options.cut_seconds)
    if not broken:
        print("  WRONG: too few connections were broken to prove anything")
    return broken and not load.wrong and not any(found.zeros.values())


def _migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()


def _tell(title: str, seconds: float, load: Load, found: Audit) -> None:
    print(f"\n== {title}: {len(load.accepted)} merges in {seconds:.0f} s")
    print("ends:", _counts(load.ends))
    print("attempts:", _counts(found.attempts), "| with adopted files:", found.adopted, "| deleted:", len(load.deleted))
    print("events:", _counts(found.happenings))
    print(f"looks at unfinished merges: {load.looks}; slowest POST {load.slowest_post:.2f} s; 503s {load.unavailable}")
    print(
        "must be zero:",
        _counts({**found.zeros, "partial files visible and wrong answers": len(load.wrong)}),
        flush=True,
    )
    for wrong in (load.wrong, found.lost, found.published_twice, found.wrong_bytes, found.left_over):
        print(*(f"  WRONG: {what}" for what in wrong[:SHOWN]), sep="\n", end="\n" if wrong else "")


def _tell_kills(campaign: Campaign) -> None:
    total = sum(campaign.kills.values())
    uncovered = [f"{victim} at {stage}" for victim, stage in MATRIX if not campaign.kills[victim, stage]]
    print(
        f"kills: {total}; frozen beyond the lease: {campaign.frozen}; stages nobody came to in time: {campaign.missed}"
    )
    print("never killed:", ", ".join(uncovered) or "nobody anywhere; every victim died at every stage")
    for victim in VICTIMS:
        by_stage = {stage: count for (who, stage), count in sorted(campaign.kills.items()) if who == victim}
        print(f"  {victim}: {sum(by_stage.values())} ({_counts(by_stage)})", flush=True)


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: str(item[0])))


def _keep(logs: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for log in logs.iterdir():
        (folder / log.name).write_bytes(log.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
