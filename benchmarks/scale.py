"""The service beside very many merges, and with very many queued.

    python -m benchmarks.scale rows --rows 1000000 --database sqlite|postgresql
    python -m benchmarks.scale queue --merges 10000 --workers 2 [--database sqlite|postgresql]
    python -m benchmarks.scale report

Each run starts the real processes (uvicorn, Celery's workers, Valkey) on servers of its own, or on the PostgreSQL that
``MERGEYARD_TEST_POSTGRES_URL`` names, and is added to FOLDER/scale.jsonl when it ends. ``--write`` makes
benchmarks/SCALE.md of the last run of each kind that is kept; ``report`` only does that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.machine import cpu_name
from benchmarks.scale_report import report
from benchmarks.speed import _commit

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    options = _options()
    kept = options.folder / "scale.jsonl"
    if options.what != "report":
        found = _run(options)
        options.folder.mkdir(parents=True, exist_ok=True)
        with kept.open("a") as file:
            file.write(json.dumps(found) + "\n")
    runs = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    text = report(runs)
    if options.write:
        (options.write / "SCALE.md").write_text(text)
    print(json.dumps(runs[-1], indent=2) if options.json else text)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    began = datetime.now(UTC)
    load = os.getloadavg()[0]
    with _bars() as tell:
        if options.what == "rows":
            from benchmarks import many_rows  # noqa: PLC0415 (imports torch, which a report needs not)

            found = many_rows.measure(options.database, options.rows, options.requests, tell)
        else:
            from benchmarks import many_merges  # noqa: PLC0415

            found = many_merges.measure(options.database, options.merges, options.workers, tell)
    return {
        "what": options.what,
        "database": options.database,
        "began": began.isoformat(timespec="seconds"),
        "minutes": (datetime.now(UTC) - began).total_seconds() / 60,
        "commit": _commit(),
        "machine": _machine(),
        "load": load,
        **found,
    }


def _machine() -> str:
    memory = psutil.virtual_memory().total / 1e9
    return f"{cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GB of memory, Linux {os.uname().release}"


@contextmanager
def _bars() -> Iterator[Any]:
    """Progress on stderr: a bar on a terminal, elsewhere a line each tenth."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}
        tenths: dict[str, int] = {}

        def tell(what: str, done: int, whole: int) -> None:
            task = tasks.setdefault(what, None)
            if task is None:
                task = tasks[what] = progress.add_task(what, total=whole)
            progress.update(task, completed=done)
            tenth = 10 * done // max(1, whole)
            if not console.is_terminal and tenth > tenths.get(what, -1):
                tenths[what] = tenth
                print(f"{datetime.now(UTC):%H:%M:%S} {what}: {done} of {whole}", file=sys.stderr, flush=True)

        yield tell


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").split("\n", 1)[0])
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    shared.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"), help="where runs are kept")
    shared.add_argument("--json", action="store_true", help="print this run, not the report")
    shared.add_argument(
        "--write", type=Path, nargs="?", const=ROOT / "benchmarks", metavar="FOLDER", help="write SCALE.md there"
    )
    commands = parser.add_subparsers(dest="what", required=True)
    rows = commands.add_parser("rows", parents=[shared], help="requests beside very many merges")
    rows.add_argument("--rows", type=int, default=1_000_000)
    rows.add_argument("--requests", type=int, default=1_000, help="of each kind")
    queue = commands.add_parser("queue", parents=[shared], help="very many queued merges")
    queue.add_argument("--merges", type=int, default=10_000)
    queue.add_argument("--workers", type=int, default=2)
    commands.add_parser("report", parents=[shared], help="only show what is kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
