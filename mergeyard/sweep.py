"""``mergeyard sweep``: one recipe over a grid of parameters, on this machine and without a service."""

# Each command imports what it alone needs:
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeyard.command import AsJson, guarded, print_json, read_settings

if TYPE_CHECKING:
    from app.sweeps.grid import Point
    from mergeyard.local import Here
    from worker.evaluation.sweep import Candidate, Scored, SweepTask

BASE = "base"
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A point with its scores by task, and of tasks whose source is known the share of that source's gain it keeps.

    ``losses``: the tasks of which less is better.
    """

    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    kept: Mapping[str, float | None]
    losses: frozenset[str]

    @property
    def measures(self) -> Mapping[str, float]:
        """By task, more is better: the share that is kept, or the score (of a loss its negative)."""
        signed = {name: -score if name in self.losses else score for name, score in self.scores.items()}
        return {name: score if (share := self.kept.get(name)) is None else share for name, score in signed.items()}

    @property
    def worth(self) -> float:
        """What points are ordered by: the mean share kept; where no task has a source, the mean measure."""
        return sum(self.measures.values()) / len(self.measures) if self.mean is None else self.mean

    @property
    def mean(self) -> float | None:
        shares = [share for share in self.kept.values() if share is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def minimum(self) -> float | None:
        return min((share for share in self.kept.values() if share is not None), default=None)


@guarded
def sweep(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, YAML or JSON; - reads standard input.")
    ],
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="FILE[=METRIC][@SOURCE]",
            help="A task file, how it is judged [nll], and the number of the model it belongs to; several times.",
        ),
    ],
    grid: Annotated[
        list[str], typer.Option(metavar="NAME=V1,V2,…", help="An axis: density=0.2,0.4 or models[0].weight=1,2.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="The first examples of each task alone.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep every score there (JSONL), and go on from what it has.")
    ] = None,
    best: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the best point's recipe there.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw the scores there, PNG and SVG.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a recipe at every point of a grid. No checkpoint is written: one model in memory becomes each of them."""
    from mergeyard import display
    from mergeyard.evaluate import DEVICES

    if device not in DEVICES:
        raise typer.BadParameter(f"{device!r} is none of {', '.join(DEVICES)}", param_hint="--device")
    if plots is not None:
        _require_matplotlib()
    raw = _read(recipe)
    place = _place(recipe)
    points, candidates, asked = _prepare(raw, _axes(grid), tasks, limit, place)
    found = _run(candidates, asked, out, device)
    rows = _rows(points, found, asked)
    chosen = max(range(len(rows)), key=lambda number: (rows[number].worth, -number))
    if best is not None:
        import yaml

        best.write_text(yaml.safe_dump(dict(points[chosen].recipe), sort_keys=False, allow_unicode=True))
    if plots is not None:
        from mergeyard.plots import draw

        draw(rows, plots)
    against = [one for one in found if one.settings is None]
    if as_json:
        print_json(_as_json(rows, chosen, points, against))
    else:
        display.show_sweep([_shown(row) for row in rows], chosen)
        for one in against:
            display.note(f"{one.name}: " + ", ".join(f"{score.name} {score.score:.4f}" for score in one.scores))


def _prepare(
    raw: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], tasks: Sequence[str], limit: int | None, place: Here
) -> tuple[Sequence[Point], list[Candidate], list[SweepTask]]:
    """The grid's points, everything that is to be scored (what points are held against first), and the tasks.

    All of it is planned before anything is computed.
    """
    from app.planning.output import has_chat_template
    from app.planning.planner import make_plan
    from app.planning.tasks import read_tasks
    from app.recipe import parse_recipe
    from app.sweeps.grid import expand, only_source
    from mergeyard import display, local
    from worker.evaluation.sweep import Candidate, SweepTask

    points = expand(raw, axes)
    entries = [_task(text, limit, len(raw["models"])) for text in tasks]
    owners = sorted({source for _, source in entries if source is not None})
    recipes: list[tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]] = [(BASE, None, only_source(raw, 0, 0.0))]
    recipes += [(f"model {index} alone", None, only_source(raw, index)) for index in owners]
    recipes += [(f"point {point.number}", point.settings, point.recipe) for point in points]
    candidates = []
    for name, settings, value in recipes:
        plan = make_plan(parse_recipe(value), place.resolver())
        if plan.remote:
            with display.downloading() as on_bytes:
                plan = local.fetch_remote(plan, place, lambda done, total: on_bytes(done, total, "sources"))
        candidates.append(Candidate(name=name, settings=settings, plan=plan))
    first = candidates[0].plan
    template = has_chat_template(first.documents, first.companions, first.base.reference)
    planned = read_tasks([entry for entry, _ in entries], place.resolver(), "--tasks", has_chat_template=template)
    asked = [SweepTask(planned=item, source=source) for item, (_, source) in zip(planned, entries, strict=True)]
    return points, candidates, asked


