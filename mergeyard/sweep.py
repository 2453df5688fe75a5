"""``mergeyard sweep``: one recipe over a grid of parameters, on this machine and without a service."""

# Each command imports what it alone needs:
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeyard.command import LOCAL, ApiKey, AsJson, Submit, Url, guarded, print_json, read_settings

if TYPE_CHECKING:
    from app.planning.plan import Plan
    from app.sweeps.planning import PlannedPoint, PlannedSweep, SweptTask
    from app.sweeps.results import Row, Scored
    from app.tasks.task import TaskScore
    from mergeyard.client import Client
    from mergeyard.local import Here

STDIN = "-"


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
    submit: Submit = False,
    url: Url = LOCAL,
    api_key: ApiKey = "",
) -> None:
    """Score a recipe at every point of a grid, here or on the service's workers (--submit).

    No checkpoint is written: one model in memory becomes each of them.
    """
    from app.sweeps.grid import expand
    from app.sweeps.results import best_of, rows_of
    from mergeyard import display
    from mergeyard.evaluate import DEVICES

    if device not in DEVICES:
        raise typer.BadParameter(f"{device!r} is none of {', '.join(DEVICES)}", param_hint="--device")
    if plots is not None:
        _require_matplotlib()
    raw, axes = _read(recipe), _axes(grid)
    entries = [_task(text, limit, len(raw["models"])) for text in tasks]
    if submit:
        if out is not None:
            raise typer.BadParameter("is for sweeps on this machine; the service keeps its scores", param_hint="--out")
        from mergeyard.client import Client

        found = _there(Client(url, api_key, retries=6), raw, axes, entries)
    else:
        found = _here(raw, axes, entries, _place(recipe), out, device)
    rows = rows_of(found, [entry.source for entry in entries])
    chosen = best_of(rows)
    assert chosen is not None  # a grid has points
    chosen_recipe = dict(expand(raw, axes)[chosen].recipe)
    if best is not None:
        import yaml

        best.write_text(yaml.safe_dump(chosen_recipe, sort_keys=False, allow_unicode=True))
    if plots is not None:
        from mergeyard.plots import draw

        draw(rows, plots)
    against = [one for one in found if one.settings is None]
    if as_json:
        print_json(_as_json(rows, chosen, chosen_recipe, against))
    else:
        display.show_sweep([_shown(row) for row in rows], chosen)
        for one in against:
            display.note(f"{one.name}: " + ", ".join(f"{score.name} {score.score:.4f}" for score in one.scores))


def _there(
    client: Client, raw: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], tasks: Sequence[SweptTask]
) -> list[Scored]:
    """All that the service's workers scored, in order."""
    from app.sweeps.results import Scored
    from app.tasks.task import TaskScore
    from mergeyard.remote import sweep_there

    done = sweep_there(client, raw, axes, [task.model_dump(exclude_none=True) for task in tasks])
    against = [(one["name"], None, one["scores"]) for one in done["against"]]
    points = [(f"point {point['number']}", point["settings"], point["scores"]) for point in done["points"]]
    return [
        Scored(
            name=name,
            settings=settings,
            scores=tuple(TaskScore(**score) for score in scores or ()),  # type: ignore[arg-type]
        )
        for name, settings, scores in (*against, *points)
    ]


def _here(
    raw: Mapping[str, Any],
    axes: Mapping[str, Sequence[Any]],
    tasks: Sequence[SweptTask],
    place: Here,
    out: Path | None,
    device: str,
) -> list[Scored]:
    """All that is scored on this machine, in order."""
    from app.sweeps.planning import plan_sweep

    return _scored(plan_sweep(raw, axes, tasks, place.resolver(), where="--tasks"), place, out, device)


def _scored(sweep: PlannedSweep, place: Here, out: Path | None, device: str) -> list[Scored]:
    """All that is scored, in order; what the file ``out`` has is not scored again, and what is new goes there."""
    from app.planning.planner import plan_again
    from app.sweeps.results import Scored
    from mergeyard import display, local
    from worker.engine.kernels import load
    from worker.evaluation.sweep import score_points

    known = {} if out is None else _kept(out)
    keys = {point.name: sweep.key_of(point) for point in sweep.points}
    missing = [point for point in sweep.points if keys[point.name] not in known]
    with display.sweeping(len(missing)) as watch:

        def planned() -> Iterator[tuple[PlannedPoint, Plan]]:
            for point in missing:
                plan = plan_again(point.resolved, point.plan_digest, place.resolver(), what="sweep")
                if plan.remote:
                    with display.downloading() as on_bytes:
                        plan = local.fetch_remote(plan, place, lambda done, total: on_bytes(done, total, "sources"))
                yield point, plan

        def keep(point: PlannedPoint, scores: tuple[TaskScore, ...]) -> None:
            known[keys[point.name]] = scores
            watch.next()
            if out is not None:
                settings = None if point.settings is None else dict(point.settings)
                line = {"name": point.name, "settings": settings, "key": keys[point.name]}
                with out.open("a") as stream:
                    stream.write(json.dumps({**line, "scores": [asdict(score) for score in scores]}) + "\n")

        kernels = load(device)  # type: ignore[arg-type]
        score_points(planned(), sweep.tasks, kernels=kernels, watch=watch, on_scored=keep)
    return [Scored(name=point.name, settings=point.settings, scores=known[keys[point.name]]) for point in sweep.points]


def _kept(out: Path) -> dict[str, tuple[TaskScore, ...]]:
    from app.tasks.task import TaskScore

    if not out.exists():
        return {}
    lines = map(json.loads, out.read_text().splitlines())
    return {line["key"]: tuple(TaskScore(**score) for score in line["scores"]) for line in lines}


def _as_json(rows: Sequence[Row], chosen: int, recipe: Mapping[str, Any], against: Sequence[Scored]) -> dict[str, Any]:
    return {
        "points": [
            {**{"settings": dict(row.settings), "scores": dict(row.scores), "kept": dict(row.kept)},
             "mean": row.mean, "minimum": row.minimum}
            for row in rows
        ],
        "against": {one.name: {score.name: score.score for score in one.scores} for one in against},
        "best": {"point": chosen, "recipe": recipe},
    }  # fmt: skip


def _shown(row: Row) -> dict[str, str]:
    shown = {name: str(value) for name, value in row.settings.items()}
    shown |= {name: f"{score:.4f}" for name, score in row.scores.items()}
    if row.mean is not None and row.minimum is not None:
        shown |= {"kept, mean": f"{row.mean:.1%}", "least": f"{row.minimum:.1%}"}
    return shown


def _task(text: str, limit: int | None, sources: int) -> SweptTask:
    from app.sweeps.planning import SweptTask
    from mergeyard.evaluate import task_entry

    file, at, index = text.rpartition("@")
    if not (at and index.isascii() and index.isdigit() and len(index) < 4):
        file, source = text, None
    elif (source := int(index)) >= sources:
        message = f"the recipe has {sources} models, counted from 0; {text!r} names another"
        raise typer.BadParameter(message, param_hint="--tasks")
    return SweptTask(**task_entry(file, default="nll", limit=limit).model_dump(), source=source)


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
