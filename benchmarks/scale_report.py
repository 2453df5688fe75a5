"""SCALE.md, made of the runs that are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROWS_LIMIT, QUEUE_LIMIT = 2.0, 1.5
BUSY = 0.1  # of all cores, taken by others: ratios within a run hold, times do not
ASKED = "GET /merges, owner", "GET /merges, admin"  # what the limit is of
POSTED = "POST /merges", "GET /merges/{id}, beside submissions", "GET /merges/{id}, to the end"


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last run of each kind, on each database."""
    last = {(run["what"], run["database"]): run for run in runs}
    parts = ["# Measured: very many merges", "Made by `python -m benchmarks.scale … --write`; do not edit."]
    parts += ["\n".join(_rows(run)) for (what, _), run in sorted(last.items()) if what == "rows"]
    parts += ["\n".join(_queue(run)) for (what, _), run in sorted(last.items()) if what == "queue"]
    return "\n\n".join(parts) + "\n"


def _rows(run: Mapping[str, Any]) -> Iterator[str]:
    many, few = str(run["rows"]), str(run["few"])
    yield f"## {run['rows']:,} merges beside {run['few']:,}, {_named(run)}\n"
    yield _made(run) + (
        " Both databases are there at once, each with an API of its own, and every request goes to one and the other "
        f"in turn; {run['requests'][ASKED[0]][many]['count']:,} of each. Milliseconds. "
        f"Filling took {run['filled_seconds'] / 60:.0f} min.\n"
    )
    yield f"| request | p99 at {run['few']:,} | p99 at {run['rows']:,} | ratio | median | median | |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, found in {**run["requests"], **run["upkeep"]}.items():
        ratio = found[many]["p99"] / found[few]["p99"]
        verdict = _verdict(run, ratio, ROWS_LIMIT) if name in ASKED else ""
        cells = (_ms(found[few]["p99"]), _ms(found[many]["p99"]), f"{ratio:.2f}")
        medians = (_ms(found[few]["median"]), _ms(found[many]["median"]))
        yield f"| {_code(name)} | {' | '.join((*cells, *medians))} | {verdict} |"


def _queue(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {run['merges']:,} queued merges by {run['workers']} workers, {_named(run)}\n"
    ends = ", ".join(f"{count:,} {status}" for status, count in sorted(run["ends"].items()))
    yield _made(run) + (
        f" A tiny model, every recipe different: {ends} (those that warmed the workers included), "
        f"{run['published']:,} different results in {run['attempts']:,} attempts. All were submitted after "
        f"{run['submitted_after']:.0f} s and done after {run['seconds']:.0f} s, "
        f"{run['merges'] / run['seconds']:.1f} a second; at most {run['longest_queue']:,} waited at once, and never "
        f"more than {max(0, run['most_repeated_doorbells'])} doorbells more than jobs. Milliseconds.\n"
    )
    yield "| request | requests | p99 of the first | p99 of the last | ratio | median | median | |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, found in run["requests"].items():
        first, last = found["first"], found["last"]
        ratio = last["p99"] / first["p99"]
        verdict = _verdict(run, ratio, QUEUE_LIMIT) if name in POSTED else ""
        cells = (f"{first['count']:,}", _ms(first["p99"]), _ms(last["p99"]), f"{ratio:.2f}")
        yield f"| {_code(name)} | {' | '.join((*cells, _ms(first['median']), _ms(last['median'])))} | {verdict} |"


def _named(run: Mapping[str, Any]) -> str:
    return {"sqlite": "SQLite", "postgresql": "PostgreSQL"}[run["database"]]


def _made(run: Mapping[str, Any]) -> str:
    busy = f"load average at start {run['load']:.1f}; others took {run['others']:.0%} of all cores meanwhile"
    note = (
        " **The machine was busy**: the ratios are within one run, the times are not to be compared."
        if (run["others"] > BUSY)
        else ""
    )
    return f"{run['began'][:10]}, {run['minutes']:.0f} min at {run['commit']} on {run['machine']}; {busy}.{note}"


def _verdict(run: Mapping[str, Any], ratio: float, limit: float) -> str:
    if run["others"] > BUSY:
        return f"≤ {limit:g}: not judged"
    return f"≤ {limit:g}: {'reached' if ratio <= limit else '**missed**'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def _code(name: str) -> str:
    what, comma, who = name.partition(", ")
    return (f"`{what}`" if "/" in what or "?" in what else what) + (f"{comma}{who}" if comma else "")
