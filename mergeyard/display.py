"""What people see: tables and summaries on standard output, bars and notes on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from app.artifacts.manifest import Manifest
    from mergeyard.answers import Evaluation, Event, Merge, MergePage, MergeSummary, Sweep

STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}
LONGEST_LIST = 12


def say(text: str) -> None:
    """A line of result, exactly as it is."""
    _out().print(Text(text))


def note(text: str, style: str = "") -> None:
    """A line beside the result."""
    _err().print(Text(text, style=style))


def size(count: float) -> str:
    """``135000000`` → ``135.0 MB``, decimal as disks and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# ── while something runs ────────────────────────────────────────────────────────────────────────


@contextmanager
def merging(method: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a merge on this machine; yields what is to be told (bytes done, bytes in all)."""
    with _bar() as bar:
        task = bar.add_task(method, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def downloading() -> Iterator[Callable[[int, int, str], None]]:
    """A bar for a download; yields what is to be told (bytes done, bytes in all, the file's name)."""
    with _bar() as bar:
        task = bar.add_task("download", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name[-40:])


@contextmanager
def scoring() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each task; yields what is to be told (the task's name, prompts done, prompts in all)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err()) as bar:
        bars: dict[str, TaskID] = {}

        def tell(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = bar.add_task(name, total=total)
            bar.update(bars[name], completed=done)

        yield tell


@contextmanager
def sweeping(count: int) -> Iterator[SweepBar]:
    """A bar over ``count`` candidates."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(SpinnerColumn(), *columns, console=_err()) as bar:
        yield SweepBar(bar, bar.add_task("sweep", total=count))


class SweepBar:
    """A ``worker.evaluation.sweep.Watch`` that moves a bar."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._done = 0

    def next(self) -> None:
        """A candidate is scored."""
        self._done += 1

    def stage(self, name: str) -> None:
        self._bar.update(self._task, description=name)

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        pass

    def scored(self, score: object) -> None:
        pass

    def scoring(self, share: float) -> None:
        self._bar.update(self._task, description="scoring", completed=self._done + share)

    def check(self) -> None:
        pass


@contextmanager
def watching_points(count: int) -> Iterator[Callable[[Sweep | Evaluation], None]]:
    """A bar over what is scored; where there is no terminal, a line whenever something was."""
    if not _err().is_terminal:
        seen = -1

        def log(update: Sweep | Evaluation) -> None:
            nonlocal seen
            if (done := update["progress"]["points_done"]) != seen:
                seen = done
                note(f"{update['id']} {update['stage'] or update['status']}, {done} of {count}")

        yield log
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(SpinnerColumn(), *columns, console=_err()) as bar:
        task = bar.add_task("queued", total=count)
        yield lambda update: bar.update(
            task,
            completed=update["progress"]["fraction"] * count,
            description=update["stage"] or update["status"],
        )


@contextmanager
def watching(merge: Merge) -> Iterator[Callable[[Merge], None]]:
    """A bar with the merge's stage; where there is no terminal, a line whenever status or stage change."""
    if not _err().is_terminal:
        seen = _state(merge)

        def log(update: Merge) -> None:
            nonlocal seen
            if _state(update) != seen:
                seen = _state(update)
                done, total = size(update["progress"]["bytes_done"]), size(update["progress"]["bytes_total"])
                note(f"{update['id']} {seen}, {done} of {total}")

        yield log
        return
    with _bar() as bar:
        task = bar.add_task(_state(merge), total=merge["progress"]["bytes_total"] or None)
        yield lambda update: bar.update(task, completed=update["progress"]["bytes_done"], description=_state(update))


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=_err(),
    )


def _state(merge: MergeSummary) -> str:
    attempt = f" (attempt {merge['attempt']})" if merge["attempt"] > 1 else ""
    return f"{merge['stage'] or merge['status']}{attempt}"


# ── results ─────────────────────────────────────────────────────────────────────────────────────


def show_warnings(warnings: Sequence[Mapping[str, object]]) -> None:
    for warning in warnings:
        where = f" at {warning['where']}" if warning["where"] else ""
        note(f"warning{where}: {warning['message']}", style="yellow")


def show_plan(plan: Mapping[str, Any]) -> None:
    """Document by document the sources; then what changes, what it takes, and what deserves a second look."""
    for document in plan["earlier"]:
        written = size(document["estimates"]["output_bytes"])
        say(f"{document['name']}: {document['method']}, {written} until the result is finished")
        _show_sources(document)
    if plan["earlier"]:
        say(f"the result: {plan['method']}")
    _show_sources(plan)
    estimates = plan["estimates"]
    facts = {
        "method": plan["method"],
        "result": f"{size(estimates['output_bytes'])} in {len(plan['shards'])} file(s)",
        "tensors changed": f"{estimates['tensors_touched']} of {estimates['tensors']}",
        "parameters changed": f"{estimates['parameters_touched']:,} of {estimates['parameters']:,}",
        "peak memory": size(estimates["peak_memory_bytes"]),
        "fingerprint": plan["fingerprint"],
    }
    if estimates["scratch_bytes"]:
        facts["beside it, until it is finished"] = size(estimates["scratch_bytes"])
    _out().print(_pairs(facts))
    touched = [f"{tensor['name']} {tensor['dtype']} {tensor['shape']}" for tensor in plan["touched"]]
    for line in touched[:LONGEST_LIST]:
        _out().print(Text(f"  {line}", style="dim"))
    if len(touched) > LONGEST_LIST:
        _out().print(Text(f"  … and {len(touched) - LONGEST_LIST} more; --json lists all", style="dim"))
    show_warnings(plan["warnings"])


def _show_sources(document: Mapping[str, Any]) -> None:
    rows = [("base", document["base"]["reference"], size(document["base"]["size"]), "")]
    for index, source in enumerate(document["sources"]):
        changed = sum(index in tensor["sources"] for tensor in document["touched"])
        rows.append((source["role"], source["reference"], size(source["size"]), str(changed)))
    _columns(("role", "reference", "size", "tensors it changes"), rows)
    say("")


def show_merged(out: Path, manifest: Manifest) -> None:
    total = sum(file.size for file in manifest.files)
    say(f"{len(manifest.files)} files, {size(total)}, in {out}")
    if manifest.evaluation:
        show_scores([asdict(score) for score in manifest.evaluation])
    note(f"fingerprint {manifest.fingerprint}", style="dim")


def show_scores(scores: Sequence[Mapping[str, Any]]) -> None:
    """A table of scores, as ``mergeyard evaluate --json`` has them."""
    rows = [
        (item["name"], item["metric"], f"{item['score']:.4f}", f"{item['standard_error']:.4f}", str(item["examples"]))
        for item in scores
    ]
    _columns(("task", "metric", "score", "± error", "examples"), rows)


def show_sweep(rows: Sequence[Mapping[str, str]], best: int) -> None:
    """A table of points with their settings and scores; the best one has a star."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        ["*" if number == best else "", *(row.get(name, "–") for name in names)] for number, row in enumerate(rows)
    ]
    _columns(("", *names), lines)


def show_submitted(merge: Merge) -> None:
    show_warnings(merge["warnings"])
    if merge["reused"]:
        note(f"submitted {merge['id']}: an equal merge has been made before, and its result is reused")
    else:
        note(f"submitted {merge['id']}: {size(merge['progress']['bytes_total'])} to write")


def show_succeeded(merge: Merge, directory: Path | None) -> None:
    assert merge["artifact"] is not None
    where = f"; all verified, in {directory}" if directory else ""
    say(f"{merge['id']} succeeded: {merge['artifact']['files']} files, {size(merge['artifact']['size'])}{where}")
    if merge["evaluation"]:
        show_scores(merge["evaluation"])


def show_failure(job: Merge | Sweep | Evaluation) -> None:
    """Why a job did not succeed, with every problem."""
    say(f"{job['id']} {job['status']}")
    for problem in (job["error"] or {"problems": []})["problems"]:
        where = f" at {problem['where']}" if problem["where"] else ""
        note(f"{problem['code']}{where}: {problem['message']}", style="red")


def show_merge(merge: Merge) -> None:
    progress = merge["progress"]
    rows = {
        "id": merge["id"],
        "status": _state(merge) if merge["status"] == "running" else merge["status"],
        "method": merge["method"],
        "progress": f"{progress['fraction']:.0%} of {size(progress['bytes_total'])}",
        "attempt": f"{merge['attempt']} of {merge['max_attempts']}",
        "queue": merge["queue"],
        "labels": _listed(merge["labels"]),
        "created": _ago(merge["created_at"]),
        "finished": _ago(merge["finished_at"]),
        "expires": (merge["expires_at"] or "")[:16],
        "fingerprint": merge["fingerprint"],
    }
    if merge["artifact"]:
        rows["artifact"] = f"{merge['artifact']['files']} files, {size(merge['artifact']['size'])}"
        rows["artifact"] += ", reused" if merge["reused"] else ""
    _out().print(_pairs({name: value for name, value in rows.items() if value}))
    if merge["evaluation"]:
        show_scores(merge["evaluation"])
    show_warnings(merge["warnings"])
    for failure in merge["failures"]:
        note(f"attempt {failure['attempt']}: {failure['code']}: {failure['message']}", style="yellow")
    if merge["error"]:
        show_failure(merge)


def show_page(page: MergePage) -> None:
    rows = [
        (
            merge["id"],
            _state(merge) if merge["status"] == "running" else merge["status"],
            merge["method"],
            f"{merge['progress']['fraction']:.0%}",
            _ago(merge["created_at"]),
            _listed(merge["labels"]),
        )
        for merge in page["items"]
    ]
    _columns(("id", "status", "method", "progress", "created", "labels"), rows)
    if page["next_cursor"]:
        note(f"More: --cursor {page['next_cursor']}", style="dim")


def show_event(event: Event) -> None:
    """A line: its number, its time, what happened."""
    say(f"{event['id']:<6} {event['at']:<32} {event['type']:<16} {_listed(event['data'])}".rstrip())


def show_keys(keys: Sequence[Mapping[str, Any]]) -> None:
    """A table of keys, as ``mergeyard keys list --json`` has them."""
    rows = [
        (
            key["id"],
            key["owner"],
            ",".join(key["scopes"]),
            key["state"],
            "never" if key["expires_at"] is None else key["expires_at"][:16],
            "never" if key["last_used_at"] is None else _ago(key["last_used_at"]),
            key["note"],
        )
        for key in keys
    ]
    _columns(("id", "owner", "scopes", "state", "expires", "used", "note"), rows)


def _columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns that are never cut: an id is there to be copied, whatever the window's width."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for index, row in enumerate((names, *rows)):
        cells = [
            Text(f"{cell:<{width}}  ", style="bold" if index == 0 else STYLES.get(cell, ""))
            for cell, width in zip(row, widths, strict=True)
        ]
        line = Text.assemble(*cells)
        line.rstrip()
        _out().print(line)


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _pairs(rows: Mapping[str, str]) -> Text:
    width = max(map(len, rows))
    lines = [Text.assemble((f"{name:<{width}}", "bold"), f"  {value}") for name, value in rows.items()]
    return Text("\n").join(lines)


def _ago(moment: str | None) -> str:
    if moment is None:
        return ""
    seconds = max(0.0, time.time() - datetime.fromisoformat(moment).astimezone(UTC).timestamp())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _out() -> Console:
    return Console(soft_wrap=True)


def _err() -> Console:
    return Console(stderr=True, soft_wrap=True)
