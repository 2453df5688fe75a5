"""What the page of a merge shows, gathered from the records and the artifact's manifest."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.api.schemas import FileEntry, FileList, Merge
from app.api.service import Service
from app.artifacts.store import read_whole
from app.dashboard.commands import Command, commands
from app.dashboard.graph import Drawing, draw
from app.dashboard.heatmap import Cell, Heatmap, heatmap
from app.dashboard.shown import norm, percent
from app.dashboard.timeline import Timeline, merged_since, timeline
from app.errors import MergeyardError
from app.recipe.difference import Line, as_yaml, difference
from app.records.job import Job, Listed, Status
from app.records.key import Caller, Scope
from app.records.lineage import Lineage, Lineages
from app.records.published import artifact_files

MOST_EVENTS = 1000  # besides those of files; a merge that was handed back oftener shows its first ones
FIGURES = {"sign_conflict": "Sign conflict", "trimmed": "Share trimmed", "norm": "Norm of the change"}
FEW = 8  # merges that the recipe can be compared with by a click

log = logging.getLogger("mergeyard.dashboard")


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the attempt that goes on: bytes of the result a second since it began to merge, and seconds left."""

    bytes_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Part:
    """Of the bar of stages, in hundredths of its width."""

    name: str
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """With the merge ``other``: the lines that differ, group by group; or why there is no comparison."""

    other: str
    groups: tuple[tuple[Line, ...], ...] = ()
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeView:
    """``merge`` is the API's document; ``may`` the actions that its state and the caller's key allow."""

    merge: Merge
    now: datetime
    may: frozenset[str]
    timeline: Timeline
    bar: tuple[Part, ...]
    speed: Speed | None
    recipe: str
    resolved: str
    others: Sequence[Listed]
    comparison: Comparison | None
    lineage: Lineage
    drawing: Drawing
    aliases: tuple[str, ...]
    files: Sequence[FileEntry]
    heatmap: Heatmap | None
    commands: tuple[Command, ...]

    @property
    def heatmap_data(self) -> Mapping[str, Any]:
        """For the script that draws it: of each stack a row for each module, with a value for each layer or null."""
        assert self.heatmap is not None
        return {"stacks": [_stack(self.heatmap, stack) for stack in self.heatmap.stacks]}


def merge_view(serving: Service, job: Job, *, caller: Caller, url: str, compare: str = "") -> MergeView:
    """``job`` is one that the caller sees; ``url`` the service's; ``compare`` the id of a merge of the same owner."""
    lineage = Lineages(serving.database).of(job.id, by=caller)
    found = timeline(serving.jobs.events(job.id, limit=MOST_EVENTS, without=("shard",), by=caller))
    now = serving.database.now()
    of_owner = Caller(owner=job.owner, scopes=frozenset())
    published = job.artifact is not None
    return MergeView(
        merge=Merge.of(job),
        now=now,
        may=_may(job, caller),
        timeline=found,
        bar=_bar(found, now),
        speed=_speed(job, found, now),
        recipe=as_yaml(job.recipe),
        resolved=as_yaml(job.resolved),
        others=[other for other in serving.jobs.list(limit=FEW + 1, by=of_owner).jobs if other.id != job.id][:FEW],
        comparison=_compare(serving, job, compare, of_owner) if compare else None,
        lineage=lineage,
        drawing=draw(lineage),
        aliases=tuple(tie.target for tie in lineage.ties if tie.relation == "alias" and tie.source == lineage.subject),
        files=FileList.of(job.id, artifact_files(job), "").items if published else (),
        heatmap=heatmap(_statistics(serving, job)) if published else None,
        commands=commands(job, service=url, keys=caller.key_id is not None) if published else (),
    )


def _may(job: Job, caller: Caller) -> frozenset[str]:
    if not caller.may(Scope.MERGE):
        return frozenset()
    if not job.status.finished:
        return frozenset({"cancel"} if job.status is not Status.CANCELLING else ())
    return frozenset(
        {"rerun", "delete"} | ({"alias"} if job.artifact is not None and caller.owner == job.owner else set())
    )


def _speed(job: Job, found: Timeline, now: datetime) -> Speed | None:
    since = merged_since(job, found)
    seconds = 0.0 if since is None else (now - since).total_seconds()
    if seconds <= 0 or job.progress_bytes <= 0:
        return None
    speed = job.progress_bytes / seconds
    return Speed(speed, max(0, job.total_bytes - job.progress_bytes) / speed)


def _bar(found: Timeline, now: datetime) -> tuple[Part, ...]:
    """Empty where nothing took any time."""
    whole = sum(span.seconds(now) for span in found.spans)
    parts, left = [], 0.0
    for span in found.spans:
        width = 100 * span.seconds(now) / whole if whole else 0.0
        parts.append(Part(span.name, left, width))
        left += width
    return tuple(part for part in parts if part.width > 0)


def _compare(serving: Service, job: Job, other: str, of_owner: Caller) -> Comparison:
    """Their resolved recipes: every default is written out, so that no difference hides in one."""
    try:
        with_it = serving.jobs.get(other, by=of_owner)
    except MergeyardError as error:
        if error.code != "not_found":
            raise
        return Comparison(other, refusal="Its owner has no merge with this id.")
    return Comparison(other, groups=difference(as_yaml(with_it.resolved), as_yaml(job.resolved)))


def _statistics(serving: Service, job: Job) -> Mapping[str, Mapping[str, Any]]:
    assert job.artifact is not None
    try:
        manifest = json.loads(read_whole(serving.store, job.artifact["manifest_key"]))
    except (OSError, MergeyardError) as error:
        log.warning("the manifest cannot be read: %s", error, extra={"merge": job.id})
        return {}
    found = manifest.get("statistics", {})
    assert isinstance(found, dict)
    return found


def _stack(found: Heatmap, stack: str) -> dict[str, Any]:
    layers, modules = found.stacks[stack]
    rows = [[found.cells.get((stack, layer, module)) for layer in layers] for module in modules]
    return {
        "name": stack,
        "layers": list(layers),
        "modules": list(modules),
        "shown": [["" if cell is None else _told(cell) for cell in row] for row in rows],
        **{name: [[None if cell is None else getattr(cell, name) for cell in row] for row in rows] for name in FIGURES},
    }


def _told(cell: Cell) -> str:
    """What a pointer on the cell is told, line by line."""
    figures = [f"{title.lower()} {figure(name, cell)}" for name, title in FIGURES.items()]
    return "<br>".join([*figures, f"{cell.parameters:,} parameters"])


def figure(name: str, cell: Cell | None) -> str:
    """A figure of a cell as it is shown; a dash for one that it has not."""
    value = None if cell is None else getattr(cell, name)
    if value is None:
        return "—"
    return norm(value) if name == "norm" else percent(value)