def _run(candidates: Sequence[Candidate], tasks: Sequence[SweepTask], out: Path | None, device: str) -> list[Scored]:
    from app.tasks.task import TaskScore
    from mergeyard import display
    from worker.engine.kernels import load
    from worker.evaluation.sweep import run_sweep

    known: dict[str, list[TaskScore]] = {}
    if out is not None and out.exists():
        for line in out.read_text().splitlines():
            value = json.loads(line)
            known[value["key"]] = [TaskScore(**score) for score in value["scores"]]
    with display.sweeping(len(candidates)) as watch:

        def keep(one: Scored) -> None:
            if out is not None:
                settings = None if one.settings is None else dict(one.settings)
                line = {"name": one.name, "settings": settings, "key": one.key}
                with out.open("a") as stream:
                    stream.write(json.dumps({**line, "scores": [asdict(score) for score in one.scores]}) + "\n")

        kernels = load(device)  # type: ignore[arg-type]
        return run_sweep(candidates, tasks, known=known, kernels=kernels, watch=watch, on_scored=keep)


def _rows(points: Sequence[Point], found: Sequence[Scored], tasks: Sequence[SweepTask]) -> list[Row]:
    from app.tasks.task import LOWER_IS_BETTER
    from worker.evaluation.sweep import kept

    by_name = {one.name: one.scores for one in found}
    rows = []
    for point in points:
        scores = by_name[f"point {point.number}"]
        shares = {
            score.name: kept(score, by_name[BASE][place], by_name[f"model {task.source} alone"][place])
            for place, (score, task) in enumerate(zip(scores, tasks, strict=True))
            if task.source is not None
        }
        losses = frozenset(score.name for score in scores if score.metric in LOWER_IS_BETTER)
        reached = {score.name: score.score for score in scores}
        rows.append(Row(settings=point.settings, scores=reached, kept=shares, losses=losses))
    return rows


def _as_json(rows: Sequence[Row], chosen: int, points: Sequence[Point], against: Sequence[Scored]) -> dict[str, Any]:
    return {
        "points": [
            {**{"settings": dict(row.settings), "scores": dict(row.scores), "kept": dict(row.kept)},
             "mean": row.mean, "minimum": row.minimum}
            for row in rows
        ],
        "against": {one.name: {score.name: score.score for score in one.scores} for one in against},
        "best": {"point": chosen, "recipe": dict(points[chosen].recipe)},
    }  # fmt: skip


def _shown(row: Row) -> dict[str, str]:
    shown = {name: str(value) for name, value in row.settings.items()}
    shown |= {name: f"{score:.4f}" for name, score in row.scores.items()}
    if row.mean is not None and row.minimum is not None:
        shown |= {"kept, mean": f"{row.mean:.1%}", "least": f"{row.minimum:.1%}"}
    return shown


def _task(text: str, limit: int | None, sources: int) -> tuple[Any, int | None]:
    from mergeyard.evaluate import task_entry

    file, at, index = text.rpartition("@")
    if not (at and index.isascii() and index.isdigit() and len(index) < 4):
        return task_entry(text, default="nll", limit=limit), None
    if int(index) >= sources:
        message = f"the recipe has {sources} models, counted from 0; {text!r} names another"
        raise typer.BadParameter(message, param_hint="--tasks")
    return task_entry(file, default="nll", limit=limit), int(index)


def _axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    import yaml

    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise typer.BadParameter(f"{text!r} is not NAME=V1,V2,…", param_hint="--grid")
        if name in axes:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--grid")
        try:
            axes[name] = [yaml.safe_load(value) for value in values.split(",")]
        except yaml.YAMLError:
            raise typer.BadParameter(f"{text!r} has a value that is none", param_hint="--grid") from None
    return axes


def _read(recipe: str) -> Mapping[str, Any]:
    from app.recipe import parse_recipe

    text = sys.stdin.read() if recipe == STDIN else Path(recipe).read_text(encoding="utf-8")
    return parse_recipe(text).as_sent()  # so that what is wrong without the grid is told first


def _place(recipe: str) -> Here:
    from mergeyard import local

    return local.here(Path.cwd() if recipe == STDIN else Path(recipe).absolute().parent, read_settings())


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise typer.BadParameter("needs matplotlib: pip install 'mergeyard[plots]'", param_hint="--plots") from None
